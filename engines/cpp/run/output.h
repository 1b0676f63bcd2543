// Files of frames: y4m, npy and raw RGB.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

struct Picture {
    std::vector<std::uint8_t> rgb;
    int width = 0;
    int height = 0;
};

// Writes a clip as its frames come, to a file beside the target that takes its name at the end: a clip that fails leaves
// nothing behind. Throws std::runtime_error.
class ClipWriter {
public:
    // The format is that of the suffix; "-" is y4m on the standard output. Checks that the folder can be written.
    explicit ClipWriter(std::string path);
    ~ClipWriter();
    ClipWriter(const ClipWriter&) = delete;
    ClipWriter& operator=(const ClipWriter&) = delete;

    void write(const std::uint8_t* rgb, int count, int total, int width, int height, int fps);
    // After the last frame.
    void finish();

private:
    enum class Format { y4m, npy, rgb };

    void put(const void* data, std::size_t size);
    void put_y4m(const std::uint8_t* rgb, std::size_t pixels);

    std::string path_, aside_;
    Format format_ = Format::y4m;
    std::FILE* file_ = nullptr;
    bool begun_ = false;
};

// A binary PPM (P6, 8 bits). Throws std::runtime_error.
[[nodiscard]] Picture read_ppm(const std::string& path);
