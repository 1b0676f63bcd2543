// The C interface. No exception leaves it.
#include "c_api.h"

#include <memory>
#include <optional>

#include "request.h"
#include "version.h"

namespace core = higen::core;
using namespace higen::c_api;

namespace {

constexpr std::int32_t most_threads = 1024;  // the same limit as in Python

// What on_step's `state` points to.
struct StepState {
    const core::Pipeline& pipeline;
    const core::Step& step;
    const std::vector<core::Request>& requests;
    core::Cancellation& cancellation;
    std::size_t bytes;
};

// A generation that its model, and the caller's token if there is one, can stop.
class Running {
public:
    Running(const Call& call, const higen_callbacks& calls)
        : of_model_(call.running(), cancellation_),
          token_(calls.token == nullptr ? nullptr : find_token(calls.token)) {
        if (token_) of_token_.emplace(*token_, cancellation_);
    }

    core::Cancellation& cancellation() { return cancellation_; }

private:
    core::Cancellation cancellation_;
    Stoppable::Member of_model_;
    std::shared_ptr<Stoppable> token_;
    std::optional<Stoppable::Member> of_token_;
};

void warn(const higen_callbacks& calls, const std::string& message) {
    if (calls.on_warning != nullptr) calls.on_warning(calls.user, message.c_str());
}

void stop_if(int answer) {
    if (answer != 0) throw core::Error(HIGEN_CANCELLED, "stopped by a callback");
}

// Checks a request; its messages begin with `prefix`.
core::Request checked(const OpenModel& model, const higen_request* request, const char* name,
                      const std::string& prefix, const higen_callbacks& calls) {
    try {
        return core::make_request(model.manifest(), model.reader(), sized(request, name, higen_request{}),
                                  [&](const std::string& message) { warn(calls, prefix + message); });
    } catch (const core::Error& error) {
        throw core::Error(error.status(), prefix + error.what());
    }
}

// Warn of fallbacks to a worse backend; the first call after a fallback gets the warning.
void tell_fallbacks(OpenModel& model, const higen_callbacks& calls) {
    for (const auto& message : model.router->take_warnings()) warn(calls, message);
}

// `running` was made before the requests were checked, so that a cancellation during the checks is not lost.
void make_videos(OpenModel& model, Running& running, const std::vector<core::Request>& requests,
                 const higen_callbacks& calls) {
    running.cancellation().check();
    const auto& first = requests.front();
    const int width = narrow(first.width), height = narrow(first.height), videos = narrow(requests.size());
    const auto on_step = [&](const core::Step& step) {
        tell_fallbacks(model, calls);
        if (calls.on_step == nullptr) return;
        const auto frames = step.previous.shape()[2];
        const StepState state{model.pipeline, step, requests, running.cancellation(),
                              requests.size() * static_cast<std::size_t>(frames) * first.width * first.height * 3};
        const std::string loop(step.loop), stage(step.stage);
        higen_step shown{};
        shown.struct_size = sizeof(higen_step);
        shown.loop = loop.c_str();
        shown.stage = stage.c_str();
        shown.index = narrow(step.index);
        shown.total = narrow(step.total);
        shown.t = step.t;
        shown.frames = narrow(frames);
        shown.width = width;
        shown.height = height;
        shown.state = &state;
        shown.videos = videos;
        stop_if(calls.on_step(calls.user, &shown));
    };
    const auto on_frames = [&](const core::Frames& frames) {
        tell_fallbacks(model, calls);
        if (calls.on_frames == nullptr) return;
        higen_frames shown{};
        shown.struct_size = sizeof(higen_frames);
        shown.rgb = frames.rgb.data();
        shown.first = narrow(frames.first);
        shown.count = narrow(frames.count);
        shown.total = narrow(frames.total);
        shown.width = width;
        shown.height = height;
        shown.fps = first.fps;
        shown.video = narrow(frames.video);
        stop_if(calls.on_frames(calls.user, &shown));
    };
    model.pipeline.generate(requests, on_step, on_frames, running.cancellation());
}

}  // namespace

const char* higen_version(void) { return HIGEN_VERSION; }

const char* higen_status_name(higen_status status) {
    switch (status) {
        case HIGEN_OK: return "HIGEN_OK";
        case HIGEN_ERROR_REQUEST: return "HIGEN_ERROR_REQUEST";
        case HIGEN_ERROR_CLEANING: return "HIGEN_ERROR_CLEANING";
        case HIGEN_ERROR_MANIFEST: return "HIGEN_ERROR_MANIFEST";
        case HIGEN_ERROR_INTEGRITY: return "HIGEN_ERROR_INTEGRITY";
        case HIGEN_ERROR_UNAVAILABLE: return "HIGEN_ERROR_UNAVAILABLE";
        case HIGEN_ERROR_BACKEND: return "HIGEN_ERROR_BACKEND";
        case HIGEN_ERROR_MEMORY: return "HIGEN_ERROR_MEMORY";
        case HIGEN_ERROR_INTERNAL: return "HIGEN_ERROR_INTERNAL";
        case HIGEN_CANCELLED: return "HIGEN_CANCELLED";
        case HIGEN_ERROR_CLOSED: return "HIGEN_ERROR_CLOSED";
    }
    return "unknown status";
}

const char* higen_last_error(void) { return last_error().c_str(); }

higen_status higen_model_open(const char* path, const higen_model_options* options, higen_model** model) {
    if (model != nullptr) *model = nullptr;
    return guarded([&] {
        require(path, "path");
        require(model, "model");
        const auto given = sized(options, "options", higen_model_options HIGEN_MODEL_OPTIONS_INIT);
        if (given.threads < 0 || given.threads > most_threads)
            core::fail_request("threads=" + std::to_string(given.threads) + ": 0 to " + std::to_string(most_threads));
        core::BackendOptions backend;
        if (given.provider != nullptr) backend.provider = given.provider;
        if (given.provider_library != nullptr) backend.provider_library = given.provider_library;
        backend.threads = given.threads;
        backend.verify = given.skip_verification == 0;
        if (given.backend != nullptr) backend.backend = given.backend;
        if (given.precision != nullptr) {
            core::check_precision(given.precision);
            backend.precision = given.precision;
        }
        *model = add_model(std::make_unique<OpenModel>(std::filesystem::u8path(path), backend));
    });
}

void higen_model_close(higen_model* model) {
    quietly([&] { close_model(model); });
}

higen_status higen_tokenize(const higen_model* model, const char* text, int64_t* ids, size_t count) {
    return guarded([&] {
        const Call call(model);
        require(text, "text");
        require(ids, "ids");
        if (!call.model().tokenizer) core::fail_request(call.model().manifest().name + " reads no text");
        const auto tokens = call.model().tokenizer->encode(text);
        if (count != tokens.size())
            core::fail_request("count=" + std::to_string(count) + ": the model's context_length, " +
                               std::to_string(tokens.size()));
        std::copy(tokens.begin(), tokens.end(), ids);
    });
}

higen_status higen_request_init(const higen_model* model, higen_request* request) {
    return guarded([&] {
        const Call call(model);
        require(request, "request");
        const auto& sizes = call.model().manifest().sizes;
        *request = higen_request{};
        request->struct_size = sizeof(higen_request);
        request->frames = narrow(sizes.frames);
        request->width = narrow(sizes.width);
        request->height = narrow(sizes.height);
        request->fps = narrow(sizes.fps);
    });
}

higen_status higen_generate(higen_model* model, const higen_request* request, const higen_callbacks* callbacks) {
    return guarded([&] {
        const Call call(model);
        auto& open = call.model();
        require(request, "request");
        const auto calls = sized(callbacks, "callbacks", higen_callbacks HIGEN_CALLBACKS_INIT);
        Running running(call, calls);
        make_videos(open, running, {checked(open, request, "request", "", calls)}, calls);
    });
}

higen_status higen_generate_batch(higen_model* model, const higen_request* const* requests, size_t count,
                                  const higen_callbacks* callbacks) {
    return guarded([&] {
        const Call call(model);
        auto& open = call.model();
        require(requests, "requests");
        if (count == 0) core::fail_request("count=0: one request or more");
        const auto calls = sized(callbacks, "callbacks", higen_callbacks HIGEN_CALLBACKS_INIT);
        Running running(call, calls);
        std::vector<core::Request> given;
        for (std::size_t i = 0; i < count; ++i) {
            const auto name = "requests[" + std::to_string(i) + "]";
            require(requests[i], name.c_str());
            given.push_back(checked(open, requests[i], name.c_str(), name + ": ", calls));
        }
        core::check_batch(open.manifest(), given);
        make_videos(open, running, given, calls);
    });
}

higen_status higen_step_preview(const higen_step* step, uint8_t* rgb, size_t size) {
    return guarded([&] {
        require(step, "step");
        require(step->state, "step->state");
        require(rgb, "rgb");
        const auto& state = *static_cast<const StepState*>(step->state);
        if (size != state.bytes)
            core::fail_request("size=" + std::to_string(size) +
                               ": videos x frames x height x width x 3 = " + std::to_string(state.bytes));
        state.pipeline.preview(
            state.step.previous, state.requests,
            [&](const core::Frames& frames) {
                const auto frame = frames.rgb.size() / frames.count;
                const auto place = frames.video * frames.total + frames.first;
                std::copy(frames.rgb.begin(), frames.rgb.end(), rgb + place * frame);
            },
            state.cancellation);
    });
}

higen_status higen_cancel(higen_model* model) {
    return guarded([&] { Call(model).running().stop(); });
}

higen_status higen_token_create(higen_token** token) {
    if (token != nullptr) *token = nullptr;
    return guarded([&] {
        require(token, "token");
        *token = add_token();
    });
}

higen_status higen_token_cancel(higen_token* token) {
    return guarded([&] { find_token(token)->stop_for_good("cancelled by its token"); });
}

void higen_token_free(higen_token* token) {
    quietly([&] { free_token(token); });
}
