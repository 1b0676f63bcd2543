// Motion and appearance cues as arrays: what the conditioner stage is fed (higen/conditioning.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace higen::core {

// Numbers given for a cue, row by row: one number is 1 x 1, a list is rows x 1.
struct CueValues {
    std::vector<double> values;
    std::size_t rows = 0;
    std::size_t columns = 0;

    static CueValues number(double value) { return {{value}, 1, 1}; }
};

// No value: unspecified, for models that were trained with cue dropout.
using Cue = std::optional<CueValues>;

// The conditioner's motion input, [frames, dim]: sinusoids, resampled in time *after* the sinusoid; unspecified is a row
// of zeros. Throws a request error for a length that is not 1, frames - 1 or frames, and for negative or non-finite
// values.
[[nodiscard]] std::vector<float> motion_cue(const Cue& motion, std::size_t frames, std::size_t dim);

// The conditioner's appearance input, [frames, columns]: wanted similarity of frame i to position k; unspecified tells
// each frame its place alone. Throws a request error for another shape and for non-finite values.
[[nodiscard]] std::vector<float> appearance_cue(const Cue& appearance, std::size_t frames, std::size_t columns);

}  // namespace higen::core
