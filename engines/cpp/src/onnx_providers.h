// What ONNX Runtime's sessions run on, and with which settings.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace higen::core {

// An execution provider and its device. `name` is the option's own text, read whole: "cpu", "cuda", "cuda:1",
// "tensorrt-rtx", or that of a plugin's provider.
struct Provider {
    std::string name;
    std::string kind;         // as ONNX Runtime lists it; "" for a plugin's
    std::int32_t device = 0;  // of several GPUs, from 0

    // A plugin's provider is not known to be one.
    [[nodiscard]] bool is_gpu() const { return !kind.empty() && kind != "CPUExecutionProvider"; }
};

// The provider of an option that names one of ONNX Runtime's own. Throws a request error for any other text: an unknown
// name, a number that is none, a number of a CPU.
[[nodiscard]] Provider parse_provider(const std::string& option);

// The providers that this ONNX Runtime was built with, the preferred first.
[[nodiscard]] std::vector<Provider> built_in_providers();
[[nodiscard]] bool is_built_in(const Provider& provider);

// Let sessions run on a built-in provider. Throws Ort::Exception where it cannot be loaded or has no such device.
void append(Ort::SessionOptions& options, const Provider& provider);

// The settings of every session: the same numbers on every CPU. `threads` of one stage; 0: ONNX Runtime's choice.
[[nodiscard]] Ort::SessionOptions session_settings(int threads);

// Whether ONNX Runtime failed because memory ran out: a broken file or graph is another matter.
[[nodiscard]] bool is_out_of_memory(std::string_view message);

}  // namespace higen::core
