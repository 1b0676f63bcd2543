// TensorRT direct: engines that `higen-export build-engines` made (higen/backends/tensorrt.py).
#pragma once

#include <memory>

#include "backend.h"
#include "cuda.h"

namespace higen::core {

// Like make_tensorrt_backend, with a driver of the caller's choice, such as the tests' fake driver.
[[nodiscard]] std::unique_ptr<Backend> make_tensorrt_backend(const Bundle& bundle, const BackendOptions& options,
                                                             std::function<CudaDriver()> load_driver);

}  // namespace higen::core
