// Pictures from files as Python sees them: upright, over white, RGB of 8 bits (higen/images.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace higen::core {

constexpr std::size_t max_picture_side = 1 << 15;
constexpr std::size_t max_picture_pixels = std::size_t{1} << 27;

// RGB [height, width, 3].
struct Rgb {
    std::vector<std::uint8_t> pixels;
    std::size_t height = 0;
    std::size_t width = 0;
};

// Reads a PNG, JPEG or binary PPM file; its first bytes decide the format. Turns it as its Exif record says and lays
// transparency over white. Throws a request error for a file that cannot be read, and an unavailable error for a format
// that this library was built without.
[[nodiscard]] Rgb read_picture(const std::string& path);

// The result of a decoder: RGBA [height, width, 4], and the TIFF part of the Exif record, which may be empty.
struct Decoded {
    std::vector<std::uint8_t> rgba;
    std::size_t height = 0;
    std::size_t width = 0;
    std::vector<std::uint8_t> exif;
};

using Bytes = std::vector<std::uint8_t>;

// Decoders of whole files. They throw a request error beginning with `path`.
[[nodiscard]] Decoded decode_png(const Bytes& file, const std::string& path);
[[nodiscard]] Decoded decode_jpeg(const Bytes& file, const std::string& path);

// Throws a request error for a picture that is too large, or has no pixels.
void check_picture_size(const std::string& path, std::size_t width, std::size_t height);

// The orientation in an Exif record, 1 to 8; 1 (upright) if there is none.
[[nodiscard]] int orientation_of(const Bytes& tiff);

}  // namespace higen::core
