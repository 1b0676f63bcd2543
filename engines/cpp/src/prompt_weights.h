// The weights of a prompt's words, in the usual syntax of AUTOMATIC1111's web UI (higen/prompt_weights.py).
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace higen::core {

// A part of a prompt with one weight for all its words. A part without a text begins a new chunk (BREAK).
struct Piece {
    std::optional<std::u32string> text;
    double weight = 1.0;
};

// The parts of a prompt with their weights; neighbours of equal weight are joined. Throws a request error for a weight
// that is not a plain decimal number or is above 100, for more than 32 open brackets, and for the web UI's prompt
// editing. The message calls the prompt `name`.
[[nodiscard]] std::vector<Piece> pieces(std::u32string_view prompt, const std::string& name);

}  // namespace higen::core
