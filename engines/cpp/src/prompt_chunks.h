// Long prompts and weighted words: chunks of token ids, and what their weights do to the encoder's outputs
// (higen/prompt_chunks.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "tensor.h"

namespace higen::core {

// A prompt as the text encoder reads it, row by row: chunks of start, tokens, end, padding, and a weight a token.
struct Reading {
    std::vector<std::int64_t> ids;
    std::vector<float> weights;  // empty: all 1
};

// Token ids, dealt out to at most `most` chunks with room for `room` each.
class Chunks {
public:
    Chunks(std::size_t room, std::size_t most, std::optional<std::int64_t> comma)
        : room_(room), most_(most), comma_(comma) {}

    // Add a token; false where there is no room for it.
    [[nodiscard]] bool add(std::int64_t id, double weight);
    // Begin a new chunk; where there may be no more, nothing can be added from now on.
    void begin();
    // The chunks that were filled; an empty one at the end is left out.
    [[nodiscard]] Reading reading(std::int64_t start, std::int64_t end, std::int64_t pad) const;

private:
    using Row = std::vector<std::pair<std::int64_t, double>>;

    std::vector<Row> rows_ = {Row()};
    std::size_t room_, most_;
    std::optional<std::int64_t> comma_;
    std::optional<std::size_t> last_comma_;
    bool closed_ = false;
};

// Outputs [1, L, D] of a chunk times the weights [L] of its tokens, with the mean that they had before. Throws a
// request error where the weights leave a mean of 0, which nothing can restore.
void apply_weights(Array& hidden, const float* weights);

}  // namespace higen::core
