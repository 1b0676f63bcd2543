#include "output.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <system_error>

#ifndef _WIN32
#include <unistd.h>
#endif

namespace fs = std::filesystem;

namespace {

[[noreturn]] void fail(const std::string& path, const std::string& what) { throw std::runtime_error(path + ": " + what); }

std::uint8_t byte(double value) { return static_cast<std::uint8_t>(std::lround(std::clamp(value, 0.0, 255.0))); }

std::string lower_suffix(const std::string& path) {
    auto suffix = fs::u8path(path).extension().u8string();
    std::transform(suffix.begin(), suffix.end(), suffix.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return suffix;
}

// Whether a file may be written. A file that nobody may write is not writable for root either.
bool is_writable(const fs::path& path, fs::perms perms) {
    constexpr auto any = fs::perms::owner_write | fs::perms::group_write | fs::perms::others_write;
    if ((perms & any) == fs::perms::none) return false;
#ifndef _WIN32
    return access(path.c_str(), W_OK) == 0;
#else
    (void)path;
    return true;
#endif
}

// The prompt as title, and a JSON description of the clip (higen/video_record.py).
Tags tags_of(const About& about, int total, int width, int height, int fps) {
    const nlohmann::json record = {{"fps", fps}, {"frames", total}, {"height", height}, {"width", width}};
    const nlohmann::json comment = {{"prompt", about.prompt}, {"seed", about.seed}, {"higen.video", record}};
    return {about.prompt, comment.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)};
}

}  // namespace

ClipWriter::ClipWriter(std::string path, About about) : path_(std::move(path)), about_(std::move(about)) {
    if (path_ == "-") {
        file_ = stdout;
        return;
    }
    const auto suffix = lower_suffix(path_);
    if (suffix == ".npy")
        format_ = Format::npy;
    else if (suffix == ".rgb")
        format_ = Format::rgb;
    else if (Encoder::takes(suffix))
        format_ = Format::video;
    else if (suffix != ".y4m")
        fail(path_, "the suffix selects the format: .mp4, .webm, .y4m, .npy or .rgb");
    check_target();
    try {
        if (format_ == Format::video) Encoder::check(suffix);
    } catch (const std::runtime_error& error) {
        fail(path_, error.what());
    }
    try {
        staging_ = std::make_unique<Staging>(target_.parent_path());
    } catch (const fs::filesystem_error& error) {
        fail(path_, "cannot be written: " + error.code().message());
    }
    finished_ = staging_->folder() / ("clip" + suffix);
    if (format_ == Format::video) return;
    file_ = std::fopen(finished_.c_str(), "wb");
    if (file_ == nullptr) fail(path_, std::string("cannot be written: ") + std::strerror(errno));
}

// A link is kept and its target is written. Read-only files and anything but regular files are not replaced.
void ClipWriter::check_target() {
    std::error_code error;
    target_ = fs::absolute(fs::u8path(path_));
    const auto status = fs::status(target_, error);
    if (fs::is_directory(status)) fail(path_, "is a folder; name a file in it");
    for (int i = 0; i < 40 && fs::is_symlink(target_, error); ++i)  // Linux follows at most 40 links
        target_ = target_.parent_path() / fs::read_symlink(target_, error);
    if (!fs::exists(status)) return;
    if (!fs::is_regular_file(status)) fail(path_, "is a pipe or a device, not a regular file; choose another name");
    if (!is_writable(target_, status.permissions()))
        fail(path_, "is read-only: make it writable, or choose another name");
}

ClipWriter::~ClipWriter() {
    if (file_ != nullptr && file_ != stdout) std::fclose(file_);
}

void ClipWriter::put(const void* data, std::size_t size) {
    if (std::fwrite(data, 1, size, file_) != size) fail(path_, std::string("cannot be written: ") + std::strerror(errno));
}

void ClipWriter::begin(int total, int width, int height, int fps) {
    if (format_ == Format::video) {
        encoder_ = std::make_unique<Encoder>(finished_, width, height, fps, tags_of(about_, total, width, height, fps));
    } else if (format_ == Format::y4m) {
        const auto header = "YUV4MPEG2 W" + std::to_string(width) + " H" + std::to_string(height) + " F" +
                            std::to_string(fps) + ":1 Ip A1:1 C444 XCOLORRANGE=LIMITED\n";
        put(header.data(), header.size());
    } else if (format_ == Format::npy) {
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
}

void ClipWriter::write(const std::uint8_t* rgb, int count, int total, int width, int height, int fps) {
    const auto pixels = static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
    if (!begun_) begin(total, width, height, fps);
    for (int i = 0; i < count; ++i, rgb += 3 * pixels) {
        if (format_ == Format::video)
            encoder_->write(rgb);
        else if (format_ == Format::y4m)
            put_y4m(rgb, pixels);
        else
            put(rgb, 3 * pixels);
    }
}

// BT.601 with limited range, which players assume for y4m. The chroma planes have the full size (4:4:4).
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
    if (encoder_) encoder_->finish();
    const bool closed = file_ == nullptr || std::fclose(file_) == 0;
    file_ = nullptr;
    if (!closed) fail(path_, std::string("cannot be written: ") + std::strerror(errno));
    check_target();  // a file may have been created meanwhile
    std::error_code error;
    fs::rename(finished_, target_, error);
    if (error) fail(path_, "cannot be written: " + error.message());
}
