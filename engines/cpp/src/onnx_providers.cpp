#include "onnx_providers.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
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

// As `exact_int8` in higen/backends/sessions.py: whether u8 x s8 products are exact here. An x86 CPU without VNNI adds
// pairs of them in 16 bits, which saturate.
bool u8_s8_products_are_exact() {
    // An ONNX graph, opset 21: y = MatMulInteger(a, b) of a uint8 [1, 4] and b int8 [4, 1].
    static constexpr unsigned char graph[] = {
        0x08, 0x0a, 0x3a, 0x5c, 0x0a, 0x18, 0x0a, 0x01, 0x61, 0x0a, 0x01, 0x62, 0x12, 0x01, 0x79, 0x22, 0x0d, 0x4d,
        0x61, 0x74, 0x4d, 0x75, 0x6c, 0x49, 0x6e, 0x74, 0x65, 0x67, 0x65, 0x72, 0x12, 0x01, 0x67, 0x5a, 0x13, 0x0a,
        0x01, 0x61, 0x12, 0x0e, 0x0a, 0x0c, 0x08, 0x02, 0x12, 0x08, 0x0a, 0x02, 0x08, 0x01, 0x0a, 0x02, 0x08, 0x04,
        0x5a, 0x13, 0x0a, 0x01, 0x62, 0x12, 0x0e, 0x0a, 0x0c, 0x08, 0x03, 0x12, 0x08, 0x0a, 0x02, 0x08, 0x04, 0x0a,
        0x02, 0x08, 0x01, 0x62, 0x13, 0x0a, 0x01, 0x79, 0x12, 0x0e, 0x0a, 0x0c, 0x08, 0x06, 0x12, 0x08, 0x0a, 0x02,
        0x08, 0x01, 0x0a, 0x02, 0x08, 0x01, 0x42, 0x04, 0x0a, 0x00, 0x10, 0x15,
    };
    std::array<std::uint8_t, 4> a{255, 255, 255, 255};
    std::array<std::int8_t, 4> b{127, 127, 127, 127};
    const std::array<std::int64_t, 2> row{1, 4}, column{4, 1};
    try {
        Ort::SessionOptions options;
        options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
        options.SetIntraOpNumThreads(1);
        const Ort::Env environment(ORT_LOGGING_LEVEL_FATAL, "higen");
        Ort::Session session(environment, graph, sizeof graph, options);
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const std::array<Ort::Value, 2> inputs = {
            Ort::Value::CreateTensor<std::uint8_t>(memory, a.data(), a.size(), row.data(), row.size()),
            Ort::Value::CreateTensor<std::int8_t>(memory, b.data(), b.size(), column.data(), column.size())};
        const char* const names[] = {"a", "b"};
        const char* const result[] = {"y"};
        const auto found = session.Run(Ort::RunOptions{}, names, inputs.data(), inputs.size(), result, 1);
        return *found[0].GetTensorData<std::int32_t>() == 4 * 255 * 127;
    } catch (const Ort::Exception&) {
        return false;  // a build without this operator
    }
}

}  // namespace

Ort::SessionOptions session_settings(int threads) {
    Ort::SessionOptions options;
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    if (threads > 0) options.SetIntraOpNumThreads(threads);
    // With this option, x86 CPUs use u8 x u8 products. They never saturate, but take three times as long with VNNI.
    static const bool exact = u8_s8_products_are_exact();
    options.AddConfigEntry("session.x64quantprecision", exact ? "0" : "1");
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
