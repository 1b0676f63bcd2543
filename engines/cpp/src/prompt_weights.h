// The weights of a prompt's words, as AUTOMATIC1111's web UI and the field write them (higen/prompt_weights.py).
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace higen::core {

// A part of a prompt whose words have one weight. Without a text, a new chunk begins here (BREAK).
struct Piece {
    std::optional<std::u32string> text;
    double weight = 1.0;
};

// The parts of a prompt with their weights, neighbours of equal weight joined. Throws a request error, which calls the
// prompt `name`, for a weight that is not a plain decimal number or beyond 100, for more than 32 open brackets, and for
// the web UI's prompt editing.
[[nodiscard]] std::vector<Piece> pieces(std::u32string_view prompt, const std::string& name);

}  // namespace higen::core
