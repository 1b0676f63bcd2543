#include "request.h"

#include <cmath>
#include <limits>

#include "errors.h"
#include "schedule.h"
#include "text.h"

namespace higen::core {
namespace {

constexpr std::int64_t max_side = 4096;

std::int64_t whole(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high)
        fail_request(std::string(name) + "=" + std::to_string(value) + ": a whole number from " + std::to_string(low) +
                     " to " + std::to_string(high));
    return value;
}

float number(const char* name, double value) {
    if (!(value >= 0 && value <= std::numeric_limits<float>::max()))
        fail_request(std::string(name) + "=" + std::to_string(value) + ": a finite number, 0 or more");
    return static_cast<float>(value);
}

std::size_t side(const char* name, std::int64_t value, std::int64_t multiple) {
    const auto size = whole(name, value, multiple, max_side);
    const auto below = size / multiple * multiple;
    if (size != below)
        fail_request(std::string(name) + "=" + std::to_string(size) + ": a multiple of " + std::to_string(multiple) +
                     "; the nearest are " + std::to_string(below) + " and " + std::to_string(below + multiple));
    return static_cast<std::size_t>(size);
}

Cue cue(const char* name, const higen_cue& given, std::optional<double> standard, const ModelConfig& config) {
    switch (given.kind) {
        case HIGEN_CUE_DEFAULT:
            return standard ? Cue(CueValues::number(*standard)) : std::nullopt;
        case HIGEN_CUE_UNSPECIFIED:
            if (!config.optional_cues)
                fail_request(std::string(name) + " is unspecified: " + config.name + " was not trained without this cue");
            return std::nullopt;
        case HIGEN_CUE_GIVEN: {
            // The largest is a matrix of max_frames by max_frames.
            constexpr std::size_t most = 1 << 16;
            if (given.values == nullptr || given.rows == 0 || given.columns == 0 || given.rows > most ||
                given.columns > most)
                fail_request(std::string(name) + " has no values, or too many");
            return CueValues{{given.values, given.values + given.rows * given.columns}, given.rows, given.columns};
        }
    }
    fail_request(std::string(name) + ".kind=" + std::to_string(static_cast<int>(given.kind)) + ": a higen_cue_kind");
}

bool is_blank(const char* text) {
    const auto decoded = decode_utf8(text);
    if (!decoded) fail_request("the prompt is not valid UTF-8");
    for (const char32_t c : *decoded)
        if (!is_python_space(c)) return false;
    return true;
}

std::vector<std::int64_t> tokens(const Tokenizer& tokenizer, const higen_request& given, const Tokenizer::Warn& warn) {
    if (given.tokens != nullptr)
        return tokenizer.pad("tokens", {given.tokens, given.tokens + given.token_count});
    if (given.prompt == nullptr || is_blank(given.prompt)) fail_request("prompt: a text with at least one word");
    return tokenizer.encode(given.prompt, warn);
}

std::vector<std::int64_t> negative_tokens(const Tokenizer& tokenizer, const higen_request& given,
                                          const Tokenizer::Warn& warn) {
    if (given.negative_tokens != nullptr)
        return tokenizer.pad("negative_tokens",
                             {given.negative_tokens, given.negative_tokens + given.negative_token_count});
    return tokenizer.encode(given.negative_prompt == nullptr ? "" : given.negative_prompt, warn);
}

std::vector<float> planes(const std::uint8_t* rgb, std::size_t pixels) {
    std::vector<float> planes(3 * pixels);
    for (std::size_t i = 0; i < pixels; ++i)
        for (std::size_t c = 0; c < 3; ++c)
            planes[c * pixels + i] = static_cast<float>(rgb[3 * i + c]) / 127.5F - 1.0F;
    return planes;
}

}  // namespace

Request make_request(const ModelConfig& config, const Tokenizer& tokenizer, const higen_request& given,
                     const Tokenizer::Warn& warn) {
    Request request;
    request.frames = static_cast<std::size_t>(whole("frames", given.frames, 1, config.max_frames));
    request.solver = given.solver == nullptr ? config.defaults.solver : given.solver;
    if (!is_solver(request.solver)) fail_request("solver='" + request.solver + "': one of 'ddim', 'dpm++2m'");
    request.height = side("height", given.height, config.size_multiple());
    request.width = side("width", given.width, config.size_multiple());
    request.fps = static_cast<std::int32_t>(whole("fps", given.fps, 1, 240));
    request.seed = given.seed;
    for (std::size_t i = 0; i < 2; ++i) {
        request.steps[i] = whole("steps", given.steps[i], 1, config.schedule.timesteps);
        request.guidance[i] = number("guidance", given.guidance[i]);
    }
    request.offset_noise = number("offset_noise", given.offset_noise);
    request.motion = motion_cue(cue("motion", given.motion, config.defaults.motion, config), request.frames,
                                static_cast<std::size_t>(config.unet.base_channels));
    request.appearance = appearance_cue(cue("appearance", given.appearance, config.defaults.appearance, config),
                                        request.frames, static_cast<std::size_t>(config.unet.appearance_columns));
    if (given.key_frame != nullptr) request.key_frame = planes(given.key_frame, request.height * request.width);
    request.tokens = tokens(tokenizer, given, warn);
    request.negative_tokens = negative_tokens(tokenizer, given, warn);
    return request;
}

void check_batch(const std::vector<Request>& requests) {
    const auto& first = requests.front();
    for (std::size_t i = 1; i < requests.size(); ++i) {
        const auto& request = requests[i];
        const auto same = [&](const char* name, const auto& given, const auto& wanted) {
            if (given != wanted)
                fail_request("requests[" + std::to_string(i) + "]: another " + name +
                             " than requests[0]: a batch has one");
        };
        same("frames", request.frames, first.frames);
        same("width", request.width, first.width);
        same("height", request.height, first.height);
        same("fps", request.fps, first.fps);
        same("steps", request.steps, first.steps);
        same("solver", request.solver, first.solver);
        if (request.key_frame.empty() != first.key_frame.empty())
            fail_request("requests[" + std::to_string(i) + "]: a key frame is for all videos of a batch or for none");
    }
}

}  // namespace higen::core
