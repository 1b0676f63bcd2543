// From a request to frames: text, spatial loop, temporal loop, decoder (higen/pipeline.py, higen/sampler.py).
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "backend.h"
#include "request.h"
#include "schedule.h"

namespace higen::core {

// The state after a denoising step.
struct Step {
    std::string_view stage;
    std::size_t index, total;
    std::int64_t t;
    const Tensor& previous;  // the estimate of the clean latents, [1, C, F, H, W]
};

// Some decoded frames: `rgb` is [count, height, width, 3].
struct Frames {
    const std::vector<std::uint8_t>& rgb;
    std::size_t first, count, total;
};

class Pipeline {
public:
    using OnStep = std::function<void(const Step&)>;
    using OnFrames = std::function<void(const Frames&)>;

    // Both must outlive it.
    Pipeline(const ModelConfig& config, Backend& backend) : config_(config), backend_(backend) {}

    // Load all that a video from text needs, so that a broken model is found out before any work starts.
    void prepare() const;

    // Make a video; either callback may throw to stop it.
    void generate(const Request& request, const OnStep& on_step, const OnFrames& on_frames,
                  Cancellation& cancellation) const;

    // Latents [1, C, F, H, W] to frames, a few at a time.
    void decode(const Tensor& latents, const OnFrames& on_frames, Cancellation& cancellation) const;

private:
    [[nodiscard]] TensorPtr floats(Shape shape, std::vector<float> values) const;
    [[nodiscard]] TensorPtr encode_text(const std::vector<std::int64_t>& tokens, Cancellation& cancellation) const;
    [[nodiscard]] Tensors conditions(const TensorPtr& hidden, const TensorPtr& empty, const TensorPtr& motion,
                                     const TensorPtr& appearance, Cancellation& cancellation) const;
    [[nodiscard]] TensorPtr denoise(std::string_view stage, TensorPtr latents, const std::vector<SolverRow>& table,
                                    float guidance, Tensors inputs, const OnStep& on_step,
                                    Cancellation& cancellation) const;

    const ModelConfig& config_;
    Backend& backend_;
};

// Decoded pixels [3, H, W] in -1 to 1 as RGB bytes [H, W, 3]: x * 0.5 + 0.5, clamped to [0, 1], times 255, truncated.
// Throws a backend error for NaN and infinity.
void to_rgb(const float* pixels, std::size_t plane, std::uint8_t* rgb);

}  // namespace higen::core
