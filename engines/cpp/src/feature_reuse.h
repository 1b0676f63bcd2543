// Feature reuse in the denoising loop (higen/feature_reuse.py, which says what it is).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend.h"

namespace higen::core {

// A stage's two variants: the full step that keeps its deep features, and the shallow one that takes them.
struct ReuseStages {
    const Stage* full = nullptr;
    const Stage* shallow = nullptr;
};

// A backend for one loop: it keeps the deep features of full steps, and hands them to the shallow ones. A step on
// windows or tiles is one run for each of them, in the same order in every row: each has its own features.
class FeatureReuse final : public Backend {
public:
    // `every` so many rows there is a full step. The backend must outlive it.
    FeatureReuse(Backend& backend, std::int64_t every) : backend_(backend), every_(static_cast<std::size_t>(every)) {}

    // The stage that does a row, counted from the first one that runs; the rows are asked for in order. The features of
    // a guided step are not those of a plain one, so the first row behind a change between the two is a full step.
    [[nodiscard]] const Stage& step(const ReuseStages& stages, std::size_t row);

    void prepare(const Stage& stage) override { backend_.prepare(stage); }
    // Runs the variant that `step` gave in the place of its stage; the outputs are without the features.
    [[nodiscard]] Tensors run(const Stage& stage, const Tensors& inputs, Cancellation& cancellation) override;
    [[nodiscard]] std::string describe(const Stage& stage) const override { return backend_.describe(stage); }

private:
    Backend& backend_;
    std::size_t every_;
    const Stage* kind_ = nullptr;  // the full step of the last row's kind
    const Stage* now_ = nullptr;
    bool shallow_ = false;
    std::vector<TensorPtr> kept_;
    std::size_t part_ = 0;
};

}  // namespace higen::core
