#include "edges.h"

#include <algorithm>
#include <cstdlib>

namespace higen::core {
namespace {

constexpr int low = 100, high = 200;  // an edge has a point above high, and all its points are above low
constexpr int shift = 15, tangent = 13573;  // tan(22.5 degrees), in units of 2^-15

struct Gradient {
    int x = 0, y = 0, length = 0;
};

// The longest of the three colours' Sobel gradients. The picture's border is repeated.
Gradient gradient(const std::vector<std::uint8_t>& rgb, std::ptrdiff_t width, std::ptrdiff_t height, std::ptrdiff_t row,
                  std::ptrdiff_t column) {
    const auto at = [&](std::ptrdiff_t y, std::ptrdiff_t x, std::ptrdiff_t colour) {
        const auto line = std::clamp<std::ptrdiff_t>(y, 0, height - 1), place = std::clamp<std::ptrdiff_t>(x, 0, width - 1);
        return static_cast<int>(rgb[static_cast<std::size_t>((line * width + place) * 3 + colour)]);
    };
    Gradient longest{0, 0, -1};
    for (std::ptrdiff_t c = 0; c < 3; ++c) {
        Gradient own;
        for (std::ptrdiff_t d = -1; d <= 1; ++d) {
            const int weight = d == 0 ? 2 : 1;
            own.x += weight * (at(row + d, column + 1, c) - at(row + d, column - 1, c));
            own.y += weight * (at(row + 1, column + d, c) - at(row - 1, column + d, c));
        }
        own.length = std::abs(own.x) + std::abs(own.y);
        if (own.length > longest.length) longest = own;
    }
    return longest;
}

}  // namespace

std::vector<std::uint8_t> edges(const std::vector<std::uint8_t>& rgb, std::size_t width, std::size_t height) {
    const auto w = static_cast<std::ptrdiff_t>(width), h = static_cast<std::ptrdiff_t>(height), line = w + 2;
    const auto place = [&](std::ptrdiff_t y, std::ptrdiff_t x) { return static_cast<std::size_t>((y + 1) * line + x + 1); };
    std::vector<Gradient> around(static_cast<std::size_t>(line * (h + 2)));  // beyond the picture the length is 0
    for (std::ptrdiff_t y = 0; y < h; ++y)
        for (std::ptrdiff_t x = 0; x < w; ++x) around[place(y, x)] = gradient(rgb, w, h, y, x);

    std::vector<bool> thin(around.size()), found(around.size());
    std::vector<std::size_t> open;
    for (std::ptrdiff_t y = 0; y < h; ++y)
        for (std::ptrdiff_t x = 0; x < w; ++x) {
            const auto& own = around[place(y, x)];
            if (own.length <= low) continue;
            const auto length = [&](std::ptrdiff_t down, std::ptrdiff_t right) {
                return around[place(y + down, x + right)].length;
            };
            const auto tall = std::int64_t{std::abs(own.y)} << shift;
            const auto flat = std::int64_t{std::abs(own.x)} * tangent;
            const auto steep = flat + (std::int64_t{std::abs(own.x)} << (shift + 1));
            bool peak = false;
            if (tall < flat) {
                peak = own.length > length(0, -1) && own.length >= length(0, 1);
            } else if (tall > steep) {
                peak = own.length > length(-1, 0) && own.length >= length(1, 0);
            } else {
                const std::ptrdiff_t side = (own.x ^ own.y) < 0 ? 1 : -1;
                peak = own.length > length(-1, side) && own.length > length(1, -side);
            }
            if (!peak) continue;
            thin[place(y, x)] = true;
            if (own.length > high) open.push_back(place(y, x));
        }
    while (!open.empty()) {
        const auto at = open.back();
        open.pop_back();
        if (found[at]) continue;
        found[at] = true;
        for (std::ptrdiff_t down = -1; down <= 1; ++down)
            for (std::ptrdiff_t right = -1; right <= 1; ++right) {
                const auto next = static_cast<std::size_t>(static_cast<std::ptrdiff_t>(at) + down * line + right);
                if (thin[next] && !found[next]) open.push_back(next);
            }
    }
    std::vector<std::uint8_t> made(rgb.size());
    for (std::ptrdiff_t y = 0; y < h; ++y)
        for (std::ptrdiff_t x = 0; x < w; ++x)
            if (found[place(y, x)]) std::fill_n(made.begin() + (y * w + x) * 3, 3, std::uint8_t{255});
    return made;
}

}  // namespace higen::core
