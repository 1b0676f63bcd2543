// Where a stage's inputs come from: each source of the manifest, for one sample (docs/manifest.md, "Sources").
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "backend.h"
#include "manifest.h"
#include "prompt_chunks.h"
#include "request.h"
#include "sampler.h"

namespace higen::core {

// Where an input is used: its sample, its loop (null: after the last loop), and its branch of guidance.
struct Place {
    std::size_t sample = 0;
    std::size_t frames = 1;
    const Loop* loop = nullptr;
    bool negative = false;
    std::string given = {};  // the control whose frames replace pictures and clips
};

// Resolves the sources of one batch of requests. A stage is run once per distinct input, for one sample at a time.
class Sources {
public:
    // All must outlive it.
    Sources(const Manifest& manifest, Backend& backend, const std::vector<Request>& requests,
            Cancellation& cancellation)
        : manifest_(manifest), backend_(backend), requests_(requests), cancellation_(cancellation) {}

    // The inputs of a stage other than its state, for one sample.
    [[nodiscard]] Tensors inputs(const Stage& stage, const Place& place);

    // The inputs of a denoising stage other than its state, for all samples: [B, ...] each.
    [[nodiscard]] Tensors batch(const Stage& stage, const Loop& loop);

    // The number of tokens of each sample's texts, padded to the same number of chunks; empty if texts have one chunk.
    [[nodiscard]] std::vector<std::size_t> tokens() const;

    // A source that gives latents, for all samples: [B, C, f, H, W].
    [[nodiscard]] TensorPtr latents(const Source& source, const Loop& loop);

    // The known frames that a loop's result passes through; empty if the requests have none.
    [[nodiscard]] std::optional<Edit> known(const Loop& loop);

    // Store the last latents [B, C, f, H, W] of a loop for later stages.
    void finish(const Loop& loop, TensorPtr latents);

private:
    struct Made {
        Tensors inputs, outputs;
    };

    [[nodiscard]] TensorPtr value(const Source& source, const std::vector<Axis>& shape, const Place& place);
    [[nodiscard]] TensorPtr control(const std::string& name, const std::vector<Axis>& shape, const Place& place) const;
    [[nodiscard]] TensorPtr picture(const Source& source, const std::vector<Axis>& shape, const Place& place) const;
    [[nodiscard]] TensorPtr frames_of(const std::string& control, const Place& place) const;
    [[nodiscard]] TensorPtr placed_frames(const Source& source, const Place& place) const;
    [[nodiscard]] Array placed(const Array& values, const std::string& control, const Place& place,
                               float elsewhere = 0.0F) const;
    [[nodiscard]] Edit known(const Place& place);
    [[nodiscard]] TensorPtr known_input(const std::string& name, const std::vector<Axis>& shape, const Place& place);
    [[nodiscard]] TensorPtr noise(std::uint64_t purpose, const std::vector<Axis>& shape, const Place& place) const;
    [[nodiscard]] TensorPtr of_loop(const std::string& name, std::size_t rank, const Place& place) const;
    [[nodiscard]] TensorPtr of_stage(const Source& source, std::size_t rank, const Place& place);
    [[nodiscard]] TensorPtr shown(const Source& source, const std::vector<Axis>& shape, const Place& place);
    [[nodiscard]] TensorPtr resampled(const std::vector<float>& pixels, std::size_t height, std::size_t width,
                                      const std::vector<Axis>& shape, const Place& place) const;
    [[nodiscard]] const Tensors& run(const Stage& stage, const Place& place);
    [[nodiscard]] bool has_chunks() const { return manifest_.text && !manifest_.text->plain(); }
    [[nodiscard]] Reading reading(const Source& source, const Place& place) const;
    [[nodiscard]] Tensors read(const Stage& stage, const TensorSpec& text, Tensors inputs,
                               const Reading& reading) const;
    [[nodiscard]] Tensors call(const Stage& stage, const Tensors& inputs) const;
    [[nodiscard]] std::int64_t size_of(const Axis& axis, const Place& place) const;
    [[nodiscard]] MaybeValue value_of(const Control& control, const Place& place) const;

    const Manifest& manifest_;
    Backend& backend_;
    const std::vector<Request>& requests_;
    Cancellation& cancellation_;
    std::map<std::string, std::vector<Made>, std::less<>> made_;  // by stage
    std::map<std::string, Array, std::less<>> latents_;           // by loop
};

// Joins tensors [1, ...] to [B, ...]; a single one is returned unchanged. Throws a backend error if their shapes
// differ.
[[nodiscard]] TensorPtr stacked(const std::vector<TensorPtr>& rows);

// `count` entries of an axis, from `first` on.
[[nodiscard]] Array cut(const Array& array, std::size_t axis, std::size_t first, std::size_t count);

// Latents of single frames [N, C, H, W] as those of one clip [1, C, N, H, W].
[[nodiscard]] Array as_video(const Array& frames);

}  // namespace higen::core
