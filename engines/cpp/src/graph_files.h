// Which files an ONNX graph keeps its weights in.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace higen::core {

// The locations of all external tensors of a graph in ONNX's format, also of its inner graphs and functions. Throws an
// integrity error, beginning with `where`, for bytes that are no such graph.
[[nodiscard]] std::set<std::string> external_files(std::string_view onnx, const std::string& where);

}  // namespace higen::core
