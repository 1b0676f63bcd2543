// The command line of higen-run.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// A cue as it is given: nothing for the model's default, an empty list for "none".
using CueOption = std::optional<std::vector<double>>;

struct Options {
    std::string model;
    std::string prompt;
    std::string output;
    std::string negative_prompt;
    std::optional<std::vector<std::int64_t>> tokens;
    std::uint64_t seed = 0;
    std::vector<std::int64_t> steps;  // nothing, one for both stages, or two
    std::vector<double> guidance;
    std::optional<std::string> solver;
    std::optional<std::int64_t> frames, width, height, fps;
    CueOption motion, appearance;
    std::optional<double> offset_noise;
    std::string image;
    std::string backend = "auto";
    std::string precision;
    std::string provider = "auto";
    std::string provider_library;
    std::int64_t threads = 0;
    bool verify = true;
    bool quiet = false;
    bool info = false;
    bool help = false;
};

extern const char* const usage;

// Throws std::invalid_argument that names the option, its value and what is allowed.
[[nodiscard]] Options parse(const std::vector<std::string>& arguments);
