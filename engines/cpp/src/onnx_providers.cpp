#include "onnx_providers.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <memory>
#include <thread>
#include <unordered_map>

#include "errors.h"

namespace higen::core {
namespace {

struct Known {
    const char* name;
    const char* kind;
};

// In the order of preference.
constexpr std::array<Known, 3> known = {{{"tensorrt-rtx", "NvTensorRTRTXExecutionProvider"},
                                         {"cuda", "CUDAExecutionProvider"},
                                         {"cpu", "CPUExecutionProvider"}}};

[[noreturn]] void fail_provider(const std::string& option) {
    fail_request("provider='" + option +
                 "': one of 'auto', 'cpu', 'cuda', 'cuda:N', 'tensorrt-rtx', 'tensorrt-rtx:N' (N: a GPU, from 0), "
                 "'openvino', 'webgpu', or another plugin's provider together with its library");
}

}  // namespace

Provider parse_provider(const std::string& option) {
    const auto colon = option.find(':');
    const auto name = option.substr(0, colon);
    const auto* found =
        std::find_if(known.begin(), known.end(), [&](const auto& provider) { return provider.name == name; });
    if (found == known.end()) fail_provider(option);
    Provider provider{option, found->kind, 0};
    if (colon == std::string::npos) return provider;
    const auto digits = option.substr(colon + 1);
    const bool plain = !digits.empty() && digits.find_first_not_of("0123456789") == std::string::npos &&
                       (digits.size() == 1 || digits[0] != '0');
    const auto* end = digits.data() + digits.size();
    if (!plain || std::from_chars(digits.data(), end, provider.device).ec != std::errc()) fail_provider(option);
    if (!provider.is_gpu() && provider.device != 0) fail_provider(option);
    return provider;
}

bool is_built_in(const Provider& provider) {
    const auto available = Ort::GetAvailableProviders();
    return std::find(available.begin(), available.end(), provider.kind) != available.end();
}

std::vector<Provider> built_in_providers() {
    std::vector<Provider> providers;
    for (const auto& [name, kind] : known)
        if (Provider provider{name, kind, 0}; is_built_in(provider)) providers.push_back(provider);
    return providers;
}

void append(Ort::SessionOptions& options, const Provider& provider) {
    const auto device = std::to_string(provider.device);
    if (provider.kind == "CUDAExecutionProvider") {
        OrtCUDAProviderOptionsV2* cuda = nullptr;
        Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
        const auto release = [](OrtCUDAProviderOptionsV2* p) { Ort::GetApi().ReleaseCUDAProviderOptions(p); };
        const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(release)> owner(cuda, release);
        const char* const keys[] = {"device_id"};
        const char* const values[] = {device.c_str()};
        Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(cuda, keys, values, 1));
        options.AppendExecutionProvider_CUDA_V2(*cuda);
    } else if (provider.kind == "NvTensorRTRTXExecutionProvider") {
        const std::unordered_map<std::string, std::string> values = {{"device_id", device}};
        options.AppendExecutionProvider(provider.kind, values);
    }
}

namespace {

// As `waiting` in higen/backends/sessions.py: threads without work sleep if there are only a few, else they spin, but
// only during a run. Each stage has a session, and spinning threads would take the processor from the next stage.
void set_waiting(Ort::SessionOptions& options, unsigned threads) {
    constexpr unsigned few = 4;
    if (threads <= few)
        options.AddConfigEntry("session.intra_op.allow_spinning", "0");
    else
        options.AddConfigEntry("session.force_spinning_stop", "1");
}

}  // namespace

Ort::SessionOptions session_settings(int threads) {
    Ort::SessionOptions options;
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    if (threads > 0) options.SetIntraOpNumThreads(threads);
    // An x86 CPU without VNNI adds pairs of u8 x s8 products in 16 bits. These saturate and give a wrong result. With
    // this option it uses u8 x u8 products, which do not saturate. On other CPUs it changes nothing.
    options.AddConfigEntry("session.x64quantprecision", "1");
    set_waiting(options, threads > 0 ? static_cast<unsigned>(threads) : std::thread::hardware_concurrency());
    return options;
}

bool is_out_of_memory(std::string_view message) {
    for (const std::string_view words : {"bad_alloc", "bad allocation", "Failed to allocate memory", "out of memory",
                                         "Cannot allocate memory", "not enough memory"})
        if (message.find(words) != std::string_view::npos) return true;
    return false;
}

}  // namespace higen::core
