// Long prompts and weighted words: chunks of token ids, and how weights change the encoder's outputs
// (higen/prompt_chunks.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "tensor.h"

namespace higen::core {

// A prompt as the text encoder reads it, row by row. A row is a chunk of start, tokens, end and padding, with a weight
// per id.
struct Reading {
    std::vector<std::int64_t> ids;
    std::vector<float> weights;  // empty: all 1
};

// Distributes token ids over at most `most` chunks with room for `room` ids each.
class Chunks {
public:
    Chunks(std::size_t room, std::size_t most, std::optional<std::int64_t> comma)
        : room_(room), most_(most), comma_(comma) {}

    // Add a token; returns false if there is no room.
    [[nodiscard]] bool add(std::int64_t id, double weight);
    // Begin a new chunk. If no more chunks are allowed, nothing can be added from now on.
    void begin();
    // The filled chunks, without an empty one at the end.
    [[nodiscard]] Reading reading(std::int64_t start, std::int64_t end, std::int64_t pad) const;

private:
    using Row = std::vector<std::pair<std::int64_t, double>>;

    std::vector<Row> rows_ = {Row()};
    std::size_t room_, most_;
    std::optional<std::int64_t> comma_;
    std::optional<std::size_t> last_comma_;
    bool closed_ = false;
};

// Multiply the outputs [1, L, D] of a chunk by the weights [L] of its tokens, then restore their mean. Throws a request
// error if the weights leave a mean of 0, because it cannot be restored.
void apply_weights(Array& hidden, const float* weights);

}  // namespace higen::core
