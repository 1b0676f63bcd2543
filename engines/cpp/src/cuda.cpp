#include "cuda.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <algorithm>

#include "errors.h"

namespace higen::core {
namespace {

using Kind = EngineError::Kind;

constexpr int capability_major = 75, capability_minor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
constexpr unsigned non_blocking = 1;                         // CU_STREAM_NON_BLOCKING
constexpr int no_device = 100, out_of_memory = 2;            // CUresult

// Block sizes are multiples of this many bytes: TensorRT needs such alignment.
std::size_t rounded(std::size_t size) {
    constexpr std::size_t alignment = 256;
    return std::max<std::size_t>((size + alignment - 1) / alignment, 1) * alignment;
}

std::string text_of(const CudaDriver& driver, int result) {
    const char* text = nullptr;
    (void)driver.error_text(result, &text);
    return std::string(text != nullptr ? text : "unknown error") + " (" + std::to_string(result) + ")";
}

#if defined(_WIN32)
constexpr const char* library = "nvcuda.dll";
void* open_library() { return LoadLibraryA(library); }
void* find(void* handle, const char* name) {
    return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(handle), name));
}
#else
constexpr const char* library = "libcuda.so.1";
void* open_library() { return dlopen(library, RTLD_NOW | RTLD_LOCAL); }
void* find(void* handle, const char* name) { return dlsym(handle, name); }
#endif

template <typename Function>
void load(void* handle, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(find(handle, name));
    if (function == nullptr)
        throw EngineError(Kind::no_driver, std::string(library) + " is too old: it has no " + name);
}

}  // namespace

CudaDriver load_cuda_driver() {
    void* const handle = open_library();  // never unloaded: a driver cannot be started again
    if (handle == nullptr)
        throw EngineError(Kind::no_driver, std::string("no NVIDIA driver: ") + library + " cannot be loaded");
    CudaDriver driver{};
    load(handle, "cuInit", driver.init);
    load(handle, "cuGetErrorString", driver.error_text);
    load(handle, "cuDeviceGetCount", driver.device_count);
    load(handle, "cuDeviceGet", driver.device);
    load(handle, "cuDeviceGetAttribute", driver.attribute);
    load(handle, "cuDevicePrimaryCtxRetain", driver.retain_context);
    load(handle, "cuDevicePrimaryCtxRelease_v2", driver.release_context);
    load(handle, "cuCtxSetCurrent", driver.set_context);
    load(handle, "cuStreamCreate", driver.create_stream);
    load(handle, "cuStreamDestroy_v2", driver.destroy_stream);
    load(handle, "cuStreamSynchronize", driver.synchronize);
    load(handle, "cuMemGetInfo_v2", driver.memory_info);
    load(handle, "cuMemAlloc_v2", driver.allocate);
    load(handle, "cuMemFree_v2", driver.release);
    load(handle, "cuMemcpyHtoDAsync_v2", driver.copy_to_device);
    load(handle, "cuMemcpyDtoHAsync_v2", driver.copy_to_host);
    return driver;
}

std::shared_ptr<Cuda> Cuda::open(const CudaDriver& driver) {
    const int started = driver.init(0);
    if (started == no_device) throw EngineError(Kind::no_device, "the NVIDIA driver finds no GPU");
    if (started != 0)
        throw EngineError(Kind::no_driver, "the NVIDIA driver does not start: " + text_of(driver, started));
    int count = 0;
    if (driver.device_count(&count) != 0 || count < 1)
        throw EngineError(Kind::no_device, "the NVIDIA driver finds no GPU");
    return std::shared_ptr<Cuda>(new Cuda(driver, 0));
}

Cuda::Cuda(const CudaDriver& driver, int index) : driver_(driver) {
    int major = 0, minor = 0;
    check(driver_.device(&device_, index), "cuDeviceGet");
    check(driver_.attribute(&major, capability_major, device_), "cuDeviceGetAttribute");
    check(driver_.attribute(&minor, capability_minor, device_), "cuDeviceGetAttribute");
    architecture_ = 10 * major + minor;
    // TensorRT itself uses the primary context too.
    check(driver_.retain_context(&context_, device_), "cuDevicePrimaryCtxRetain");
    try {
        enter();
        check(driver_.create_stream(&stream_, non_blocking), "cuStreamCreate");
    } catch (...) {
        (void)driver_.set_context(nullptr);
        (void)driver_.release_context(device_);
        throw;
    }
}

Cuda::~Cuda() {
    (void)driver_.set_context(context_);
    (void)driver_.synchronize(stream_);
    for (const auto& [size, blocks] : pool_)
        for (const auto address : blocks) release(address);
    (void)driver_.destroy_stream(stream_);
    (void)driver_.set_context(nullptr);  // a destroyed context must not stay current
    (void)driver_.release_context(device_);
}

void Cuda::check(int result, const char* function) const {
    if (result == 0) return;
    fail_backend(std::string(function) + ": " + text_of(driver_, result) +
                 (result == out_of_memory ? ": the GPU's memory is full" : ""));
}

void Cuda::enter() const { check(driver_.set_context(context_), "cuCtxSetCurrent"); }

std::int64_t Cuda::free_memory() const {
    std::size_t free = 0, total = 0;
    check(driver_.memory_info(&free, &total), "cuMemGetInfo");
    return static_cast<std::int64_t>(free);
}

std::uint64_t Cuda::take(std::size_t size) {
    size = rounded(size);
    const std::lock_guard lock(mutex_);
    if (auto& blocks = pool_[size]; !blocks.empty()) {
        const auto address = blocks.back();
        blocks.pop_back();
        return address;
    }
    return allocate(size);
}

void Cuda::give(std::uint64_t address, std::size_t size) noexcept {
    const std::lock_guard lock(mutex_);
    try {
        pool_[rounded(size)].push_back(address);
    } catch (...) {  // no memory for the list entry; freeing waits for work that uses the block
        release(address);
    }
}

std::uint64_t Cuda::allocate(std::size_t size) {
    std::uint64_t address = 0;
    if (driver_.allocate(&address, size) == 0) return address;
    trim();
    check(driver_.allocate(&address, size), "cuMemAlloc");
    return address;
}

void Cuda::trim() {
    synchronize();
    for (auto& [size, blocks] : pool_) {
        for (const auto address : blocks) release(address);
        blocks.clear();
    }
}

// The driver copies pageable memory before it returns, so `from` may be freed afterwards.
void Cuda::copy_to_device(std::uint64_t to, const void* from, std::size_t size) const {
    check(driver_.copy_to_device(to, from, size, stream_), "cuMemcpyHtoDAsync");
}

void Cuda::copy_to_host(void* to, std::uint64_t from, std::size_t size) {
    const std::lock_guard lock(mutex_);
    enter();
    check(driver_.copy_to_host(to, from, size, stream_), "cuMemcpyDtoHAsync");
    synchronize();
}

void Cuda::synchronize() const { check(driver_.synchronize(stream_), "cuStreamSynchronize"); }

DeviceTensor::DeviceTensor(std::shared_ptr<Cuda> cuda, Shape shape, bool is_float)
    : cuda_(std::move(cuda)), shape_(std::move(shape)), is_float_(is_float), address_(cuda_->take(bytes())) {}

Array DeviceTensor::to_host() const {
    const auto copy = [&](auto values) {
        cuda_->copy_to_host(values.data(), address_, bytes());
        return Array::of(shape_, std::move(values));
    };
    if (is_float_) return copy(std::vector<float>(count(shape_)));
    return copy(std::vector<std::int64_t>(count(shape_)));
}

void DeviceTensor::copy_from(const Array& array) const {
    std::visit([&](const auto& values) { cuda_->copy_to_device(address_, values.data(), bytes()); }, array.values);
}

}  // namespace higen::core
