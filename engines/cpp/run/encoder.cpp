#include "encoder.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string_view>
#include <vector>

#ifndef _WIN32
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

extern char** environ;  // NOLINT: POSIX declares it nowhere
#endif

namespace fs = std::filesystem;

namespace {

using Words = std::vector<std::string>;

// Container, encoder and its options: higen/video_writer.py.
struct Kind {
    const char* suffix;
    const char* container;
    const char* codec;
    Words options;
};

const std::array<Kind, 2>& kinds() {
    static const std::array<Kind, 2> all = {
        {{".mp4", "mp4", "libx264", {"-crf", "17", "-movflags", "+faststart"}},
         {".webm", "webm", "libvpx-vp9",
      {"-crf", "24", "-b:v", "0", "-deadline", "good", "-cpu-used", "4", "-row-mt", "1"}}}};
    return all;
}

const Kind& kind_of(const std::string& suffix) {
    return *std::find_if(kinds().begin(), kinds().end(), [&](const auto& kind) { return kind.suffix == suffix; });
}

constexpr const char* other_formats = "; .y4m, .npy and .rgb need no other program";

#ifndef _WIN32

// Starts a program with these arguments. It reads `input`, and both of its outputs go to the file `said`.
int start(const Words& words, int input, const char* said) {
    std::vector<char*> arguments;
    for (const auto& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    if (input >= 0)
        posix_spawn_file_actions_adddup2(&actions, input, 0);
    else
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, said, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    // higen-run handles Ctrl-C. The program runs in a separate process group and does not get the signal.
    sigset_t standard;
    sigemptyset(&standard);
    sigaddset(&standard, SIGPIPE);
    posix_spawnattr_setsigdefault(&attributes, &standard);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    pid_t process = -1;
    const int error = posix_spawnp(&process, words.front().c_str(), &actions, &attributes, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    if (error == 0) return process;
    errno = error;
    return -1;
}

// The exit status of a process; -1 if a signal ended it.
int wait_for(int process) {
    int status = 0;
    while (waitpid(process, &status, 0) < 0)
        if (errno != EINTR) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#endif

// Quotes a value for ffmpeg's metadata files.
std::string escaped(const std::string& text) {
    std::string result;
    for (const char c : text) {
        if (std::string_view("=;#\\\n").find(c) != std::string_view::npos) result += '\\';
        result += c;
    }
    return result;
}

}  // namespace

bool Encoder::takes(const std::string& suffix) {
    return std::any_of(kinds().begin(), kinds().end(), [&](const auto& kind) { return suffix == kind.suffix; });
}

#ifndef _WIN32

void Encoder::check(const std::string& suffix) {
    const auto& kind = kind_of(suffix);
    // Test the encoder with one black frame, because the installed program may lack it.
    const Words words = {"ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "16x16", "-i",
                         "/dev/zero", "-frames:v", "1", "-c:v", kind.codec, "-pix_fmt", "yuv420p", "-f", "null", "-"};
    const int process = start(words, -1, "/dev/null");
    if (process < 0)
        throw std::runtime_error(std::string("a ") + suffix + " file is written by the program ffmpeg, which cannot be run (" +
                                 std::strerror(errno) + "): apt-get install ffmpeg" + other_formats);
    if (wait_for(process) != 0)
        throw std::runtime_error(std::string("a ") + suffix + " file needs an ffmpeg with the encoder " + kind.codec +
                                 ", but the ffmpeg in PATH lacks it" + other_formats);
}

// 4:2:0 needs even sizes: odd frames are padded by repeating their last line or column.
Encoder::Encoder(const fs::path& file, int width, int height, int fps, const Tags& tags)
    : width_(static_cast<std::size_t>(width)),
      height_(static_cast<std::size_t>(height)),
      said_(file.parent_path() / "ffmpeg.log") {
    const auto& kind = kind_of(file.extension().u8string());
    const auto notes = file.parent_path() / "tags.txt";
    std::ofstream(notes, std::ios::binary) << ";FFMETADATA1\ntitle=" << escaped(tags.title)
                                           << "\ncomment=" << escaped(tags.comment) << "\n";
    const auto size = std::to_string(width + width % 2) + "x" + std::to_string(height + height % 2);
    Words words = {"ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size,
                   "-r", std::to_string(fps), "-i", "pipe:0", "-f", "ffmetadata", "-i", notes.u8string(),
                   "-map", "0:v", "-map_metadata", "1",
                   // The conversion, and the tags that declare it.
                   "-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic,format=yuv420p",
                   "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv",
                   "-c:v", kind.codec};
    words.insert(words.end(), kind.options.begin(), kind.options.end());
    words.insert(words.end(), {"-f", kind.container, file.u8string()});
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error(std::string("no pipe to ffmpeg: ") + std::strerror(errno));
    for (const int end : ends) fcntl(end, F_SETFD, FD_CLOEXEC);
    std::signal(SIGPIPE, SIG_IGN);  // if ffmpeg ends too early, writing must fail, not end this process
    process_ = start(words, ends[0], said_.c_str());
    const int error = errno;
    close(ends[0]);
    pipe_ = ends[1];
    if (process_ < 0) throw std::runtime_error(std::string("ffmpeg cannot be run: ") + std::strerror(error));
}

Encoder::~Encoder() {
    if (pipe_ >= 0) close(pipe_);
    if (process_ < 0) return;
    kill(process_, SIGKILL);
    (void)wait_for(process_);
}

void Encoder::put(const void* data, std::size_t size) {
    const auto* at = static_cast<const char*>(data);
    while (size > 0) {
        const auto written = ::write(pipe_, at, size);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) fail();
        at += written;
        size -= static_cast<std::size_t>(written);
    }
}

void Encoder::write(const std::uint8_t* rgb) {
    const auto line = 3 * width_;
    for (std::size_t y = 0; y < height_ + height_ % 2; ++y) {
        const auto* row = rgb + std::min(y, height_ - 1) * line;
        put(row, line);
        if (width_ % 2 != 0) put(row + line - 3, 3);
    }
}

void Encoder::finish() {
    if (end() != 0) fail();
}

// Close the pipe, so that ffmpeg finishes the file; returns its exit status.
int Encoder::end() {
    if (pipe_ >= 0) close(pipe_);
    pipe_ = -1;
    if (process_ < 0) return -1;
    const int status = wait_for(process_);
    process_ = -1;
    return status;
}

void Encoder::fail() {
    (void)end();  // now its output is complete
    std::ifstream file(said_, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.pop_back();
    const auto last = text.rfind('\n');
    throw std::runtime_error("ffmpeg failed: " + (text.empty() ? "it printed no message" : text.substr(last + 1)));
}

#else

void Encoder::check(const std::string& suffix) {
    throw std::runtime_error("a " + suffix + " file is not written here on Windows: pipe -o - into ffmpeg" + other_formats);
}
Encoder::Encoder(const fs::path&, int width, int height, int, const Tags&)
    : width_(static_cast<std::size_t>(width)), height_(static_cast<std::size_t>(height)) {}
Encoder::~Encoder() = default;
void Encoder::put(const void*, std::size_t) {}
void Encoder::write(const std::uint8_t*) {}
void Encoder::finish() {}
int Encoder::end() { return -1; }
void Encoder::fail() { throw std::runtime_error("no ffmpeg"); }

#endif
