// Computes what a Python test asks for, to be compared with Python's own: vectors JOB.json RESULT.json
//
// JOB is a list of {"op": ...}; RESULT is the list of answers: numbers, or {"error": status, "message": ...}.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "bundle.h"
#include "encodings.h"
#include "errors.h"
#include "noise.h"
#include "picture_file.h"
#include "pictures.h"
#include "plans.h"
#include "stages.h"
#include "tokenizer.h"

using namespace higen::core;
using Json = nlohmann::json;

namespace {

// A control's value checked and encoded: {"encoding", "low", "value": {"values", "rows", "columns"} or null, "frames",
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

// A picture scaled to cover a size and cropped; with "small" also that resampled: {"rgb", "width", "height", "new_width",
// "new_height", "small": [height, width]}.
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

// Texts in chunks, their words with weights: ids and weights of each, and the warnings.
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

// What the reader made of a model's tables.
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

// Target and precision of each plan of a stage that fits.
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
    if (op == "image") {
        const auto read = read_picture(job.at("path").get<std::string>());
        return {{"height", read.height}, {"width", read.width}, {"rgb", read.pixels}};
    }
    if (op == "tokens") return tokens(job);
    if (op == "readings") return readings(job);
    if (op == "tables") return tables(job);
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
