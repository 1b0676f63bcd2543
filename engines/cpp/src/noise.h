// Random numbers that are part of the contract: the same seed gives the same noise on every runtime (higen/noise.py).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace higen::core {

// Purposes of a stream: key-frame noise, video noise, and the offset added to each frame and channel of it.
enum class Purpose : std::uint64_t { spatial = 0, temporal = 1, temporal_offset = 2 };

// One block of Philox4x64-10 (Salmon et al. 2011, section 3.3).
[[nodiscard]] std::array<std::uint64_t, 4> philox(std::array<std::uint64_t, 4> counter,
                                                  std::array<std::uint64_t, 2> key);

// `count` standard normal numbers of the stream (seed, purpose), by Box and Muller in float64.
[[nodiscard]] std::vector<float> normal(std::uint64_t seed, Purpose purpose, std::size_t count);

// Noise of one sample, [C, F, H, W]. Drawn frame by frame: a longer clip begins with a shorter one's.
[[nodiscard]] std::vector<float> initial_noise(std::uint64_t seed, Purpose purpose, std::size_t channels,
                                               std::size_t frames, std::size_t height, std::size_t width);

}  // namespace higen::core
