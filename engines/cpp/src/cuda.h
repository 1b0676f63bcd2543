// The part of the CUDA driver that engines need, loaded at run time: device, memory, one stream
// (higen/backends/cuda.py). Building it needs no header and no library of CUDA.
//
// TensorRT must not be touched before Cuda::open has succeeded: without a driver its runtime can end the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tensor.h"

namespace higen::core {

// Functions of libcuda.so.1 (nvcuda.dll), as the CUDA driver API declares them; a CUresult is an int, 0 is success.
struct CudaDriver {
    int (*init)(unsigned flags);
    int (*error_text)(int result, const char** text);
    int (*device_count)(int* count);
    int (*device)(int* device, int index);
    int (*attribute)(int* value, int attribute, int device);
    int (*retain_context)(void** context, int device);
    int (*release_context)(int device);
    int (*set_context)(void* context);
    int (*create_stream)(void** stream, unsigned flags);
    int (*destroy_stream)(void* stream);
    int (*synchronize)(void* stream);
    int (*memory_info)(std::size_t* free, std::size_t* total);
    int (*allocate)(std::uint64_t* address, std::size_t size);
    int (*release)(std::uint64_t address);
    int (*copy_to_device)(std::uint64_t to, const void* from, std::size_t size, void* stream);
    int (*copy_to_host)(void* to, std::uint64_t from, std::size_t size, void* stream);
};

// The driver of this machine. Throws EngineError (no driver).
[[nodiscard]] CudaDriver load_cuda_driver();

// A GPU with one stream, on which everything here runs in order, and a pool of memory.
class Cuda {
public:
    // The first GPU that the driver lists (see CUDA_VISIBLE_DEVICES). Throws EngineError (no driver, no device).
    [[nodiscard]] static std::shared_ptr<Cuda> open(const CudaDriver& driver);
    ~Cuda();
    Cuda(const Cuda&) = delete;
    Cuda& operator=(const Cuda&) = delete;

    // Lock it while the stream is used.
    [[nodiscard]] std::recursive_mutex& mutex() { return mutex_; }
    // Make the GPU current for the calling thread.
    void enter() const;

    [[nodiscard]] std::int64_t architecture() const { return architecture_; }  // 89 for SM89
    [[nodiscard]] void* stream() const { return stream_; }
    [[nodiscard]] std::int64_t free_memory() const;

    // The address of a block of at least `size` bytes. Throws a backend error if the GPU has no such block.
    [[nodiscard]] std::uint64_t take(std::size_t size);
    // Return a block to the pool. Work on the stream may still use it: the next user comes later on the same stream.
    void give(std::uint64_t address, std::size_t size) noexcept;

    // New device memory, outside the pool.
    [[nodiscard]] std::uint64_t allocate(std::size_t size);
    void release(std::uint64_t address) const noexcept { (void)driver_.release(address); }

    void copy_to_device(std::uint64_t to, const void* from, std::size_t size) const;
    // Waits for everything on the stream.
    void copy_to_host(void* to, std::uint64_t from, std::size_t size);
    void synchronize() const;

private:
    Cuda(const CudaDriver& driver, int index);

    void check(int result, const char* function) const;
    void trim();

    CudaDriver driver_;
    std::recursive_mutex mutex_;
    std::map<std::size_t, std::vector<std::uint64_t>> pool_;
    int device_ = 0;
    std::int64_t architecture_ = 0;
    void* context_ = nullptr;
    void* stream_ = nullptr;
};

// A tensor on the GPU. Its memory returns to the pool when nothing refers to it.
class DeviceTensor final : public Tensor {
public:
    DeviceTensor(std::shared_ptr<Cuda> cuda, Shape shape, bool is_float);
    ~DeviceTensor() override { cuda_->give(address_, bytes()); }

    [[nodiscard]] const Shape& shape() const override { return shape_; }
    [[nodiscard]] bool is_float() const override { return is_float_; }
    [[nodiscard]] Array to_host() const override;
    [[nodiscard]] std::uint64_t address() const { return address_; }
    [[nodiscard]] const Cuda* cuda() const { return cuda_.get(); }

    // Copy an array of the same shape and type into it.
    void copy_from(const Array& array) const;

private:
    [[nodiscard]] std::size_t bytes() const { return count(shape_) * (is_float_ ? 4 : 8); }

    std::shared_ptr<Cuda> cuda_;
    Shape shape_;
    bool is_float_;
    std::uint64_t address_;
};

}  // namespace higen::core
