// The ONNX Runtime backend. Its graphs have their weights in the model's safetensors files.
#include <onnxruntime_cxx_api.h>

#include <deque>
#include <filesystem>
#include <map>
#include <mutex>
#include <utility>

#include "backend.h"
#include "graph_files.h"
#include "onnx_providers.h"

namespace higen::core {
namespace {

// A result of ONNX Runtime in host memory.
class OnnxTensor final : public Tensor {
public:
    explicit OnnxTensor(Ort::Value value) : value_(std::move(value)) {
        const auto info = value_.GetTensorTypeAndShapeInfo();
        shape_ = info.GetShape();
        is_float_ = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }

    [[nodiscard]] const Shape& shape() const override { return shape_; }
    [[nodiscard]] bool is_float() const override { return is_float_; }
    [[nodiscard]] const Ort::Value& value() const { return value_; }

    [[nodiscard]] Array to_host() const override {
        const auto size = count(shape_);
        if (is_float_) {
            const auto* data = value_.GetTensorData<float>();
            return Array::of(shape_, std::vector<float>(data, data + size));
        }
        const auto* data = value_.GetTensorData<std::int64_t>();
        return Array::of(shape_, std::vector<std::int64_t>(data, data + size));
    }

private:
    Shape shape_;
    bool is_float_ = true;
    Ort::Value value_;
};

// The inputs of one run as ONNX Runtime takes them: views of host memory, and copies of other tensors.
class Inputs {
public:
    [[nodiscard]] Ort::Value& add(const Tensor& tensor) {
        if (const auto* host = dynamic_cast<const HostTensor*>(&tensor)) return look_at(host->array());
        return look_at(copies_.emplace_back(tensor.to_host()));
    }

private:
    Ort::Value& look_at(const Array& array) {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        return std::visit(
            [&](const auto& values) -> Ort::Value& {
                using Number = typename std::decay_t<decltype(values)>::value_type;
                // ONNX Runtime only reads an input, though the interface is not const.
                return values_.emplace_back(Ort::Value::CreateTensor(
                    memory, const_cast<Number*>(values.data()), values.size(), array.shape.data(), array.shape.size()));
            },
            array.values);
    }

    std::deque<Array> copies_;
    std::deque<Ort::Value> values_;
};

// ONNX Runtime's message, without the newline at the end of some messages.
std::string words(const Ort::Exception& error) {
    std::string text = error.what();
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
}

// Throws if ONNX Runtime failed because memory ran out.
void check_memory(const Ort::Exception& error, const std::string& where) {
    if (is_out_of_memory(error.what())) throw Error(HIGEN_ERROR_MEMORY, where + ": out of memory: " + words(error));
}

class OnnxBackend final : public Backend {
public:
    OnnxBackend(const Bundle& bundle, const BackendOptions& options) : bundle_(bundle), options_(options) {
        if (!options.provider_library.empty()) {
            if (options.provider == "auto" || options.provider.empty())
                fail_request("provider='" + options.provider + "': the name of a provider of provider_library='" +
                             options.provider_library + "'");
            register_plugin();
            candidates_ = {{options.provider, "", 0}};
        } else if (options.provider != "auto") {
            candidates_ = {parse_provider(options.provider)};
            if (!is_built_in(candidates_.front()))
                fail_unavailable("provider='" + options.provider + "': this ONNX Runtime has no " +
                                 candidates_.front().kind);
        } else {
            candidates_ = built_in_providers();
        }
    }

    void prepare(const Stage& stage) override { (void)made(stage); }

    Tensors run(const Stage& stage, const Tensors& inputs, Cancellation& cancellation) override {
        auto& made = this->made(stage);
        check_inputs(stage, inputs, made.fixed);
        auto& session = made.session;
        Ort::RunOptions run_options;
        const Cancellation::Interruptible interruptible(cancellation, [&] { run_options.SetTerminate(); });
        try {
            Ort::IoBinding binding(session);
            Inputs given;
            for (const auto& [name, tensor] : inputs) {
                const auto* own = dynamic_cast<const OnnxTensor*>(tensor.get());
                binding.BindInput(name.c_str(), own != nullptr ? own->value() : given.add(*tensor));
            }
            // Results go through host memory, also on a GPU: they are about a megabyte per step, and a step takes far
            // longer.
            const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
            for (const auto& output : stage.outputs) binding.BindOutput(stage.graph_output(output).c_str(), memory);
            session.Run(run_options, binding);
            auto values = binding.GetOutputValues();
            Tensors outputs;
            for (std::size_t i = 0; i < stage.outputs.size(); ++i)
                outputs.emplace(stage.outputs[i].name, std::make_shared<OnnxTensor>(std::move(values.at(i))));
            return outputs;
        } catch (const Ort::Exception& error) {
            cancellation.check();
            check_memory(error, stage.name);
            fail_backend(stage.name + ": ONNX Runtime failed: " + words(error));
        }
    }

    std::string describe(const Stage& stage) const override {
        const std::lock_guard lock(mutex_);
        const auto& found = sessions_.at(stage.name);
        return found.provider + ", " + found.precision + found.passed_over;
    }

private:
    // A stage's session. `fixed`: the only sizes that its graph accepts, those of the model and of a static graph.
    struct Made {
        Ort::Session session;
        Sizes fixed;
        std::string provider;
        std::string precision;
        std::string passed_over;
    };

    Made& made(const Stage& stage) {
        const std::lock_guard lock(mutex_);
        auto found = sessions_.find(stage.name);
        if (found == sessions_.end()) found = sessions_.emplace(stage.name, make(stage)).first;
        return found->second;
    }

    Made make(const Stage& stage) {
        std::string passed_over;
        for (const auto& provider : candidates_) {
            const auto precision = choose_precision(stage, provider);
            const auto path = bundle_.file(graph_file(stage.name, precision));
            const auto weights = bundle_.weights(stage, precision);
            (void)bundle_.file(weights);
            check_external(path, weights);
            auto options = session_settings(options_.threads);
            // A provider that cannot be loaded fails here: there is no silent fallback.
            try {
                append_to(options, provider);
            } catch (const Ort::Exception& error) {
                if (options_.provider != "auto") fail_unavailable("provider='" + provider.name + "': " + error.what());
                passed_over += "; not " + provider.name + ": " + error.what();
                continue;
            }
            try {
                Made made{Ort::Session(env_, path.c_str(), options), bundle_.fixed(), provider.name, precision,
                          passed_over};
                check_graph(stage, made.session, path, made.fixed);
                (void)bundle_.file(graph_file(stage.name, precision));  // throws if the file was replaced
                (void)bundle_.file(weights);
                return made;
            } catch (const Ort::Exception& error) {
                const auto where = path.u8string();
                if (&provider == &candidates_.back()) {
                    check_memory(error, where);
                    if (error.GetOrtErrorCode() == ORT_NOT_IMPLEMENTED)
                        fail_unavailable(where + ": this ONNX Runtime cannot run it on " + provider.name + ": " +
                                         words(error));
                    fail_integrity(where + ": ONNX Runtime cannot load it: " + words(error));
                }
                passed_over += "; not " + provider.name + ": " + error.what();
            }
        }
        fail_unavailable("no provider can run " + stage.name + " here" + passed_over);
    }

    // The requested precision, or one that stands in for it. By default fp16 on a GPU if there is such a graph, else
    // fp32: a CPU computes float16 graphs in float32, with extra casts.
    [[nodiscard]] std::string choose_precision(const Stage& stage, const Provider& provider) const {
        const auto wanted = !options_.precision.empty()             ? stand_ins(options_.precision)
                            : provider.is_gpu()                   ? std::vector<std::string>{"fp16", "fp32"}
                                                                    : std::vector<std::string>{"fp32"};
        for (const auto& precision : wanted) {
            const auto graph = graph_file(stage.name, precision);
            if (!bundle_.lists(graph)) continue;
            if (precision == engines_only)
                fail_unavailable(graph + ": ONNX Runtime does not compute in this precision");
            return precision;
        }
        const std::string asked = options_.precision.empty() ? "fp32" : options_.precision;
        const auto model = bundle_.path().u8string();
        const bool reuses = stage.output(deep_features) != nullptr || stage.input(deep_features) != nullptr;
        fail_unavailable("no " + graph_file(stage.name, asked) + " in " + model + " (make it: higen-export onnx " +
                         model + (asked == "fp32" ? "" : " --precision " + asked) + (reuses ? " --reuse" : "") + ")");
    }

    [[nodiscard]] bool is_a_plugins() const { return !options_.provider_library.empty(); }

#if ORT_API_VERSION >= 23
    // A process has one shared environment, so a library is registered in it under its path.
    void register_plugin() {
        const auto& library = options_.provider_library;
        try {
            env_.RegisterExecutionProviderLibrary(library.c_str(), std::filesystem::u8path(library).native());
        } catch (const Ort::Exception& error) {
            if (std::string_view(error.what()).find("already registered") != std::string_view::npos) return;
            fail_unavailable("provider_library='" + options_.provider_library + "': " + error.what());
        }
    }

    void append_to(Ort::SessionOptions& options, const Provider& provider) {
        if (!is_a_plugins()) return append(options, provider);
        std::vector<Ort::ConstEpDevice> devices;
        for (const auto& device : env_.GetEpDevices())
            if (device.EpName() == provider.name) devices.push_back(device);
        if (devices.empty()) fail_unavailable("provider='" + provider.name + "': the plugin sees no device for it here");
        options.AppendExecutionProvider_V2(env_, {devices.front()}, Ort::KeyValuePairs());
    }
#else
    void register_plugin() {
        fail_unavailable("provider_library='" + options_.provider_library +
                         "': this library was built with headers older than ONNX Runtime 1.23");
    }

    void append_to(Ort::SessionOptions& options, const Provider& provider) { append(options, provider); }
#endif

    // A graph's weights must be in files with a hash in the manifest.
    void check_external(const std::filesystem::path& path, const std::string& weights) const {
        for (const auto& name : external_files(read_file(path), path.u8string())) {
            if (name == weights) continue;
            if (!bundle_.lists(name))
                fail_integrity(path.u8string() + ": its weights lie in " + name.substr(0, 200) +
                               ", which higen.json does not list");
            (void)bundle_.file(name);
        }
    }

    // A graph must have the inputs and outputs of the stage's row, in the sizes that the manifest fixes. Other sizes
    // that the graph fixes are added to `fixed`.
    void check_graph(const Stage& stage, const Ort::Session& session, const std::filesystem::path& path,
                     Sizes& fixed) const {
        Ort::AllocatorWithDefaultOptions allocator;
        const auto wrong = [&](const std::string& what) {
            fail_integrity(path.u8string() + ": not a graph of the stage " + stage.name + " of this model: " + what);
        };
        const auto check = [&](const TensorSpec& spec, const std::string& name, const std::string& found,
                               const Ort::TypeInfo& type, bool input) {
            if (found != name) wrong("found '" + found + "' instead of '" + name + "'");
            if (type.GetONNXType() != ONNX_TYPE_TENSOR) wrong(name + " is not a tensor");
            const auto info = type.GetTensorTypeAndShapeInfo();
            const auto shape = info.GetShape();
            const bool is_float = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
            const bool is_int64 = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
            if (input && is_older(spec, is_int64, shape.size()))
                fail_unavailable(path.u8string() + ": was made before version 2 of the manifest (its input " + name +
                                 " differs); make it again: higen-export onnx " + bundle_.path().u8string());
            if (spec.is_float ? !is_float : !is_int64) wrong(name + " has a different number type");
            if (!fits(spec, shape, fixed)) wrong(name + " has the shape " + to_text(shape));
        };
        if (session.GetInputCount() != stage.inputs.size() || session.GetOutputCount() != stage.outputs.size())
            wrong(std::to_string(session.GetInputCount()) + " inputs and " + std::to_string(session.GetOutputCount()) +
                  " outputs");
        // Inputs are bound by name, so the graph may have any order; outputs must be in the order of the row.
        for (std::size_t i = 0; i < stage.inputs.size(); ++i) {
            const std::string found = session.GetInputNameAllocated(i, allocator).get();
            const auto* spec = stage.input(found);
            if (spec == nullptr) wrong("it takes '" + found + "'");
            check(*spec, found, found, session.GetInputTypeInfo(i), true);
        }
        for (std::size_t i = 0; i < stage.outputs.size(); ++i)
            check(stage.outputs[i], stage.graph_output(stage.outputs[i]),
                  session.GetOutputNameAllocated(i, allocator).get(), session.GetOutputTypeInfo(i), false);
    }

    // Whether a graph takes step columns as in version 1: whole timesteps, and one guidance number per sample.
    static bool is_older(const TensorSpec& spec, bool is_int64, std::size_t rank) {
        if (spec.source.kind != Source::Kind::state) return false;
        return (spec.name == "t" && is_int64) || (spec.name == "guidance" && rank == 1 && spec.shape.size() == 2);
    }

    // Whether a graph's shape can be that of the row; an axis of -1 can have any size.
    static bool fits(const TensorSpec& spec, const Shape& shape, Sizes& fixed) {
        if (shape.size() != spec.shape.size()) return false;
        for (std::size_t i = 0; i < shape.size(); ++i) {
            const auto& axis = spec.shape[i];
            if (shape[i] < 0) continue;
            const auto known = axis.symbol.empty() ? axis.size : fixed.try_emplace(axis.symbol, shape[i]).first->second;
            if (shape[i] != known) return false;
        }
        return true;
    }

    const Bundle& bundle_;
    BackendOptions options_;
    std::vector<Provider> candidates_;  // the preferred one first
    Ort::Env env_{ORT_LOGGING_LEVEL_FATAL, "higen"};
    mutable std::mutex mutex_;
    std::map<std::string, Made, std::less<>> sessions_;
};

}  // namespace

std::unique_ptr<Backend> make_onnx_backend(const Bundle& bundle, const BackendOptions& options) {
    try {
        return std::make_unique<OnnxBackend>(bundle, options);
    } catch (const Ort::Exception& error) {
        fail_unavailable(std::string("ONNX Runtime cannot start: ") + error.what());
    }
}

}  // namespace higen::core
