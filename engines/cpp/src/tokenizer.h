// Texts to token ids: CLIP's byte-pair tokenizer, and a plain word tokenizer for small models (higen/tokenizer.py).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "manifest.h"
#include "prompt_chunks.h"

namespace higen::core {

class Tokenizer {
public:
    using Warn = std::function<void(const std::string&)>;

    // Reads a tokenizer.json as higen writes it. `where` names it in messages. Throws an integrity error.
    Tokenizer(std::string_view json, const std::string& where, TextRules rules);

    // Token ids: start, text, end, then padding up to the model's length. A text that is too long is cut, keeping the
    // end; `warn` gets a message then, and one for words that a word tokenizer does not know. Messages call the text
    // `name`. Throws a request error for what is not UTF-8 and HIGEN_ERROR_CLEANING for what only Python can clean.
    [[nodiscard]] std::vector<std::int64_t> encode(std::string_view text, const Warn& warn = {},
                                                   const std::string& name = "prompt") const;

    // A text in chunks, its words with their weights, as the rules say; encoded as it is where they say nothing. Throws
    // what `encode` throws, and a request error for weights that are wrong.
    [[nodiscard]] Reading read(std::string_view text, const Warn& warn = {}, const std::string& name = "prompt") const;

    // Ids that were made elsewhere, from start to end, with padding added. Throws a request error.
    [[nodiscard]] std::vector<std::int64_t> pad(const char* name, std::vector<std::int64_t> ids) const;

    [[nodiscard]] const TextRules& rules() const { return rules_; }

private:
    struct Token {
        std::int64_t id;
        std::size_t start;  // of its word or piece, in the normalised text
    };
    struct Merge {
        std::size_t rank;
        std::int64_t id;
    };

    [[nodiscard]] std::vector<Token> tokens_of(std::u32string_view normal, const Warn& warn,
                                               const std::string& name) const {
        return is_bpe_ ? pieces(normal) : words(normal, warn, name);
    }
    [[nodiscard]] std::vector<Token> words(std::u32string_view text, const Warn& warn, const std::string& name) const;
    [[nodiscard]] std::vector<Token> pieces(std::u32string_view text) const;
    void merge(std::string_view piece, std::size_t start, std::vector<Token>& tokens) const;
    void read_merges(const void* json, const std::string& where);

    TextRules rules_;
    bool is_bpe_ = false;
    std::int64_t start_ = 0, end_ = 0, unknown_ = 0, size_ = 0;
    std::unordered_map<std::string, std::int64_t> vocabulary_;
    std::vector<std::int64_t> bytes_, last_bytes_;  // ids of single bytes, inside and at the end of a word
    std::unordered_map<std::uint64_t, Merge> merges_;
};

}  // namespace higen::core
