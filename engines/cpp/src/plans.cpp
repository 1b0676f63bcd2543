#include "plans.h"

#include <algorithm>
#include <initializer_list>
#include <system_error>
#include <tuple>

#include "json_object.h"
#include "sha256.h"

namespace higen::core {

namespace fs = std::filesystem;

namespace {

using Kind = EngineError::Kind;

constexpr std::int64_t record_format = 1;

// Calls `read` with each item of a list of objects.
template <typename T>
void take_list(Object& object, const char* key, std::vector<T>& list,
               void (*read)(const Json&, const std::string&, T&)) {
    object.required(key, [&](const Json& value, const std::string& where) {
        if (!value.is_array()) fail_manifest(where + "=" + shown(value) + ": a list is wanted");
        for (const auto& item : value) {
            const auto place = where + "[" + std::to_string(list.size()) + "]";
            read(item, place, list.emplace_back());
        }
    });
}

void one_of(const std::string& value, const std::string& where, const std::string& first, const std::string& second) {
    if (value != first && value != second)
        fail_manifest(where + "=" + shown(value) + ": one of '" + first + "', '" + second + "'");
}

void read(const Json& json, const std::string& where, PlanTensor& tensor) {
    Object object(json, where);
    std::string kind;
    object.required_value("name", tensor.name);
    object.required_value("kind", kind);
    object.required_value("dtype", tensor.dtype);
    object.required_value("shape", tensor.shape);
    object.finish();
    one_of(kind, where + ".kind", "input", "output");
    tensor.is_input = kind == "input";
}

void read(const Json& json, const std::string& where, Span& span) {
    Object object(json, where);
    object.required_value("name", span.name);
    object.required_value("smallest", span.smallest);
    object.required_value("best", span.best);
    object.required_value("largest", span.largest);
    object.finish();
}

void read(const Json& json, const std::string& where, PlanProfile& profile) {
    Object object(json, where);
    object.required_value("name", profile.name);
    take_list<Span>(object, "spans", profile.spans, read);
    object.finish();
}

PlanRecord read_record(const Json& json) {
    PlanRecord record;
    Object object(json, "record");
    for (const auto& [key, text] :
         std::initializer_list<std::pair<const char*, std::string*>>{{"stage", &record.stage},
                                                                     {"target", &record.target},
                                                                     {"precision", &record.precision},
                                                                     {"flavour", &record.flavour},
                                                                     {"library", &record.library},
                                                                     {"graph", &record.graph},
                                                                     {"graph_sha256", &record.graph_sha256},
                                                                     {"weights", &record.weights},
                                                                     {"weights_sha256", &record.weights_sha256},
                                                                     {"sha256", &record.sha256},
                                                                     {"built", &record.built}})
        object.required_value(key, *text);
    object.required_value("architectures", record.architectures);
    object.required_value("size", record.size);
    object.required_value("seconds", record.seconds);
    take_list<PlanTensor>(object, "tensors", record.tensors, read);
    take_list<PlanProfile>(object, "profiles", record.profiles, read);
    object.required("options", [&](const Json& value, const std::string& where) {
        if (!value.is_object()) fail_manifest(where + "=" + shown(value) + ": an object is wanted");
        const auto streaming = value.find("weight_streaming");
        record.weight_streaming = streaming != value.end() && *streaming == true;
    });
    object.key("format", [](const Json&, const std::string&) {});
    object.finish();
    one_of(record.flavour, "record.flavour", "rtx", "tensorrt");
    return record;
}

// Whether two descriptions can be of the same tensor: -1 matches any size.
bool alike(const PlanTensor& a, const PlanTensor& b) {
    return a.name == b.name && a.is_input == b.is_input && a.dtype == b.dtype &&
           std::equal(a.shape.begin(), a.shape.end(), b.shape.begin(), b.shape.end(),
                      [](auto n, auto m) { return n == m || n == -1 || m == -1; });
}

// The record that waits to replace the one at `path`, if it belongs to the present plan.
std::optional<PlanRecord> pending_record(const fs::path& path) {
    const auto part = path.parent_path() / fs::u8path("." + path.filename().u8string() + ".part");
    const auto stage = path.stem().u8string();
    const auto plan = path.parent_path() / fs::u8path(stage + ".engine");
    std::error_code failed;
    if (!fs::is_regular_file(part, failed)) return std::nullopt;
    try {
        auto record = parse_record(read_file(part), part.u8string());
        const auto size = fs::file_size(plan, failed);
        if (!failed && record.stage == stage && size == static_cast<std::uintmax_t>(record.size) &&
            sha256(plan) == record.sha256)
            return record;
    } catch (const Error&) {  // truncated, or already moved
    }
    return std::nullopt;
}

std::string package(const std::string& flavour) { return flavour == "rtx" ? "tensorrt_rtx" : "tensorrt"; }

}  // namespace

std::string Plan::remedy() const {
    const auto model = path.parent_path().parent_path().parent_path().u8string();
    const auto target = record.flavour == "rtx" ? record.target : "tensorrt";  // the folder's name has the GPU too
    return "higen-export build-engines " + model + " --target " + target + " --stage " + record.stage +
           " --precision " + record.precision;
}

bool Span::holds(const Shape& shape) const {
    if (shape.size() != smallest.size() || shape.size() != largest.size()) return false;
    for (std::size_t i = 0; i < shape.size(); ++i)
        if (shape[i] < smallest[i] || shape[i] > largest[i]) return false;
    return true;
}

bool PlanProfile::holds(const Shapes& shapes) const {
    return std::all_of(spans.begin(), spans.end(), [&](const Span& span) {
        const auto shape = shapes.find(span.name);
        return shape != shapes.end() && span.holds(shape->second);
    });
}

double PlanProfile::volume() const {
    double sum = 0;
    for (const auto& span : spans) {
        double product = 1;
        for (const auto size : span.largest) product *= static_cast<double>(size);
        sum += product;
    }
    return sum;
}

PlanRecord parse_record(std::string_view text, const std::string& where) {
    Json json;
    try {
        json = Json::parse(text.begin(), text.end());
    } catch (const Json::exception& error) {
        throw EngineError(Kind::malformed, where + ": is not the record of an engine: " + error.what());
    }
    if (json.is_object()) {
        const auto format = json.find("format");
        if (format == json.end() || !format->is_number_integer() || *format != record_format)
            throw EngineError(Kind::malformed, where + ": format=" + (format == json.end() ? "none" : shown(*format)) +
                                                   ", this higen reads " + std::to_string(record_format));
    }
    try {
        return read_record(json);
    } catch (const Error& error) {
        throw EngineError(Kind::malformed, where + ": is not the record of an engine: " + error.what());
    }
}

std::pair<std::vector<Plan>, std::vector<EngineError>> read_plans(const fs::path& model, const std::string& stage) {
    std::vector<Plan> plans;
    std::vector<EngineError> errors;
    std::vector<fs::path> paths;
    std::error_code failed;
    fs::directory_iterator entry(model / "engines", failed);
    for (const fs::directory_iterator end; !failed && entry != end; entry.increment(failed)) {
        auto path = entry->path() / (stage + ".json");
        std::error_code ignored;
        if (entry->path().filename().u8string().front() != '.' && fs::exists(path, ignored))
            paths.push_back(std::move(path));
    }
    std::sort(paths.begin(), paths.end());
    for (const auto& path : paths) {
        const auto where = path.u8string();
        try {
            auto pending = pending_record(path);
            auto record = pending ? std::move(*pending) : parse_record(read_file(path), where);
            if (record.stage != stage || record.target != path.parent_path().filename().u8string())
                throw EngineError(Kind::malformed, where + ": is the record of " + record.target + "/" + record.stage);
            plans.push_back({path.parent_path() / (stage + ".engine"), std::move(record)});
        } catch (const EngineError& error) {
            errors.push_back(error);
        } catch (const Error& error) {  // it cannot be read
            errors.emplace_back(Kind::malformed, error.what());
        }
    }
    return {std::move(plans), std::move(errors)};
}

void check_plan(const Plan& plan, const Files& files, std::int64_t architecture, const Libraries& libraries) {
    const auto& record = plan.record;
    const auto& built = record.architectures;
    if (std::find(built.begin(), built.end(), architecture) == built.end()) {
        std::string names;
        for (const auto one : built) names += (names.empty() ? "SM" : ", SM") + std::to_string(one);
        throw EngineError(Kind::wrong_architecture,
                          plan.name() + ": built for " + names + ", this GPU is SM" + std::to_string(architecture));
    }
    for (const auto& [name, sha256] :
         {std::pair(record.graph, record.graph_sha256), std::pair(record.weights, record.weights_sha256)}) {
        const auto file = files.find(name);
        if (file == files.end() || file->second.sha256 != sha256)
            throw EngineError(Kind::stale, plan.name() + ": " + name + " " +
                                               (file == files.end() ? "is not in the model any more" : "has changed") +
                                               " since it was built: " + plan.remedy());
    }
    const auto version = libraries.find(record.flavour);
    if (version == libraries.end())
        throw EngineError(Kind::missing_library, "the engine " + plan.name() + " needs " + package(record.flavour) +
                                                     ", which this library was not built with");
    if (version->second != record.library)
        throw EngineError(Kind::stale, plan.name() + ": built by " + package(record.flavour) + " " + record.library +
                                           ", " + version->second +
                                           " is here and reads only its own: " + plan.remedy());
}

std::vector<Plan> fitting_plans(const std::string& stage, const std::vector<Plan>& plans,
                                const std::vector<EngineError>& errors, const Files& files, std::int64_t architecture,
                                const Libraries& libraries) {
    std::vector<const Plan*> order;
    for (const auto& plan : plans) order.push_back(&plan);
    std::stable_sort(order.begin(), order.end(), [](const Plan* a, const Plan* b) {
        const auto rank = [](const Plan* plan) {
            return std::pair(plan->record.architectures.size(), plan->record.flavour != "tensorrt");
        };
        return rank(a) < rank(b);
    });
    std::vector<Plan> fitting;
    auto refused = errors;
    for (const auto* plan : order) {
        try {
            check_plan(*plan, files, architecture, libraries);
            fitting.push_back(*plan);
        } catch (const EngineError& error) {
            refused.push_back(error);
        }
    }
    if (!fitting.empty()) return fitting;
    if (refused.empty())
        fail_unavailable("no engine of " + stage + " (make one: higen-export build-engines MODEL --target TARGET)");
    // The error of an engine for this GPU is more useful than that of an engine for another GPU.
    const auto own = std::find_if(refused.begin(), refused.end(),
                                  [](const auto& error) { return error.kind() != Kind::wrong_architecture; });
    throw own == refused.end() ? refused.front() : *own;
}

std::vector<Plan> in_precision(std::vector<Plan> plans, std::string_view precision) {
    if (precision.empty()) return plans;
    for (const auto& wanted : stand_ins(precision)) {
        std::vector<Plan> found;
        for (const auto& plan : plans)
            if (plan.record.precision == wanted) found.push_back(plan);
        if (!found.empty()) return found;
    }
    return {};
}

void check_interface(const Plan& plan, const Stage& stage, const std::vector<PlanTensor>& tensors) {
    const auto fail = [&](const std::string& what) {
        throw EngineError(Kind::malformed, plan.path.u8string() + ": " + what);
    };
    const auto sorted = [](std::vector<PlanTensor> list) {
        std::sort(list.begin(), list.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
        return list;
    };
    const auto found = sorted(tensors);
    std::map<std::string, std::pair<bool, bool>> wanted;  // is an input, is float32
    for (const auto& spec : stage.inputs) wanted.emplace(spec.name, std::pair(true, spec.is_float));
    for (const auto& spec : stage.outputs) wanted.emplace(stage.graph_output(spec), std::pair(false, spec.is_float));
    bool fits = found.size() == wanted.size();
    for (const auto& tensor : found) {
        const auto known = wanted.find(tensor.name);
        fits = fits && known != wanted.end() && known->second.first == tensor.is_input;
    }
    if (!fits) {
        std::string names;
        for (const auto& tensor : found) names += (names.empty() ? "" : ", ") + tensor.name;
        fail("its tensors are " + names + ": not those of " + stage.name);
    }
    const auto recorded = sorted(plan.record.tensors);
    if (!std::equal(found.begin(), found.end(), recorded.begin(), recorded.end(), alike))
        fail("its tensors differ from those in its record");
    for (const auto& tensor : found) {
        const std::string type = wanted.at(tensor.name).second ? "float32" : "int64";
        // An engine of the step contract of version 1: whole timesteps, one guidance number per sample.
        const auto* column = stage.input(tensor.name);
        const bool state = column != nullptr && column->source.kind == Source::Kind::state;
        if (state && ((tensor.name == "t" && tensor.dtype == "int64") ||
                      (tensor.name == "guidance" && tensor.shape.size() < column->shape.size())))
            throw EngineError(Kind::stale, plan.name() + ": was built before version 2 of the manifest (its input " +
                                               tensor.name + " differs): higen-export onnx " +
                                               plan.path.parent_path().parent_path().parent_path().u8string() +
                                               ", then " + plan.remedy());
        if (tensor.dtype != type)
            fail(tensor.name + " has the type " + tensor.dtype + ", but this library gives " + type);
    }
}

std::size_t best_profile(const Plan& plan, const Shapes& shapes) {
    const auto& profiles = plan.record.profiles;
    std::optional<std::size_t> best;
    for (std::size_t i = 0; i < profiles.size(); ++i)
        if (profiles[i].holds(shapes) && (!best || profiles[i].volume() < profiles[*best].volume())) best = i;
    if (best) return *best;
    std::string limits;
    for (const auto& profile : profiles)
        for (const auto& span : profile.spans) {
            const auto shape = shapes.find(span.name);
            if (shape != shapes.end() && span.holds(shape->second)) continue;
            limits += (limits.empty() ? "" : "; ") + profile.name + " takes " + span.name + " from " +
                      to_text(span.smallest) + " to " + to_text(span.largest) +
                      (shape == shapes.end() ? "" : ", not " + to_text(shape->second));
            break;
        }
    throw EngineError(Kind::outside_profile, plan.name() + ": " + (limits.empty() ? "it has no profile" : limits));
}

std::int64_t streaming_budget(std::int64_t streamable, std::int64_t activations, std::int64_t free,
                              std::int64_t automatic) {
    return streamable + activations <= free - free / 10 ? streamable : std::min(automatic, streamable);
}

EngineError validity_error(const Plan& plan, std::uint64_t reasons) {
    // The most likely cause comes first.
    const std::vector<std::tuple<InvalidityBit, Kind, const char*>> known = {
        {unsupported_architecture, Kind::wrong_architecture, "it was not built for this GPU"},
        {version_mismatch, Kind::stale, "another version of TensorRT built it"},
        {malformed_engine, Kind::malformed, "its file is not a plan"},
        {old_cuda_driver, Kind::no_driver, "the NVIDIA driver is too old for it"},
        {old_cuda_runtime, Kind::no_driver, "the CUDA runtime is too old for it"},
        {insufficient_gpu_memory, Kind::other, "the GPU has too little memory for it"},
        {cuda_error, Kind::no_device, "CUDA does not work here"},
    };
    std::optional<Kind> kind;
    std::string text;
    for (const auto& [bit, one, words] : known) {
        if ((reasons & bit) == 0) continue;
        if (!kind) kind = one;
        text += (text.empty() ? "" : "; ") + std::string(words);
    }
    return {kind.value_or(Kind::other),
            plan.name() + ": " + (text.empty() ? "TensorRT calls it invalid and does not say why" : text)};
}

}  // namespace higen::core
