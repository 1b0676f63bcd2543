// Finds the files that an ONNX graph keeps its weights in.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace higen::core {

// The locations of all external tensors of an ONNX graph, also of its inner graphs and functions. Throws an integrity
// error that begins with `where` if the bytes are not an ONNX graph.
[[nodiscard]] std::set<std::string> external_files(std::string_view onnx, const std::string& where);

}  // namespace higen::core
