#include "onnx_plugins.h"

#include <array>
#include <cstdlib>
#include <filesystem>
#include <string_view>
#include <vector>

#include "errors.h"

namespace higen::core {
namespace {

// As PLUGINS in higen/backends/plugins.py.
struct Known {
    const char* name;
    const char* provider;
    const char* variable;
    const char* package;
    const char* wanted;
};

constexpr std::array<Known, 2> known_plugins = {
    {{"openvino", "OpenVINOExecutionProvider", "HIGEN_OPENVINO_LIBRARY", "onnxruntime-ep-openvino",
      "it runs on Intel processors only"},
     {"webgpu", "WebGpuExecutionProvider", "HIGEN_WEBGPU_LIBRARY", "onnxruntime-ep-webgpu",
      "it needs a GPU and its driver, on Linux for Vulkan (libvulkan.so.1)"}}};

const Known* find_known(const std::string& name) {
    for (const auto& row : known_plugins)
        if (name == row.name) return &row;
    return nullptr;
}

}  // namespace

std::optional<Plugin> Plugin::of(const BackendOptions& options) {
    const auto& library = options.provider_library;
    if (const auto* row = find_known(options.provider)) {
        Plugin plugin{options.provider, row->provider, library, true};
        if (const char* given = std::getenv(row->variable); library.empty() && given != nullptr) plugin.library = given;
        if (plugin.library.empty())
            fail_unavailable("provider='" + plugin.name + "': give the path of its library as provider_library or in " +
                             row->variable + "; the library is in the Python package " + row->package);
        if (!options.precision.empty() && options.precision != "fp32")
            fail_unavailable("precision='" + options.precision + "' with provider='" + plugin.name +
                             "': only fp32 runs there");
        return plugin;
    }
    if (library.empty()) return std::nullopt;
    if (options.provider == "auto" || options.provider.empty())
        fail_request("provider='" + options.provider + "': the name of a provider of provider_library='" + library + "'");
    return Plugin{options.provider, options.provider, library, false};
}

bool Plugin::needs_cpu(const Ort::Exception& error) {
    return std::string_view(error.what()).find("fallback to CPU EP has been explicitly disabled") !=
           std::string_view::npos;
}

#if ORT_API_VERSION >= 23

// A process has one shared environment, so a library is registered in it under its path.
void Plugin::load(Ort::Env& env) const {
    try {
        env.RegisterExecutionProviderLibrary(library.c_str(), std::filesystem::u8path(library).native());
    } catch (const Ort::Exception& error) {
        if (std::string_view(error.what()).find("already registered") != std::string_view::npos) return;
        fail_unavailable("provider_library='" + library + "': " + error.what());
    }
}

void Plugin::append(Ort::Env& env, Ort::SessionOptions& options, int threads) const {
    const bool openvino = name == "openvino";
    std::vector<Ort::ConstEpDevice> devices;
    for (const auto& device : env.GetEpDevices()) {
        if (device.EpName() != provider) continue;
        const char* kind = openvino ? device.EpMetadata().GetValue("ov_device") : nullptr;
        if (!openvino || (kind != nullptr && std::string_view(kind) == "CPU")) devices.push_back(device);
    }
    if (devices.empty()) {
        const auto* row = find_known(name);
        fail_unavailable("provider='" + name + "': its plugin offers no device here" +
                         (row != nullptr ? std::string("; ") + row->wanted : ""));
    }
    Ort::KeyValuePairs values;
    if (openvino) {
        // By itself OpenVINO computes in bfloat16 where the processor can.
        const auto count = threads > 0 ? ",\"INFERENCE_NUM_THREADS\":" + std::to_string(threads) : "";
        values.Add("load_config", (R"({"CPU":{"INFERENCE_PRECISION_HINT":"f32")" + count + "}}").c_str());
    }
    options.AppendExecutionProvider_V2(env, {devices.front()}, values);
}

#else

void Plugin::load(Ort::Env&) const {
    fail_unavailable("provider_library='" + library +
                     "': this library was built with headers older than ONNX Runtime 1.23");
}

void Plugin::append(Ort::Env& env, Ort::SessionOptions&, int) const { load(env); }

#endif

}  // namespace higen::core
