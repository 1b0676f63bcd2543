// Turns values of controls into input arrays of stages (docs/manifest.md, "controls").
#pragma once

#include <cstddef>
#include <vector>

#include "manifest.h"

namespace higen::core {

// Check a value against the control's range and the shapes that its encoding takes for `frames` frames. Throws a
// request error that names the control, the value and what is allowed. Not for pictures and clips.
void check_value(const Control& control, const ControlValue& value, std::size_t frames);

// The array of one sample for an input with `columns` entries in its last axis: number [1], curve [frames], sinusoid
// and similarity [frames, columns]. The value has passed `check_value`; an empty one is unspecified.
[[nodiscard]] std::vector<float> encode(const Control& control, const MaybeValue& value, std::size_t frames,
                                        std::size_t columns);

// A list of numbers, interpolated at `count` evenly spread positions.
[[nodiscard]] std::vector<float> spread(const std::vector<double>& numbers, std::size_t count);

}  // namespace higen::core
