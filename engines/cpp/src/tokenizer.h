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

    // Token ids: start, text, end, then padding up to the model's length. A text that is too long is cut before the end
    // token, with a warning. Words that a word tokenizer does not know give a warning too. Messages call the text
    // `name`. Throws a request error for text that is not UTF-8, and HIGEN_ERROR_CLEANING for text that only Python can
    // clean.
    [[nodiscard]] std::vector<std::int64_t> encode(std::string_view text, const Warn& warn = {},
                                                   const std::string& name = "prompt") const;

    // A text in chunks of words with weights, if the rules allow them; otherwise as `encode`. Throws what `encode`
    // throws, and a request error for wrong weights.
    [[nodiscard]] Reading read(std::string_view text, const Warn& warn = {}, const std::string& name = "prompt") const;

    // Add padding to ids from start to end that were made elsewhere. Throws a request error.
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
