// higen-run makes a video from a text, through the library's public interface.
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "higen/higen.hpp"
#include "matrix.h"
#include "options.h"
#include "output.h"

namespace {

using higen::check;

constexpr int wrong_usage = 2, interrupted = 130;

volatile std::sig_atomic_t stopped = 0;

extern "C" void stop(int) { stopped = 1; }

std::int32_t narrow(const char* name, std::int64_t value) {
    if (value < INT32_MIN || value > INT32_MAX)
        throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": too large");
    return static_cast<std::int32_t>(value);
}

higen::Model open_model(const Options& options) {
    higen_model_options given = HIGEN_MODEL_OPTIONS_INIT;
    given.backend = options.backend.c_str();
    given.precision = options.precision ? options.precision->c_str() : nullptr;
    given.provider = options.provider.c_str();
    given.provider_library = options.provider_library.empty() ? nullptr : options.provider_library.c_str();
    given.threads = narrow("--threads", options.threads);
    given.skip_verification = options.verify ? 0 : 1;
    return higen::Model(options.model, given);
}

std::string numbers(const double* values, std::size_t count) {
    std::string text;
    for (std::size_t i = 0; i < count; ++i) {
        char number[32];
        std::snprintf(number, sizeof number, "%g", values[i]);
        text += (i > 0 ? ":" : "") + std::string(number);
    }
    return text;
}

void print_loop(const higen_loop_info& loop) {
    std::string solvers;
    for (std::size_t i = 0; i < loop.solver_count; ++i) solvers += (i > 0 ? " or " : "") + std::string(loop.solvers[i]);
    std::printf("loop %s: %s, %d steps of %s (at most %d), guidance %s\n", loop.name,
                loop.every_frame != 0 ? "all frames" : "one frame", loop.steps, solvers.c_str(), loop.max_steps,
                numbers(loop.guidance, loop.guidance_count).c_str());
}

// Prints "preset full: 12, 3 steps, guidance 1.5, 1".
void print_preset(const higen_preset_info& preset, std::size_t loops) {
    std::string steps, guidance;
    for (std::size_t i = 0; i < loops; ++i) {
        const std::string comma = i > 0 ? ", " : "", standard = "default";
        steps += comma + (preset.steps[i] > 0 ? std::to_string(preset.steps[i]) : standard);
        guidance += comma + (preset.guidance[i] >= 0 ? numbers(&preset.guidance[i], 1) : standard);
    }
    std::printf("preset %s: %s steps, guidance %s%s\n", preset.name, steps.c_str(), guidance.c_str(),
                preset.usual != 0 ? " (the usual one)" : "");
}

void print_info(const higen_model* model) {
    higen_model_info info = HIGEN_MODEL_INFO_INIT;
    higen_request standard;
    check(higen_model_describe(model, &info));
    check(higen_request_init(model, &standard));
    std::printf("%s (%s)\n", info.name, info.licence);
    std::printf("default: %d frames of %dx%d at %d a second\n", standard.frames, standard.width, standard.height,
                standard.fps);
    for (std::size_t i = 0; i < info.loop_count; ++i) {
        higen_loop_info loop = HIGEN_LOOP_INFO_INIT;
        check(higen_model_loop(model, i, &loop));
        print_loop(loop);
    }
    for (std::size_t i = 0; i < info.preset_count; ++i) {
        higen_preset_info preset = HIGEN_PRESET_INFO_INIT;
        check(higen_model_preset(model, i, &preset));
        print_preset(preset, info.loop_count);
    }
    std::printf("%d to %d frames; sizes in multiples of %d; ", info.min_frames, info.max_frames, info.size_multiple);
    if (info.context_length > 0)
        std::printf("texts of %d tokens; ", info.context_length);
    else
        std::printf("no texts; ");
    std::printf("%zu controls (--list-controls)\n%s\n", info.control_count, info.report);
    for (std::size_t i = 0; i < info.prompt_count; ++i) std::printf("  %s\n", higen_model_prompt(model, i));
}

const char* kind_name(higen_control_kind kind) {
    constexpr const char* names[] = {"number", "whole number", "curve", "text", "picture", "clip", "choice",
                                     "known frames", "mask", "map"};
    return names[kind];
}

// Prints "wind             curve, sinusoid, from 0, default 500, may be unspecified: how fast it blows".
void print_controls(const higen_model* model) {
    for (std::size_t i = 0; i < higen_controls(model); ++i) {
        higen_control_info control = HIGEN_CONTROL_INFO_INIT;
        check(higen_model_control(model, i, &control));
        std::string text = kind_name(control.kind);
        if (control.encoding != nullptr) text += std::string(", ") + control.encoding;
        if (control.has_low != 0) text += ", from " + numbers(&control.low, 1);
        if (control.has_high != 0) text += (control.has_low != 0 ? " to " : ", to ") + numbers(&control.high, 1);
        for (std::size_t k = 0; k < control.choice_count; ++k)
            text += (k > 0 ? "|" : ": ") + std::string(control.choices[k]);
        if (control.has_default != 0)
            text += ", default " + (control.default_text != nullptr ? std::string(control.default_text)
                                                                    : numbers(&control.default_value, 1));
        if (control.optional != 0) text += ", may be unspecified";
        std::printf("%-16s %s: %s\n", control.name, text.c_str(), control.meaning);
    }
}

// The request made from the options, and what it points to.
class Given {
public:
    Given(const higen_model* model, const Options& options) {
        check(higen_request_init(model, &request_));
        request_.prompt = options.prompt.c_str();
        request_.negative_prompt = options.negative_prompt.c_str();
        if (options.tokens) request_.tokens = options.tokens->data(), request_.token_count = options.tokens->size();
        request_.seed = options.seed;
        if (options.frames) request_.frames = narrow("--frames", *options.frames);
        if (options.width) request_.width = narrow("--width", *options.width);
        if (options.height) request_.height = narrow("--height", *options.height);
        if (options.fps) request_.fps = narrow("--fps", *options.fps);
        take_lists(options);
        take_settings(options);
        take_controls(model, options);
        for (const auto& [name, files] : options.pictures) take_picture(name, files);
        for (const auto& [index, file] : options.keyframes)
            take_picture(names_.emplace_back(frames_control(model) + "[" + index + "]"), {file});
        request_.controls = controls_.data(), request_.control_count = controls_.size();
        request_.pictures = pictures_.data(), request_.picture_count = pictures_.size();
    }
    Given(const Given&) = delete;
    Given& operator=(const Given&) = delete;

    [[nodiscard]] const higen_request& request() const { return request_; }

private:
    void take_lists(const Options& options) {
        for (const auto steps : options.steps) {
            if (steps < 1) throw std::runtime_error("steps=" + std::to_string(steps) + ": a whole number from 1");
            steps_.push_back(narrow("--steps", steps));
        }
        for (const auto& curve : options.guidance) guidance_.push_back({curve.data(), curve.size()});
        for (const auto& solver : options.solvers) solvers_.push_back(solver.c_str());
        if (!steps_.empty()) request_.steps = steps_.data(), request_.step_count = steps_.size();
        if (!guidance_.empty()) request_.guidance = guidance_.data(), request_.guidance_count = guidance_.size();
        if (!solvers_.empty()) request_.solvers = solvers_.data(), request_.solver_count = solvers_.size();
    }

    void take_settings(const Options& options) {
        const auto text = [](const std::string& word) { return word.empty() ? nullptr : word.c_str(); };
        for (const auto number : options.windows) windows_.push_back(narrow("--windows", number));
        if (!windows_.empty()) request_.windows = windows_.data(), request_.window_count = windows_.size();
        for (const auto number : options.reuse) reuse_.push_back(narrow("--reuse", number));
        if (!reuse_.empty()) request_.reuse = reuse_.data(), request_.reuse_count = reuse_.size();
        request_.window_noise = text(options.window_noise);
        request_.preset = text(options.preset);
        if (options.inversion) request_.inversion = options.inversion->c_str();
        const auto &interval = options.guidance_interval, &init = options.free_init;
        if (!interval.empty())
            request_.guidance_interval = interval.data(), request_.guidance_interval_count = interval.size();
        if (!init.empty()) request_.free_init = init.data(), request_.free_init_count = init.size();
        request_.free_init_filter = text(options.free_init_filter);
    }

    // A control's kind says whether its value is a text. For an unknown control the library's error lists the names.
    static bool takes_text(const higen_model* model, const std::string& name) {
        for (std::size_t i = 0; i < higen_controls(model); ++i) {
            higen_control_info control = HIGEN_CONTROL_INFO_INIT;
            check(higen_model_control(model, i, &control));
            if (control.name == name) return control.kind == HIGEN_CONTROL_TEXT || control.kind == HIGEN_CONTROL_CHOICE;
        }
        return true;
    }

    void take_controls(const higen_model* model, const Options& options) {
        for (const auto& [name, value] : options.controls) {
            higen_control control{name.c_str(), nullptr, 0, 0, nullptr};
            if (takes_text(model, name)) {
                control.text = value.c_str();
            } else if (value != "unspecified") {
                const auto& own = numbers_.emplace_back(parse_numbers("--control " + name, value));
                control.values = own.data(), control.rows = own.size(), control.columns = 1;
            }
            controls_.push_back(control);
        }
        for (const auto& [name, file] : options.matrices) {
            const auto& own = matrices_.emplace_back(read_matrix(file));
            controls_.push_back({name.c_str(), own.numbers.data(), own.rows, own.columns, nullptr});
        }
    }

    // The model's control for known frames.
    static std::string frames_control(const higen_model* model) {
        for (std::size_t i = 0; i < higen_controls(model); ++i) {
            higen_control_info control = HIGEN_CONTROL_INFO_INIT;
            check(higen_model_control(model, i, &control));
            if (control.kind == HIGEN_CONTROL_FRAMES) return control.name;
        }
        throw std::runtime_error("--keyframe: this model takes no known frames");
    }

    void take_picture(const std::string& name, const std::vector<std::string>& files) {
        auto& rgb = rgb_.emplace_back();
        higen_picture picture{name.c_str(), nullptr, static_cast<std::int32_t>(files.size()), 0, 0};
        for (const auto& file : files) {
            const higen::Image frame(file);
            if (!rgb.empty() && (frame.width != picture.width || frame.height != picture.height))
                throw std::runtime_error(file + ": differs in size from the frames before it");
            picture.width = frame.width, picture.height = frame.height;
            rgb.insert(rgb.end(), frame.rgb.begin(), frame.rgb.end());
        }
        picture.rgb = rgb.data();
        pictures_.push_back(picture);
    }

    higen_request request_{};
    std::vector<std::int32_t> steps_, windows_, reuse_;
    std::vector<higen_curve> guidance_;
    std::vector<const char*> solvers_;
    std::deque<std::vector<double>> numbers_;
    std::deque<Matrix> matrices_;
    std::vector<higen_control> controls_;
    std::deque<std::string> names_;
    std::deque<std::vector<std::uint8_t>> rgb_;
    std::vector<higen_picture> pictures_;
};

struct Run {
    ClipWriter& writer;
    bool quiet;
    std::string error;  // in a callback
};

int on_step(void* user, const higen_step* step) {
    if (!static_cast<const Run*>(user)->quiet)
        std::fprintf(stderr, "\r%-13s %d/%d%s", step->loop, step->index + 1, step->total,
                     step->index + 1 == step->total ? "\n" : "");
    return stopped;
}

int on_frames(void* user, const higen_frames* frames) {
    auto& run = *static_cast<Run*>(user);
    try {
        run.writer.write(frames->rgb, frames->count, frames->total, frames->width, frames->height, frames->fps);
        return stopped;
    } catch (const std::exception& error) {
        run.error = error.what();
        return 1;
    }
}

void on_warning(void* user, const char* message) {
    if (!static_cast<const Run*>(user)->quiet) std::fprintf(stderr, "warning: %s\n", message);
}

void generate(const Options& options) {
    const auto model = open_model(options);
    if (options.list_controls) return print_controls(model.get());
    if (options.info) return print_info(model.get());
    const Given given(model.get(), options);
    ClipWriter writer(options.output, {options.prompt, options.seed});
    Run run{writer, options.quiet, ""};
    const higen_callbacks callbacks = {sizeof(higen_callbacks), &run, on_step, on_frames, on_warning, nullptr};
    const auto status = higen_generate(model.get(), &given.request(), &callbacks);
    if (!run.error.empty()) throw std::runtime_error(run.error);
    check(status);
    writer.finish();
}

}  // namespace

int main(int argc, char** argv) {
    std::signal(SIGINT, stop);  // the work ends after the step and leaves no unfinished file
    std::signal(SIGTERM, stop);
    try {
        const auto options = parse({argv + 1, argv + argc});
        if (options.help) {
            std::fputs(usage, stdout);
        } else {
            generate(options);
        }
        if (std::fflush(stdout) != 0) throw std::runtime_error(std::string("standard output: ") + std::strerror(errno));
        return EXIT_SUCCESS;
    } catch (const std::invalid_argument& error) {
        std::fprintf(stderr, "higen-run: %s\n", error.what());
        return wrong_usage;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "higen-run: %s\n", stopped != 0 ? "stopped" : error.what());
        return stopped != 0 ? interrupted : EXIT_FAILURE;
    }
}
