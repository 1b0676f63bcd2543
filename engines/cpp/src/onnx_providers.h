// The execution providers and settings of ONNX Runtime's sessions.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace higen::core {

// An execution provider and its device. `name` is the whole text of the option: "cpu", "cuda", "cuda:1",
// "tensorrt-rtx", or the name of a plugin's provider.
struct Provider {
    std::string name;
    std::string kind;         // ONNX Runtime's name for it; "" for a plugin's provider
    std::int32_t device = 0;  // index of the GPU, from 0

    // False for a plugin's provider: it is not known whether that uses a GPU.
    [[nodiscard]] bool is_gpu() const { return !kind.empty() && kind != "CPUExecutionProvider"; }
};

// Parses an option that names one of ONNX Runtime's own providers. Throws a request error for any other text: an
// unknown name, a wrong number, or a number after "cpu".
[[nodiscard]] Provider parse_provider(const std::string& option);

// The providers that this ONNX Runtime was built with, the preferred one first.
[[nodiscard]] std::vector<Provider> built_in_providers();
[[nodiscard]] bool is_built_in(const Provider& provider);

// Let sessions run on a built-in provider. Throws Ort::Exception if it cannot be loaded or has no such device.
void append(Ort::SessionOptions& options, const Provider& provider);

// The settings of every session, which give the same numbers on every CPU. `threads`: per stage; 0: ONNX Runtime's
// choice.
[[nodiscard]] Ort::SessionOptions session_settings(int threads);

// Whether ONNX Runtime failed because memory ran out, and not because of a broken file or graph.
[[nodiscard]] bool is_out_of_memory(std::string_view message);

}  // namespace higen::core
