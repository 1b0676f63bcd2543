// higen for C++17: the C interface with owning objects and exceptions. Header only.
//
//     higen::Model model("path/to/model");
//     higen::Request request(model, "a whale flapping its tail on a blue sky");
//     request->seed = 7;
//     request.steps({20}).set("NAME", 0.5);           // a control of the model: see model.controls()
//     higen::Video video = model.generate(request);   // video.rgb: frames x height x width x 3 bytes
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
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

// A picture from a PNG, JPEG or binary PPM file; see higen_image_open.
struct Image {
    std::vector<std::uint8_t> rgb;
    int width = 0;
    int height = 0;

    explicit Image(const std::string& path) {
        struct Opened {
            higen_image image = HIGEN_IMAGE_INIT;
            ~Opened() { higen_image_free(&image); }
        } opened;
        check(higen_image_open(path.c_str(), &opened.image));
        width = opened.image.width;
        height = opened.image.height;
        rgb.assign(opened.image.rgb, opened.image.rgb + std::size_t{3} * static_cast<std::size_t>(width) *
                                                            static_cast<std::size_t>(height));
    }
};

// Stops the generations that it is given to, from any thread, now and later. Copies share one token.
class Token {
public:
    Token() {
        higen_token* token = nullptr;
        check(higen_token_create(&token));
        token_.reset(token, higen_token_free);
    }

    void cancel() const { check(higen_token_cancel(token_.get())); }

    [[nodiscard]] higen_token* get() const { return token_.get(); }

private:
    std::shared_ptr<higen_token> token_;
};

// What a generation reports, and what stops it. Each may be empty. on_step returns whether to continue. The caller gets
// exceptions that they throw.
struct Callbacks {
    std::function<bool(const higen_step&)> on_step;
    std::function<void(const std::string&)> on_warning;
    std::optional<Token> token;
};

class Request;

// An opened model directory. Several threads may call all functions at once.
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

    // Prompts that work well with the model.
    [[nodiscard]] std::vector<std::string> prompts() const {
        std::vector<std::string> prompts(info().prompt_count);
        for (std::size_t i = 0; i < prompts.size(); ++i) prompts[i] = higen_model_prompt(model_.get(), i);
        return prompts;
    }

    // The denoising loops, in order.
    [[nodiscard]] std::vector<higen_loop_info> loops() const {
        std::vector<higen_loop_info> loops(info().loop_count, higen_loop_info HIGEN_LOOP_INFO_INIT);
        for (std::size_t i = 0; i < loops.size(); ++i) check(higen_model_loop(model_.get(), i, &loops[i]));
        return loops;
    }

    // The model's presets.
    [[nodiscard]] std::vector<higen_preset_info> presets() const {
        std::vector<higen_preset_info> presets(info().preset_count, higen_preset_info HIGEN_PRESET_INFO_INIT);
        for (std::size_t i = 0; i < presets.size(); ++i) check(higen_model_preset(model_.get(), i, &presets[i]));
        return presets;
    }

    // What a request may set for this model.
    [[nodiscard]] std::vector<higen_control_info> controls() const {
        std::vector<higen_control_info> controls(higen_controls(model_.get()),
                                                 higen_control_info HIGEN_CONTROL_INFO_INIT);
        for (std::size_t i = 0; i < controls.size(); ++i) check(higen_model_control(model_.get(), i, &controls[i]));
        return controls;
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

    // Stop what runs on this model, wait for it, and free the model, from any thread; see higen_model_close. Every
    // later call throws HIGEN_ERROR_CLOSED.
    void close() { higen_model_close(model_.get()); }

    [[nodiscard]] higen_model* get() const { return model_.get(); }

private:
    struct Close {
        void operator()(higen_model* model) const { higen_model_close(model); }
    };
    std::unique_ptr<higen_model, Close> model_;
};

// A request with the model's defaults. `->` gives the plain fields of higen_request; keep alive what they point to. The
// functions below set lists, controls and pictures, and keep copies.
class Request {
public:
    Request(const Model& model, std::string prompt) : prompt_(std::move(prompt)) {
        check(higen_request_init(model.get(), &request_));
    }

    higen_request* operator->() { return &request_; }

    // Steps: one number for every loop, or one per loop; 0 is that loop's default.
    Request& steps(std::vector<std::int32_t> steps) {
        steps_ = std::move(steps);
        return *this;
    }

    // Guidance: one list for every loop, or one per loop. A list has one number, or one per frame; empty is the
    // default.
    Request& guidance(std::vector<std::vector<double>> guidance) {
        guidance_ = std::move(guidance);
        return *this;
    }
    Request& guidance(double scale) { return guidance(std::vector<std::vector<double>>{{scale}}); }

    // Start and end of the rows with guidance, as fractions from 0 to 1: two numbers for every loop, or two per loop.
    Request& guidance_interval(std::vector<double> parts) {
        interval_ = std::move(parts);
        return *this;
    }

    // Windows of a longer clip: length and stride, or only the length; 0 is the whole clip at once. `noise`: "fresh",
    // "shuffled" or "repeated"; "" is the model's default.
    Request& windows(std::vector<std::int32_t> numbers, std::string noise = "") {
        windows_ = std::move(numbers), window_noise_ = std::move(noise);
        return *this;
    }

    // FreeInit: iterations, stop frequencies in space and time, order. The last three may be left out. `filter`:
    // "butterworth" (also ""), "gaussian" or "ideal".
    Request& free_init(std::vector<double> numbers, std::string filter = "") {
        free_init_ = std::move(numbers), free_init_filter_ = std::move(filter);
        return *this;
    }

    // With the number n, the whole network runs in every n-th row, and the other rows reuse its deep features. One
    // number for every loop, or one per loop.
    Request& reuse(std::vector<std::int32_t> every) {
        reuse_ = std::move(every);
        return *this;
    }

    // A preset of the model: it sets the steps and guidance that the request leaves out, and the stretch of the loops.
    // A request that sets only prompt, seed, frames, sizes and rate has the model's usual preset.
    Request& preset(std::string name) {
        preset_ = std::move(name);
        return *this;
    }

    // A text that describes the picture or clip from which a loop begins ("": the empty text). Its latents are inverted
    // into noise, and no noise is added.
    Request& inversion(std::string text) {
        inversion_ = std::move(text);
        return *this;
    }

    // Solvers: one name for every loop, or one per loop; "" is that loop's default.
    Request& solvers(std::vector<std::string> names) {
        solvers_ = std::move(names);
        return *this;
    }

    // A control with numbers: one number, a list, or a matrix with `columns` columns.
    Request& set(const std::string& control, std::vector<double> numbers, std::size_t columns = 1) {
        return put({control, std::move(numbers), columns, std::nullopt});
    }
    Request& set(const std::string& control, double number) { return set(control, std::vector<double>{number}); }
    // A text or a choice.
    Request& text(const std::string& control, const std::string& value) { return put({control, {}, 1, value}); }
    // Leave an optional control unspecified.
    Request& unspecified(const std::string& control) { return put({control, {}, 1, std::nullopt}); }

    // A picture or clip: RGB of frames x height x width pixels.
    Request& picture(const std::string& control, std::vector<std::uint8_t> rgb, int width, int height, int frames = 1) {
        pictures_.push_back({control, std::move(rgb), width, height, frames});
        return *this;
    }
    Request& picture(const std::string& control, Image image) {
        return picture(control, std::move(image.rgb), image.width, image.height);
    }

    // A frame that the clip must pass through, for a control of kind frames. `index`: from 0, or negative; -1 is the
    // last.
    Request& keyframe(const std::string& control, std::int64_t index, Image image) {
        return picture(control + "[" + std::to_string(index) + "]", std::move(image));
    }

    // The request for the C interface. It is valid until this object is changed or freed.
    [[nodiscard]] const higen_request& get() {
        flat_ = {};
        flat_.request = request_;
        auto& made = flat_.request;
        if (made.prompt == nullptr && made.tokens == nullptr) made.prompt = prompt_.c_str();
        if (!steps_.empty()) made.steps = steps_.data(), made.step_count = steps_.size();
        for (const auto& curve : guidance_)
            flat_.guidance.push_back({curve.empty() ? nullptr : curve.data(), curve.size()});
        if (!guidance_.empty()) made.guidance = flat_.guidance.data(), made.guidance_count = flat_.guidance.size();
        for (const auto& name : solvers_) flat_.solvers.push_back(name.empty() ? nullptr : name.c_str());
        if (!solvers_.empty()) made.solvers = flat_.solvers.data(), made.solver_count = flat_.solvers.size();
        if (!interval_.empty()) made.guidance_interval = interval_.data(), made.guidance_interval_count = interval_.size();
        if (!windows_.empty()) made.windows = windows_.data(), made.window_count = windows_.size();
        if (!window_noise_.empty()) made.window_noise = window_noise_.c_str();
        if (!free_init_.empty()) made.free_init = free_init_.data(), made.free_init_count = free_init_.size();
        if (!reuse_.empty()) made.reuse = reuse_.data(), made.reuse_count = reuse_.size();
        if (!preset_.empty()) made.preset = preset_.c_str();
        if (inversion_) made.inversion = inversion_->c_str();
        if (!free_init_filter_.empty()) made.free_init_filter = free_init_filter_.c_str();
        for (const auto& value : values_)
            flat_.controls.push_back({value.name.c_str(), value.numbers.empty() ? nullptr : value.numbers.data(),
                                      value.numbers.size() / value.columns, value.columns,
                                      value.text ? value.text->c_str() : nullptr});
        if (!values_.empty()) made.controls = flat_.controls.data(), made.control_count = flat_.controls.size();
        for (const auto& one : pictures_)
            flat_.pictures.push_back({one.name.c_str(), one.rgb.data(), one.frames, one.height, one.width});
        if (!pictures_.empty()) made.pictures = flat_.pictures.data(), made.picture_count = flat_.pictures.size();
        return made;
    }

private:
    struct Value {
        std::string name;
        std::vector<double> numbers;
        std::size_t columns;
        std::optional<std::string> text;
    };
    struct Pixels {
        std::string name;
        std::vector<std::uint8_t> rgb;
        int width, height, frames;
    };
    // What the C structure points to.
    struct Flat {
        higen_request request{};
        std::vector<higen_curve> guidance;
        std::vector<const char*> solvers;
        std::vector<higen_control> controls;
        std::vector<higen_picture> pictures;
    };

    Request& put(Value value) {
        if (value.columns == 0) throw Error(HIGEN_ERROR_REQUEST, value.name + ": a matrix of 0 columns");
        values_.push_back(std::move(value));
        return *this;
    }

    std::string prompt_;
    higen_request request_{};
    std::vector<std::int32_t> steps_;
    std::vector<std::vector<double>> guidance_;
    std::vector<std::string> solvers_;
    std::vector<double> interval_, free_init_;
    std::vector<std::int32_t> windows_;
    std::vector<std::int32_t> reuse_;
    std::string window_noise_, free_init_filter_, preset_;
    std::optional<std::string> inversion_;
    std::vector<Value> values_;
    std::vector<Pixels> pictures_;
    Flat flat_;
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
    // An exception must not pass through the C library. It is kept here and thrown again after the call.
    static constexpr auto keep = [](void* user, auto&& work) -> int {
        auto& own = *static_cast<State*>(user);
        if (own.thrown) return 1;  // on_warning has thrown; it cannot stop the work itself
        try {
            return work(own);
        } catch (...) {
            own.thrown = std::current_exception();
            return 1;
        }
    };
    higen_callbacks calls = HIGEN_CALLBACKS_INIT;
    calls.user = &state;
    calls.token = callbacks.token ? callbacks.token->get() : nullptr;
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
    auto given = requests;  // copies, because get() changes a request
    std::vector<const higen_request*> pointers;
    for (auto& request : given) pointers.push_back(&request.get());
    const auto status = given.size() == 1 ? higen_generate(model_.get(), pointers.front(), &calls)
                                          : higen_generate_batch(model_.get(), pointers.data(), given.size(), &calls);
    if (state.thrown) std::rethrow_exception(state.thrown);
    check(status);
    return std::move(state.videos);
}

}  // namespace higen
