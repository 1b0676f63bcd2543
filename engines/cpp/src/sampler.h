// The denoising loop: a stage gets a solver's rows one by one, and its outputs are fed back (docs/manifest.md,
// "loops").
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "backend.h"
#include "feature_reuse.h"
#include "loop_settings.h"
#include "manifest.h"

namespace higen::core {

// The state after a denoising step. `total` is the number of rows that run; `previous` is the estimate of the clean
// latents, [B, C, f, H, W].
struct Step {
    std::string_view loop, stage;
    std::size_t index, total;
    double t;
    const Tensor& previous;
};

using OnStep = std::function<void(const Step&)>;

// Where `mask` [B, 1, f, h, w] (0 to 1; h and w may be 1) is 1, the estimate of the clean latents is `known`
// [B, C, f, H, W], and so is the result.
struct Edit {
    Array known;
    Array mask;

    // The mask at entry i of latents of this shape.
    [[nodiscard]] float weight(const Shape& shape, std::size_t i) const;
};

// After the last row, the latents x become from + by (x - from); `from` has their shape.
struct Stretching {
    std::vector<float> from;
    float by = 1.0F;
};

// One run of a loop for one batch.
struct LoopRun {
    std::string_view loop;
    const Stage& stage;
    Tensors conditions;  // the stage's inputs other than the state, [B, ...] each
    SolverTable table;
    Array guidance;                    // [B, f], the same in every row with guidance
    std::vector<std::uint64_t> seeds;  // one per sample
    std::uint64_t purpose = 0;         // for the noise that a stochastic solver adds
    std::size_t first = 0;             // the first row to run
    std::optional<Edit> edit = {};
    std::optional<Windows> windows = {};
    std::optional<Tiles> tiles = {};
    std::vector<std::size_t> tokens = {};  // how many per sample, if texts have several chunks
    Interval interval = {};                // the rows of the whole table that have guidance
    // How the other rows are run, with guidance 1: another stage and its conditions. Null: all rows have guidance.
    std::shared_ptr<const LoopRun> outside = nullptr;
    std::int64_t reuse = 1;      // above 1: every `reuse`-th row is a full step,
    ReuseStages reuses = {};     // and these stages do the rows
    std::optional<Stretching> stretch = {};
};

// The initial noise [B, C, f, H, W] of an iteration (from 0) of a loop that is run again, and what is added to it.
using NoiseOf = std::function<std::pair<std::vector<float>, std::vector<float>>(std::size_t iteration)>;

// Run all rows of the table on latents [B, C, f, H, W] and return the last state. `on_step` may throw to stop it.
[[nodiscard]] TensorPtr denoise(Backend& backend, const LoopRun& run, TensorPtr latents, const OnStep& on_step,
                                Cancellation& cancellation);

// Run the table several times. Each time begins with the low frequencies of the previous result (FreeInit). `level`:
// alpha and sigma of the noisiest state.
[[nodiscard]] TensorPtr denoise_again(Backend& backend, LoopRun run, const Shape& shape, const NoiseOf& noise_of,
                                      std::pair<double, double> level, const FreeInit& settings, const OnStep& on_step,
                                      Cancellation& cancellation);

// The state before row `first`: `initial` times the unit noise, plus what is added to it. With clean latents the loop
// begins in the table's tail, at the row's own noise level (Meng et al. 2022, SDEdit). `added` and `clean` may be
// empty.
[[nodiscard]] std::vector<float> initial_state(const SolverTable& table, std::vector<float> unit,
                                               const std::vector<float>& added, const std::vector<float>& clean,
                                               std::size_t first);

// The first row, if the fraction `strength` of the rows is run, rounded down but at least one.
[[nodiscard]] std::size_t tail_row(std::size_t rows, double strength);

// Where each window of a clip begins, and the weight of each of its frames; a frame's weights sum to one.
[[nodiscard]] std::vector<std::pair<std::size_t, std::vector<float>>> window_weights(std::size_t frames,
                                                                                     const Windows& windows);

}  // namespace higen::core
