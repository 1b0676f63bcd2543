#include "prompt_weights.h"

#include <algorithm>
#include <cmath>
#include <locale>
#include <sstream>
#include <utility>

#include "errors.h"
#include "text.h"

namespace higen::core {
namespace {

using Text = std::u32string_view;

constexpr double round_factor = 1.1, square_factor = 1 / 1.1;  // weights of words in a pair of brackets
constexpr double largest = 100.0;
constexpr std::size_t deepest = 32;
constexpr Text special = U"()[]:\\", break_word = U"BREAK";

bool is_digit(char32_t c) { return c >= U'0' && c <= U'9'; }

bool is_of_word(char32_t c) { return is_letter(c) || is_number(c) || c == U'_'; }

bool is_of_number(char32_t c) {
    return c == U'+' || c == U'-' || c == U'.' || is_digit(c) || (c >= U'a' && c <= U'z') || (c >= U'A' && c <= U'Z');
}

Text unsigned_part(Text text) {
    return !text.empty() && (text.front() == U'+' || text.front() == U'-') ? text.substr(1) : text;
}

bool is_digits(Text text, bool dots) {
    return std::any_of(text.begin(), text.end(), is_digit) &&
           std::all_of(text.begin(), text.end(), [&](char32_t c) { return is_digit(c) || (dots && c == U'.'); });
}

// Whether a word is written like a number: digits and dots, an exponent, or nan and inf.
bool is_meant_as_number(Text text) {
    const auto bare = lower(unsigned_part(text));
    if (bare == U"nan" || bare == U"inf" || bare == U"infinity") return true;
    const auto e = bare.find(U'e');
    return is_digits(Text(bare).substr(0, e), true) &&
           (e == bare.npos || is_digits(unsigned_part(Text(bare).substr(e + 1)), false));
}

bool is_decimal(Text text) {
    const auto bare = unsigned_part(text);
    return is_digits(bare, true) && std::count(bare.begin(), bare.end(), U'.') <= 1;
}

// Parse a decimal number independently of the locale.
double number_of(Text text) {
    std::istringstream stream(encode_utf8(text));
    stream.imbue(std::locale::classic());
    double value = 0;
    stream >> value;
    return value;
}

Text stripped(Text text) {
    while (!text.empty() && is_python_space(text.front())) text.remove_prefix(1);
    while (!text.empty() && is_python_space(text.back())) text.remove_suffix(1);
    return text;
}

class Reader {
public:
    Reader(Text prompt, const std::string& name) : prompt_(prompt), name_(name) {}

    std::vector<Piece> read() {
        for (std::size_t i = 0; i < prompt_.size();) i = step(i);
        for (const auto first : round_) close(first, round_factor);
        for (const auto& open : square_) close(open.first, square_factor);
        return joined();
    }

private:
    [[noreturn]] void fail(const std::string& reason) const {
        const auto shown = prompt_.size() <= 80 ? Text(prompt_) : prompt_.substr(0, 80);
        fail_request(name_ + " '" + encode_utf8(shown) + (shown.size() < prompt_.size() ? "...': " : "': ") + reason);
    }

    void add(std::optional<std::u32string> text) { parts_.push_back({std::move(text), 1.0}); }

    void close(std::size_t first, double weight) {
        for (auto i = first; i < parts_.size(); ++i) parts_[i].weight *= weight;
    }

    // Read the item at `i`; returns where the next one begins.
    std::size_t step(std::size_t i) {
        const auto c = prompt_[i];
        if (special.find(c) == special.npos) {
            const auto end = std::min(prompt_.find_first_of(special, i), prompt_.size());
            add_words(prompt_.substr(i, end - i));
            return end;
        }
        if (c == U'\\') {
            const bool escaped = i + 1 < prompt_.size() && Text(U"()[]\\").find(prompt_[i + 1]) != Text::npos;
            if (escaped) add(std::u32string(1, prompt_[i + 1]));
            return i + (escaped ? 2 : 1);
        }
        if (c == U':') return colon(i);
        if (c == U'(' || c == U'[') {
            if (round_.size() + square_.size() == deepest)
                fail("more than " + std::to_string(deepest) +
                     " open brackets; write \\( and \\[ for brackets that are text");
            if (c == U'(')
                round_.push_back(parts_.size());
            else
                square_.emplace_back(parts_.size(), i);
        } else if (c == U')' && !round_.empty()) {
            close(round_.back(), round_factor);
            round_.pop_back();
        } else if (c == U']' && !square_.empty()) {
            check_no_editing(prompt_.substr(square_.back().second, i - square_.back().second));
            close(square_.back().first, square_factor);
            square_.pop_back();
        } else {
            add(std::u32string(1, c));
        }
        return i + 1;
    }

    // `:1.3)` sets the weight of the words since the last open round bracket. Any other colon is text.
    std::size_t colon(std::size_t i) {
        const auto after_space = [&](std::size_t at) {
            while (at < prompt_.size() && is_python_space(prompt_[at])) ++at;
            return at;
        };
        const auto start = after_space(i + 1);
        auto end = start;
        while (end < prompt_.size() && is_of_number(prompt_[end])) ++end;
        const auto closing = after_space(end);
        const auto number = prompt_.substr(start, end - start);
        if (round_.empty() || closing == prompt_.size() || prompt_[closing] != U')' || !is_meant_as_number(number)) {
            add(U":");
            return i + 1;
        }
        if (!is_decimal(number))
            fail("the weight '" + encode_utf8(number.substr(0, 40)) + "': a plain decimal number, as in (word:1.3)");
        close(round_.back(), number_of(number));
        round_.pop_back();
        return closing + 1;
    }

    // Throws for `[a|b]` and `[a:b:0.5]`. The latter has a number after its last colon.
    void check_no_editing(Text inner) const {
        const auto at = inner.rfind(U':');
        if (inner.find(U'|') != inner.npos || (at != inner.npos && is_decimal(stripped(inner.substr(at + 1)))))
            fail("prompt editing, [from:to:when] and [one|other], is not supported; write \\[ for a bracket");
    }

    // Add a text without special characters, split at each BREAK that is a separate word.
    void add_words(Text text) {
        std::size_t done = 0;
        for (auto at = text.find(break_word); at != text.npos; at = text.find(break_word, at)) {
            const auto end = at + break_word.size();
            if ((at == 0 || !is_of_word(text[at - 1])) && (end == text.size() || !is_of_word(text[end]))) {
                add(std::u32string(text.substr(done, at - done)));
                add(std::nullopt);
                done = end;
            }
            at = end;
        }
        add(std::u32string(text.substr(done)));
    }

    // Joins neighbouring texts of equal weight and drops empty ones. Throws for a weight that is too large.
    std::vector<Piece> joined() const {
        std::vector<Piece> found;
        Piece run{std::u32string(), 1.0};
        const auto finish = [&] {
            if (!run.text->empty()) found.push_back(run);
            run.text->clear();
        };
        for (const auto& part : parts_) {
            if (!part.text) {
                finish();
                found.push_back({std::nullopt, 1.0});
                continue;
            }
            if (!(std::abs(part.weight) <= largest))
                fail("the weight " + std::to_string(part.weight) + ": from -100 to 100");
            if (part.weight != run.weight) finish();
            run.weight = part.weight;
            *run.text += *part.text;
        }
        finish();
        return found;
    }

    Text prompt_;
    const std::string& name_;
    std::vector<Piece> parts_;
    std::vector<std::size_t> round_;                          // index of the part after each open bracket
    std::vector<std::pair<std::size_t, std::size_t>> square_;  // the same, and the bracket's position
};

}  // namespace

std::vector<Piece> pieces(std::u32string_view prompt, const std::string& name) { return Reader(prompt, name).read(); }

}  // namespace higen::core
