// Feature reuse in the denoising loop; higen/feature_reuse.py explains it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend.h"

namespace higen::core {

// A stage's two variants: the full step, which also outputs its deep features, and the shallow step, which takes them.
struct ReuseStages {
    const Stage* full = nullptr;
    const Stage* shallow = nullptr;
};

// A backend for one loop. It keeps the deep features of full steps and gives them to shallow steps. A step on windows
// or tiles runs once for each of them, in the same order in every row, and each has its own features.
class FeatureReuse final : public Backend {
public:
    // Every `every`-th row is a full step. The backend must outlive it.
    FeatureReuse(Backend& backend, std::int64_t every) : backend_(backend), every_(static_cast<std::size_t>(every)) {}

    // The stage of a row, counted from the first row that runs. Rows must be asked for in order. Guided and plain steps
    // have different features, so the first row after a change between them is a full step.
    [[nodiscard]] const Stage& step(const ReuseStages& stages, std::size_t row);

    void prepare(const Stage& stage) override { backend_.prepare(stage); }
    // Runs the variant that `step` returned last, instead of `stage`. Its deep features are not in the outputs.
    [[nodiscard]] Tensors run(const Stage& stage, const Tensors& inputs, Cancellation& cancellation) override;
    [[nodiscard]] std::string describe(const Stage& stage) const override { return backend_.describe(stage); }

private:
    Backend& backend_;
    std::size_t every_;
    const Stage* kind_ = nullptr;  // the full step of the last row's stage
    const Stage* now_ = nullptr;
    bool shallow_ = false;
    std::vector<TensorPtr> kept_;
    std::size_t part_ = 0;
};

}  // namespace higen::core
