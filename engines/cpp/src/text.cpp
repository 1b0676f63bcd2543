#include "text.h"

#include "text_tables.h"

namespace higen::core {

std::optional<std::u32string> decode_utf8(std::string_view bytes) {
    std::u32string text;
    text.reserve(bytes.size());
    for (std::size_t i = 0; i < bytes.size();) {
        const auto lead = static_cast<unsigned char>(bytes[i]);
        const std::size_t length = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
        if (length == 0 || length > bytes.size() - i) return std::nullopt;
        char32_t c = length == 1 ? lead : lead & (0x7FU >> length);
        for (std::size_t k = 1; k < length; ++k) {
            const auto next = static_cast<unsigned char>(bytes[i + k]);
            if (next >> 6 != 2) return std::nullopt;
            c = c << 6 | (next & 0x3F);
        }
        constexpr char32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
        if (c < smallest[length] || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) return std::nullopt;
        text.push_back(c);
        i += length;
    }
    return text;
}

std::string encode_utf8(std::u32string_view text) {
    std::string bytes;
    const auto put = [&](char32_t value) { bytes.push_back(static_cast<char>(static_cast<unsigned char>(value))); };
    for (const char32_t c : text) {
        if (c < 0x80) {
            put(c);
        } else if (c < 0x800) {
            put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
        } else if (c < 0x10000) {
            put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
        } else {
            put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F)), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
        }
    }
    return bytes;
}

bool is_letter(char32_t c) { return tables::contains(tables::letters, c); }
bool is_number(char32_t c) { return tables::contains(tables::numbers, c); }
bool is_word(char32_t c) { return tables::contains(tables::word_characters, c); }
bool is_space(char32_t c) { return tables::contains(tables::white_space, c); }
bool is_python_space(char32_t c) { return tables::contains(tables::python_white_space, c); }

std::u32string lower(std::u32string_view text) {
    std::u32string result;
    result.reserve(text.size());
    for (const char32_t c : text) {
        if (c == 0x130) {  // the only character with a lower case of two characters
            result += U"i\u0307";
        } else {
            const auto* entry = tables::find(tables::lower_case, c);
            result.push_back(entry != nullptr ? entry->to : c);
        }
    }
    return result;
}

}  // namespace higen::core
