// The C interface: no exception passes it.
#include <algorithm>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <vector>

#include "bundle.h"
#include "errors.h"
#include "higen/higen.h"
#include "pipeline.h"
#include "request.h"
#include "router.h"
#include "tokenizer.h"
#include "version.h"

namespace core = higen::core;

struct higen_model {
    core::Bundle bundle;
    core::Tokenizer tokenizer;
    std::unique_ptr<core::Router> router;
    core::Pipeline pipeline;
    mutable std::mutex mutex;
    mutable std::set<std::string> reports;  // those handed out
    std::list<core::Cancellation*> running;

    higen_model(const std::filesystem::path& path, const core::BackendOptions& options)
        : bundle(path, options.verify),
          tokenizer(core::read_file(bundle.file("tokenizer.json")), (path / "tokenizer.json").u8string(),
                    bundle.config().text),
          router(core::make_router(bundle, options)),
          pipeline(bundle.config(), *router) {
        pipeline.prepare();
    }

    // What runs each stage by now; the text lives as long as the model.
    [[nodiscard]] const char* report() const {
        const std::lock_guard lock(mutex);
        return reports.insert(router->report()).first->c_str();
    }
};

namespace {

// What on_step's `state` points to.
struct StepState {
    const core::Pipeline& pipeline;
    const core::Step& step;
    core::Cancellation& cancellation;
    std::size_t bytes;
};

// Registers a generation with its model, for higen_cancel.
class Running {
public:
    explicit Running(higen_model& model) : model_(model) {
        const std::lock_guard lock(model_.mutex);
        place_ = model_.running.insert(model_.running.end(), &cancellation_);
    }
    ~Running() {
        const std::lock_guard lock(model_.mutex);
        model_.running.erase(place_);
    }
    Running(const Running&) = delete;
    Running& operator=(const Running&) = delete;

    core::Cancellation& cancellation() { return cancellation_; }

private:
    higen_model& model_;
    core::Cancellation cancellation_;
    std::list<core::Cancellation*>::iterator place_;
};

std::string& last_error() {
    thread_local std::string message;
    return message;
}

template <typename Work>
higen_status guarded(const Work& work) noexcept {
    try {
        last_error().clear();
        try {
            work();
            return HIGEN_OK;
        } catch (const core::Error& error) {
            last_error() = error.what();
            return error.status();
        } catch (const std::bad_alloc&) {
            last_error() = "out of memory";
            return HIGEN_ERROR_MEMORY;
        } catch (const std::length_error&) {
            last_error() = "out of memory: an array would be larger than this machine can address";
            return HIGEN_ERROR_MEMORY;
        } catch (const std::exception& error) {
            last_error() = std::string("an error of this library: ") + error.what();
            return HIGEN_ERROR_INTERNAL;
        }
    } catch (...) {  // no memory for the message either
        return HIGEN_ERROR_MEMORY;
    }
}

void require(const void* pointer, const char* name) {
    if (pointer == nullptr) core::fail_request(std::string(name) + " is NULL");
}

// A caller's structure in this version's layout; it may be an older, smaller one.
template <typename T>
T sized(const T* given, const char* name, T standard) {
    if (given == nullptr) return standard;
    const std::size_t size = given->struct_size;
    if (size < sizeof(std::size_t) || size > (1U << 20))
        core::fail_request(std::string(name) + ".struct_size=" + std::to_string(size) +
                           ": initialise the structure with its macro or function");
    std::memcpy(&standard, given, std::min(size, sizeof(T)));
    return standard;
}

template <typename T>
void store(const T& value, T* out, const char* name) {
    const std::size_t size = out->struct_size;
    if (size < sizeof(std::size_t)) core::fail_request(std::string(name) + ".struct_size is not set");
    std::memcpy(out, &value, std::min(size, sizeof(T)));
    out->struct_size = size;
}

int narrow(std::int64_t value) {
    return static_cast<int>(std::clamp<std::int64_t>(value, INT32_MIN, INT32_MAX));
}

int narrow(std::size_t value) { return narrow(static_cast<std::int64_t>(std::min<std::size_t>(value, INT32_MAX))); }

void warn(const higen_callbacks& calls, const std::string& message) {
    if (calls.on_warning != nullptr) calls.on_warning(calls.user, message.c_str());
}

void stop_if(int answer) {
    if (answer != 0) throw core::Error(HIGEN_CANCELLED, "stopped by a callback");
}

// A request that has been checked; `prefix` stands before its messages.
core::Request checked(const higen_model& model, const higen_request* request, const char* name,
                      const std::string& prefix, const higen_callbacks& calls) {
    try {
        return core::make_request(model.bundle.config(), model.tokenizer, sized(request, name, higen_request{}),
                                  [&](const std::string& message) { warn(calls, prefix + message); });
    } catch (const core::Error& error) {
        throw core::Error(error.status(), prefix + error.what());
    }
}

// Fallbacks to a worse backend are told to whoever works on the model first.
void tell_fallbacks(higen_model& model, const higen_callbacks& calls) {
    for (const auto& message : model.router->take_warnings()) warn(calls, message);
}

// `running` was there before the requests were checked, so that a cancellation from then on counts.
void make_videos(higen_model& model, Running& running, const std::vector<core::Request>& requests,
                 const higen_callbacks& calls) {
    running.cancellation().check();
    const auto& first = requests.front();
    const int width = narrow(first.width), height = narrow(first.height), videos = narrow(requests.size());
    const auto on_step = [&](const core::Step& step) {
        tell_fallbacks(model, calls);
        if (calls.on_step == nullptr) return;
        const auto frames = step.previous.shape()[2];
        const StepState state{model.pipeline, step, running.cancellation(),
                              requests.size() * static_cast<std::size_t>(frames) * first.width * first.height * 3};
        const std::string stage(step.stage);
        const higen_step shown{sizeof(higen_step), stage.c_str(), narrow(step.index), narrow(step.total),
                               narrow(step.t), narrow(frames), width, height, &state, videos};
        stop_if(calls.on_step(calls.user, &shown));
    };
    const auto on_frames = [&](const core::Frames& frames) {
        tell_fallbacks(model, calls);
        if (calls.on_frames == nullptr) return;
        const higen_frames shown{sizeof(higen_frames), frames.rgb.data(), narrow(frames.first), narrow(frames.count),
                                 narrow(frames.total), width, height, first.fps, narrow(frames.video)};
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
        if (given.threads < 0) core::fail_request("threads=" + std::to_string(given.threads) + ": 0 or more");
        core::BackendOptions backend;
        if (given.provider != nullptr) backend.provider = given.provider;
        if (given.provider_library != nullptr) backend.provider_library = given.provider_library;
        backend.threads = given.threads;
        backend.verify = given.skip_verification == 0;
        if (given.backend != nullptr) backend.backend = given.backend;
        if (given.precision != nullptr) backend.precision = given.precision;
        *model = new higen_model(std::filesystem::u8path(path), backend);
    });
}

void higen_model_close(higen_model* model) { delete model; }

higen_status higen_model_describe(const higen_model* model, higen_model_info* info) {
    return guarded([&] {
        require(model, "model");
        require(info, "info");
        const auto& config = model->bundle.config();
        higen_model_info found = HIGEN_MODEL_INFO_INIT;
        found.name = config.name.c_str();
        found.licence = config.licence.c_str();
        found.report = model->report();
        found.size_multiple = narrow(config.size_multiple());
        found.max_frames = narrow(config.max_frames);
        found.max_steps = narrow(config.schedule.timesteps);
        found.context_length = narrow(config.text.context_length);
        found.pad_id = narrow(config.text.pad_id);
        found.appearance_columns = narrow(config.unet.appearance_columns);
        found.optional_cues = config.optional_cues ? 1 : 0;
        found.prompt_count = config.prompts.size();
        store(found, info, "info");
    });
}

const char* higen_model_prompt(const higen_model* model, size_t index) {
    if (model == nullptr || index >= model->bundle.config().prompts.size()) return nullptr;
    return model->bundle.config().prompts[index].c_str();
}

higen_status higen_tokenize(const higen_model* model, const char* text, int64_t* ids, size_t count) {
    return guarded([&] {
        require(model, "model");
        require(text, "text");
        require(ids, "ids");
        const auto tokens = model->tokenizer.encode(text);
        if (count != tokens.size())
            core::fail_request("count=" + std::to_string(count) + ": the context length, " +
                               std::to_string(tokens.size()));
        std::copy(tokens.begin(), tokens.end(), ids);
    });
}

higen_status higen_request_init(const higen_model* model, higen_request* request) {
    return guarded([&] {
        require(model, "model");
        require(request, "request");
        const auto& defaults = model->bundle.config().defaults;
        *request = higen_request{};
        request->struct_size = sizeof(higen_request);
        request->frames = narrow(defaults.frames);
        request->width = narrow(defaults.width);
        request->height = narrow(defaults.height);
        request->fps = narrow(defaults.fps);
        request->solver = defaults.solver.c_str();
        request->offset_noise = defaults.offset_noise;
        for (int i = 0; i < 2; ++i) {
            const auto k = static_cast<std::size_t>(i);
            request->steps[i] = narrow(defaults.steps[k]);
            request->guidance[i] = defaults.guidance[k];
        }
    });
}

higen_status higen_generate(higen_model* model, const higen_request* request, const higen_callbacks* callbacks) {
    return guarded([&] {
        require(model, "model");
        require(request, "request");
        const auto calls = sized(callbacks, "callbacks", higen_callbacks HIGEN_CALLBACKS_INIT);
        Running running(*model);
        make_videos(*model, running, {checked(*model, request, "request", "", calls)}, calls);
    });
}

higen_status higen_generate_batch(higen_model* model, const higen_request* const* requests, size_t count,
                                  const higen_callbacks* callbacks) {
    return guarded([&] {
        require(model, "model");
        require(requests, "requests");
        if (count == 0) core::fail_request("count=0: one request or more");
        const auto calls = sized(callbacks, "callbacks", higen_callbacks HIGEN_CALLBACKS_INIT);
        Running running(*model);
        std::vector<core::Request> given;
        for (std::size_t i = 0; i < count; ++i) {
            const auto name = "requests[" + std::to_string(i) + "]";
            require(requests[i], name.c_str());
            given.push_back(checked(*model, requests[i], name.c_str(), name + ": ", calls));
        }
        core::check_batch(given);
        make_videos(*model, running, given, calls);
    });
}

higen_status higen_step_preview(const higen_step* step, uint8_t* rgb, size_t size) {
    return guarded([&] {
        require(step, "step");
        require(step->state, "step->state");
        require(rgb, "rgb");
        const auto& state = *static_cast<const StepState*>(step->state);
        if (size != state.bytes)
            core::fail_request("size=" + std::to_string(size) + ": videos x frames x height x width x 3 = " +
                               std::to_string(state.bytes));
        state.pipeline.decode(
            state.step.previous,
            [&](const core::Frames& frames) {
                const auto frame = frames.rgb.size() / frames.count;
                const auto place = frames.video * frames.total + frames.first;
                std::copy(frames.rgb.begin(), frames.rgb.end(), rgb + place * frame);
            },
            state.cancellation);
    });
}

higen_status higen_cancel(higen_model* model) {
    return guarded([&] {
        require(model, "model");
        const std::lock_guard lock(model->mutex);
        for (auto* cancellation : model->running) cancellation->cancel();
    });
}
