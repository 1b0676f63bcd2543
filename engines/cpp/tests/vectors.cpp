// Computes results for a Python test, which compares them with Python's: vectors JOB.json RESULT.json
//
// JOB is a list of {"op": ...}; RESULT is the list of answers: numbers, or {"error": status, "message": ...}.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <numeric>
#include <nlohmann/json.hpp>
#include <string>

#include "bundle.h"
#include "edges.h"
#include "encodings.h"
#include "errors.h"
#include "noise.h"
#include "picture_file.h"
#include "pictures.h"
#include "plans.h"
#include "sampler.h"
#include "stages.h"
#include "tokenizer.h"

using namespace higen::core;
using Json = nlohmann::json;

namespace {

// Checks and encodes a control's value: {"encoding", "low", "value": {"values", "rows", "columns"} or null, "frames",
// "columns"}.
Json encoded(const Json& job) {
    const std::map<std::string, Control::Encoding> encodings = {{"curve", Control::Encoding::curve},
                                                                {"sinusoid", Control::Encoding::sinusoid},
                                                                {"similarity", Control::Encoding::similarity}};
    Control control;
    control.name = "control";
    control.kind = Control::Kind::curve;
    control.encoding = encodings.at(job.at("encoding").get<std::string>());
    if (!job.at("low").is_null()) control.low = job.at("low").get<double>();
    const auto frames = job.at("frames").get<std::size_t>();
    const auto& given = job.at("value");
    MaybeValue value;
    if (!given.is_null()) {
        value = ControlValue{given.at("values").get<std::vector<double>>(), given.at("rows").get<std::size_t>(),
                             given.at("columns").get<std::size_t>(), ""};
        check_value(control, *value, frames);
    }
    return encode(control, value, frames, job.at("columns").get<std::size_t>());
}

// Scales a picture to cover a size and crops it; with "small" also resamples the result: {"rgb", "width", "height",
// "new_width", "new_height", "small": [height, width]}.
Json picture(const Json& job) {
    const auto n = [&](const char* key) { return job.at(key).get<std::size_t>(); };
    const auto rgb = job.at("rgb").get<std::vector<std::uint8_t>>();
    const auto covered = cover(rgb.data(), n("width"), n("height"), n("new_width"), n("new_height"));
    const auto pixels = planes(covered, 1, n("new_width") * n("new_height"));
    const auto small = job.at("small").get<std::vector<std::size_t>>();
    return {covered, resample(pixels, n("new_height"), n("new_width"), small.at(0), small.at(1))};
}

Json tokens(const Json& job) {
    TextRules rules;
    rules.length = job.at("length").get<std::int64_t>();
    rules.pad_id = job.at("pad_id").get<std::int64_t>();
    rules.clean = job.at("clean").get<bool>();
    const auto path = std::filesystem::u8path(job.at("tokenizer").get<std::string>());
    const Tokenizer tokenizer(read_file(path), path.u8string(), rules);
    auto rows = Json::array();
    for (const auto& text : job.at("texts")) {
        std::vector<std::string> warnings;
        try {
            rows.push_back(tokenizer.encode(text.get<std::string>(), [&](const auto& w) { warnings.push_back(w); }));
        } catch (const Error& error) {
            rows.push_back(higen_status_name(error.status()));
        }
    }
    return rows;
}

// Reads texts with chunks and weighted words: ids and weights of each text, and the warnings.
Json readings(const Json& job) {
    TextRules rules;
    rules.length = job.at("length").get<std::int64_t>();
    rules.pad_id = job.at("pad_id").get<std::int64_t>();
    rules.weights = job.at("weights").get<bool>();
    rules.chunks = job.at("chunks").get<std::int64_t>();
    const auto path = std::filesystem::u8path(job.at("tokenizer").get<std::string>());
    const Tokenizer tokenizer(read_file(path), path.u8string(), rules);
    auto rows = Json::array();
    for (const auto& text : job.at("texts")) {
        std::vector<std::string> warnings;
        try {
            const auto read =
                tokenizer.read(text.get<std::string>(), [&](const auto& w) { warnings.push_back(w); });
            rows.push_back({read.ids, read.weights, warnings});
        } catch (const Error& error) {
            rows.push_back(higen_status_name(error.status()));
        }
    }
    return rows;
}

Json axes(const std::vector<Axis>& shape) {
    auto list = Json::array();
    for (const auto& axis : shape) list.push_back(axis.symbol.empty() ? Json(axis.size) : Json(axis.symbol));
    return list;
}

// A model's tables as this library reads them.
Json tables(const Json& job) {
    const Bundle bundle(std::filesystem::u8path(job.at("path").get<std::string>()), false);
    const auto& manifest = bundle.manifest();
    auto stages = Json::object(), loops = Json::object(), controls = Json::object();
    for (const auto& stage : manifest.stages) {
        auto inputs = Json::array(), outputs = Json::array();
        for (const auto& input : stage.inputs)
            inputs.push_back({input.name, axes(input.shape), input.is_float ? "float32" : "int64", to_text(input.source)});
        for (const auto& output : stage.outputs) outputs.push_back({stage.graph_output(output), axes(output.shape)});
        stages[stage.name] = {inputs, outputs, stage.weights, stage.lowest, stage.batch};
    }
    for (const auto& loop : manifest.loops)
        loops[loop.name] = {loop.stages(), loop.steps, loop.guidance, loop.solvers.front().name, loop.least_frames};
    for (const auto& control : manifest.controls) controls[control.name] = {to_text(control.kind), control.range()};
    return {{"symbols", manifest.sizes.symbols}, {"stages", stages}, {"loops", loops}, {"controls", controls}};
}

// A denoising step with a formula as its network: m is the mean of the latents of the (cut) clip, plus the mean of the
// text's tokens, plus a tenth of x.
class Formula final : public Backend {
public:
    void prepare(const Stage&) override {}
    std::string describe(const Stage&) const override { return "formula"; }

    Tensors run(const Stage&, const Tensors& inputs, Cancellation&) override {
        const auto host = [&](const char* name) { return inputs.at(name)->to_host(); };
        const auto x = host("latents"), previous = host("previous"), text = host("context");
        const auto samples = static_cast<std::size_t>(x.shape[0]);
        const auto cells = x.floats().size() / samples, words = text.floats().size() / samples;
        std::vector<float> moved, clean;
        for (std::size_t i = 0; i < samples; ++i) {
            const auto column = [&](const char* name) { return host(name).floats()[i]; };
            const auto mean = [&](const Array& of, std::size_t n) {
                const auto first = of.floats().begin() + static_cast<std::ptrdiff_t>(i * n);
                return std::accumulate(first, first + static_cast<std::ptrdiff_t>(n), 0.0F) / static_cast<float>(n);
            };
            const float said = mean(x, cells) + mean(text, words);
            for (std::size_t j = 0; j < cells; ++j) {
                const float at = x.floats()[i * cells + j], m = said + 0.1F * at;
                moved.push_back(column("A") * at + column("B") * m + column("C") * previous.floats()[i * cells + j]);
                clean.push_back(column("alpha") * at - column("sigma") * m);
            }
        }
        return {{"latents", host_tensor(Array::of(x.shape, moved))},
                {"previous", host_tensor(Array::of(x.shape, clean))}};
    }
};

// A whole loop with that network, for a batch of texts with these numbers of tokens, in windows and tiles.
Json loop(const Json& job) {
    const auto shape = job.at("shape").get<Shape>();
    const std::vector<Axis> state = {{"B", 0}, {"C", 0}, {"F", 0}, {"H", 0}, {"W", 0}}, column = {{"B", 0}};
    Stage stage{"step", {}, {{"latents", state}, {"previous", state}}, ""};
    for (const auto* name : {"latents", "previous"}) stage.inputs.push_back({name, state});
    for (const auto* name : {"t", "A", "B", "C", "alpha", "sigma"}) stage.inputs.push_back({name, column});
    stage.inputs.push_back({"context", {{"B", 0}, {tokens_symbol, 0}, {"", 1}}});
    const auto text = job.at("context").get<std::vector<float>>();
    const Shape words = {shape[0], static_cast<std::int64_t>(text.size()) / shape[0], 1};
    LoopRun run{"loop",
                stage,
                {{"context", host_tensor(Array::of(words, text))}},
                solver_table(NoiseSchedule{}, "v", Solver{"dpm++2m", "trailing"}, job.at("steps").get<std::int64_t>()),
                Array::of({shape[0], shape[2]}, std::vector<float>(static_cast<std::size_t>(shape[0] * shape[2]), 1.0F)),
                {}};
    run.tokens = job.at("tokens").get<std::vector<std::size_t>>();
    if (const auto& w = job.at("windows"); !w.is_null()) run.windows = Windows{w.at(0), w.at(1)};
    if (const auto& t = job.at("tiles"); !t.is_null()) run.tiles = Tiles{t.at(0), t.at(1), t.at(2)};
    Formula network;
    Cancellation cancellation;
    const auto start = host_tensor(Array::of(shape, job.at("latents").get<std::vector<float>>()));
    return denoise(network, run, start, [](const Step&) {}, cancellation)->to_host().floats();
}

// Target and precision of each fitting plan of a stage.
Json chosen_plan(const Json& job) {
    const auto stage = job.at("stage").get<std::string>();
    auto [plans, errors] = read_plans(std::filesystem::u8path(job.at("model").get<std::string>()), stage);
    Files files;
    for (const auto& item : job.at("files").items()) files[item.key()].sha256 = item.value().get<std::string>();
    plans = in_precision(std::move(plans), job.at("precision").get<std::string>());
    auto found = Json::array();
    for (const auto& plan : fitting_plans(stage, plans, errors, files, job.at("architecture").get<std::int64_t>(),
                                          job.at("libraries").get<Libraries>()))
        found.push_back({plan.record.target, plan.record.precision});
    return found;
}

Json answer(const Json& job) {
    const auto op = job.at("op").get<std::string>();
    const auto n = [&](const char* key) { return job.at(key).get<std::size_t>(); };
    if (op == "noise")
        return frame_noise(job.at("seed").get<std::uint64_t>(), job.at("purpose").get<std::uint64_t>(), n("channels"),
                           n("frames"), n("height") * n("width"));
    if (op == "encoded") return encoded(job);
    if (op == "picture") return picture(job);
    if (op == "edges") return edges(job.at("rgb").get<std::vector<std::uint8_t>>(), n("width"), n("height"));
    if (op == "image") {
        const auto read = read_picture(job.at("path").get<std::string>());
        return {{"height", read.height}, {"width", read.width}, {"rgb", read.pixels}};
    }
    if (op == "tokens") return tokens(job);
    if (op == "readings") return readings(job);
    if (op == "tables") return tables(job);
    if (op == "loop") return loop(job);
    if (op == "plan") return chosen_plan(job);
    if (op == "profile")
        return best_profile({"", parse_record(job.at("record").get<std::string>(), "job")},
                            job.at("shapes").get<Shapes>());
    if (op == "bundle") return Bundle(std::filesystem::u8path(job.at("path").get<std::string>()), true).manifest().name;
    throw Error(HIGEN_ERROR_REQUEST, "op " + op);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    auto results = Json::array();
    for (const auto& job : Json::parse(read_file(argv[1]))) {
        try {
            results.push_back(answer(job));
        } catch (const Error& error) {
            results.push_back({{"error", higen_status_name(error.status())}, {"message", error.what()}});
        }
    }
    std::ofstream(argv[2], std::ios::binary) << results;
    return EXIT_SUCCESS;
}
