// From a request to frames: the manifest's tables, interpreted (higen/pipeline.py).
//
// texts, controls -> sources -> loop after loop (sampler.h) -> decoder -> frames
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "backend.h"
#include "request.h"
#include "sampler.h"
#include "sources.h"

namespace higen::core {

// Some decoded frames of one video: `rgb` is [count, height, width, 3].
struct Frames {
    const std::vector<std::uint8_t>& rgb;
    std::size_t video, first, count, total;
};

class Pipeline {
public:
    using OnFrames = std::function<void(const Frames&)>;

    // Both must outlive it.
    Pipeline(const Manifest& manifest, Backend& backend) : manifest_(manifest), backend_(backend) {}

    // Load everything that the default request needs, so that a broken model fails before any work starts.
    void prepare() const;

    // Make a video of each request, all in one batch (see check_batch). Either callback may throw to stop the work.
    void generate(const std::vector<Request>& requests, const OnStep& on_step, const OnFrames& on_frames,
                  Cancellation& cancellation) const;

    // Decode an estimate of the latents [B, C, f, H, W] of these requests to frames, a chunk of one video at a time, with
    // the decoder for previews if the model has one that can be run.
    void preview(const Tensor& latents, const std::vector<Request>& requests, const OnFrames& on_frames,
                 Cancellation& cancellation) const;

private:
    [[nodiscard]] std::size_t index_of(const Loop& loop) const;
    [[nodiscard]] std::vector<const Stage*> ways(std::size_t loop, const std::vector<Request>& requests) const;
    [[nodiscard]] std::vector<const Stage*> unguided(const StagePair& pair) const;
    [[nodiscard]] const Stage& chosen(const std::vector<const Stage*>& ways, std::int64_t reuse,
                                      ReuseStages& reuses) const;
    [[nodiscard]] LoopRun without_guidance(const LoopRun& run, const StagePair& pair, const Loop& loop,
                                           Sources& sources) const;
    [[nodiscard]] TensorPtr run_inverted(const LoopRun& run, const std::vector<Request>& requests, const Loop& loop,
                                         Sources& sources, const Array& clean, const OnStep& on_step,
                                         Cancellation& cancellation) const;
    void prepare_reuse(const std::vector<Request>& requests) const;
    [[nodiscard]] TensorPtr run_loop(std::size_t index, const std::vector<Request>& requests, Sources& sources,
                                     const OnStep& on_step, Cancellation& cancellation) const;
    [[nodiscard]] static TensorPtr replaced(const Loop& loop, const std::vector<Request>& requests, Sources& sources);
    [[nodiscard]] const Stage& decoder_of(const Request& request) const;
    void decode(const Tensor& latents, const std::vector<Request>& requests, Sources& sources, const Stage* fixed,
                const OnFrames& on_frames, Cancellation& cancellation) const;
    [[nodiscard]] std::int64_t channels(const Stage& stage) const;

    const Manifest& manifest_;
    Backend& backend_;
};

}  // namespace higen::core
