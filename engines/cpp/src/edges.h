// Edges of a picture, as ControlNets for edges were trained on them (higen/edges.py): Canny's detector in whole numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace higen::core {

// White edges on black of RGB bytes [height, width, 3], in their shape.
[[nodiscard]] std::vector<std::uint8_t> edges(const std::vector<std::uint8_t>& rgb, std::size_t width,
                                              std::size_t height);

}  // namespace higen::core
