#include "bundle.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <system_error>

#ifndef _WIN32
#include <sys/stat.h>
#endif

#include "errors.h"
#include "sha256.h"

namespace higen::core {

namespace fs = std::filesystem;

namespace {

bool is_quantised(std::string_view precision) {
    return precision != "fp32" && precision != "fp16" && precision != "bf16";
}

// The precision of a quantised graph's weights and of its layers that are not quantised.
std::string_view plain(std::string_view precision) {
    if (!is_quantised(precision)) return precision;
    const auto dot = precision.find('.');
    return dot == std::string_view::npos ? "fp32" : precision.substr(dot + 1);
}

}  // namespace

void check_precision(std::string_view precision) {
    if (std::find(precisions.begin(), precisions.end(), precision) != precisions.end()) return;
    std::string known;
    for (const auto& name : precisions) known += (known.empty() ? "'" : ", '") + std::string(name) + "'";
    fail_request("precision='" + std::string(precision) + "': one of " + known);
}

std::vector<std::string> stand_ins(std::string_view precision) {
    if (!is_quantised(precision)) return {std::string(precision)};
    return {std::string(precision), std::string(plain(precision))};
}

std::string graph_file(std::string_view stage, std::string_view precision) {
    return std::string(stage) + (precision == "fp32" ? "" : "." + std::string(precision)) + ".onnx";
}

std::string weights_variant(std::string_view name, std::string_view precision) {
    const auto base = plain(precision);
    const auto dot = std::min(name.rfind('.'), name.size());
    return std::string(name.substr(0, dot)) + (base == "fp32" ? "" : "." + std::string(base)) +
           std::string(name.substr(dot));
}

std::string read_file(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file) fail_integrity(path.u8string() + ": cannot be read");
    return text;
}

Bundle::Bundle(fs::path path, bool verify) : path_(std::move(path)), verify_(verify) {
    const auto manifest = path_ / "higen.json";
    std::error_code error;
    std::string text;
    try {
        const auto status = fs::status(manifest, error);
        if (!fs::exists(status)) fail_integrity(error ? error.message() : "no such file");
        if (!fs::is_regular_file(status)) fail_integrity("is not a regular file");  // reading a FIFO would wait
        text = read_file(manifest);
    } catch (const Error& reason) {
        fail_manifest(path_.u8string() + ": not a model directory, higen.json cannot be read: " + reason.what());
    }
    manifest_ = parse_manifest(text, manifest.u8string());
    for (const auto& [name, record] : manifest_.files) {
        const auto file = check_size(name, record);
        if (!verify_) known_.emplace(name, stamp_of(file));  // without checks, this file is trusted
    }
    path_ = fs::absolute(path_);  // the process may change its working directory
}

Bundle::Stamp Bundle::stamp_of(const fs::path& path) {
#ifdef _WIN32
    std::error_code error;
    const auto time = fs::last_write_time(path, error);
    return {0, 0, static_cast<std::int64_t>(fs::file_size(path, error)), time.time_since_epoch().count(), 0};
#else
    struct stat found = {};
    if (stat(path.c_str(), &found) != 0) return {};
#ifdef __APPLE__
    const auto& time = found.st_mtimespec;
#else
    const auto& time = found.st_mtim;
#endif
    return {static_cast<std::int64_t>(found.st_dev), static_cast<std::int64_t>(found.st_ino),
            static_cast<std::int64_t>(found.st_size), static_cast<std::int64_t>(time.tv_sec),
            static_cast<std::int64_t>(time.tv_nsec)};
#endif
}

fs::path Bundle::file(const std::string& name) const {
    const auto record = manifest_.files.find(name);
    if (record == manifest_.files.end()) fail_integrity(path_.u8string() + ": the manifest lists no " + name);
    auto path = check_size(name, record->second);
    const std::lock_guard lock(mutex_);
    const auto stamp = stamp_of(path);
    const auto known = known_.find(name);
    if (known != known_.end() && known->second == stamp) return path;
    const bool replaced = known != known_.end();
    if ((replaced && !verify_) || sha256(path) != record->second.sha256)
        fail_integrity(path.u8string() +
                       (replaced ? ": was replaced after the model was opened; open the model again"
                                 : ": its content does not match the sha256 in higen.json; fetch the file again"));
    known_.insert_or_assign(name, stamp);
    return path;
}

std::string Bundle::weights(const Stage& stage, std::string_view precision) const {
    auto name = weights_variant(stage.weights, precision);
    return lists(name) ? name : stage.weights;
}

std::string Bundle::not_quantized(std::string_view precision) const {
    if (precision.empty() || !is_quantised(precision)) return "";
    const auto stages = manifest_.denoising();
    for (const auto& stage : stages)
        if (lists(graph_file(stage, precision))) return "";
    const auto where = path_.u8string();
    return where + ": no " + graph_file(stages.front(), precision) + " (make it: higen-export quantize " + where +
           " --precision " + std::string(precision) + ")";
}

fs::path Bundle::check_size(const std::string& name, const FileRecord& record) const {
    auto path = path_ / fs::u8path(name);
    std::error_code error;
    const auto status = fs::status(path, error);
    if (!fs::exists(status)) fail_integrity(path.u8string() + ": listed in higen.json but not readable");
    if (!fs::is_regular_file(status))
        fail_integrity(path.u8string() + ": listed in higen.json but is not a regular file");
    const auto size = fs::file_size(path, error);
    if (error) fail_integrity(path.u8string() + ": listed in higen.json but not readable: " + error.message());
    if (size != record.size)
        fail_integrity(path.u8string() + ": " + std::to_string(size) + " bytes, but higen.json says " +
                       std::to_string(record.size) + "; fetch the file again");
    return path;
}

}  // namespace higen::core
