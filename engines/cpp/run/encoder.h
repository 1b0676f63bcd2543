// Video files by the system's program ffmpeg. It gets raw frames through a pipe; no shell is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

// A video file's tags, as Python writes them.
struct Tags {
    std::string title;
    std::string comment;
};

class Encoder {
public:
    // Whether ffmpeg writes files with this suffix: ".mp4" or ".webm".
    [[nodiscard]] static bool takes(const std::string& suffix);

    // Throws std::runtime_error that says what to install, if there is no ffmpeg with the encoder for this suffix.
    static void check(const std::string& suffix);

    // Begins a file of frames [height, width, 3]. Its folder gets the other files that ffmpeg needs.
    Encoder(const std::filesystem::path& file, int width, int height, int fps, const Tags& tags);
    ~Encoder();  // the caller removes an unfinished file
    Encoder(const Encoder&) = delete;
    Encoder& operator=(const Encoder&) = delete;

    // Both throw std::runtime_error with ffmpeg's message.
    void write(const std::uint8_t* rgb);
    void finish();

private:
    void put(const void* data, std::size_t size);
    int end();
    [[noreturn]] void fail();

    std::size_t width_, height_;
    std::filesystem::path said_;
    int pipe_ = -1;
    int process_ = -1;
};
