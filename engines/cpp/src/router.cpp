#include "router.h"

#include <exception>

namespace higen::core {
namespace {

// Whether the router tries the next way after this error: not after an error of the request or the caller.
bool passes_over(const Error& error) {
    return error.status() == HIGEN_ERROR_UNAVAILABLE || error.status() == HIGEN_ERROR_INTEGRITY ||
           error.status() == HIGEN_ERROR_BACKEND;
}

// Whether the error gives a warning: something exists but does not work. Something absent gives none.
bool is_news(const Error& error) {
    return error.status() != HIGEN_ERROR_UNAVAILABLE || dynamic_cast<const EngineError*>(&error) != nullptr;
}

bool is_outside(const Error& error) {
    const auto* of_engine = dynamic_cast<const EngineError*>(&error);
    return of_engine != nullptr && of_engine->kind() == EngineError::Kind::outside_profile;
}

}  // namespace

Tensors Router::run(const Stage& stage, const Tensors& inputs, Cancellation& cancellation) {
    const auto& chosen = choice(stage);
    try {
        return made_[chosen.way]->run(stage, inputs, cancellation);
    } catch (const EngineError& error) {
        if (!is_outside(error)) throw;
        return made_[choice_outside(stage, error).way]->run(stage, inputs, cancellation);
    }
}

const Router::Choice& Router::choice(const Stage& stage) {
    const std::lock_guard lock(mutex_);
    auto found = choices_.find(stage.name);
    if (found == choices_.end()) found = choices_.emplace(stage.name, choose_from({&stage}, 0, nullptr)).first;
    return found->second;
}

const Router::Choice& Router::choice_outside(const Stage& stage, const EngineError& why) {
    const std::lock_guard lock(mutex_);
    auto found = outside_.find(stage.name);
    if (found == outside_.end())
        found = outside_.emplace(stage.name, choose_from({&stage}, choices_.at(stage.name).way + 1, &why)).first;
    return found->second;
}

const Stage& Router::choose(const Stages& stages) {
    const std::lock_guard lock(mutex_);
    auto& served = served_[stages];
    if (served == nullptr) {
        auto chosen = choose_from(stages, 0, nullptr);
        served = chosen.stage;
        choices_.emplace(chosen.stage->name, std::move(chosen));
    }
    return *served;
}

Router::Choice Router::choose_from(const Stages& stages, std::size_t first, const Error* why) {
    Choice chosen;
    std::exception_ptr broken;
    std::string news, cause, hint;
    const auto pass_over = [&](const std::string& way, const Error& error) {
        chosen.passed_over += "; not " + way + ": " + error.what();
        if (!is_news(error)) return;
        // A clip outside one stage's profiles is outside those of the others too: one warning is enough.
        const bool outside = is_outside(error);
        news = error.what();
        cause = outside ? EngineError::name(EngineError::Kind::outside_profile) : news;
        hint = outside ? " (the model's report lists the stages)" : "";
        broken = std::current_exception();
    };
    if (why != nullptr) pass_over(ways_[first - 1].name, *why);
    for (chosen.way = first; chosen.way < ways_.size(); ++chosen.way) {
        const auto& way = ways_[chosen.way];
        try {
            if (!made_[chosen.way]) made_[chosen.way] = way.make();
            chosen.stage = &choose_on(*made_[chosen.way], stages);
        } catch (const Error& error) {
            if (!passes_over(error)) throw;
            if (ways_.size() == 1) throw;
            pass_over(way.name, error);
            continue;
        }
        if (!news.empty()) warn(cause, chosen.stage->name + " runs on " + way.name + ": " + news + hint);
        return chosen;
    }
    if (broken) std::rethrow_exception(broken);
    std::string names;
    for (const auto* stage : stages) names += (names.empty() ? "" : " or ") + stage->name;
    fail_unavailable("no backend can run " + names + " here" + chosen.passed_over);
}

// The backend's own fallbacks become warnings, even if it fails.
const Stage& Router::choose_on(Backend& backend, const Stages& stages) {
    const auto tell = [&] {
        for (const auto& message : backend.take_warnings()) warn(message, message);
    };
    try {
        const auto& stage = backend.choose(stages);
        tell();
        return stage;
    } catch (const Error&) {
        tell();
        throw;
    }
}

void Router::warn(const std::string& cause, const std::string& message) {
    if (warned_.insert(cause).second) warnings_.push_back(message);
}

std::string Router::describe(const Stage& stage) const {
    const std::lock_guard lock(mutex_);
    return describe(stage, choices_.at(stage.name));
}

std::string Router::describe(const Stage& stage, const Choice& choice) const {
    return ways_[choice.way].name + ", " + made_[choice.way]->describe(stage) + choice.passed_over;
}

std::string Router::report() const {
    const std::lock_guard lock(mutex_);
    std::string text;
    for (const auto& [name, choice] : choices_) {
        const auto& row = manifest_.stage(name);
        text += (text.empty() ? "" : "\n") + name + ": " + describe(row, choice);
        if (const auto other = outside_.find(name); other != outside_.end())
            text += "\n" + name + ", other shapes: " + describe(row, other->second);
    }
    return text;
}

std::vector<std::string> Router::take_warnings() {
    const std::lock_guard lock(mutex_);
    return std::exchange(warnings_, {});
}

std::unique_ptr<Router> make_router(const Bundle& bundle, const BackendOptions& options) {
    if (options.backend != "auto" && options.backend != "tensorrt" && options.backend != "onnx")
        fail_request("backend='" + options.backend + "': one of 'auto', 'tensorrt', 'onnx'");
    if (options.backend == "tensorrt" && options.provider != "auto")
        fail_request("provider='" + options.provider + "' with backend='tensorrt': only ONNX Runtime has providers");
    if (!options.precision.empty()) check_precision(options.precision);
    // Without this check, stand-ins could replace the missing graphs of all stages, and the video would silently have
    // the plain precision.
    if (const auto missing = bundle.not_quantized(options.precision); !missing.empty()) fail_unavailable(missing);
    std::vector<Router::Way> ways;
    // A provider given by name belongs to ONNX Runtime.
    if (options.backend == "tensorrt" || (options.backend == "auto" && options.provider == "auto"))
        ways.push_back({"tensorrt", [&bundle, options]() -> std::unique_ptr<Backend> {
#ifdef HIGEN_TENSORRT
                            return make_tensorrt_backend(bundle, options);
#else
                            (void)bundle;
                            fail_unavailable("this library was built without TensorRT (HIGEN_TENSORRT)");
#endif
                        }});
    if (options.backend != "tensorrt")
        ways.push_back({"onnx", [&bundle, options] { return make_onnx_backend(bundle, options); }});
    return std::make_unique<Router>(bundle.manifest(), std::move(ways));
}

}  // namespace higen::core
