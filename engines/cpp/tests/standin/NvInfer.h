// A stand-in for TensorRT's headers, for tests on machines without them: our own declarations of the calls that
// src/tensorrt_backend.cpp makes, with the names and types of TensorRT's documentation. Its binary interface differs
// from TensorRT's: code compiled against it runs only with tests/fake_tensorrt.h.
//
// -DTRT_MAJOR_RTX=1 -DTRT_MINOR_RTX=7 makes it TensorRT for RTX.
#pragma once

#if !defined(HIGEN_TENSORRT_STANDIN)
#error "this is no TensorRT: set TENSORRT_ROOT to one"
#endif

#include <cstddef>
#include <cstdint>

using cudaStream_t = struct CUstream_st*;

extern "C" void* createInferRuntime_INTERNAL(void* logger, std::int32_t version) noexcept;
extern "C" std::int32_t getInferLibMajorVersion() noexcept;
extern "C" std::int32_t getInferLibMinorVersion() noexcept;
extern "C" std::int32_t getInferLibPatchVersion() noexcept;
extern "C" std::int32_t getInferLibBuildVersion() noexcept;

namespace nvinfer1 {

using AsciiChar = char;

struct Dims {
    static constexpr std::int32_t MAX_DIMS = 8;
    std::int32_t nbDims;
    std::int64_t d[MAX_DIMS];
};

enum class DataType : std::int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64, kINT4, kFP4 };
enum class TensorIOMode : std::int32_t { kNONE, kINPUT, kOUTPUT };
enum class ExecutionContextAllocationStrategy : std::int32_t { kSTATIC, kON_PROFILE_CHANGE, kUSER_MANAGED };

class ILogger {
public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
    virtual void log(Severity severity, AsciiChar const* text) noexcept = 0;
    virtual ~ILogger() = default;
};

class IHostMemory {
public:
    virtual ~IHostMemory() = default;
    virtual void* data() const noexcept = 0;
    virtual std::size_t size() const noexcept = 0;
};

class IExecutionContext {
public:
    virtual ~IExecutionContext() = default;
    virtual bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept = 0;
    virtual bool setInputShape(char const* name, Dims const& shape) noexcept = 0;
    virtual bool setTensorAddress(char const* name, void* address) noexcept = 0;
    virtual std::int32_t inferShapes(std::int32_t most, char const** names) noexcept = 0;
    virtual Dims getTensorShape(char const* name) const noexcept = 0;
    virtual void setDeviceMemoryV2(void* address, std::int64_t size) noexcept = 0;
    virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

#if defined(TRT_MAJOR_RTX)
enum class EngineValidity : std::int32_t { kINVALID, kSUBOPTIMAL, kVALID };
enum class CudaGraphStrategy : std::int32_t { kDISABLED, kWHOLE_GRAPH_CAPTURE };

class IRuntimeCache {
public:
    virtual ~IRuntimeCache() = default;
    virtual IHostMemory* serialize() const noexcept = 0;
    virtual bool deserialize(void const* data, std::size_t size) noexcept = 0;
};

class IRuntimeConfig {
public:
    virtual ~IRuntimeConfig() = default;
    virtual void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept = 0;
    virtual bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept = 0;
    virtual IRuntimeCache* createRuntimeCache() const noexcept = 0;
    virtual bool setRuntimeCache(IRuntimeCache const& cache) noexcept = 0;
};
#endif

class ICudaEngine {
public:
    virtual ~ICudaEngine() = default;
    virtual std::int32_t getNbIOTensors() const noexcept = 0;
    virtual char const* getIOTensorName(std::int32_t index) const noexcept = 0;
    virtual TensorIOMode getTensorIOMode(char const* name) const noexcept = 0;
    virtual DataType getTensorDataType(char const* name) const noexcept = 0;
    virtual Dims getTensorShape(char const* name) const noexcept = 0;
    virtual std::int64_t getDeviceMemorySizeV2() const noexcept = 0;
    virtual std::int64_t getStreamableWeightsSize() const noexcept = 0;
    virtual std::int64_t getWeightStreamingAutomaticBudget() const noexcept = 0;
    virtual bool setWeightStreamingBudgetV2(std::int64_t bytes) noexcept = 0;
    virtual IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept = 0;
#if defined(TRT_MAJOR_RTX)
    virtual IRuntimeConfig* createRuntimeConfig() noexcept = 0;
    virtual IExecutionContext* createExecutionContext(IRuntimeConfig* config) noexcept = 0;
#endif
};

class IRuntime {
public:
    virtual ~IRuntime() = default;
#if defined(TRT_MAJOR_RTX)
    virtual EngineValidity getEngineValidity(void const* data, std::int64_t size,
                                             std::uint64_t* reasons) const noexcept = 0;
#endif
    virtual ICudaEngine* deserializeCudaEngine(void const* data, std::size_t size) noexcept = 0;
};

inline IRuntime* createInferRuntime(ILogger& logger) noexcept {
    return static_cast<IRuntime*>(createInferRuntime_INTERNAL(&logger, 0));
}

}  // namespace nvinfer1
