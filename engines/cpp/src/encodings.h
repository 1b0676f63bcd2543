// Values of controls as the arrays that stages are fed (docs/manifest.md, "controls").
#pragma once

#include <cstddef>
#include <vector>

#include "manifest.h"

namespace higen::core {

// Check a value against the control's range and the shapes that its encoding takes for `frames` frames. Throws a
// request error that names the control, the value and what is allowed. Not for pictures and clips.
void check_value(const Control& control, const ControlValue& value, std::size_t frames);

// The array of one sample for an input whose last axis has `columns`, of a value that `check_value` has passed:
// number [1], curve [frames], sinusoid and similarity [frames, columns]. Nothing: unspecified.
[[nodiscard]] std::vector<float> encode(const Control& control, const MaybeValue& value, std::size_t frames,
                                        std::size_t columns);

// A list of numbers spread evenly from the first place of `count` to the last.
[[nodiscard]] std::vector<float> spread(const std::vector<double>& numbers, std::size_t count);

}  // namespace higen::core
