#include "bundle.h"

#include <fstream>
#include <iterator>
#include <system_error>

#include "errors.h"
#include "sha256.h"

namespace higen::core {

namespace fs = std::filesystem;

std::string graph_file(std::string_view stage) { return std::string(stage) + ".onnx"; }

std::string weights_file(std::string_view stage) {
    if (stage == "text_encoder") return "text_encoder.safetensors";
    return stage.substr(0, 3) == "vae" ? "vae.safetensors" : "unet.safetensors";
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
        if (!fs::is_regular_file(manifest, error)) fail_integrity("no such file");
        text = read_file(manifest);
    } catch (const Error& reason) {
        fail_manifest(path_.u8string() + ": not a model directory, higen.json cannot be read: " + reason.what());
    }
    manifest_ = parse_manifest(text, manifest.u8string());
    for (const auto& [name, record] : manifest_.files) (void)check_size(name, record);
}

fs::path Bundle::file(const std::string& name) const {
    const auto record = manifest_.files.find(name);
    if (record == manifest_.files.end()) fail_integrity(path_.u8string() + ": the manifest lists no " + name);
    auto path = check_size(name, record->second);
    const std::lock_guard lock(mutex_);
    if (!verify_ || verified_.count(name) > 0) return path;
    if (sha256(path) != record->second.sha256)
        fail_integrity(path.u8string() +
                       ": its content does not match the sha256 in higen.json; fetch the file again");
    verified_.insert(name);
    return path;
}

fs::path Bundle::check_size(const std::string& name, const FileRecord& record) const {
    auto path = path_ / fs::u8path(name);
    std::error_code error;
    const auto status = fs::status(path, error);
    if (!fs::exists(status)) fail_integrity(path.u8string() + ": listed in higen.json but not readable");
    if (!fs::is_regular_file(status)) fail_integrity(path.u8string() + ": listed in higen.json but no plain file");
    const auto size = fs::file_size(path, error);
    if (error) fail_integrity(path.u8string() + ": listed in higen.json but not readable: " + error.message());
    if (size != record.size)
        fail_integrity(path.u8string() + ": " + std::to_string(size) + " bytes, but higen.json says " +
                       std::to_string(record.size) + "; fetch the file again");
    return path;
}

}  // namespace higen::core
