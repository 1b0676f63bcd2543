// A request's settings of its loops: the part of the rows with guidance, windows of a long clip, FreeInit, and how
// often the whole network is run (higen/loop_settings.py).
#pragma once

#include <cstddef>
#include <functional>
#include <optional>

#include "free_init.h"
#include "higen/higen.h"
#include "manifest.h"

namespace higen::core {

// The part of a table's rows, as fractions from 0 to 1, that has guidance; elsewhere guidance is 1.
struct Interval {
    double from = 0.0, to = 1.0;

    [[nodiscard]] bool whole() const { return from <= 0.0 && to >= 1.0; }
    // Whether a row of `rows` has guidance. Both ends are rounded down to whole rows.
    [[nodiscard]] bool holds(std::size_t row, std::size_t rows) const;
};

// The settings of one loop.
struct LoopSettings {
    Interval interval;
    std::optional<Windows> windows;  // none: the whole clip at once
    std::optional<FreeInit> free_init;
    std::int64_t reuse = 1;  // every reuse-th row is a full step
    double stretch = 1.0;    // the factor of the loop's stretch
};

// The name of a request's preset: the one that it gives, else the usual one if it gives nothing that chooses how to draw,
// or null (higen/presets.py). A prompt, seed, frames, sizes, rate and the choice of a decoder choose only what is drawn.
[[nodiscard]] const char* preset_name(const Manifest& manifest, const higen_request& given);

// The checked settings of a loop for a clip of this many frames. `begins`: the loop begins from a picture or clip.
// Throws a request error.
[[nodiscard]] LoopSettings loop_settings(const Manifest& manifest, std::size_t loop, const higen_request& given,
                                         std::size_t frames, bool begins);

// Throws a request error for settings that no loop of the model can have.
void check_settings(const Manifest& manifest, const higen_request& given);

}  // namespace higen::core
