#include "manifest.h"

#include <algorithm>
#include <set>

#include "errors.h"
#include "manifest_tables.h"
#include "sha256.h"

namespace higen::core {
namespace {

constexpr std::int64_t manifest_version = 2;
constexpr std::size_t largest = std::size_t{64} << 20;  // the most bytes of a manifest; real ones are far smaller

// Parses JSON and refuses an object with a repeated key, because other parsers may choose the other value.
Json parse_json(std::string_view text, const std::string& where) {
    std::vector<std::set<std::string>> keys;
    std::string twice;
    const auto watch = [&](int, Json::parse_event_t event, Json& value) {
        if (event == Json::parse_event_t::object_start) keys.emplace_back();
        if (event == Json::parse_event_t::object_end) keys.pop_back();
        if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
            twice = value.get<std::string>();
        return true;
    };
    if (text.size() > largest)
        fail_manifest(where + ": a manifest has at most " + std::to_string(largest) + " bytes");
    try {
        auto json = Json::parse(text.begin(), text.end(), watch);
        if (!twice.empty()) fail_manifest(where + ": not valid JSON: " + shown(twice) + " appears twice");
        return json;
    } catch (const Json::exception& error) {
        fail_manifest(where + ": not valid JSON: " + error.what());
    }
}

void check_version(const Json& json, const std::string& where) {
    const auto format = json.is_object() ? json.find("format") : json.end();
    check_manifest(json.is_object() && format != json.end() && *format == "higen",
                   where + ": not a higen manifest (\"format\" is not \"higen\")");
    const auto version = json.find("version");
    check_manifest(version != json.end() && version->is_number_integer() && *version >= 1,
                   where + ": version=" + (version == json.end() ? "none" : shown(*version)) +
                       ": a whole number from 1 to " + std::to_string(manifest_version));
    check_manifest(*version <= manifest_version, where + ": version=" + shown(*version) +
                                                     ", but this higen reads version " +
                                                     std::to_string(manifest_version) + ": a newer higen is needed");
    const auto folder = where.substr(0, where.rfind('/') == std::string::npos ? 0 : where.rfind('/'));
    check_manifest(*version == manifest_version,
                   where + ": version=" + shown(*version) + ", but this library reads version " +
                       std::to_string(manifest_version) + ": higen upgrade " + (folder.empty() ? "DIR" : folder));
}

// A model's files are in its directory or below: no absolute path, no "..".
void check_name(const std::string& name) {
    std::string path = name;
    std::replace(path.begin(), path.end(), '\\', '/');
    bool good = !path.empty() && name != "higen.json" && path.find(':') == std::string::npos &&
                path.find('\0') == std::string::npos;
    for (std::size_t start = 0; good && start <= path.size();) {
        const auto end = std::min(path.find('/', start), path.size());
        const auto part = path.substr(start, end - start);
        good = !part.empty() && part != "." && part != "..";
        start = end + 1;
    }
    check_manifest(good, "files has the entry " + shown(name) + ": a path inside the model directory is wanted");
}

void read_files(const Json& json, const std::string& where, Files& files) {
    if (!json.is_object()) fail_manifest(where + "=" + shown(json) + ": an object is wanted");
    for (const auto& item : json.items()) {
        check_name(item.key());
        auto& record = files[item.key()];
        Object object(item.value(), where + "." + item.key());
        // A negative size is an integrity error, not a type error: no file has this size.
        object.required("size", [&](const Json& value, const std::string& place) {
            std::int64_t size = 0;
            Object::take(value, place, size);
            if (size < 0) fail_integrity(place + "=" + std::to_string(size) + ": no file has this size");
            record.size = static_cast<std::uintmax_t>(size);
        });
        object.required_value("sha256", record.sha256);
        object.finish();
    }
}

void read_graph_input(const Json& json, const std::string& where, GraphInput& input) {
    Object object(json, where);
    object.required_value("name", input.name);
    object.required("dtype", [&](const Json& value, const std::string& place) {
        constexpr std::pair<const char*, const char*> dtypes[] = {{"float32", "float32"}, {"int64", "int64"}};
        take_word(value, place, dtypes, input.dtype);
    });
    object.required("shape",
                    [&](const auto& value, const auto& place) { read_shape(value, place, input.shape); });
    object.finish();
}

bool is_graph(const std::string& name) {
    constexpr std::string_view suffix = ".onnx";
    return name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

void read_graphs(const Json& json, const std::string& where, Manifest& manifest) {
    if (!json.is_object()) fail_manifest(where + "=" + shown(json) + ": an object is wanted");
    for (const auto& item : json.items()) {
        Object object(item.value(), where + "." + item.key());
        take_rows(object, "inputs", manifest.graphs[item.key()], read_graph_input);
        object.finish();
    }
    const std::string wanted = ": graphs must have one row for each .onnx file in files, and no other rows";
    for (const auto& [name, record] : manifest.files)
        check_manifest(!is_graph(name) || manifest.graphs.count(name) > 0, where + ": " + name + wanted);
    for (const auto& [name, inputs] : manifest.graphs)
        check_manifest(is_graph(name) && manifest.files.count(name) > 0, where + ": " + name + wanted);
}

void check_seal(const Json& json, std::string_view text, const std::string& where) {
    const auto folder = where.substr(0, where.rfind('/') == std::string::npos ? 0 : where.rfind('/'));
    const auto remedy = "higen upgrade --reseal " + (folder.empty() ? "DIR" : folder);
    const auto* seal = json.get_ptr<const std::string*>();
    const bool good =
        seal != nullptr && seal->size() == 64 && seal->find_first_not_of("0123456789abcdef") == std::string::npos;
    check_manifest(good, where + ": seal=" + shown(json) + ": 64 hexadecimal digits (" + remedy + ")");
    if (seal_of(text, *seal) != *seal)
        fail_integrity(where +
                       ": was edited after it was written: its tables do not fit its seal. Fetch the file "
                       "again, or accept the edit: " +
                       remedy);
}

template <typename Row>
const Row* find_row(const std::vector<Row>& rows, std::string_view name) {
    const auto found = std::find_if(rows.begin(), rows.end(), [&](const auto& row) { return row.name == name; });
    return found == rows.end() ? nullptr : &*found;
}

}  // namespace

std::vector<std::string> StagePair::names() const {
    std::vector<std::string> found;
    for (const auto& one : {guided, plain})
        if (!one.empty()) found.push_back(one);
    return found;
}

std::vector<std::string> Loop::stages() const {
    auto names = own().names();
    if (variant)
        for (const auto& one : variant->stages.names()) names.push_back(one);
    return names;
}

const Solver* Loop::solver(std::string_view wanted) const { return find_row(solvers, wanted); }

const Control* Manifest::control(std::string_view wanted) const { return find_row(controls, wanted); }

const Loop* Manifest::loop(std::string_view wanted) const { return find_row(loops, wanted); }

const Stage* Manifest::find_stage(std::string_view wanted) const {
    const auto* found = find_row(stages, wanted);
    return found != nullptr ? found : find_row(variants, wanted);
}

const Stage& Manifest::stage(std::string_view wanted) const {
    const auto* found = find_stage(wanted);
    if (found == nullptr) throw Error(HIGEN_ERROR_INTERNAL, "no stage " + std::string(wanted));
    return *found;
}

const Preset* Manifest::preset(const char* wanted) const {
    if (wanted == nullptr) return nullptr;
    std::string known;
    for (const auto& one : presets) {
        if (one.name == wanted) return &one;
        known += (known.empty() ? "'" : ", '") + one.name + "'";
    }
    fail_request("preset='" + std::string(wanted) + "': " +
                 (known.empty() ? name + " has no presets" : "the presets of " + name + " are " + known));
}

std::vector<std::string> Manifest::denoising() const {
    std::vector<std::string> names;
    for (const auto& loop : loops)
        for (const auto& one : loop.stages())
            if (std::find(names.begin(), names.end(), one) == names.end()) names.push_back(one);
    return names;
}

std::vector<std::string> Manifest::feeding(const std::vector<std::string>& wanted) const {
    std::vector<std::string> found;
    std::set<std::string> seen;
    std::vector<std::pair<std::string, bool>> open;  // and whether its feeding stages were visited
    for (auto one = wanted.rbegin(); one != wanted.rend(); ++one) open.emplace_back(*one, false);
    while (!open.empty()) {
        const auto [one, fed] = open.back();
        open.pop_back();
        const auto* row = find_stage(one);
        if (fed) found.push_back(one);
        if (fed || row == nullptr || !seen.insert(one).second) continue;
        open.emplace_back(one, true);
        for (auto tensor = row->inputs.rbegin(); tensor != row->inputs.rend(); ++tensor)
            if (tensor->source.kind == Source::Kind::made) open.emplace_back(tensor->source.name, false);
    }
    return found;
}

std::string seal_of(std::string_view text, const std::string& seal) {
    std::string tables(text);
    for (auto at = tables.find(seal); at != std::string::npos; at = tables.find(seal, at + seal.size()))
        tables.replace(at, seal.size(), seal.size(), '0');
    Sha256 hash;
    hash.update(tables.data(), tables.size());
    return hash.hex();
}

Manifest parse_manifest(std::string_view text, const std::string& where) {
    const auto json = parse_json(text, where);
    check_version(json, where);
    Manifest manifest;
    Object object(json, where);
    const auto free_form = [](const Json&, const std::string&) {};
    for (const auto* key : {"format", "version", "seal"}) object.required(key, free_form);
    object.required_value("name", manifest.name);
    object.required_value("licence", manifest.licence);
    object.required_value("family", manifest.family);
    object.required("architecture", [](const Json& value, const std::string& place) {
        if (!value.is_object()) fail_manifest(place + "=" + shown(value) + ": an object is wanted");
    });
    object.required_value("prompts", manifest.prompts);
    object.required("sizes", [&](const auto& value, const auto&) { read_sizes(value, "sizes", manifest.sizes); });
    object.required("text", [&](const Json& value, const std::string&) {
        if (!value.is_null()) read_text(value, "text", manifest.text.emplace());
    });
    take_rows(object, "controls", manifest.controls, read_control);
    take_rows(object, "stages", manifest.stages, read_stage);
    for (const auto& stage : manifest.stages)
        for (auto& variant : stage.variants()) manifest.variants.push_back(std::move(variant));
    take_rows(object, "loops", manifest.loops, read_loop);
    if (json.contains("presets")) take_rows(object, "presets", manifest.presets, read_preset);
    object.required("files", [&](const auto& value, const auto&) { read_files(value, "files", manifest.files); });
    object.required("graphs", [&](const auto& value, const auto&) { read_graphs(value, "graphs", manifest); });
    object.finish();
    check_references(manifest);
    check_seal(json.at("seal"), text, where);
    return manifest;
}

}  // namespace higen::core
