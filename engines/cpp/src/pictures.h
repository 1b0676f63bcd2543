// Turns a request's pictures into inputs of stages: scaled to cover, cropped, in -1 to 1, and resampled
// (higen/images.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace higen::core {

// Scale RGB bytes [height, width, 3] to cover a size, and crop both sides equally, as Pillow's ImageOps.fit with the
// Lanczos filter does. The bytes equal those of Pillow 13.
[[nodiscard]] std::vector<std::uint8_t> cover(const std::uint8_t* rgb, std::size_t width, std::size_t height,
                                              std::size_t new_width, std::size_t new_height);

// Decoded pixels [3, H, W] in -1 to 1 as RGB bytes [H, W, 3]: x * 0.5 + 0.5, clamped to [0, 1], times 255, truncated;
// channel c lies `stride` numbers after channel c - 1. Throws a backend error for NaN and infinity.
void to_rgb(const float* pixels, std::size_t plane, std::size_t stride, std::uint8_t* rgb);

// Converts RGB bytes [frames, height, width, 3] to numbers [3, frames, height, width] in -1 to 1.
[[nodiscard]] std::vector<float> planes(const std::vector<std::uint8_t>& rgb, std::size_t frames, std::size_t pixels);

// Resizes pixels [3, height, width]: a Gaussian against aliasing, then bicubic interpolation with aligned corners.
[[nodiscard]] std::vector<float> resample(const std::vector<float>& pixels, std::size_t height, std::size_t width,
                                          std::size_t new_height, std::size_t new_width);

}  // namespace higen::core
