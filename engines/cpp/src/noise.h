// Random numbers are part of the model's contract: the same seed gives the same noise on every runtime
// (higen/noise.py).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace higen::core {

// One block of Philox4x64-10 (Salmon et al. 2011, section 3.3).
[[nodiscard]] std::array<std::uint64_t, 4> philox(std::array<std::uint64_t, 4> counter,
                                                  std::array<std::uint64_t, 2> key);

// `count` standard normal numbers of the stream (seed, purpose), by the Box-Muller method in float64.
[[nodiscard]] std::vector<float> normal(std::uint64_t seed, std::uint64_t purpose, std::size_t count);

// Noise [before, frames, after], drawn frame by frame, so a longer clip begins with the numbers of a shorter one. With
// before = channels and after = height x width it is the noise of one sample's latents [C, F, H, W].
[[nodiscard]] std::vector<float> frame_noise(std::uint64_t seed, std::uint64_t purpose, std::size_t before,
                                             std::size_t frames, std::size_t after);

// For each frame of a long clip, the frame that it takes its noise from. `kind` is "fresh", "shuffled" or "repeated"
// (higen/noise.py, frame_order).
[[nodiscard]] std::vector<std::size_t> frame_order(std::uint64_t seed, std::uint64_t purpose, std::size_t frames,
                                                   std::size_t length, std::size_t stride, std::string_view kind);

// The stream that replaces `purpose` when a loop is run again; iterations count from 0.
[[nodiscard]] constexpr std::uint64_t again(std::uint64_t purpose, std::size_t iteration) {
    return purpose + (static_cast<std::uint64_t>(iteration) << 56);
}

// The stream for the noise of a solver table's row. The loop's initial noise has `purpose`.
[[nodiscard]] constexpr std::uint64_t row_purpose(std::uint64_t purpose, std::size_t row) {
    return purpose + (static_cast<std::uint64_t>(row + 1) << 32);
}

}  // namespace higen::core
