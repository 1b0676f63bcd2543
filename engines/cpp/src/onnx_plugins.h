// Execution providers of plugins: libraries that ONNX Runtime loads at run time.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <optional>
#include <string>

#include "backend.h"

namespace higen::core {

// A plugin's provider. "openvino" and "webgpu" are known: their library may be named by the environment
// (HIGEN_OPENVINO_LIBRARY, HIGEN_WEBGPU_LIBRARY), and they compute in float32. Any other provider is given by ONNX
// Runtime's name for it, together with its library.
struct Plugin {
    std::string name;      // as in the options
    std::string provider;  // ONNX Runtime's name
    std::string library;   // path
    bool known = false;

    // The plugin that the options name; nothing if they name one of ONNX Runtime's own providers. Throws a request error
    // for a library without a provider, and an unavailable error for a known plugin without its library or with another
    // precision than fp32.
    [[nodiscard]] static std::optional<Plugin> of(const BackendOptions& options);

    // Make ONNX Runtime load the library, once per process. Throws an unavailable error if it cannot.
    void load(Ort::Env& env) const;

    // Let sessions run on the provider. `threads`: 0 is its own choice. Throws an unavailable error if it has no device.
    void append(Ort::Env& env, Ort::SessionOptions& options, int threads) const;

    // A session on the provider. If ONNX Runtime runs some nodes on the CPU, `partly` is set. `settings` makes the
    // session's options.
    template <typename Settings>
    [[nodiscard]] Ort::Session session(Ort::Env& env, const ORTCHAR_T* path, Settings settings, int threads,
                                       bool& partly) const {
        // ONNX Runtime refuses a session that needs the CPU if it is asked to.
        auto strict = settings();
        strict.AddConfigEntry("session.disable_cpu_ep_fallback", "1");
        append(env, strict, threads);
        try {
            return Ort::Session(env, path, strict);
        } catch (const Ort::Exception& error) {
            if (!needs_cpu(error)) throw;
        }
        partly = true;
        auto options = settings();
        append(env, options, threads);
        return Ort::Session(env, path, options);
    }

private:
    static bool needs_cpu(const Ort::Exception& error);
};

}  // namespace higen::core
