// A made-up model with two loops, and stage names that no real model has: a manifest, and a backend in which each
// network is one line of arithmetic.
#pragma once

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "backend.h"
#include "errors.h"
#include "manifest.h"
#include "pipeline.h"
#include "request.h"

namespace fixture {

using Json = nlohmann::json;
using namespace higen::core;

inline Json input(const char* name, Json shape, const char* source, const char* dtype = "float32") {
    return {{"name", name}, {"dtype", dtype}, {"shape", std::move(shape)}, {"source", source}};
}

inline Json output(const char* name, Json shape) { return {{"name", name}, {"shape", std::move(shape)}}; }

inline Json stage(const char* name, Json inputs, Json outputs) {
    return {{"name", name},
            {"weights", "kite.safetensors"},
            {"inputs", std::move(inputs)},
            {"outputs", std::move(outputs)},
            {"lowest", "fp16"},
            {"batch", true}};
}

inline Json control(const char* name, const char* kind, Json encoding, Json standard) {
    return {{"name", name},     {"kind", kind},    {"meaning", "a control"},   {"encoding", std::move(encoding)},
            {"low", nullptr},   {"high", nullptr}, {"choices", Json::array()}, {"default", std::move(standard)},
            {"optional", false}};
}

// A denoising stage over `frames` ("F" or 1), guided or plain.
inline Json step_stage(const char* name, const Json& frames, bool guided) {
    const Json state = {"B", "C", frames, "H", "W"};
    Json inputs = {input("latents", state, "state"), input("previous", state, "state")};
    for (const auto* column : {"t", "A", "B", "C", "alpha", "sigma"}) inputs.push_back(input(column, {"B"}, "state"));
    if (guided) {
        inputs.push_back(input("guidance", {"B", frames}, "state"));
        inputs.push_back(input("empty_mood", {"B", "K"}, "mixer@negative.mood"));
    }
    inputs.push_back(input("mood", {"B", "K"}, "mixer.mood"));
    inputs.push_back(input("beat", {"B", frames, "E"}, "mixer.beat"));
    return stage(name, std::move(inputs), {output("latents", state), output("previous", state)});
}

inline Json loop(const char* name, const char* guided, const char* plain, const Json& frames, int purpose) {
    const Json schedule = {
        {"kind", "scaled_linear"},   {"timesteps", 1000},  {"beta_start", 0.00085}, {"beta_end", 0.012},
        {"zero_terminal_snr", true}, {"sigma_min", 0.002}, {"sigma_max", 700.0},    {"shift", 1.0}};
    const auto solver = [](const char* solver_name, const char* spacing, int offset, const char* last) -> Json {
        return {{"name", solver_name}, {"spacing", spacing}, {"offset", offset},    {"final", last},
                {"eta", 0.0},          {"rho", 7.0},         {"original_steps", 50}};
    };
    return {{"name", name},
            {"guided", guided},
            {"plain", plain},
            {"frames", frames},
            {"least_frames", 1},
            {"schedule", schedule},
            {"prediction", "v"},
            {"solvers", {solver("ddim", "leading-floor", 1, "first"), solver("dpm++2m", "trailing-ceil", 0, "zero")}},
            {"steps", 3},
            {"guidance", 2.0},
            {"noise", {{"purpose", purpose}, {"offset", nullptr}, {"mix", nullptr}}},
            {"controls", Json::object()},
            {"replaced", nullptr},
            {"start", nullptr},
            {"windows", nullptr}};
}

inline Json controls() {
    Json rows = {control("wind", "curve", "sinusoid", nullptr), control("drift", "curve", "similarity", 1.0),
                 control("gust", "number", "number", 0.5),      control("pace", "whole", "curve", 3),
                 control("mood", "choice", "number", "calm"),   control("caption", "text", nullptr, "none"),
                 control("photo", "picture", nullptr, nullptr), control("reel", "clip", nullptr, nullptr)};
    rows[0]["optional"] = true, rows[0]["low"] = 0, rows[0]["high"] = 1000;
    rows[2]["low"] = 0;
    rows[4]["choices"] = {"calm", "wild"};
    return rows;
}

// The tables of the manifest, complete without seal, files and graphs. `sealed` adds the seal.
inline Json manifest() {
    Json sketching = loop("sketching", "sketch", "sketch_plain", 1, 4);
    sketching["controls"] = {{"wind", 0.0}, {"drift", 0.0}};
    sketching["replaced"] = {{"control", "photo"}, {"latents", "scanner.latents"}};
    Json filming = loop("filming", "film", "film_plain", "F", 5);
    filming["least_frames"] = 2, filming["steps"] = 2;
    filming["noise"]["offset"] = {{"purpose", 6}, {"scale", "control:gust"}};
    filming["start"] = {{"control", "reel"}, {"latents", "scribe.latents"}, {"strength", 0.5}};
    Json film = step_stage("film", "F", true), film_plain = step_stage("film_plain", "F", false);
    for (auto* row : {&film, &film_plain})
        (*row)["inputs"].push_back(input("base", {"B", "C", "H", "W"}, "sketching.latents"));
    const Json sizes = {{"symbols", {{"C", 4}, {"L", 4}, {"T", 3}, {"D", 6}, {"R", 5}, {"K", 2}, {"E", 2}}},
                        {"factor", 1},
                        {"multiple", 1},
                        {"width", 3},
                        {"height", 2},
                        {"fps", 8},
                        {"frames", {1, 5, 40}},
                        {"decoder", "painter"},
                        {"chunk", 2},
                        {"overlap", 0}};
    return {
        {"format", "higen"},
        {"version", 2},
        {"seal", std::string(64, '0')},
        {"name", "kites"},
        {"licence", "none"},
        {"family", "a family that nobody has"},
        {"architecture", {{"width", 3}}},
        {"prompts", {"a kite"}},
        {"sizes", sizes},
        {"text", {{"tokenizer", "tokenizer.json"}, {"length", 4}, {"pad_id", 0}, {"clean", false}}},
        {"controls", controls()},
        {"stages",
         {stage("reader", {input("ids", {"B", "L"}, "text:prompt", "int64")}, {output("words", {"B", "L", "T"})}),
          stage("mixer",
                {input("words", {"B", "L", "T"}, "reader.words"), input("wind", {"B", "F", "D"}, "control:wind"),
                 input("drift", {"B", "F", "R"}, "control:drift")},
                {output("mood", {"B", "K"}), output("beat", {"B", "F", "E"})}),
          step_stage("sketch", 1, true), step_stage("sketch_plain", 1, false), film, film_plain,
          stage("scanner", {input("pixels", {"N", 3, "Y", "X"}, "picture:photo")},
                {output("latents", {"N", "C", "H", "W"})}),
          stage("scribe", {input("pixels", {"N", 3, "Y", "X"}, "clip:reel")},
                {output("latents", {"N", "C", "H", "W"})}),
          stage("painter", {input("latents", {"N", "C", "H", "W"}, "state")}, {output("pixels", {"N", 3, "Y", "X"})})}},
        {"loops", {sketching, filming}},
        {"graphs", Json::object()},
        {"files", Json::object()}};
}

// The same tables with a second decoder, for previews, which the control `decoder` chooses.
inline Json with_preview() {
    auto json = manifest();
    auto chooser = control("decoder", "choice", "number", "full");
    chooser["choices"] = {"full", "preview"};
    json["controls"].push_back(chooser);
    json["stages"].push_back(
        stage("dauber", {input("latents", {"N", "C", "H", "W"}, "state")}, {output("pixels", {"N", 3, "Y", "X"})}));
    json["sizes"]["preview"] = {{"control", "decoder"}, {"choice", "preview"}, {"decoder", "dauber"}};
    return json;
}

// The text of a manifest with the seal that its tables have.
inline std::string sealed(Json json) {
    const std::string none(64, '0');
    json["seal"] = none;
    auto text = json.dump(1);
    text.replace(text.find(none), none.size(), seal_of(text, none));
    return text;
}

inline Manifest parsed(const Json& json) { return parse_manifest(sealed(json), "m"); }

inline TensorPtr floats(Shape shape, std::vector<float> values) {
    return host_tensor(Array::of(std::move(shape), std::move(values)));
}

inline double sum(const Array& array) {
    double total = 0;
    if (array.is_float())
        for (const float value : array.floats()) total += static_cast<double>(value);
    else
        for (const auto value : std::get<1>(array.values)) total += static_cast<double>(value);
    return total;
}

// The model's networks: words are the ids; mood and beat are sums; m = mood - 2 latents; encoders and decoder copy
// pixels.
class FakeBackend final : public Backend {
public:
    explicit FakeBackend(const Manifest& manifest) : manifest_(manifest) {}

    void prepare(const Stage& row) override {
        if (std::find(absent.begin(), absent.end(), row.name) != absent.end()) fail_unavailable("no " + row.name);
        if (std::find(prepared.begin(), prepared.end(), row.name) == prepared.end()) prepared.push_back(row.name);
    }
    std::string describe(const Stage&) const override { return "fake"; }

    Tensors run(const Stage& row, const Tensors& tensors, Cancellation& cancellation) override {
        check_inputs(row, tensors, manifest_.sizes.symbols);
        calls.push_back(row.name);
        inputs.push_back(tensors);
        if (cancel_at == calls.size()) cancellation.cancel();
        cancellation.check();
        const auto get = [&](const char* name) { return tensors.at(name)->to_host(); };
        if (row.name == "reader") return reader(get("ids"));
        if (row.name == "mixer") return mixer(get("words"), get("wind"), get("drift"));
        if (row.denoises()) {
            auto made = step(tensors);
            // Deep features that hold the number of the call that made them.
            if (const auto* deep = row.output("deep")) {
                auto shape = tensors.at("latents")->shape();
                shape[1] = deep->shape[1].size;
                made["deep"] = floats(shape, std::vector<float>(count(shape), static_cast<float>(calls.size())));
            }
            return made;
        }
        const auto& only = row.inputs.front().name;
        const auto pixels = get(only.c_str());
        const bool colours = row.outputs.front().shape[1].size == 3;
        return {{row.outputs.front().name, host_tensor(recoloured(pixels, colours ? 3 : 4))}};
    }

    [[nodiscard]] std::ptrdiff_t called(const std::string& name) const {
        return std::count(calls.begin(), calls.end(), name);
    }
    // The inputs of a stage's last call.
    [[nodiscard]] Array last(const std::string& name, const char* tensor) const {
        for (std::size_t i = calls.size(); i-- > 0;)
            if (calls[i] == name) return inputs[i].at(tensor)->to_host();
        return {};
    }

    std::vector<std::string> calls, prepared, absent;
    std::vector<Tensors> inputs;
    std::size_t cancel_at = 0;
    bool wrong_shape = false;

private:
    static Tensors reader(const Array& ids) {
        std::vector<float> words;
        for (const auto id : std::get<1>(ids.values))
            for (int k = 0; k < 3; ++k) words.push_back(static_cast<float>(id + k));
        return {{"words", floats({ids.shape[0], 4, 3}, std::move(words))}};
    }

    static Tensors mixer(const Array& words, const Array& wind, const Array& drift) {
        const auto all = static_cast<float>(sum(words)), rest = static_cast<float>(sum(wind) + sum(drift));
        const auto frames = static_cast<std::size_t>(wind.shape[1]);
        return {{"mood", floats({1, 2}, {all / 100, all / 50})},
                {"beat", floats({1, wind.shape[1], 2}, std::vector<float>(2 * frames, rest))}};
    }

    // m = mood[0] - 2 latents for each sample; the branch without the prompt uses empty_mood.
    [[nodiscard]] Tensors step(const Tensors& tensors) const {
        const auto get = [&](const char* name) { return tensors.at(name)->to_host(); };
        auto x = get("latents"), before = get("previous");
        const auto column = [&](const char* name) { return get(name).floats(); };
        const auto a = column("A"), b = column("B"), c = column("C"), alpha = column("alpha"), sigma = column("sigma");
        const auto mood = column("mood");
        const bool guided = tensors.count("guidance") > 0;
        const auto empty = guided ? column("empty_mood") : mood;
        const auto scale = guided ? column("guidance") : std::vector<float>();
        const auto frames = static_cast<std::size_t>(x.shape[2]),
                   plane = static_cast<std::size_t>(x.shape[3] * x.shape[4]);
        const auto one = x.floats().size() / a.size();
        auto& latents = std::get<0>(x.values);
        auto& previous = std::get<0>(before.values);
        for (std::size_t i = 0; i < latents.size(); ++i) {
            const auto s = i / one, f = i / plane % frames;
            const float given = mood[2 * s] - 2 * latents[i], without = empty[2 * s] - 2 * latents[i];
            const float m = guided ? without + scale[s * frames + f] * (given - without) : given;
            const float x0 = alpha[s] * latents[i] - sigma[s] * m;
            latents[i] = a[s] * latents[i] + b[s] * m + c[s] * previous[i];
            previous[i] = x0;
        }
        if (wrong_shape) x = Array::of({1}, std::vector<float>(1));
        return {{"latents", host_tensor(std::move(x))}, {"previous", host_tensor(std::move(before))}};
    }

    // The first channels, repeated from the first one if there are too few. Axis 1 is the channel axis.
    static Array recoloured(const Array& pixels, std::size_t channels) {
        auto shape = pixels.shape;
        const auto n = static_cast<std::size_t>(shape[0]), old = static_cast<std::size_t>(shape[1]);
        const auto plane = pixels.floats().size() / (n * old);
        shape[1] = static_cast<std::int64_t>(channels);
        std::vector<float> values;
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t c = 0; c < channels; ++c) {
                const auto from = pixels.floats().begin() + static_cast<std::ptrdiff_t>((i * old + c % old) * plane);
                values.insert(values.end(), from, from + static_cast<std::ptrdiff_t>(plane));
            }
        return Array::of(std::move(shape), std::move(values));
    }

    const Manifest& manifest_;
};

// A model, its backend and pipeline, and a request with the model's defaults.
struct Model {
    Manifest manifest;
    FakeBackend backend{manifest};
    Pipeline pipeline{manifest, backend};
    Cancellation cancellation;
    Request request;
    std::vector<std::vector<std::uint8_t>> rgb;  // of each video
    std::vector<std::string> steps;              // "sketching0", ...
    std::vector<double> times;

    // `ask`: make the default request; false for a model that needs a picture.
    explicit Model(const Json& json = fixture::manifest(), bool ask = true) : manifest(parsed(json)) {
        if (ask) request = asked([](auto&) {});
    }
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    // A request that was modified by `change`.
    [[nodiscard]] Request asked(const std::function<void(higen_request&)>& change) const {
        higen_request given{};
        given.struct_size = sizeof given;
        given.frames = static_cast<std::int32_t>(manifest.sizes.frames);
        given.width = static_cast<std::int32_t>(manifest.sizes.width);
        given.height = static_cast<std::int32_t>(manifest.sizes.height);
        given.fps = static_cast<std::int32_t>(manifest.sizes.fps);
        given.seed = 9;
        change(given);
        auto made = make_request(manifest, nullptr, given, {});
        made.tokens = {0, 1, 2, 3};
        made.negative_tokens = {0, 3, 0, 0};
        return made;
    }

    void generate() { generate({request}); }
    void generate(const std::vector<Request>& requests) {
        rgb.assign(requests.size(), {});
        pipeline.generate(
            requests,
            [&](const Step& step) {
                steps.push_back(std::string(step.loop) + std::to_string(step.index));
                times.push_back(step.t);
            },
            [&](const Frames& frames) {
                rgb.at(frames.video).insert(rgb[frames.video].end(), frames.rgb.begin(), frames.rgb.end());
            },
            cancellation);
    }
};

}  // namespace fixture
