// A generation request: every argument checked in one place, before any work starts (higen/request.py).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "conditioning.h"
#include "config.h"
#include "higen/higen.h"
#include "tokenizer.h"

namespace higen::core {

// A checked request. Two numbers in `steps` and `guidance`: spatial stage, temporal stage.
struct Request {
    std::vector<std::int64_t> tokens;  // context_length ids
    std::vector<std::int64_t> negative_tokens;
    std::uint64_t seed = 0;
    std::array<std::int64_t, 2> steps{};
    std::array<float, 2> guidance{};
    std::string solver;
    std::size_t frames = 0;
    std::size_t height = 0;
    std::size_t width = 0;
    std::int32_t fps = 0;
    std::vector<float> motion;      // [frames, base_channels]
    std::vector<float> appearance;  // [frames, appearance_columns]
    float offset_noise = 0;
    std::vector<float> key_frame;  // [3, height, width] in -1 to 1, or nothing
};

// Check every argument against the model. `given` has been filled by higen_request_init and changed since.
[[nodiscard]] Request make_request(const ModelConfig& config, const Tokenizer& tokenizer, const higen_request& given,
                                   const Tokenizer::Warn& warn);

// Check that requests can be made in one batch: the same frames, size, rate, steps and solver, and a key frame for all
// or for none. Throws a request error.
void check_batch(const std::vector<Request>& requests);

}  // namespace higen::core
