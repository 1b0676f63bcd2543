#include "noise.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace higen::core {
namespace {

constexpr double pi = 3.141592653589793;

struct Product {
    std::uint64_t high, low;
};

// The 128-bit product, without a type that only some compilers have.
Product multiply(std::uint64_t a, std::uint64_t b) {
    constexpr std::uint64_t mask = 0xffffffff;
    const std::uint64_t low = (a & mask) * (b & mask);
    const std::uint64_t first = (a >> 32) * (b & mask) + (low >> 32);
    const std::uint64_t second = (a & mask) * (b >> 32) + (first & mask);
    return {(a >> 32) * (b >> 32) + (first >> 32) + (second >> 32), a * b};
}

}  // namespace

std::array<std::uint64_t, 4> philox(std::array<std::uint64_t, 4> c, std::array<std::uint64_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const Product p0 = multiply(0xD2E7470EE14C6C93, c[0]), p1 = multiply(0xCA5A826395121157, c[2]);
        c = {p1.high ^ c[1] ^ key[0], p1.low, p0.high ^ c[3] ^ key[1], p0.low};
        key[0] += 0x9E3779B97F4A7C15;
        key[1] += 0xBB67AE8584CAA73B;
    }
    return c;
}

std::vector<float> normal(std::uint64_t seed, std::uint64_t purpose, std::size_t count) {
    std::vector<float> numbers;
    numbers.reserve(count + 3);
    // numpy increments the counter before its first block, so the first block has counter 1.
    for (std::uint64_t block = 1; numbers.size() < count; ++block) {
        const auto raw = philox({block, 0, 0, 0}, {seed, purpose});
        for (std::size_t i = 0; i < 4; i += 2) {
            const auto a = static_cast<double>(raw[i] >> 11), b = static_cast<double>(raw[i + 1] >> 11);
            const double radius = std::sqrt(-2.0 * std::log((a + 1.0) * 0x1p-53));
            const double angle = 2.0 * pi * 0x1p-53 * b;
            numbers.push_back(static_cast<float>(radius * std::cos(angle)));
            numbers.push_back(static_cast<float>(radius * std::sin(angle)));
        }
    }
    numbers.resize(count);
    return numbers;
}

std::vector<std::size_t> frame_order(std::uint64_t seed, std::uint64_t purpose, std::size_t frames, std::size_t length,
                                     std::size_t stride, std::string_view kind) {
    std::vector<std::size_t> order(frames);
    std::iota(order.begin(), order.end(), std::size_t{0});
    if (kind == "fresh" || frames <= length) return order;
    if (kind == "repeated") {
        for (auto& frame : order) frame %= length;
        return order;
    }
    std::size_t drawn = 0;
    std::array<std::uint64_t, 4> block{};
    const auto next = [&] {
        const auto place = drawn++ % 4;
        if (place == 0) block = philox({(drawn - 1) / 4 + 1, 0, 0, 0}, {seed, purpose + (std::uint64_t{1} << 31)});
        return block[place];
    };
    for (auto start = length; start < frames; start += stride) {
        std::vector<std::uint64_t> numbers(stride);
        for (auto& one : numbers) one = next();
        std::vector<std::size_t> places(stride);
        std::iota(places.begin(), places.end(), std::size_t{0});
        std::stable_sort(places.begin(), places.end(),
                         [&](std::size_t a, std::size_t b) { return numbers[a] < numbers[b]; });
        const auto before = order;
        for (std::size_t j = 0; j < stride && start + j < frames; ++j)
            order[start + j] = before[start - length + places[j]];
    }
    return order;
}

std::vector<float> frame_noise(std::uint64_t seed, std::uint64_t purpose, std::size_t before, std::size_t frames,
                               std::size_t after) {
    const auto flat = normal(seed, purpose, frames * before * after);
    std::vector<float> noise(flat.size());
    for (std::size_t f = 0; f < frames; ++f)
        for (std::size_t c = 0; c < before; ++c)
            for (std::size_t i = 0; i < after; ++i)
                noise[(c * frames + f) * after + i] = flat[(f * before + c) * after + i];
    return noise;
}

}  // namespace higen::core
