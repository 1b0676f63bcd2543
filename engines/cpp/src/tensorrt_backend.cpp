// plans.cpp decides which plan and profile to use, and why others do not fit. cuda.cpp manages device memory. This file
// calls TensorRT in the order that it needs:
//
//     probe the driver -> record -> file -> library -> validity -> deserialize -> context
//     profile -> input shapes -> addresses -> scratch memory -> execute
//
// It compiles against TensorRT 10 or newer, or TensorRT for RTX. The NvInfer.h that is found decides.
#include "tensorrt_backend.h"

#include <NvInfer.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <mutex>
#include <optional>
#include <system_error>
#include <utility>

#include "plans.h"
#include "sha256.h"
#include "tensorrt_types.h"

#ifndef _WIN32
#include <unistd.h>
#endif

namespace higen::core {
namespace {

using Kind = EngineError::Kind;

#if defined(TRT_MAJOR_RTX)
constexpr const char* flavour = "rtx";
#else
constexpr const char* flavour = "tensorrt";
#endif

// The version of the loaded library, in the form of its Python package. Only the version that built an engine can read
// it.
std::string library_version() {
    return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
           std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

using Inputs = std::map<std::string, std::shared_ptr<const DeviceTensor>>;

// A deserialized plan with its context; used while Cuda's mutex is held.
class Engine {
public:
    Engine(std::shared_ptr<Cuda> cuda, const Stage& stage, Plan plan, bool verify)
        : plan_(std::move(plan)), stage_(stage), cuda_(std::move(cuda)) {
        deserialize(verify);
        check_interface(plan_, stage_, tensors());
        stream_weights();
        make_context();
    }

    ~Engine() {
        save_cache();
        // A context must not outlive its engine, nor an engine its runtime. The order of the members ensures it.
    }
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    [[nodiscard]] const Plan& plan() const { return plan_; }
    // Bytes of scratch memory that it needs.
    [[nodiscard]] std::int64_t scratch_size() const { return engine_->getDeviceMemorySizeV2(); }

    // Put one execution on the stream.
    [[nodiscard]] Tensors run(std::size_t profile, const Inputs& inputs, std::uint64_t scratch,
                              std::int64_t scratch_bytes) {
        const auto stream = static_cast<cudaStream_t>(cuda_->stream());
        if (profile_ != profile) {
            profile_.reset();
            check(context_->setOptimizationProfileAsync(static_cast<std::int32_t>(profile), stream),
                  "profile " + std::to_string(profile));
            profile_ = profile;
        }
        for (const auto& [name, tensor] : inputs) {
            check(context_->setInputShape(name.c_str(), to_dims(tensor->shape())),
                  "shape " + to_text(tensor->shape()) + " of " + name);
            check(context_->setTensorAddress(name.c_str(), pointer(tensor->address())), "address of " + name);
        }
        const char* missing = nullptr;
        if (const auto lacking = context_->inferShapes(1, &missing); lacking != 0)
            fail_backend(plan_.name() + ": TensorRT cannot infer the shapes" +
                         (missing != nullptr ? std::string(", it misses ") + missing : ": " + logger_.errors()));
        Tensors outputs;
        for (const auto& spec : stage_.outputs) {
            const auto name = stage_.graph_output(spec);
            auto shape = to_shape(context_->getTensorShape(name.c_str()));
            if (shape.size() != spec.shape.size() ||
                std::any_of(shape.begin(), shape.end(), [](auto n) { return n < 1; }))
                fail_backend(plan_.name() + ": " + name + " would have the shape " + to_text(shape));
            auto tensor = std::make_shared<DeviceTensor>(cuda_, std::move(shape), spec.is_float);
            check(context_->setTensorAddress(name.c_str(), pointer(tensor->address())), "address of " + name);
            outputs.emplace(spec.name, std::move(tensor));
        }
        context_->setDeviceMemoryV2(pointer(scratch), scratch_bytes);
        check(context_->enqueueV3(stream), "execution");
        return outputs;
    }

private:
    static void* pointer(std::uint64_t address) {
        return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
    }

    void check(bool done, const std::string& what) const {
        if (!done) fail_backend(plan_.name() + ": TensorRT refuses the " + what + ": " + logger_.errors());
    }

    void deserialize(bool verify) {
        const auto& record = plan_.record;
        const auto where = plan_.path.u8string();
        std::string data;
        try {
            data = read_file(plan_.path);
        } catch (const Error& error) {
            throw EngineError(Kind::malformed, error.what());
        }
        bool whole = static_cast<std::int64_t>(data.size()) == record.size;
        if (whole && verify) {
            Sha256 hash;
            hash.update(data.data(), data.size());
            whole = hash.hex() == record.sha256;
        }
        if (!whole)
            throw EngineError(Kind::malformed,
                              where + ": is not the plan that its record describes: " + plan_.remedy());
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_) throw EngineError(Kind::other, "TensorRT does not start: " + logger_.errors());
#if defined(TRT_MAJOR_RTX)
        std::uint64_t reasons = 0;
        if (runtime_->getEngineValidity(data.data(), static_cast<std::int64_t>(data.size()), &reasons) ==
            nvinfer1::EngineValidity::kINVALID)
            throw validity_error(plan_, reasons);
#endif
        engine_.reset(runtime_->deserializeCudaEngine(data.data(), data.size()));
        if (!engine_) throw EngineError(Kind::malformed, where + ": TensorRT cannot load it: " + logger_.errors());
    }

    [[nodiscard]] std::vector<PlanTensor> tensors() const {
        std::vector<PlanTensor> found;
        for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* const name = engine_->getIOTensorName(i);
            found.push_back({name, engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT,
                             dtype_name(engine_->getTensorDataType(name)), to_shape(engine_->getTensorShape(name))});
        }
        return found;
    }

    // Keep as many weights of a streaming plan on the GPU as fit.
    void stream_weights() {
        const auto streamable = engine_->getStreamableWeightsSize();
        if (!plan_.record.weight_streaming || streamable <= 0) return;
        const auto budget = streaming_budget(streamable, scratch_size(), cuda_->free_memory(),
                                             engine_->getWeightStreamingAutomaticBudget());
        check(engine_->setWeightStreamingBudgetV2(budget), "budget of " + std::to_string(budget) + " bytes of weights");
    }

    void make_context() {
        constexpr auto strategy = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
#if defined(TRT_MAJOR_RTX)
        config_.reset(engine_->createRuntimeConfig());
        if (!config_) fail_backend(plan_.name() + ": TensorRT cannot create a configuration: " + logger_.errors());
        config_->setExecutionContextAllocationStrategy(strategy);
        // TensorRT for RTX compiles kernels at run time, and decides itself when a CUDA graph can be captured.
#if TRT_MAJOR_RTX > 1 || TRT_MINOR_RTX >= 3
        (void)config_->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE);
#endif
        cache_.reset(config_->createRuntimeCache());
        if (cache_) {
            load_cache();
            check(config_->setRuntimeCache(*cache_), "cache of kernels");
        }
        context_.reset(engine_->createExecutionContext(config_.get()));
#else
        context_.reset(engine_->createExecutionContext(strategy));
#endif
        if (!context_) fail_backend(plan_.name() + ": TensorRT cannot create a context: " + logger_.errors());
    }

#if defined(TRT_MAJOR_RTX)
    [[nodiscard]] std::filesystem::path cache_file(const std::string& suffix) const {
        return plan_.path.parent_path() / ("." + stage_.name + "-sm" + std::to_string(cuda_->architecture()) + suffix);
    }

    // Load kernels that an earlier run compiled. TensorRT refuses those of another GPU or version. If the file cannot
    // be read, the kernels are only compiled again.
    void load_cache() try {
        std::error_code ignored;
        const auto path = cache_file(".cache");
        if (!std::filesystem::is_regular_file(path, ignored)) return;
        const auto content = read_file(path);
        if (!content.empty() && cache_->deserialize(content.data(), content.size())) cache_size_ = content.size();
    } catch (const Error&) {
    }

    static long process() {
#ifndef _WIN32
        return static_cast<long>(getpid());
#else
        return 0;
#endif
    }

    // Write compiled kernels beside the plan if there are new ones. If this fails, the next run only compiles them
    // again.
    void save_cache() const noexcept try {
        if (!cache_ || !context_) return;
        const std::unique_ptr<nvinfer1::IHostMemory> content(cache_->serialize());
        if (!content || content->size() == cache_size_) return;
        // A unique name, because several programs may end at once. The next build removes a killed program's file.
        const auto part = cache_file(".cache." + std::to_string(process()) + "." +
                                     std::to_string(reinterpret_cast<std::uintptr_t>(this)) + ".part");
        std::ofstream file(part, std::ios::binary);
        file.write(static_cast<const char*>(content->data()), static_cast<std::streamsize>(content->size()));
        file.close();
        std::error_code failed;
        if (file) std::filesystem::rename(part, cache_file(".cache"), failed);
        if (!file || failed) std::filesystem::remove(part, failed);
    } catch (...) {
    }
#else
    void save_cache() const noexcept {}
#endif

    Plan plan_;
    const Stage& stage_;
    std::shared_ptr<Cuda> cuda_;
    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
#if defined(TRT_MAJOR_RTX)
    std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
    std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
    std::size_t cache_size_ = 0;
#endif
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::optional<std::size_t> profile_;
};

class TensorrtBackend final : public Backend {
public:
    TensorrtBackend(const Bundle& bundle, BackendOptions options, std::function<CudaDriver()> load_driver)
        : bundle_(bundle), options_(std::move(options)), load_driver_(std::move(load_driver)) {}

    ~TensorrtBackend() override {
        if (!cuda_) return;
        const std::lock_guard lock(cuda_->mutex());
        try {
            cuda_->enter();
            cuda_->synchronize();
        } catch (const Error&) {  // the GPU is lost, with everything in its memory
        }
        engines_.clear();
        if (scratch_ != 0) cuda_->release(scratch_);
    }

    void prepare(const Stage& stage) override {
        const std::lock_guard lock(mutex_);
        try {
            (void)resident(stage);
        } catch (const Error&) {
            // Release a GPU that is not used: a context takes hundreds of megabytes.
            if (engines_.empty()) cuda_.reset();
            throw;
        }
    }

    Tensors run(const Stage& stage, const Tensors& inputs, Cancellation& cancellation) override {
        check_inputs(stage, inputs, bundle_.fixed());
        Shapes shapes;
        for (const auto& [name, tensor] : inputs) shapes.emplace(name, tensor->shape());
        cancellation.check();
        const std::lock_guard own(mutex_);
        auto& engine = resident(stage);
        const auto profile = best_profile(engine.plan(), shapes);
        const std::lock_guard lock(cuda_->mutex());
        cuda_->enter();
        reserve(engine.scratch_size());  // its block may be gone, if a larger one for another engine failed
        Inputs given;
        for (const auto& [name, tensor] : inputs) given.emplace(name, on_device(tensor));
        return engine.run(profile, given, scratch_, scratch_bytes_);
    }

    std::string describe(const Stage& stage) const override {
        const std::lock_guard lock(mutex_);
        const auto& record = engines_.at(stage.name)->plan().record;
        return "cuda, " + record.precision + ", " + record.target;
    }

    std::vector<std::string> take_warnings() override {
        const std::lock_guard lock(mutex_);
        return std::exchange(warnings_, {});
    }

private:
    // The stage's engine on the GPU; the scratch memory is then large enough for it.
    Engine& resident(const Stage& stage) {
        if (const auto found = engines_.find(stage.name); found != engines_.end()) return *found->second;
        auto [plans, errors] = read_plans(bundle_.path(), stage.name);
        plans = in_precision(std::move(plans), options_.precision);
        if (plans.empty() && errors.empty()) {
            const auto& asked = options_.precision;
            fail_unavailable("no engine of " + stage.name + (asked.empty() ? "" : " in " + asked) +
                             " (make one: higen-export build-engines " + bundle_.path().u8string() +
                             " --target TARGET" + (asked.empty() ? "" : " --precision " + asked) + ")");
        }
        if (!cuda_) cuda_ = Cuda::open(load_driver_());
        plans = fitting_plans(stage.name, plans, errors, bundle_.files(), cuda_->architecture(),
                              {{flavour, library_version()}});
        const std::lock_guard lock(cuda_->mutex());
        cuda_->enter();
        auto engine = load(stage, plans);
        reserve(engine->scratch_size());
        return *engines_.emplace(stage.name, std::move(engine)).first->second;
    }

    // An engine of the best plan that loads. Warns of each better plan that does not; throws the last one's error.
    std::unique_ptr<Engine> load(const Stage& stage, const std::vector<Plan>& plans) {
        for (std::size_t i = 0;; ++i) {
            try {
                return std::make_unique<Engine>(cuda_, stage, plans.at(i), options_.verify);
            } catch (const EngineError& error) {
                if (i + 1 == plans.size()) throw;
                warnings_.push_back(stage.name + " runs on the engine " + plans[i + 1].name() + ": " + error.what());
            }
        }
    }

    // Make the block of scratch memory, which all engines use in turn, at least this large. If that fails, engines that
    // need no more than the present size keep working.
    void reserve(std::int64_t size) {
        if (size <= scratch_bytes_) return;
        const auto present = scratch_bytes_;
        if (scratch_ != 0) {
            cuda_->synchronize();
            cuda_->release(scratch_);
            scratch_ = 0, scratch_bytes_ = 0;
        }
        const auto take = [&](std::int64_t bytes) {
            scratch_ = cuda_->allocate(static_cast<std::size_t>(bytes));
            scratch_bytes_ = bytes;
        };
        try {
            take(size);
        } catch (const Error&) {
            if (present != 0) take(present);
            throw;
        }
    }

    [[nodiscard]] std::shared_ptr<const DeviceTensor> on_device(const TensorPtr& tensor) const {
        if (auto own = std::dynamic_pointer_cast<const DeviceTensor>(tensor); own && own->cuda() == cuda_.get())
            return own;
        const auto copy = [&](const Array& array) {
            auto made = std::make_shared<DeviceTensor>(cuda_, array.shape, array.is_float());
            made->copy_from(array);
            return made;
        };
        const auto* host = dynamic_cast<const HostTensor*>(tensor.get());
        return host != nullptr ? copy(host->array()) : copy(tensor->to_host());
    }

    const Bundle& bundle_;
    BackendOptions options_;
    std::function<CudaDriver()> load_driver_;
    mutable std::mutex mutex_;
    std::shared_ptr<Cuda> cuda_;
    std::map<std::string, std::unique_ptr<Engine>, std::less<>> engines_;
    std::vector<std::string> warnings_;
    std::uint64_t scratch_ = 0;
    std::int64_t scratch_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Backend> make_tensorrt_backend(const Bundle& bundle, const BackendOptions& options) {
    return make_tensorrt_backend(bundle, options, load_cuda_driver);
}

std::unique_ptr<Backend> make_tensorrt_backend(const Bundle& bundle, const BackendOptions& options,
                                               std::function<CudaDriver()> load_driver) {
    return std::make_unique<TensorrtBackend>(bundle, options, std::move(load_driver));
}

}  // namespace higen::core
