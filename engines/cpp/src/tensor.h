// Arrays on the host, and opaque tensors of a backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace higen::core {

using Shape = std::vector<std::int64_t>;

[[nodiscard]] inline std::size_t count(const Shape& shape) {
    std::size_t product = 1;
    for (const auto size : shape) product *= static_cast<std::size_t>(size);
    return product;
}

// A row-major array of float32 or int64 in host memory.
struct Array {
    Shape shape;
    std::variant<std::vector<float>, std::vector<std::int64_t>> values;

    static Array of(Shape shape, std::vector<float> values) { return {std::move(shape), std::move(values)}; }
    static Array of(Shape shape, std::vector<std::int64_t> values) { return {std::move(shape), std::move(values)}; }

    [[nodiscard]] bool is_float() const { return values.index() == 0; }
    [[nodiscard]] const std::vector<float>& floats() const { return std::get<0>(values); }
};

// A tensor of a backend, possibly on a device. Only its backend can look inside; others use a copy.
class Tensor {
public:
    Tensor() = default;
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    virtual ~Tensor() = default;

    [[nodiscard]] virtual const Shape& shape() const = 0;
    [[nodiscard]] virtual bool is_float() const = 0;
    // A copy in host memory, made when all work on it is done. Throws a backend error.
    [[nodiscard]] virtual Array to_host() const = 0;
};

// A tensor in host memory. Every backend takes it.
class HostTensor final : public Tensor {
public:
    explicit HostTensor(Array array) : array_(std::move(array)) {}

    [[nodiscard]] const Shape& shape() const override { return array_.shape; }
    [[nodiscard]] bool is_float() const override { return array_.is_float(); }
    [[nodiscard]] Array to_host() const override { return array_; }
    [[nodiscard]] const Array& array() const { return array_; }

private:
    Array array_;
};

using TensorPtr = std::shared_ptr<const Tensor>;
using Tensors = std::map<std::string, TensorPtr, std::less<>>;

[[nodiscard]] inline TensorPtr host_tensor(Array array) { return std::make_shared<HostTensor>(std::move(array)); }

}  // namespace higen::core
