// higen-run: a video from a text, on the library's public interface alone.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "higen/higen.h"
#include "options.h"
#include "output.h"

namespace {

constexpr int wrong_usage = 2, interrupted = 130;

volatile std::sig_atomic_t stopped = 0;

extern "C" void stop(int) { stopped = 1; }

void check(higen_status status) {
    if (status != HIGEN_OK) throw std::runtime_error(higen_last_error());
}

struct Close {
    void operator()(higen_model* model) const { higen_model_close(model); }
};
using Model = std::unique_ptr<higen_model, Close>;

Model open_model(const Options& options) {
    higen_model_options given = HIGEN_MODEL_OPTIONS_INIT;
    given.backend = options.backend.c_str();
    given.precision = options.precision.empty() ? nullptr : options.precision.c_str();
    given.provider = options.provider.c_str();
    given.provider_library = options.provider_library.empty() ? nullptr : options.provider_library.c_str();
    given.threads = static_cast<std::int32_t>(options.threads);
    given.skip_verification = options.verify ? 0 : 1;
    higen_model* model = nullptr;
    check(higen_model_open(options.model.c_str(), &given, &model));
    return Model(model);
}

void print_info(const higen_model* model) {
    higen_model_info info = HIGEN_MODEL_INFO_INIT;
    higen_request standard;
    check(higen_model_describe(model, &info));
    check(higen_request_init(model, &standard));
    std::printf("%s (%s)\n", info.name, info.licence);
    std::printf("default: %d frames of %dx%d at %d a second, %d and %d steps of %s, guidance %g and %g\n",
                standard.frames, standard.width, standard.height, standard.fps, standard.steps[0], standard.steps[1],
                standard.solver, standard.guidance[0], standard.guidance[1]);
    std::printf("at most %d frames; sizes in multiples of %d; texts of %d tokens; motion and appearance %s\n%s\n",
                info.max_frames, info.size_multiple, info.context_length,
                info.optional_cues != 0 ? "may be left out" : "are always given", info.report);
    for (std::size_t i = 0; i < info.prompt_count; ++i) std::printf("  %s\n", higen_model_prompt(model, i));
}

std::int32_t narrow(const char* name, std::int64_t value) {
    if (value < INT32_MIN || value > INT32_MAX)
        throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": too large");
    return static_cast<std::int32_t>(value);
}

higen_cue cue(const CueOption& given) {
    if (!given) return {HIGEN_CUE_DEFAULT, nullptr, 0, 0};
    if (given->empty()) return {HIGEN_CUE_UNSPECIFIED, nullptr, 0, 0};
    return {HIGEN_CUE_GIVEN, given->data(), given->size(), 1};
}

// `options` and `key_frame` must outlive the request.
higen_request make_request(const higen_model* model, const Options& options, const Picture& key_frame) {
    higen_request request;
    check(higen_request_init(model, &request));
    request.prompt = options.prompt.c_str();
    request.negative_prompt = options.negative_prompt.c_str();
    if (options.tokens) request.tokens = options.tokens->data(), request.token_count = options.tokens->size();
    request.seed = options.seed;
    for (std::size_t i = 0; i < 2; ++i) {
        if (!options.steps.empty()) request.steps[i] = narrow("--steps", options.steps[i % options.steps.size()]);
        if (!options.guidance.empty()) request.guidance[i] = options.guidance[i % options.guidance.size()];
    }
    if (options.solver) request.solver = options.solver->c_str();
    if (options.frames) request.frames = narrow("--frames", *options.frames);
    if (options.width) request.width = narrow("--width", *options.width);
    if (options.height) request.height = narrow("--height", *options.height);
    if (options.fps) request.fps = narrow("--fps", *options.fps);
    if (options.offset_noise) request.offset_noise = *options.offset_noise;
    request.motion = cue(options.motion);
    request.appearance = cue(options.appearance);
    if (!key_frame.rgb.empty()) {
        if (key_frame.width != request.width || key_frame.height != request.height)
            throw std::invalid_argument("--image is " + std::to_string(key_frame.width) + "x" +
                                        std::to_string(key_frame.height) + ": the video's size, " +
                                        std::to_string(request.width) + "x" + std::to_string(request.height));
        request.key_frame = key_frame.rgb.data();
    }
    return request;
}

struct Run {
    ClipWriter& writer;
    bool quiet;
    std::string error;  // of a callback
};

int on_step(void* user, const higen_step* step) {
    if (!static_cast<const Run*>(user)->quiet)
        std::fprintf(stderr, "\r%-13s %d/%d%s", step->stage, step->index + 1, step->total,
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
    if (options.info) return print_info(model.get());
    const auto key_frame = options.image.empty() ? Picture() : read_ppm(options.image);
    const auto request = make_request(model.get(), options, key_frame);
    ClipWriter writer(options.output);
    Run run{writer, options.quiet, ""};
    const higen_callbacks callbacks = {sizeof(higen_callbacks), &run, on_step, on_frames, on_warning};
    const auto status = higen_generate(model.get(), &request, &callbacks);
    if (!run.error.empty()) throw std::runtime_error(run.error);
    check(status);
    writer.finish();
}

}  // namespace

int main(int argc, char** argv) {
    std::signal(SIGINT, stop);  // the work ends after its step, and no half-written file stays
    std::signal(SIGTERM, stop);
    try {
        const auto options = parse({argv + 1, argv + argc});
        if (options.help) {
            std::fputs(usage, stdout);
            return EXIT_SUCCESS;
        }
        generate(options);
        return EXIT_SUCCESS;
    } catch (const std::invalid_argument& error) {
        std::fprintf(stderr, "higen-run: %s\n", error.what());
        return wrong_usage;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "higen-run: %s\n", stopped != 0 ? "stopped" : error.what());
        return stopped != 0 ? interrupted : EXIT_FAILURE;
    }
}
