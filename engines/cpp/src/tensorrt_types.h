// Conversion of TensorRT's types to ours, and its logger. Compiles against TensorRT 10 or newer, or TensorRT for RTX.
#pragma once

#include <NvInfer.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "tensor.h"

namespace higen::core {

// Keeps TensorRT's last error messages.
class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const nvinfer1::AsciiChar* text) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            const std::lock_guard lock(mutex_);
            if (errors_.size() == 3) errors_.erase(errors_.begin());
            errors_.emplace_back(text);
        } catch (...) {  // no memory for the message; the call that logs it fails anyway
        }
    }

    // The last messages; "no reason given" if there are none.
    [[nodiscard]] std::string errors() const {
        const std::lock_guard lock(mutex_);
        std::string text;
        for (const auto& error : errors_) text += (text.empty() ? "" : "; ") + error;
        return text.empty() ? "no reason given" : text;
    }

private:
    mutable std::mutex mutex_;
    std::vector<std::string> errors_;
};

inline nvinfer1::Dims to_dims(const Shape& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    for (std::size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
    return dims;
}

inline Shape to_shape(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

inline std::string dtype_name(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return "float32";
        case nvinfer1::DataType::kHALF: return "float16";
        case nvinfer1::DataType::kBF16: return "bfloat16";
        case nvinfer1::DataType::kINT32: return "int32";
        case nvinfer1::DataType::kINT64: return "int64";
        case nvinfer1::DataType::kBOOL: return "bool";
        default: return "another type (" + std::to_string(static_cast<int>(type)) + ")";
    }
}

}  // namespace higen::core
