// From a request to frames: text, spatial loop, temporal loop, decoder (higen/pipeline.py, higen/sampler.py).
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>
#include <utility>
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
    const Tensor& previous;  // the estimate of the clean latents, [B, C, F, H, W]
};

// Some decoded frames of one video: `rgb` is [count, height, width, 3].
struct Frames {
    const std::vector<std::uint8_t>& rgb;
    std::size_t video, first, count, total;
};

class Pipeline {
public:
    using OnStep = std::function<void(const Step&)>;
    using OnFrames = std::function<void(const Frames&)>;

    // Both must outlive it.
    Pipeline(const ModelConfig& config, Backend& backend) : config_(config), backend_(backend) {}

    // Load all that a video from text needs, so that a broken model is found out before any work starts.
    void prepare() const;

    // Make a video of each request, all in one batch (see check_batch); either callback may throw to stop it.
    void generate(const std::vector<Request>& requests, const OnStep& on_step, const OnFrames& on_frames,
                  Cancellation& cancellation) const;

    // Latents [B, C, F, H, W] to frames, a few of one video at a time.
    void decode(const Tensor& latents, const OnFrames& on_frames, Cancellation& cancellation) const;

private:
    struct Text {
        TensorPtr given, empty;  // [1, L, Dt]
    };
    using Cues = std::pair<std::vector<float>, std::vector<float>>;  // motion [F, D] and appearance [F, R]

    [[nodiscard]] std::vector<Text> encode_texts(const std::vector<Request>& requests,
                                                 Cancellation& cancellation) const;
    [[nodiscard]] Tensors conditions(const std::vector<Text>& texts, const std::vector<Cues>& cues,
                                     Cancellation& cancellation) const;
    [[nodiscard]] TensorPtr denoise(std::string_view stage, TensorPtr latents, const std::vector<SolverRow>& table,
                                    std::vector<float> guidance, Tensors inputs, const OnStep& on_step,
                                    Cancellation& cancellation) const;
    [[nodiscard]] Array draw_keys(const std::vector<Request>& requests, const std::vector<Text>& texts,
                                  const OnStep& on_step, Cancellation& cancellation) const;
    [[nodiscard]] Array encode_keys(const std::vector<Request>& requests, Cancellation& cancellation) const;

    const ModelConfig& config_;
    Backend& backend_;
};

// Decoded pixels [3, H, W] in -1 to 1 as RGB bytes [H, W, 3]: x * 0.5 + 0.5, clamped to [0, 1], times 255, truncated.
// Throws a backend error for NaN and infinity.
void to_rgb(const float* pixels, std::size_t plane, std::uint8_t* rgb);

}  // namespace higen::core
