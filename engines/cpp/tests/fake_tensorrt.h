// A GPU and a TensorRT for RTX in host memory. They check that callers keep the rules: the order of calls, the shapes
// that a profile allows, the memory that must be alive, and the order of freeing. What is an error with the real ones
// is an error here. What would crash or be silently wrong is added to `violations`.
//
// Work on the stream waits until a caller synchronizes. This reveals memory that is reused too early.
#pragma once

#include <NvInfer.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "cuda.h"

namespace fake {

// ---- The GPU ----

struct Gpu {
    int architecture = 89, devices = 1;
    std::size_t memory = 1 << 24;  // its bytes
    bool started = false, current = false;
    int contexts = 0, streams = 0, uploads = 0;
    std::map<std::uint64_t, std::vector<std::uint8_t>> blocks;
    std::vector<std::function<void()>> pending;
    std::vector<std::string> violations;
    int runtimes = 0, engines = 0, execution_contexts = 0;  // alive
    int runtimes_made = 0;

    void expect(bool good, const std::string& rule) {
        if (!good) violations.push_back(rule);
    }

    // The memory at an address, if `size` bytes of one live block are there.
    std::uint8_t* view(std::uint64_t address, std::size_t size) {
        auto block = blocks.upper_bound(address);
        if (block != blocks.begin() && address + size <= std::prev(block)->first + std::prev(block)->second.size())
            return std::prev(block)->second.data() + (address - std::prev(block)->first);
        violations.emplace_back("memory that is not allocated is used");
        return nullptr;
    }

    void drain() {
        auto work = std::exchange(pending, {});
        for (const auto& item : work) item();
    }

    [[nodiscard]] std::size_t used() const {
        std::size_t sum = 0;
        for (const auto& [address, block] : blocks) sum += block.size();
        return sum;
    }

    // Whether everything was freed.
    [[nodiscard]] bool clean() const {
        return blocks.empty() && contexts == 0 && streams == 0 && runtimes == 0 && engines == 0 &&
               execution_contexts == 0;
    }
};

inline Gpu gpu;

constexpr int not_initialized = 3, out_of_memory = 2, no_device = 100, invalid_context = 201;
inline int stream_place = 0;
inline void* const the_stream = &stream_place;

// The driver's functions for this GPU.
inline higen::core::CudaDriver driver() {
    higen::core::CudaDriver d{};
    d.init = [](unsigned) { return gpu.devices > 0 ? (gpu.started = true, 0) : no_device; };
    d.error_text = [](int, const char** text) { return *text = "a fake error", 0; };
    d.device_count = [](int* count) { return *count = gpu.devices, 0; };
    d.device = [](int* device, int index) { return *device = index, gpu.started ? 0 : not_initialized; };
    d.attribute = [](int* value, int which, int) {
        return *value = which == 75 ? gpu.architecture / 10 : gpu.architecture % 10, 0;
    };
    d.retain_context = [](void** context, int) { return *context = &gpu, ++gpu.contexts, 0; };
    d.release_context = [](int) {
        gpu.expect(--gpu.contexts > 0 || !gpu.current, "a context that is destroyed is left current");
        return 0;
    };
    d.set_context = [](void* context) { return gpu.current = context == &gpu, 0; };
    d.create_stream = [](void** stream, unsigned) {
        return *stream = the_stream, ++gpu.streams, gpu.current ? 0 : invalid_context;
    };
    d.destroy_stream = [](void*) { return gpu.drain(), --gpu.streams, 0; };
    d.synchronize = [](void* stream) {
        gpu.expect(stream == the_stream, "another stream is waited for");
        return gpu.drain(), gpu.current ? 0 : invalid_context;
    };
    d.memory_info = [](std::size_t* free, std::size_t* total) {
        return *free = gpu.memory - gpu.used(), *total = gpu.memory, gpu.current ? 0 : invalid_context;
    };
    d.allocate = [](std::uint64_t* address, std::size_t size) {
        static std::uint64_t next = 1 << 20;
        if (!gpu.current) return invalid_context;
        if (gpu.used() + size > gpu.memory) return out_of_memory;
        *address = next;
        next += (size + 511) / 256 * 256;
        gpu.blocks.emplace(*address, std::vector<std::uint8_t>(size, 0xCD));
        return 0;
    };
    d.release = [](std::uint64_t address) {
        gpu.drain();  // the real function waits too
        gpu.expect(gpu.blocks.erase(address) == 1, "what was not allocated is freed");
        return 0;
    };
    d.copy_to_device = [](std::uint64_t to, const void* from, std::size_t size, void* stream) {
        gpu.expect(stream == the_stream, "another stream is used");
        ++gpu.uploads;
        const auto* bytes = static_cast<const std::uint8_t*>(from);
        gpu.pending.emplace_back([to, copy = std::vector<std::uint8_t>(bytes, bytes + size)] {
            if (auto* place = gpu.view(to, copy.size())) std::memcpy(place, copy.data(), copy.size());
        });
        return gpu.current ? 0 : invalid_context;
    };
    d.copy_to_host = [](void* to, std::uint64_t from, std::size_t size, void*) {
        gpu.pending.emplace_back([=] {
            if (const auto* place = gpu.view(from, size)) std::memcpy(to, place, size);
        });
        return gpu.current ? 0 : invalid_context;
    };
    return d;
}

// ---- TensorRT ----

using Shape = std::vector<std::int64_t>;

// The content of a fake plan. Its file has a line for each tensor and profile:
//     input NAME TYPE SIZES...     output NAME TYPE = INPUT FACTOR     profile INPUT LOW... / HIGH...     scratch BYTES
//     streamable BYTES
// An output has an input's shape with its last two axes FACTOR times as large, and its values are those of `expected`.
struct Content {
    struct Entry {
        bool is_input;
        std::string name, type, like;
        std::int64_t factor;
        Shape shape;
    };
    std::vector<Entry> tensors;
    std::vector<std::map<std::string, std::pair<Shape, Shape>>> profiles;  // a new profile when an input is repeated
    std::int64_t scratch = 0, streamable = 0;

    [[nodiscard]] const Entry* find(const char* name) const {
        for (const auto& tensor : tensors)
            if (tensor.name == name) return &tensor;
        return nullptr;
    }
};

inline bool parse(const std::string& text, Content& content) {
    std::istringstream lines(text);
    std::string line, word;
    if (!std::getline(lines, line) || line != "fake plan") return false;
    while (std::getline(lines, line)) {
        std::istringstream words(line);
        words >> word;
        const auto sizes = [&] {
            Shape shape;
            while (words >> word && word != "/") shape.push_back(std::stoll(word));
            return shape;
        };
        if (word == "input" || word == "output") {
            Content::Entry entry{word == "input", "", "", "", 1, {}};
            words >> entry.name >> entry.type;
            if (entry.is_input)
                entry.shape = sizes();
            else
                words >> word >> entry.like >> entry.factor, entry.shape = sizes();
            content.tensors.push_back(entry);
        } else if (word == "profile") {
            words >> word;
            const auto name = word;
            if (content.profiles.empty() || content.profiles.back().count(name) > 0) content.profiles.emplace_back();
            const auto low = sizes();
            content.profiles.back()[name] = {low, sizes()};
        } else if (word == "scratch") {
            words >> content.scratch;
        } else if (word == "streamable") {
            words >> content.streamable;
        }
    }
    return true;
}

// Value number `i` of output number `output`, from the sums of the inputs.
inline float expected(double sum, std::size_t output, std::size_t i) {
    return static_cast<float>(sum) + static_cast<float>(100 * output) + static_cast<float>(i % 7);
}

inline Shape shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + dims.nbDims}; }

inline nvinfer1::Dims dims_of(const Shape& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

inline std::size_t bytes_of(const std::string& type, const Shape& shape) {
    std::size_t size = type == "int64" ? 8 : type == "float32" ? 4 : 2;
    for (const auto n : shape) size *= static_cast<std::size_t>(n);
    return size;
}

class Context final : public nvinfer1::IExecutionContext {
public:
    Context(const Content& content, nvinfer1::ILogger& logger) : content_(content), logger_(logger) {
        ++gpu.execution_contexts;
    }
    ~Context() override {
        gpu.expect(gpu.pending.empty(), "a context dies while its work waits on the stream");
        gpu.expect(gpu.engines > 0, "a context outlives its engine");
        --gpu.execution_contexts;
    }

    bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept override {
        gpu.expect(stream == the_stream, "another stream is used");
        const auto index = static_cast<std::size_t>(profile);
        if (profile < 0 || index >= content_.profiles.size()) return refuse("no such profile");
        profile_ = &content_.profiles[index];
        shapes_.clear();
        return true;
    }

    bool setInputShape(char const* name, nvinfer1::Dims const& dims) noexcept override {
        gpu.expect(profile_ != nullptr, "shapes are set before a profile");
        const auto shape = shape_of(dims);
        const auto* entry = content_.find(name);
        if (entry == nullptr || !entry->is_input) return refuse("no such input");
        if (profile_ == nullptr) return false;
        if (const auto limits = profile_->find(name); limits != profile_->end())
            for (std::size_t i = 0; i < shape.size(); ++i)
                if (shape[i] < limits->second.first.at(i) || shape[i] > limits->second.second.at(i))
                    return refuse("a shape outside its profile");
        shapes_[name] = shape;
        return true;
    }

    bool setTensorAddress(char const* name, void* address) noexcept override {
        const auto place = reinterpret_cast<std::uintptr_t>(address);
        if (content_.find(name) == nullptr) return refuse("no such tensor");
        gpu.expect(place != 0 && place % 256 == 0, "an address is not aligned");
        addresses_[name] = place;
        return true;
    }

    std::int32_t inferShapes(std::int32_t most, char const** names) noexcept override {
        std::int32_t missing = 0;
        for (const auto& tensor : content_.tensors)
            if (tensor.is_input && shapes_.count(tensor.name) == 0 && missing++ < most) *names = tensor.name.c_str();
        return missing;
    }

    nvinfer1::Dims getTensorShape(char const* name) const noexcept override {
        const auto* entry = content_.find(name);
        if (entry == nullptr) return {-1, {}};
        const auto shape = shapes_.find(entry->is_input ? entry->name : entry->like);
        if (shape == shapes_.end()) return dims_of(entry->shape);
        return dims_of(entry->is_input ? shape->second : output_shape(*entry, shape->second));
    }

    void setDeviceMemoryV2(void* address, std::int64_t size) noexcept override {
        scratch_ = reinterpret_cast<std::uintptr_t>(address);
        scratch_size_ = size;
    }

    bool enqueueV3(cudaStream_t stream) noexcept override {
        gpu.expect(gpu.current, "work is enqueued without a current context");
        gpu.expect(stream == the_stream, "another stream is used");
        gpu.expect(scratch_size_ >= content_.scratch, "the scratch memory is too small");
        std::vector<std::pair<std::uintptr_t, std::size_t>> inputs, outputs;
        for (const auto& tensor : content_.tensors) {
            const auto address = addresses_.find(tensor.name);
            if (address == addresses_.end()) return refuse("an address is missing");
            if (tensor.is_input && shapes_.count(tensor.name) == 0) return refuse("a shape is missing");
            const auto shape = shape_of(getTensorShape(tensor.name.c_str()));
            (tensor.is_input ? inputs : outputs).emplace_back(address->second, bytes_of(tensor.type, shape));
            if (tensor.is_input && tensor.type == "int64") inputs.back().second |= std::size_t{1} << 60;
        }
        gpu.pending.emplace_back([inputs, outputs, scratch = scratch_, size = content_.scratch] {
            // Scratch memory is overwritten: engines that share it must run one after the other.
            if (auto* place = gpu.view(scratch, static_cast<std::size_t>(size)); place != nullptr)
                std::memset(place, 0xAB, static_cast<std::size_t>(size));
            double sum = 0;
            for (const auto& [address, marked] : inputs) {
                const bool whole = marked >> 60 != 0;
                const auto bytes = marked & ~(std::size_t{1} << 60);
                const auto* place = gpu.view(address, bytes);
                if (place == nullptr) return;
                for (std::size_t at = 0; at < bytes; at += whole ? 8 : 4) {
                    std::int64_t number = 0;
                    float value = 0;
                    std::memcpy(whole ? static_cast<void*>(&number) : &value, place + at, whole ? 8 : 4);
                    sum += whole ? static_cast<double>(number) : value;
                }
            }
            for (std::size_t n = 0; n < outputs.size(); ++n) {
                auto* place = gpu.view(outputs[n].first, outputs[n].second);
                for (std::size_t i = 0; place != nullptr && i < outputs[n].second / 4; ++i) {
                    const float value = expected(sum, n, i);
                    std::memcpy(place + 4 * i, &value, 4);
                }
            }
        });
        return true;
    }

private:
    bool refuse(const char* why) const noexcept {
        logger_.log(nvinfer1::ILogger::Severity::kERROR, why);
        return false;
    }

    static Shape output_shape(const Content::Entry& entry, Shape shape) {
        shape[shape.size() - 2] *= entry.factor, shape.back() *= entry.factor;
        for (std::size_t i = 0; i < shape.size(); ++i)
            if (entry.shape[i] >= 0) shape[i] = entry.shape[i];
        return shape;
    }

    const Content& content_;
    nvinfer1::ILogger& logger_;
    const std::map<std::string, std::pair<Shape, Shape>>* profile_ = nullptr;
    std::map<std::string, Shape, std::less<>> shapes_;
    std::map<std::string, std::uintptr_t, std::less<>> addresses_;
    std::uintptr_t scratch_ = 0;
    std::int64_t scratch_size_ = 0;
};

using Strategy = nvinfer1::ExecutionContextAllocationStrategy;

inline std::string cached = "kernels";  // the content of a cache at the end

class HostMemory final : public nvinfer1::IHostMemory {
public:
    void* data() const noexcept override { return cached.data(); }
    std::size_t size() const noexcept override { return cached.size(); }
};

class Cache final : public nvinfer1::IRuntimeCache {
public:
    nvinfer1::IHostMemory* serialize() const noexcept override { return new HostMemory; }
    bool deserialize(void const* data, std::size_t size) noexcept override {
        return std::string(static_cast<const char*>(data), size) == cached;
    }
};

class Config final : public nvinfer1::IRuntimeConfig {
public:
    void setExecutionContextAllocationStrategy(Strategy given) noexcept override { strategy = given; }
    bool setCudaGraphStrategy(nvinfer1::CudaGraphStrategy) noexcept override { return true; }
    nvinfer1::IRuntimeCache* createRuntimeCache() const noexcept override { return new Cache; }
    bool setRuntimeCache(nvinfer1::IRuntimeCache const&) noexcept override { return true; }

    Strategy strategy = Strategy::kSTATIC;
};

class Engine final : public nvinfer1::ICudaEngine {
public:
    Engine(Content content, nvinfer1::ILogger& logger) : content_(std::move(content)), logger_(logger) {
        ++gpu.engines;
    }
    ~Engine() override {
        gpu.expect(gpu.execution_contexts < gpu.engines, "an engine dies before its context");
        gpu.expect(gpu.runtimes >= gpu.engines, "an engine outlives its runtime");
        --gpu.engines;
    }

    std::int32_t getNbIOTensors() const noexcept override { return static_cast<std::int32_t>(content_.tensors.size()); }
    char const* getIOTensorName(std::int32_t i) const noexcept override {
        return content_.tensors[static_cast<std::size_t>(i)].name.c_str();
    }
    nvinfer1::TensorIOMode getTensorIOMode(char const* name) const noexcept override {
        return content_.find(name)->is_input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
    }
    nvinfer1::DataType getTensorDataType(char const* name) const noexcept override {
        const auto& type = content_.find(name)->type;
        return type == "int64"     ? nvinfer1::DataType::kINT64
               : type == "float32" ? nvinfer1::DataType::kFLOAT
                                   : nvinfer1::DataType::kHALF;
    }
    nvinfer1::Dims getTensorShape(char const* name) const noexcept override {
        return dims_of(content_.find(name)->shape);
    }
    std::int64_t getDeviceMemorySizeV2() const noexcept override { return content_.scratch; }
    std::int64_t getStreamableWeightsSize() const noexcept override { return content_.streamable; }
    std::int64_t getWeightStreamingAutomaticBudget() const noexcept override { return content_.streamable / 2; }
    bool setWeightStreamingBudgetV2(std::int64_t bytes) noexcept override { return budget = bytes, true; }
    nvinfer1::IExecutionContext* createExecutionContext(Strategy strategy) noexcept override {
        gpu.expect(strategy == Strategy::kUSER_MANAGED, "scratch memory is TensorRT's");
        return new Context(content_, logger_);
    }
    nvinfer1::IRuntimeConfig* createRuntimeConfig() noexcept override { return new Config; }
    nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::IRuntimeConfig* config) noexcept override {
        return createExecutionContext(static_cast<Config*>(config)->strategy);
    }

    static inline std::int64_t budget = -1;  // the one that was set last

private:
    Content content_;
    nvinfer1::ILogger& logger_;
};

class Runtime final : public nvinfer1::IRuntime {
public:
    explicit Runtime(nvinfer1::ILogger& logger) : logger_(logger) {
        gpu.expect(gpu.started && gpu.current, "TensorRT is touched before the driver has started");
        ++gpu.runtimes, ++gpu.runtimes_made;
    }
    ~Runtime() override {
        gpu.expect(gpu.engines < gpu.runtimes, "a runtime dies before its engine");
        --gpu.runtimes;
    }

    nvinfer1::EngineValidity getEngineValidity(void const* data, std::int64_t size,
                                               std::uint64_t* reasons) const noexcept override {
        Content content;
        *reasons = invalid;
        if (!parse({static_cast<const char*>(data), static_cast<std::size_t>(size)}, content)) *reasons |= 32;
        return *reasons == 0 ? nvinfer1::EngineValidity::kVALID : nvinfer1::EngineValidity::kINVALID;
    }

    nvinfer1::ICudaEngine* deserializeCudaEngine(void const* data, std::size_t size) noexcept override {
        Content content;
        if (fails || !parse({static_cast<const char*>(data), size}, content)) {
            logger_.log(nvinfer1::ILogger::Severity::kINFO, "a word of advice");
            logger_.log(nvinfer1::ILogger::Severity::kERROR, "the magic tag does not match");
            return nullptr;
        }
        return new Engine(std::move(content), logger_);
    }

    static inline std::uint64_t invalid = 0;  // reasons to report for the next plans
    static inline bool fails = false;

private:
    nvinfer1::ILogger& logger_;
};

}  // namespace fake

extern "C" void* createInferRuntime_INTERNAL(void* logger, std::int32_t) noexcept {
    return static_cast<nvinfer1::IRuntime*>(new fake::Runtime(*static_cast<nvinfer1::ILogger*>(logger)));
}
extern "C" std::int32_t getInferLibMajorVersion() noexcept { return 1; }
extern "C" std::int32_t getInferLibMinorVersion() noexcept { return 7; }
extern "C" std::int32_t getInferLibPatchVersion() noexcept { return 1; }
extern "C" std::int32_t getInferLibBuildVersion() noexcept { return 116; }
