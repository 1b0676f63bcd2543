// The types of text_tables.inc, and searching in them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace higen::core::tables {

struct Range {
    char32_t first, last;
};
struct Pair {
    char32_t from;
    char32_t to;
};
struct Replacement {
    char32_t from;
    std::string_view text;
};

#include "text_tables.inc"

template <std::size_t N>
[[nodiscard]] bool contains(const Range (&ranges)[N], char32_t c) {
    const auto* found = std::upper_bound(ranges, ranges + N, c, [](char32_t x, const Range& r) { return x < r.first; });
    return found != ranges && c <= (found - 1)->last;
}

// The entry of a character, or null.
template <typename T, std::size_t N>
[[nodiscard]] const T* find(const T (&entries)[N], char32_t c) {
    const auto* found =
        std::lower_bound(entries, entries + N, c, [](const T& entry, char32_t x) { return entry.from < x; });
    return found != entries + N && found->from == c ? found : nullptr;
}

}  // namespace higen::core::tables
