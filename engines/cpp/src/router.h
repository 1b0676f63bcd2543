// Which backend runs each stage of a model here, and why the better ones do not (higen/backends/select.py).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "backend.h"

namespace higen::core {

// Sends each stage to the best backend that can run it, chosen when the stage is first used.
class Router final : public Backend {
public:
    struct Way {
        std::string name;
        std::function<std::unique_ptr<Backend>()> make;  // may throw, like `prepare`
    };

    // `ways`: the preferred one first. `manifest` has the stages and must outlive it.
    Router(const Manifest& manifest, std::vector<Way> ways)
        : manifest_(manifest), ways_(std::move(ways)), made_(ways_.size()) {}

    // Throws the last way's error if none can run the stage.
    void prepare(const Stage& stage) override { (void)choice(stage); }

    // A less preferred stage on a better backend wins over a preferred stage on a worse backend.
    [[nodiscard]] const Stage& choose(const std::vector<const Stage*>& stages) override;

    // If an engine was not built for the inputs' shapes, the next way that can run the stage is used.
    [[nodiscard]] Tensors run(const Stage& stage, const Tensors& inputs, Cancellation& cancellation) override;

    // "onnx, cpu, fp32; not tensorrt: no engine of ..."
    [[nodiscard]] std::string describe(const Stage& stage) const override;

    // One line for each stage used so far: what runs it, and why no better backend does.
    [[nodiscard]] std::string report() const;

    // New fallbacks, each cause once: a stale or broken engine, or shapes that it does not take.
    [[nodiscard]] std::vector<std::string> take_warnings() override;

private:
    using Stages = std::vector<const Stage*>;
    struct Choice {
        const Stage* stage = nullptr;
        std::size_t way = 0;
        std::string passed_over;
    };

    const Choice& choice(const Stage& stage);
    const Choice& choice_outside(const Stage& stage, const EngineError& why);
    [[nodiscard]] const Stage& choose_on(Backend& backend, const Stages& stages);
    void warn(const std::string& cause, const std::string& message);
    [[nodiscard]] Choice choose_from(const Stages& stages, std::size_t first, const Error* why);
    [[nodiscard]] std::string describe(const Stage& stage, const Choice& choice) const;

    const Manifest& manifest_;
    std::vector<Way> ways_;
    std::vector<std::unique_ptr<Backend>> made_;
    mutable std::mutex mutex_;
    std::map<std::string, Choice, std::less<>> choices_, outside_;
    std::map<Stages, const Stage*> served_;
    std::set<std::string> warned_;
    std::vector<std::string> warnings_;
};

// The router for these options. `bundle` must outlive it. Throws a request error for a wrong option, and an unavailable
// error for a precision that the model was never quantised to.
[[nodiscard]] std::unique_ptr<Router> make_router(const Bundle& bundle, const BackendOptions& options);

}  // namespace higen::core
