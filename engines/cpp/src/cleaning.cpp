#include <algorithm>
#include <cstdio>

#include "errors.h"
#include "text.h"
#include "text_tables.h"

namespace higen::core {
namespace {

using tables::contains;

constexpr char32_t none = 0;  // stands for the place before the first and after the last character

std::string code_point(char32_t c) {
    char text[16];
    std::snprintf(text, sizeof text, "U+%04X", static_cast<unsigned>(c));
    return text;
}

[[noreturn]] void refuse(const std::string& what) {
    throw Error(HIGEN_ERROR_CLEANING, "the prompt has " + what +
                                          ", which the Python package would repair (ftfy, html.unescape) and this "
                                          "library does not; give repaired text, or token ids");
}

bool is_ascii_alphanumeric(char32_t c) {
    return (c >= U'0' && c <= U'9') || (c >= U'A' && c <= U'Z') || (c >= U'a' && c <= U'z');
}

// Refuses what html.unescape or ftfy's own unescaping might replace: "&#", "&name;" and the names that HTML accepts
// without a semicolon, such as "&amp" and "&copy". "R&B", "rock & roll" and "AT&T" pass.
void refuse_entities(std::u32string_view text) {
    for (auto at = text.find(U'&'); at != text.npos; at = text.find(U'&', at + 1)) {
        std::string name;
        std::size_t i = at + 1;
        for (; i < text.size() && name.size() < 32 && is_ascii_alphanumeric(text[i]); ++i)
            name.push_back(static_cast<char>(text[i]));
        const char32_t next = i < text.size() ? text[i] : none;
        const bool legacy = std::any_of(std::begin(tables::legacy_entities), std::end(tables::legacy_entities),
                                        [&](std::string_view entity) { return name.compare(0, entity.size(), entity) == 0; });
        if (legacy || (next == U';' && !name.empty()) || (next == U'#' && name.empty()))
            refuse("the HTML entity &" + name);
    }
}

enum class Kind { plain, letter, quote, common, other };

Kind kind_of(char32_t c) {
    if (c < 0x80) return Kind::plain;
    if (contains(tables::suspicious_letters, c)) return Kind::letter;
    if (contains(tables::suspicious_quotes, c)) return Kind::quote;
    if (contains(tables::suspicious_commons, c)) return Kind::common;
    return contains(tables::suspicious_others, c) ? Kind::other : Kind::plain;
}

// Letters that ftfy's rules name one by one, mostly as the first half of a two-byte sequence.
bool is_named_letter(char32_t c) {
    constexpr std::u32string_view named = U"\u00C2\u00C3\u00CE\u00D0\u00D8\u00D9\u0152\u0153\u0402";
    return named.find(c) != named.npos;
}

// Whether two neighbours can be part of text that ftfy takes for a wrong encoding. ftfy knows some 500 characters of
// such text, and its rules need two of them side by side (`refuse_mojibake` handles the few exceptions). Text that no
// rule names passes: words with accents, words of Greek or Cyrillic letters, and quotation marks around them.
bool may_be_mojibake(char32_t before, char32_t a, char32_t b, char32_t after) {
    const Kind first = kind_of(a), second = kind_of(b);
    if (first == Kind::plain || second == Kind::plain) return false;
    if (is_named_letter(a) || is_named_letter(b))
        return !(first == Kind::letter && second == Kind::letter) || a == 0x402 || b == 0x402 ||
               contains(tables::upper_accented, b) || (b >= 0x150 && b <= 0x17F);
    if (first == Kind::letter && second == Kind::letter)
        return contains(tables::upper_accented, b) && !contains(tables::upper_accented, a);
    if (first == Kind::common || second == Kind::common) return first == Kind::other || second == Kind::other;
    if (first == Kind::quote && second == Kind::letter)
        return kind_of(before) != Kind::plain || contains(tables::upper_accented, b) ||
               (b != none && !(a == 0x2018 || a == 0x201C || a == 0x201E || a == 0xAB || a == 0xBF || a == 0xA1));
    if (first == Kind::letter && second == Kind::quote)
        return contains(tables::upper_accented, a) || is_word(after) || is_number(after) ||
               (kind_of(after) != Kind::plain && kind_of(after) != Kind::common);
    return true;
}

void refuse_mojibake(std::u32string_view text) {
    const auto at = [&](std::size_t i) { return i < text.size() ? text[i] : none; };
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char32_t c = text[i], next = at(i + 1);
        if (c >= 0x80 && c <= 0x9F) refuse("the control character " + code_point(c));
        const bool single = ((c == 0x152 || c == 0x153) && next != none && !is_ascii_alphanumeric(next)) ||
                            ((c == 0xC2 || c == 0xC3) && next == U' ');
        if (single || (next != none && may_be_mojibake(i > 0 ? text[i - 1] : none, c, next, at(i + 2))))
            refuse(code_point(c) + " before " + code_point(next));
    }
}

void refuse_other_than_nfc(std::u32string_view text) {
    char32_t last_class = 0;
    for (const char32_t c : text) {
        const auto* entry = tables::find(tables::combining_class, c);
        const char32_t combining = entry != nullptr ? entry->to : 0;
        const bool disordered = combining != 0 && combining < last_class;
        if (disordered || contains(tables::not_nfc, c) || contains(tables::composing, c))
            refuse(code_point(c) + " where Unicode's normal form C may have another character");
        last_class = combining;
    }
}

// The length of a terminal escape at the start: "\033[", digits and semicolons, a letter; 0 if there is none.
std::size_t terminal_escape(std::u32string_view text) {
    if (text.size() < 3 || text[0] != 0x1B || text[1] != U'[') return 0;
    std::size_t i = 2;
    // Python's \d is any decimal digit. Digits other than ASCII are refused.
    while (i < text.size() && ((text[i] >= U'0' && text[i] <= U'9') || text[i] == U';')) ++i;
    if (i < text.size() && is_number(text[i]) && text[i] >= 0x80) refuse("a terminal escape with foreign digits");
    const bool ends = i < text.size() && is_ascii_alphanumeric(text[i]);
    return ends ? i + 1 : 0;
}

// ftfy's replacements that need no guessing: ligatures, widths, quotation marks, line ends, escapes, controls.
std::u32string replace(std::u32string_view text) {
    std::u32string replaced;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char32_t c = text[i];
        if (const auto* entry = tables::find(tables::replacements, c)) {
            replaced += *decode_utf8(entry->text);
        } else if (c == U'\r' || c == 0x2028 || c == 0x2029) {
            replaced.push_back(U'\n');
        } else {
            replaced.push_back(c);
        }
    }
    std::u32string kept;
    for (std::size_t i = 0; i < replaced.size(); ++i) {
        const auto rest = std::u32string_view(replaced).substr(i);
        if (const auto length = terminal_escape(rest))
            i += length - 1;
        else if (!contains(tables::removed_controls, replaced[i]))
            kept.push_back(replaced[i]);
    }
    return kept;
}

bool is_final_sigma(std::u32string_view text, std::size_t at) {
    std::size_t i = at;
    while (i > 0 && contains(tables::case_ignorable, text[i - 1])) --i;
    if (i == 0 || !contains(tables::cased, text[i - 1])) return false;
    i = at + 1;
    while (i < text.size() && contains(tables::case_ignorable, text[i])) ++i;
    return i == text.size() || !contains(tables::cased, text[i]);
}

// Python's str.lower: a sigma at the end of a word has a special form.
std::u32string python_lower(std::u32string_view text) {
    constexpr char32_t sigma = 0x3A3, small = 0x3C3, final = 0x3C2;
    std::u32string marked(text);
    for (std::size_t i = 0; i < text.size(); ++i)
        if (text[i] == sigma) marked[i] = is_final_sigma(text, i) ? final : small;
    return lower(marked);
}

}  // namespace

std::u32string clean(std::u32string_view text) {
    std::u32string fixed(text), before;
    while (fixed != before) {  // as ftfy does: repeat until nothing changes
        before = fixed;
        refuse_entities(fixed);
        refuse_mojibake(fixed);
        fixed = replace(fixed);
        refuse_other_than_nfc(fixed);
    }
    std::u32string collapsed;
    for (const char32_t c : fixed) {
        if (!is_python_space(c))
            collapsed.push_back(c);
        else if (!collapsed.empty() && collapsed.back() != U' ')
            collapsed.push_back(U' ');
    }
    if (!collapsed.empty() && collapsed.back() == U' ') collapsed.pop_back();
    return python_lower(collapsed);
}

}  // namespace higen::core
