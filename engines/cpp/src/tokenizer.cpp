#include "tokenizer.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <queue>
#include <tuple>

#include "errors.h"
#include "prompt_weights.h"
#include "text.h"

namespace higen::core {
namespace {

using Json = nlohmann::json;

constexpr const char* start_token = "<|startoftext|>";
constexpr const char* end_token = "<|endoftext|>";
constexpr const char* unknown_token = "[UNK]";

// The patterns of the two kinds of tokenizer that higen writes. The code below matches them without a regex engine.
constexpr const char* clip_pieces = R"('[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+)";
constexpr const char* word_pieces = R"(\w+|[^\w\s])";

std::uint64_t pair_key(std::int64_t left, std::int64_t right) {
    return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
}

std::int64_t take_id(const Json& json, const std::string& where) {
    if (!json.is_number_unsigned() || json.get<std::uint64_t>() > std::numeric_limits<std::int32_t>::max())
        fail_integrity(where + ": a token id is not a whole number from 0");
    return json.get<std::int64_t>();
}

// A printable character for each byte, in the order of CLIP's ids: printable bytes first, then the others.
std::vector<std::string> byte_letters() {
    std::vector<std::string> letters(256);
    char32_t other = 256;
    for (char32_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 0x21 && byte < 0x7F) || (byte >= 0xA1 && byte < 0xAD) || byte >= 0xAE;
        const char32_t letter = printable ? byte : other++;
        letters[byte] = encode_utf8(std::u32string(1, letter));
    }
    return letters;
}

// The pattern by which a tokenizer's first pre-tokenizer splits.
std::string split_pattern(const Json& json) {
    const auto& split = json.at("pre_tokenizer").at("pretokenizers").at(0);
    if (split.at("type") != "Split" || split.at("behavior") != "Removed" || split.at("invert") != true) return "";
    return split.at("pattern").at("Regex").get<std::string>();
}

bool is_usual_normalizer(const Json& json) {
    const auto& steps = json.at("normalizer").at("normalizers");
    return steps.size() == 2 && steps.at(0).at("type") == "Replace" &&
           steps.at(0).at("pattern").at("Regex") == "\\s+" && steps.at(0).at("content") == " " &&
           steps.at(1).at("type") == "Lowercase";
}

// The tokenizer's own normaliser: white space becomes single blanks, then lower case.
std::u32string normalise(std::u32string_view text) {
    std::u32string collapsed;
    for (const char32_t c : text) {
        if (!is_space(c))
            collapsed.push_back(c);
        else if (collapsed.empty() || collapsed.back() != U' ')
            collapsed.push_back(U' ');
    }
    return lower(collapsed);
}

// Length of the contraction that the text begins with; 0 if none.
std::size_t contraction(std::u32string_view text) {
    using namespace std::string_view_literals;
    for (const auto ending : {U"'s"sv, U"'\u017f"sv, U"'t"sv, U"'re"sv, U"'ve"sv, U"'m"sv, U"'ll"sv, U"'d"sv})
        if (text.substr(0, ending.size()) == ending) return ending.size();
    return 0;
}

bool is_mark(char32_t c) { return !is_space(c) && !is_letter(c) && !is_number(c) && c != 0x345; }

// Length of the piece of CLIP's pattern that the text begins with; 0 if it begins with none.
std::size_t clip_piece(std::u32string_view text) {
    if (const auto length = contraction(text)) return length;
    if (is_number(text[0])) return 1;
    const auto is_of_run = is_letter(text[0]) ? is_letter : is_mark;
    return static_cast<std::size_t>(std::find_if_not(text.begin(), text.end(), is_of_run) - text.begin());
}

// The first words, for a warning. Each is cut to its first letters, because a prompt can be one word of 100,000
// letters.
std::string quoted(const std::vector<std::string>& words) {
    constexpr std::size_t named = 12, longest = 40;
    std::string text;
    for (std::size_t i = 0; i < std::min(words.size(), named); ++i) {
        const auto letters = decode_utf8(words[i]).value_or(U"");
        const auto shown = letters.size() <= longest ? words[i] : encode_utf8(letters.substr(0, longest)) + "...";
        text += (i > 0 ? ", '" : "'") + shown + "'";
    }
    return text + (words.size() > named ? " and " + std::to_string(words.size() - named) + " more" : "");
}

// Where the word at `first` begins. A word counts as lost if any of its tokens is lost.
std::size_t word_start(std::u32string_view text, std::size_t first) {
    while (first > 0 && !is_space(text[first - 1])) --first;
    return first;
}

std::vector<std::string> split(std::u32string_view text) {
    std::vector<std::string> words;
    std::u32string word;
    for (const char32_t c : text) {
        if (!is_space(c)) {
            word.push_back(c);
        } else if (!word.empty()) {
            words.push_back(encode_utf8(word));
            word.clear();
        }
    }
    if (!word.empty()) words.push_back(encode_utf8(word));
    return words;
}

}  // namespace

Tokenizer::Tokenizer(std::string_view text, const std::string& where, TextRules rules) : rules_(std::move(rules)) {
    try {
        const auto json = Json::parse(text.begin(), text.end());
        const auto& model = json.at("model");
        for (const auto& item : model.at("vocab").items()) vocabulary_[item.key()] = take_id(item.value(), where);
        std::unordered_map<std::string, std::int64_t> all = vocabulary_;
        for (const auto& added : json.at("added_tokens"))
            all[added.at("content").get<std::string>()] = take_id(added.at("id"), where);
        const auto special = [&](const std::string& token) {
            const auto found = all.find(token);
            if (found == all.end()) fail_integrity(where + ": the tokenizer has no token " + token);
            return found->second;
        };
        start_ = special(start_token);
        end_ = special(end_token);
        for (const auto& entry : all) size_ = std::max(size_, entry.second + 1);

        const auto kind = model.at("type").get<std::string>(), pattern = split_pattern(json);
        is_bpe_ = kind == "BPE" && pattern == clip_pieces;
        if (!is_usual_normalizer(json) || !(is_bpe_ || (kind == "WordLevel" && pattern == word_pieces)))
            fail_integrity(where + ": a tokenizer that this library does not know; give token ids");
        if (is_bpe_) {
            const auto& byte_level = json.at("pre_tokenizer").at("pretokenizers").at(1);
            if (byte_level.at("type") != "ByteLevel" || byte_level.at("add_prefix_space") != false ||
                byte_level.at("use_regex") != false || model.at("end_of_word_suffix") != "</w>")
                fail_integrity(where + ": a byte-pair tokenizer that this library does not know; give token ids");
            read_merges(&model, where);
        } else {
            unknown_ = special(unknown_token);
        }
    } catch (const Json::exception& error) {
        fail_integrity(where + ": not a tokenizer: " + error.what());
    }
}

void Tokenizer::read_merges(const void* model, const std::string& where) {
    const auto id = [&](const std::string& token) {
        const auto found = vocabulary_.find(token);
        if (found == vocabulary_.end()) fail_integrity(where + ": no token '" + token + "' in the vocabulary");
        return found->second;
    };
    for (const auto& letter : byte_letters()) {
        bytes_.push_back(id(letter));
        last_bytes_.push_back(id(letter + "</w>"));
    }
    for (const auto& entry : static_cast<const Json*>(model)->at("merges")) {
        std::string left, right;
        if (entry.is_string()) {  // files written by tokenizers before 0.20
            const auto text = entry.get<std::string>();
            const auto space = text.find(' ');
            if (space == text.npos) fail_integrity(where + ": '" + text + "' is not a merge of two tokens");
            left = text.substr(0, space), right = text.substr(space + 1);
        } else {
            left = entry.at(0).get<std::string>(), right = entry.at(1).get<std::string>();
        }
        // A pair that is listed twice keeps its last rank, as in the library that Python uses.
        merges_[pair_key(id(left), id(right))] = Merge{merges_.size(), id(left + right)};
    }
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text, const Warn& warn, const std::string& name) const {
    const auto decoded = decode_utf8(text);
    if (!decoded) fail_request(name + ": not valid UTF-8");
    const auto normal = normalise(rules_.clean ? clean(*decoded) : *decoded);
    const auto tokens = tokens_of(normal, warn, name);

    const auto length = static_cast<std::size_t>(rules_.length), room = length - 2;
    std::vector<std::int64_t> ids = {start_};
    for (std::size_t i = 0; i < std::min(tokens.size(), room); ++i) ids.push_back(tokens[i].id);
    ids.push_back(end_);
    ids.resize(length, rules_.pad_id);
    if (tokens.size() > room && warn) {
        const auto first = word_start(normal, tokens[room].start);
        warn(name + " has " + std::to_string(tokens.size()) + " tokens, but the model reads " + std::to_string(room) +
             "; words cut off: " + quoted(split(std::u32string_view(normal).substr(first))) + "; use fewer words");
    }
    return ids;
}

Reading Tokenizer::read(std::string_view text, const Warn& warn, const std::string& name) const {
    if (rules_.plain()) return {encode(text, warn, name), {}};
    const auto decoded = decode_utf8(text);
    if (!decoded) fail_request(name + ": not valid UTF-8");
    const auto room = static_cast<std::size_t>(rules_.length) - 2, most = static_cast<std::size_t>(rules_.chunks);
    const auto comma = vocabulary_.find(",</w>");
    Chunks chunks(room, most, comma == vocabulary_.end() ? std::nullopt : std::optional(comma->second));
    const auto parts = rules_.weights ? core::pieces(*decoded, name) : std::vector{Piece{*decoded, 1.0}};
    std::u32string lost;
    for (const auto& part : parts) {
        if (!lost.empty()) {
            lost += U' ' + part.text.value_or(U"");
            continue;
        }
        if (!part.text) {
            chunks.begin();
            continue;
        }
        const auto normal = normalise(rules_.clean ? clean(*part.text) : *part.text);
        for (const auto& token : tokens_of(normal, warn, name))
            if (!chunks.add(token.id, part.weight)) {
                lost = normal.substr(word_start(normal, token.start));
                break;
            }
    }
    if (!lost.empty() && warn)
        warn(name + ": the model reads " + (most > 1 ? std::to_string(most) + " x " : "") + std::to_string(room) +
             " tokens; words cut off: " + quoted(split(lost)) + "; use fewer words");
    return chunks.reading(start_, end_, rules_.pad_id);
}

std::vector<std::int64_t> Tokenizer::pad(const char* name, std::vector<std::int64_t> ids) const {
    const auto length = static_cast<std::size_t>(rules_.length);
    if (ids.empty() || ids.size() > length)
        fail_request(std::string(name) + " has " + std::to_string(ids.size()) + " ids: 1 to " + std::to_string(length));
    for (const auto id : ids)
        if (id < 0 || id >= std::max(size_, rules_.pad_id + 1))
            fail_request(std::string(name) + " has the id " + std::to_string(id) + ": from 0 to below " +
                         std::to_string(std::max(size_, rules_.pad_id + 1)));
    ids.resize(length, rules_.pad_id);
    return ids;
}

std::vector<Tokenizer::Token> Tokenizer::words(std::u32string_view text, const Warn& warn,
                                               const std::string& name) const {
    std::vector<Token> tokens;
    std::vector<std::string> unknown;
    for (std::size_t i = 0; i < text.size();) {
        std::size_t end = i + 1;
        if (is_word(text[i]))
            while (end < text.size() && is_word(text[end])) ++end;
        if (!is_space(text[i]) || is_word(text[i])) {
            const auto word = encode_utf8(text.substr(i, end - i));
            const auto found = vocabulary_.find(word);
            tokens.push_back({found == vocabulary_.end() ? unknown_ : found->second, i});
            if (tokens.back().id == unknown_ && std::find(unknown.begin(), unknown.end(), word) == unknown.end() &&
                unknown.size() < 1000)
                unknown.push_back(word);
        }
        i = end;
    }
    if (!unknown.empty() && warn) warn(name + ": this model does not know " + quoted(unknown));
    return tokens;
}

std::vector<Tokenizer::Token> Tokenizer::pieces(std::u32string_view text) const {
    std::vector<Token> tokens;
    for (std::size_t i = 0; i < text.size();) {
        const auto length = clip_piece(text.substr(i));
        if (length > 0) merge(encode_utf8(text.substr(i, length)), i, tokens);
        i += std::max<std::size_t>(length, 1);
    }
    return tokens;
}

// Byte-pair encoding: merge the leftmost pair of the lowest rank, until no known pair is left.
void Tokenizer::merge(std::string_view piece, std::size_t start, std::vector<Token>& tokens) const {
    constexpr auto nowhere = std::numeric_limits<std::size_t>::max();
    struct Part {
        std::int64_t id;
        std::size_t before, after;
    };
    std::vector<Part> parts;
    for (std::size_t i = 0; i < piece.size(); ++i) {
        const auto byte = static_cast<unsigned char>(piece[i]);
        const bool last = i + 1 == piece.size();
        parts.push_back({last ? last_bytes_[byte] : bytes_[byte], i == 0 ? nowhere : i - 1, last ? nowhere : i + 1});
    }
    using Candidate = std::tuple<std::size_t, std::size_t, std::uint64_t>;  // rank, place, and the pair at that place
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
    const auto look_at = [&](std::size_t at) {
        if (at == nowhere || parts[at].after == nowhere) return;
        const auto key = pair_key(parts[at].id, parts[parts[at].after].id);
        if (const auto found = merges_.find(key); found != merges_.end()) queue.emplace(found->second.rank, at, key);
    };
    for (std::size_t i = 0; i < parts.size(); ++i) look_at(i);
    while (!queue.empty()) {
        const auto [rank, at, key] = queue.top();
        queue.pop();
        auto& part = parts[at];
        // An entry is stale when one of its parts has been merged since.
        if (part.id < 0 || part.after == nowhere || pair_key(part.id, parts[part.after].id) != key) continue;
        part.id = merges_.at(key).id;
        parts[part.after].id = -1;
        part.after = parts[part.after].after;
        if (part.after != nowhere) parts[part.after].before = at;
        look_at(part.before);
        look_at(at);
    }
    for (const auto& part : parts)
        if (part.id >= 0) tokens.push_back({part.id, start});
}

}  // namespace higen::core
