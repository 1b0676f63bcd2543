// The interface of backends, which run stages. ONNX Runtime, TensorRT, and the router that chooses between these two
// implement it; tests use a fake.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.h"
#include "errors.h"
#include "stages.h"
#include "tensor.h"

namespace higen::core {

// Lets another thread stop a generation, also within a step if the backend can be interrupted.
class Cancellation {
public:
    // `why` is a string literal; the first call's is kept.
    void cancel(const char* why = "cancelled") {
        const std::lock_guard lock(mutex_);
        const char* none = nullptr;
        why_.compare_exchange_strong(none, why);
        if (interrupt_) interrupt_();
    }

    // Throws HIGEN_CANCELLED after `cancel` was called.
    void check() const {
        if (const char* why = why_) throw Error(HIGEN_CANCELLED, why);
    }

    // While this lives, `cancel` calls `interrupt`.
    class Interruptible {
    public:
        Interruptible(Cancellation& cancellation, std::function<void()> interrupt) : cancellation_(cancellation) {
            const std::lock_guard lock(cancellation_.mutex_);
            cancellation_.check();
            cancellation_.interrupt_ = std::move(interrupt);
        }
        ~Interruptible() {
            const std::lock_guard lock(cancellation_.mutex_);
            cancellation_.interrupt_ = nullptr;
        }
        Interruptible(const Interruptible&) = delete;
        Interruptible& operator=(const Interruptible&) = delete;

    private:
        Cancellation& cancellation_;
    };

private:
    std::atomic<const char*> why_ = nullptr;  // it was cancelled
    std::mutex mutex_;
    std::function<void()> interrupt_;
};

// Runs stages; safe for several threads at once.
class Backend {
public:
    Backend() = default;
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;
    virtual ~Backend() = default;

    // Load what a stage needs. Throws an unavailable or integrity error.
    virtual void prepare(const Stage& stage) = 0;

    // Load and return the first of several equivalent stages that can be run; the preferred one comes first. Throws
    // what `prepare` throws if none can be run.
    [[nodiscard]] virtual const Stage& choose(const std::vector<const Stage*>& stages) {
        for (std::size_t i = 0; i + 1 < stages.size(); ++i) {
            try {
                prepare(*stages[i]);
                return *stages[i];
            } catch (const Error& error) {
                if (error.status() != HIGEN_ERROR_UNAVAILABLE) throw;
            }
        }
        prepare(*stages.back());
        return *stages.back();
    }

    // Run a stage; calling `prepare` first is optional. Inputs may be host tensors or tensors of any backend. Throws a
    // backend error, also for wrong inputs, or HIGEN_CANCELLED.
    [[nodiscard]] virtual Tensors run(const Stage& stage, const Tensors& inputs, Cancellation& cancellation) = 0;

    // Where a prepared stage runs, in what precision ("cpu, fp32"), and why this backend's better choice is not used.
    [[nodiscard]] virtual std::string describe(const Stage& stage) const = 0;

    // The fallbacks inside this backend since the last call.
    [[nodiscard]] virtual std::vector<std::string> take_warnings() { return {}; }
};

struct BackendOptions {
    std::string backend = "auto";   // "auto", "tensorrt", "onnx"
    std::string precision;          // one of `precisions` (bundle.h); "": each backend's choice for its device
    std::string provider = "auto";  // of ONNX Runtime: "auto", "cpu", "cuda", "tensorrt-rtx", or a plugin's provider
    std::string provider_library;   // path of a plugin's library; "": none
    int threads = 0;                // per stage on a CPU; 0: ONNX Runtime's choice
    bool verify = true;             // check an engine's sha256; the bundle checks the other files
};

// The ONNX Runtime backend. `bundle` must outlive it. Throws an unavailable error if the provider is missing.
[[nodiscard]] std::unique_ptr<Backend> make_onnx_backend(const Bundle& bundle, const BackendOptions& options);

#ifdef HIGEN_TENSORRT
// The TensorRT backend: engines that `higen-export build-engines` made. `bundle` must outlive it.
[[nodiscard]] std::unique_ptr<Backend> make_tensorrt_backend(const Bundle& bundle, const BackendOptions& options);
#endif

}  // namespace higen::core
