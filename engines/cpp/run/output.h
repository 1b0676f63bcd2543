// Files of frames: y4m, npy, raw RGB, and mp4 and webm through ffmpeg.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "encoder.h"
#include "staging.h"

// The contents of a video file's tags.
struct About {
    std::string prompt;
    std::uint64_t seed = 0;
};

// Writes a clip frame by frame, in a hidden folder beside the target. At the end the finished file is moved to the
// target. A clip that fails leaves nothing behind. Throws std::runtime_error.
class ClipWriter {
public:
    // The suffix gives the format; "-" is y4m on the standard output. Checks, before any frame is made, that the file
    // can be written and replaced, and that the program that writes it exists.
    ClipWriter(std::string path, About about);
    ~ClipWriter();
    ClipWriter(const ClipWriter&) = delete;
    ClipWriter& operator=(const ClipWriter&) = delete;

    void write(const std::uint8_t* rgb, int count, int total, int width, int height, int fps);
    // Call it after the last frame.
    void finish();

private:
    enum class Format { y4m, npy, rgb, video };

    void check_target();
    void begin(int total, int width, int height, int fps);
    void put(const void* data, std::size_t size);
    void put_y4m(const std::uint8_t* rgb, std::size_t pixels);

    std::string path_;
    About about_;
    Format format_ = Format::y4m;
    std::filesystem::path target_, finished_;
    std::unique_ptr<Staging> staging_;
    std::unique_ptr<Encoder> encoder_;
    std::FILE* file_ = nullptr;
    bool begun_ = false;
};
