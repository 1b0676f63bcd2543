// Characters: UTF-8, classes, lower case, and CLIP's cleaning of a prompt.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace higen::core {

// UTF-8 to code points; empty if it is not valid UTF-8.
[[nodiscard]] std::optional<std::u32string> decode_utf8(std::string_view bytes);
[[nodiscard]] std::string encode_utf8(std::u32string_view text);

// Oniguruma's \p{L}, \p{N}, \w and \s, which Python's tokenizers use.
[[nodiscard]] bool is_letter(char32_t c);
[[nodiscard]] bool is_number(char32_t c);
[[nodiscard]] bool is_word(char32_t c);
[[nodiscard]] bool is_space(char32_t c);
// Python's str.isspace.
[[nodiscard]] bool is_python_space(char32_t c);

// Lower case, character by character.
[[nodiscard]] std::u32string lower(std::u32string_view text);

// A prompt as CLIP reads it: what Python does with ftfy, html.unescape twice, white space collapsed, lower case.
//
// A result is exact. Text that ftfy would repair or unescape is refused with HIGEN_ERROR_CLEANING: HTML entities, C1
// controls, text that is not in Unicode's normal form C, and neighbours that ftfy may take for a wrong encoding.
[[nodiscard]] std::u32string clean(std::u32string_view text);

}  // namespace higen::core
