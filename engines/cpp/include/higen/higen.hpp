// higen for C++17: the C interface with owning objects and exceptions. Header only.
//
//     higen::Model model("path/to/model");
//     higen::Request request(model, "a whale flapping its tail on a blue sky");
//     request->seed = 7;
//     higen::Video video = model.generate(request);   // video.rgb: frames x height x width x 3 bytes
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "higen/higen.h"

namespace higen {

// A status that is not HIGEN_OK, with its message.
class Error : public std::runtime_error {
public:
    Error(higen_status status, const std::string& message) : std::runtime_error(message), status_(status) {}

    [[nodiscard]] higen_status status() const noexcept { return status_; }

private:
    higen_status status_;
};

// Throws Error for any status but HIGEN_OK.
inline void check(higen_status status) {
    if (status != HIGEN_OK) throw Error(status, higen_last_error());
}

// A finished clip: RGB, `count` frames of height x width pixels.
struct Video {
    std::vector<std::uint8_t> rgb;
    int count = 0;
    int width = 0;
    int height = 0;
    int fps = 0;
};

// What a generation reports. Each may be empty; on_step returns whether to go on. Exceptions pass to the caller.
struct Callbacks {
    std::function<bool(const higen_step&)> on_step;
    std::function<void(const std::string&)> on_warning;
};

class Request;

// An opened model directory.
class Model {
public:
    explicit Model(const std::string& path, higen_model_options options = HIGEN_MODEL_OPTIONS_INIT) {
        higen_model* model = nullptr;
        check(higen_model_open(path.c_str(), &options, &model));
        model_.reset(model);
    }

    [[nodiscard]] higen_model_info info() const {
        higen_model_info info = HIGEN_MODEL_INFO_INIT;
        check(higen_model_describe(model_.get(), &info));
        return info;
    }

    // Prompts the model is known to draw well.
    [[nodiscard]] std::vector<std::string> prompts() const {
        std::vector<std::string> prompts(info().prompt_count);
        for (std::size_t i = 0; i < prompts.size(); ++i) prompts[i] = higen_model_prompt(model_.get(), i);
        return prompts;
    }

    [[nodiscard]] std::vector<std::int64_t> tokenize(const std::string& text) const {
        std::vector<std::int64_t> ids(static_cast<std::size_t>(info().context_length));
        check(higen_tokenize(model_.get(), text.c_str(), ids.data(), ids.size()));
        return ids;
    }

    [[nodiscard]] Video generate(const Request& request, const Callbacks& callbacks = {});

    // A video of each request, made in one batch: see higen_generate_batch.
    [[nodiscard]] std::vector<Video> generate(const std::vector<Request>& requests, const Callbacks& callbacks = {});

    // Stop what runs on this model, from any thread.
    void cancel() { check(higen_cancel(model_.get())); }

    [[nodiscard]] higen_model* get() const { return model_.get(); }

private:
    struct Close {
        void operator()(higen_model* model) const { higen_model_close(model); }
    };
    std::unique_ptr<higen_model, Close> model_;
};

// A request with the model's defaults; the fields of higen_request are behind `->`. Keep alive what they point to.
class Request {
public:
    Request(const Model& model, std::string prompt) : prompt_(std::move(prompt)) {
        check(higen_request_init(model.get(), &request_));
    }

    higen_request* operator->() { return &request_; }

    // The request as the C interface takes it.
    [[nodiscard]] higen_request get() const {
        auto request = request_;
        if (request.prompt == nullptr && request.tokens == nullptr) request.prompt = prompt_.c_str();
        return request;
    }

private:
    std::string prompt_;
    higen_request request_{};
};

inline Video Model::generate(const Request& request, const Callbacks& callbacks) {
    return std::move(generate(std::vector<Request>{request}, callbacks).front());
}

inline std::vector<Video> Model::generate(const std::vector<Request>& requests, const Callbacks& callbacks) {
    struct State {
        const Callbacks& callbacks;
        std::vector<Video> videos;
        std::exception_ptr thrown;
    } state{callbacks, std::vector<Video>(requests.size()), nullptr};
    // An exception must not pass through the C library: it is kept, and thrown again on this side.
    static constexpr auto keep = [](void* user, auto&& work) -> int {
        auto& own = *static_cast<State*>(user);
        if (own.thrown) return 1;  // by a warning, which has no answer of its own
        try {
            return work(own);
        } catch (...) {
            own.thrown = std::current_exception();
            return 1;
        }
    };
    higen_callbacks calls = HIGEN_CALLBACKS_INIT;
    calls.user = &state;
    calls.on_step = [](void* user, const higen_step* step) {
        return keep(user, [&](State& own) { return own.callbacks.on_step && !own.callbacks.on_step(*step) ? 1 : 0; });
    };
    calls.on_frames = [](void* user, const higen_frames* frames) {
        return keep(user, [&](State& own) {
            const auto size = static_cast<std::size_t>(frames->count) * static_cast<std::size_t>(frames->width) *
                              static_cast<std::size_t>(frames->height) * 3;
            auto& video = own.videos[static_cast<std::size_t>(frames->video)];
            video.rgb.insert(video.rgb.end(), frames->rgb, frames->rgb + size);
            video.count = frames->total;
            video.width = frames->width;
            video.height = frames->height;
            video.fps = frames->fps;
            return 0;
        });
    };
    calls.on_warning = [](void* user, const char* message) {
        keep(user, [&](State& own) {
            if (own.callbacks.on_warning) own.callbacks.on_warning(message);
            return 0;
        });
    };
    std::vector<higen_request> given;
    std::vector<const higen_request*> pointers;
    for (const auto& request : requests) given.push_back(request.get());
    for (const auto& request : given) pointers.push_back(&request);
    const auto status = given.size() == 1 ? higen_generate(model_.get(), given.data(), &calls)
                                          : higen_generate_batch(model_.get(), pointers.data(), given.size(), &calls);
    if (state.thrown) std::rethrow_exception(state.thrown);
    check(status);
    return std::move(state.videos);
}

}  // namespace higen
