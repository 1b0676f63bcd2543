// Checks between the manifest's tables, in two files: references.cpp for stages and sources, loop_references.cpp for
// loops and the decoder. Each message names the row and what is allowed.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "errors.h"
#include "manifest.h"

namespace higen::core::references {

using Names = std::vector<std::string>;

inline void check(bool good, const std::string& message) {
    if (!good) fail_manifest(message);
}

[[nodiscard]] inline bool has(const Names& names, std::string_view name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

[[nodiscard]] inline std::string joined(const Names& names) {
    std::string text;
    for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
    return text.empty() ? "none" : text;
}

template <typename Row>
[[nodiscard]] Names names_of(const std::vector<Row>& rows) {
    Names names;
    for (const auto& row : rows) names.push_back(row.name);
    return names;
}

template <typename Wanted>
[[nodiscard]] Names controls_that(const Manifest& manifest, Wanted wanted) {
    Names names;
    for (const auto& control : manifest.controls)
        if (wanted(control)) names.push_back(control.name);
    return names;
}

inline void check_once(const std::string& table, const Names& names) {
    for (std::size_t i = 0; i < names.size(); ++i)
        check(std::find(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(i), names[i]) ==
                  names.begin() + static_cast<std::ptrdiff_t>(i),
              table + ": " + names[i] + " appears twice (names of loops and stages must differ)");
}

// The size of an axis if the model fixes it; 0 for a free axis.
[[nodiscard]] inline std::int64_t size_of(const Manifest& manifest, const Axis& axis) {
    const auto fixed = manifest.sizes.symbols.find(axis.symbol);
    return fixed == manifest.sizes.symbols.end() ? axis.size : fixed->second;
}

[[nodiscard]] inline std::string shown(const std::vector<Axis>& shape) {
    std::string text;
    for (const auto& axis : shape)
        text += (text.empty() ? "" : ", ") + (axis.symbol.empty() ? std::to_string(axis.size) : axis.symbol);
    return "[" + text + "]";
}

// Whether a shape equals `wanted`; an entry of digits is a size.
[[nodiscard]] inline bool is_shape(const std::vector<Axis>& shape, const Names& wanted) {
    return std::equal(shape.begin(), shape.end(), wanted.begin(), wanted.end(),
                      [](const Axis& axis, const std::string& name) {
                          return axis.symbol.empty() ? std::to_string(axis.size) == name : axis.symbol == name;
                      });
}

// Check a source that takes the result of a stage or loop; `rank` is the number of axes that it must have.
void check_made(const Manifest& manifest, const std::string& where, const Source& source, std::size_t rank);

// Check that a stage can take a control's frames, [N, 3, Y, X], in place of a picture or clip (`Source::given`).
void check_frames_of(const Manifest& manifest, const std::string& where, const Source& source);

// The stages and loops that a stage or loop takes results from.
[[nodiscard]] Names needs(const Manifest& manifest, const std::string& name);

// Check loops and the decoder, and that a clip of any length gets all its inputs.
void check_loops(const Manifest& manifest);

}  // namespace higen::core::references
