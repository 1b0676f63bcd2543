#include "picture_file.h"

#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string_view>
#include <system_error>
#include <utility>

#include "errors.h"

namespace higen::core {

namespace fs = std::filesystem;

namespace {

constexpr std::uintmax_t largest_file = std::uintmax_t{1} << 30;

[[noreturn]] void fail(const std::string& path, const std::string& what) { fail_request(path + ": " + what); }

[[noreturn, maybe_unused]] void fail_without(const std::string& path, const char* format, const std::string& library) {
    fail_unavailable(path + ": is a " + format + " file, but higen was built without " + library +
                     ": install it (apt-get install " + library + "-dev) and build higen again, or give a binary PPM (P6)");
}

// Reads regular files only: a FIFO would block.
Bytes read_bytes(const std::string& path) {
    const auto place = fs::u8path(path);
    std::error_code error;
    const auto status = fs::status(place, error);
    if (!fs::exists(status)) fail(path, error ? error.message() : "No such file or directory");
    if (!fs::is_regular_file(status)) fail(path, "is not a regular file");
    const auto size = fs::file_size(place, error);
    if (error) fail(path, error.message());
    if (size > largest_file) fail(path, "has " + std::to_string(size) + " bytes: too large for a picture");
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) fail(path, std::strerror(errno));
    Bytes bytes(static_cast<std::size_t>(size));
    if (std::fread(bytes.data(), 1, bytes.size(), file.get()) != bytes.size()) fail(path, "is truncated");
    return bytes;
}

Rgb decode_ppm(const Bytes& file, const std::string& path) {
    std::size_t at = 2;
    const auto next = [&] { return at < file.size() ? static_cast<int>(file[at++]) : -1; };
    const auto number = [&] {
        int c = next();
        while (std::isspace(c) || c == '#') {
            if (c == '#')
                while (c != '\n' && c != -1) c = next();
            c = next();
        }
        int value = 0, digits = 0;
        for (; std::isdigit(c) && digits < 6; ++digits, c = next()) value = value * 10 + (c - '0');
        if (digits == 0 || !std::isspace(c)) fail(path, "not a binary PPM (P6)");
        return static_cast<std::size_t>(value);
    };
    Rgb made;
    made.width = number(), made.height = number();
    check_picture_size(path, made.width, made.height);
    if (number() != 255) fail(path, "a PPM with 8 bits is wanted");
    const auto size = 3 * made.width * made.height;
    if (file.size() - at < size) fail(path, "is truncated");
    made.pixels.assign(file.begin() + static_cast<std::ptrdiff_t>(at),
                       file.begin() + static_cast<std::ptrdiff_t>(at + size));
    return made;
}

// RGBA laid over white and turned upright.
Rgb finished(const Decoded& decoded) {
    const int way = orientation_of(decoded.exif);
    const auto w = decoded.width, h = decoded.height;
    Rgb made;
    made.width = way >= 5 ? h : w, made.height = way >= 5 ? w : h;
    made.pixels.resize(3 * w * h);
    for (std::size_t y = 0; y < made.height; ++y)
        for (std::size_t x = 0; x < made.width; ++x) {
            auto across = way >= 5 ? y : x, down = way >= 5 ? x : y;
            if (way == 2 || way == 3 || way == 7 || way == 8) across = w - 1 - across;
            if (way == 3 || way == 4 || way == 6 || way == 7) down = h - 1 - down;
            const auto* from = decoded.rgba.data() + 4 * (down * w + across);
            auto* to = made.pixels.data() + 3 * (y * made.width + x);
            for (int c = 0; c < 3; ++c)
                to[c] = static_cast<std::uint8_t>((from[c] * from[3] + 255 * (255 - from[3]) + 127) / 255);
        }
    return made;
}

bool begins(const Bytes& file, std::string_view with) {
    return file.size() >= with.size() && std::memcmp(file.data(), with.data(), with.size()) == 0;
}

}  // namespace

#ifndef HIGEN_PNG
Decoded decode_png(const Bytes&, const std::string& path) { fail_without(path, "PNG", "libpng"); }
#endif
#ifndef HIGEN_JPEG
Decoded decode_jpeg(const Bytes&, const std::string& path) { fail_without(path, "JPEG", "libjpeg"); }
#endif

void check_picture_size(const std::string& path, std::size_t width, std::size_t height) {
    if (width >= 1 && height >= 1 && width <= max_picture_side && height <= max_picture_side &&
        width * height <= max_picture_pixels)
        return;
    fail(path, std::to_string(width) + "x" + std::to_string(height) + " pixels: 1 to " +
                   std::to_string(max_picture_side) + " a side and at most " + std::to_string(max_picture_pixels) +
                   " in all");
}

// The tag 0x0112 of the first directory of a TIFF header, "II" or "MM".
int orientation_of(const Bytes& tiff) {
    if (tiff.size() < 8) return 1;
    const bool little = tiff[0] == 'I';
    const auto read = [&](std::size_t at, std::size_t size) {
        std::size_t value = 0;
        for (std::size_t i = 0; i < size && at + i < tiff.size(); ++i)
            value |= std::size_t{tiff[at + i]} << 8 * (little ? i : size - 1 - i);
        return value;
    };
    const auto directory = read(4, 4);
    const auto count = read(directory, 2);
    for (std::size_t i = 0; i < count && directory + 2 + 12 * i + 12 <= tiff.size(); ++i) {
        const auto entry = directory + 2 + 12 * i;
        if (read(entry, 2) != 0x0112) continue;
        const auto value = read(entry + 8, read(entry + 2, 2) == 3 ? 2 : 4);
        return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
    }
    return 1;
}

Rgb read_picture(const std::string& path) {
    const auto file = read_bytes(path);
    if (begins(file, "P6")) return decode_ppm(file, path);
    if (begins(file, "\x89PNG\r\n\x1a\n")) return finished(decode_png(file, path));
    if (begins(file, "\xff\xd8\xff")) return finished(decode_jpeg(file, path));
    fail(path, "is no PNG, JPEG or binary PPM (P6) file");
}

}  // namespace higen::core
