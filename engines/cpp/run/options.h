// The command line of higen-run.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

struct Options {
    std::string model;
    std::string prompt;
    std::string output;
    std::string negative_prompt;
    std::optional<std::vector<std::int64_t>> tokens;
    std::uint64_t seed = 0;
    std::vector<std::int64_t> steps;            // nothing, one for every loop, or one per loop
    std::vector<std::vector<double>> guidance;  // as `steps`; one number, or one per frame
    std::vector<std::string> solvers;           // nothing, one for every loop, or one per loop
    std::vector<double> guidance_interval, free_init;
    std::vector<std::int64_t> windows, reuse;
    std::string window_noise, free_init_filter, preset;  // "": not given
    std::optional<std::string> inversion;
    std::optional<std::int64_t> frames, width, height, fps;
    std::vector<std::pair<std::string, std::string>> controls;               // name and value, as given
    std::vector<std::pair<std::string, std::vector<std::string>>> pictures;  // name and files
    std::vector<std::pair<std::string, std::string>> keyframes;              // index and file
    std::vector<std::pair<std::string, std::string>> matrices;               // name and file
    std::string backend = "auto";
    std::optional<std::string> precision;
    std::string provider = "auto";
    std::string provider_library;
    std::int64_t threads = 0;
    bool verify = true;
    bool quiet = false;
    bool info = false;
    bool list_controls = false;
    bool help = false;
};

extern const char* const usage;

// Throws std::invalid_argument that names the option, its value and what is allowed.
[[nodiscard]] Options parse(const std::vector<std::string>& arguments);

// Numbers separated by commas. Throws std::invalid_argument.
[[nodiscard]] std::vector<double> parse_numbers(const std::string& option, const std::string& text);
