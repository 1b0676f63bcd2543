// Computes what a Python test asks for, to be compared with Python's own: vectors JOB.json RESULT.json
//
// JOB is a list of {"op": ...}; RESULT is the list of answers: numbers, or {"error": status, "message": ...}.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "bundle.h"
#include "conditioning.h"
#include "errors.h"
#include "noise.h"
#include "plans.h"
#include "schedule.h"
#include "stages.h"
#include "tokenizer.h"

using namespace higen::core;
using Json = nlohmann::json;

namespace {

Cue cue(const Json& json) {
    if (json.is_null()) return std::nullopt;
    return CueValues{json.at("values").get<std::vector<double>>(), json.at("rows").get<std::size_t>(),
                     json.at("columns").get<std::size_t>()};
}

Json schedule(const Json& job) {
    ScheduleConfig config;
    config.timesteps = job.at("timesteps").get<std::int64_t>();
    config.zero_terminal_snr = job.at("zero_terminal_snr").get<bool>();
    auto rows = Json::array();
    for (const auto& row : solver_table(job.at("solver").get<std::string>(), job.at("steps").get<std::int64_t>(), config))
        rows.push_back({row.t, row.A, row.B, row.C, row.alpha, row.sigma});
    return rows;
}

Json tokens(const Json& job) {
    TextConfig config;
    config.context_length = job.at("context_length").get<std::int64_t>();
    config.pad_id = job.at("pad_id").get<std::int64_t>();
    config.clean = job.at("clean").get<bool>();
    const auto path = std::filesystem::u8path(job.at("tokenizer").get<std::string>());
    const Tokenizer tokenizer(read_file(path), path.u8string(), config);
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

Json stage_table(const Json& job) {
    const auto& found = stage(job.at("stage").get<std::string>());
    const auto list = [&](const std::vector<TensorSpec>& specs, bool outputs) {
        auto tensors = Json::array();
        for (const auto& spec : specs) {
            auto shape = Json::array();
            for (const auto& axis : spec.shape) {
                if (axis.symbol.empty())
                    shape.push_back(axis.size);
                else
                    shape.push_back(axis.symbol);
            }
            const auto name = outputs ? found.graph_output(spec) : std::string(spec.name);
            tensors.push_back({name, shape, spec.is_float ? "float32" : "int64"});
        }
        return tensors;
    };
    return {list(found.inputs, false), list(found.outputs, true)};
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
        return initial_noise(job.at("seed").get<std::uint64_t>(), static_cast<Purpose>(job.at("purpose").get<int>()),
                             n("channels"), n("frames"), n("height"), n("width"));
    if (op == "schedule") return schedule(job);
    if (op == "motion") return motion_cue(cue(job.at("cue")), n("frames"), n("dim"));
    if (op == "appearance") return appearance_cue(cue(job.at("cue")), n("frames"), n("columns"));
    if (op == "tokens") return tokens(job);
    if (op == "stage") return stage_table(job);
    if (op == "dimensions") {
        const auto path = std::filesystem::u8path(job.at("path").get<std::string>());
        return dimensions(Bundle(path, false).config());
    }
    if (op == "plan") return chosen_plan(job);
    if (op == "profile")
        return best_profile({"", parse_record(job.at("record").get<std::string>(), "job")},
                            job.at("shapes").get<Shapes>());
    if (op == "bundle") return Bundle(std::filesystem::u8path(job.at("path").get<std::string>()), true).config().name;
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
