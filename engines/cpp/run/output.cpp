#include "output.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <system_error>

namespace fs = std::filesystem;

namespace {

[[noreturn]] void fail(const std::string& path, const std::string& what) { throw std::runtime_error(path + ": " + what); }

std::uint8_t byte(double value) { return static_cast<std::uint8_t>(std::lround(std::clamp(value, 0.0, 255.0))); }

}  // namespace

ClipWriter::ClipWriter(std::string path) : path_(std::move(path)) {
    if (path_ == "-") {
        file_ = stdout;
        return;
    }
    auto suffix = fs::u8path(path_).extension().u8string();
    std::transform(suffix.begin(), suffix.end(), suffix.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (suffix == ".npy")
        format_ = Format::npy;
    else if (suffix == ".rgb")
        format_ = Format::rgb;
    else if (suffix != ".y4m")
        fail(path_, "the suffix says the format: .y4m, .npy or .rgb");
    std::error_code error;
    if (fs::is_directory(fs::u8path(path_), error)) fail(path_, "is a folder; name a file in it");
    aside_ = path_ + ".part";
    file_ = std::fopen(aside_.c_str(), "wb");
    if (file_ == nullptr) fail(path_, std::string("cannot be written: ") + std::strerror(errno));
}

ClipWriter::~ClipWriter() {
    if (file_ != nullptr && file_ != stdout) {
        std::fclose(file_);
        std::remove(aside_.c_str());
    }
}

void ClipWriter::put(const void* data, std::size_t size) {
    if (std::fwrite(data, 1, size, file_) != size) fail(path_, std::string("cannot be written: ") + std::strerror(errno));
}

void ClipWriter::write(const std::uint8_t* rgb, int count, int total, int width, int height, int fps) {
    const auto pixels = static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
    if (!begun_ && format_ == Format::y4m) {
        const auto header = "YUV4MPEG2 W" + std::to_string(width) + " H" + std::to_string(height) + " F" +
                            std::to_string(fps) + ":1 Ip A1:1 C444 XCOLORRANGE=LIMITED\n";
        put(header.data(), header.size());
    } else if (!begun_ && format_ == Format::npy) {
        std::string header = "{'descr': '|u1', 'fortran_order': False, 'shape': (" + std::to_string(total) + ", " +
                             std::to_string(height) + ", " + std::to_string(width) + ", 3), }";
        header.resize((10 + header.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
        header += '\n';
        const auto size = header.size();
        const char start[] = {'\x93', 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<char>(size & 255), static_cast<char>(size >> 8)};
        put(start, sizeof start);
        put(header.data(), size);
    }
    begun_ = true;
    for (int i = 0; i < count; ++i, rgb += 3 * pixels) {
        if (format_ == Format::y4m)
            put_y4m(rgb, pixels);
        else
            put(rgb, 3 * pixels);
    }
}

// BT.601 in the limited range, which is what a player takes a y4m for, with colour at every pixel.
void ClipWriter::put_y4m(const std::uint8_t* rgb, std::size_t pixels) {
    std::vector<std::uint8_t> planes(3 * pixels);
    for (std::size_t i = 0; i < pixels; ++i) {
        const double r = rgb[3 * i], g = rgb[3 * i + 1], b = rgb[3 * i + 2];
        const double y = 0.299 * r + 0.587 * g + 0.114 * b;
        planes[i] = byte(16.0 + y * 219.0 / 255.0);
        planes[pixels + i] = byte(128.0 + (b - y) / 1.772 * 224.0 / 255.0);
        planes[2 * pixels + i] = byte(128.0 + (r - y) / 1.402 * 224.0 / 255.0);
    }
    put("FRAME\n", 6);
    put(planes.data(), planes.size());
}

void ClipWriter::finish() {
    if (file_ == stdout) {
        if (std::fflush(stdout) != 0) fail("standard output", std::strerror(errno));
        return;
    }
    const bool closed = std::fclose(file_) == 0;
    file_ = nullptr;
    std::error_code error;
    if (closed) fs::rename(fs::u8path(aside_), fs::u8path(path_), error);
    if (!closed || error) {
        std::remove(aside_.c_str());
        fail(path_, "cannot be written" + (error ? ": " + error.message() : std::string()));
    }
}

Picture read_ppm(const std::string& path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) fail(path, std::strerror(errno));
    const auto number = [&] {
        int c = std::fgetc(file.get());
        while (std::isspace(c) || c == '#') {
            if (c == '#')
                while (c != '\n' && c != EOF) c = std::fgetc(file.get());
            c = std::fgetc(file.get());
        }
        int value = 0, digits = 0;
        for (; std::isdigit(c) && digits < 6; ++digits, c = std::fgetc(file.get())) value = value * 10 + (c - '0');
        if (digits == 0 || !std::isspace(c)) fail(path, "not a binary PPM (P6)");
        return value;
    };
    char magic[2] = {};
    if (std::fread(magic, 1, 2, file.get()) != 2 || magic[0] != 'P' || magic[1] != '6') fail(path, "not a binary PPM (P6)");
    Picture picture;
    picture.width = number(), picture.height = number();
    if (picture.width < 1 || picture.width > 4096 || picture.height < 1 || picture.height > 4096 || number() != 255)
        fail(path, "a PPM of 1 to 4096 pixels a side with 8 bits is wanted");
    picture.rgb.resize(3 * static_cast<std::size_t>(picture.width) * static_cast<std::size_t>(picture.height));
    if (std::fread(picture.rgb.data(), 1, picture.rgb.size(), file.get()) != picture.rgb.size()) fail(path, "is truncated");
    return picture;
}
