#include "pictures.h"

#include <algorithm>
#include <cmath>

#include "errors.h"

namespace higen::core {
namespace {

constexpr double pi = 3.141592653589793;

double sinc(double x) { return x == 0.0 ? 1.0 : std::sin(x * pi) / (x * pi); }

double lanczos(double x) { return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0; }

// The weights of the source pixels of one pixel, as integers in units of 2^-22.
struct Tap {
    std::size_t first = 0;
    std::vector<int> weights;
};

constexpr int precision_bits = 32 - 8 - 2;

// Pillow's precompute_coeffs: the interval from `low` to `high` of `size` pixels becomes `count` pixels.
std::vector<Tap> lanczos_taps(std::size_t size, float low, float high, std::size_t count) {
    const double scale = static_cast<double>(high - low) / static_cast<double>(count);
    const double stretch = std::max(scale, 1.0), support = 3.0 * stretch;
    std::vector<Tap> taps(count);
    for (std::size_t i = 0; i < count; ++i) {
        const double center = static_cast<double>(low) + (static_cast<double>(i) + 0.5) * scale;
        const auto first =
            static_cast<std::size_t>(std::max(static_cast<std::int64_t>(center - support + 0.5), std::int64_t{0}));
        const auto last = std::min(static_cast<std::size_t>(center + support + 0.5), size);
        std::vector<double> weights;
        double sum = 0.0;
        for (auto x = first; x < last; ++x) {
            weights.push_back(lanczos((static_cast<double>(x) - center + 0.5) / stretch));
            sum += weights.back();
        }
        taps[i].first = first;
        for (const double weight : weights) {
            const double scaled = (sum != 0.0 ? weight / sum : weight) * (1 << precision_bits);
            taps[i].weights.push_back(static_cast<int>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
        }
    }
    return taps;
}

// The lines of an image that a pass filters. Lines start `stride` bytes apart; pixels in a line are `step` bytes apart.
struct Lines {
    std::size_t lines, stride, step;
};

void filter(const std::uint8_t* from, Lines source, std::uint8_t* to, Lines target, const std::vector<Tap>& taps) {
    for (std::size_t line = 0; line < source.lines; ++line)
        for (std::size_t i = 0; i < taps.size(); ++i) {
            int sum = 1 << (precision_bits - 1);
            const auto* at = from + line * source.stride + taps[i].first * source.step;
            for (const int weight : taps[i].weights) {
                sum += weight * static_cast<int>(*at);
                at += source.step;
            }
            to[line * target.stride + i * target.step] =
                static_cast<std::uint8_t>(std::clamp(sum >> precision_bits, 0, 255));
        }
}

// A matrix [new_size, size], row by row: Gaussian of standard deviation max((size/new_size - 1)/2, .001), mirrored at
// the edges, then bicubic with a = -.75 at i (size - 1)/(new_size - 1), the edge repeated.
std::vector<double> resampling_matrix(std::size_t size, std::size_t new_size) {
    const auto n = static_cast<std::int64_t>(size);
    const double deviation = std::max((static_cast<double>(size) / static_cast<double>(new_size) - 1.0) / 2.0, 0.001);
    const auto width = static_cast<std::int64_t>(std::max(4.0 * deviation, 3.0)) | 1;
    std::vector<double> kernel;
    double sum = 0.0;
    for (std::int64_t i = -(width / 2); i <= width / 2; ++i) {
        const auto x = static_cast<double>(i);
        kernel.push_back(std::exp(-x * x / (2.0 * deviation * deviation)));
        sum += kernel.back();
    }
    const auto cubic = [](double x) {
        constexpr double a = -0.75;
        x = std::abs(x);
        if (x <= 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
        return x < 2.0 ? ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a : 0.0;
    };
    std::vector<double> matrix(new_size * size, 0.0);
    for (std::size_t i = 0; i < new_size; ++i) {
        const double scale = new_size == 1 ? 0.0 : static_cast<double>(size - 1) / static_cast<double>(new_size - 1);
        const double position = static_cast<double>(i) * scale;
        const auto below = static_cast<std::int64_t>(std::floor(position));
        for (std::int64_t tap = below - 1; tap <= below + 2; ++tap) {
            const double weight = cubic(position - static_cast<double>(tap));
            const auto blurred = std::clamp(tap, std::int64_t{0}, n - 1);
            for (std::int64_t k = 0; k < width; ++k) {
                auto at = blurred + k - width / 2;
                while (n > 1 && (at < 0 || at >= n)) at = at < 0 ? -at : 2 * (n - 1) - at;
                if (n == 1) at = 0;
                matrix[i * size + static_cast<std::size_t>(at)] += weight * kernel[static_cast<std::size_t>(k)] / sum;
            }
        }
    }
    return matrix;
}

}  // namespace

std::vector<std::uint8_t> cover(const std::uint8_t* rgb, std::size_t width, std::size_t height, std::size_t new_width,
                                std::size_t new_height) {
    const auto w = static_cast<double>(width), h = static_cast<double>(height);
    const double have = w / h, want = static_cast<double>(new_width) / static_cast<double>(new_height);
    const double kept_width = have > want ? want * h : w, kept_height = have < want ? w / want : h;
    const double left = (w - kept_width) * 0.5, top = (h - kept_height) * 0.5;
    const auto x0 = static_cast<float>(left), x1 = static_cast<float>(left + kept_width);
    const auto y0 = static_cast<float>(top), y1 = static_cast<float>(top + kept_height);
    std::vector<std::uint8_t> pixels(rgb, rgb + 3 * width * height);
    std::size_t now_wide = width, now_tall = height;
    const auto go_across = [&] {  // an unchanged width needs no pass
        if (new_width == width && x0 == 0.0F && x1 == static_cast<float>(new_width)) return;
        const auto taps = lanczos_taps(width, x0, x1, new_width);
        std::vector<std::uint8_t> made(3 * new_width * now_tall);
        for (std::size_t c = 0; c < 3; ++c)
            filter(pixels.data() + c, {now_tall, 3 * now_wide, 3}, made.data() + c, {now_tall, 3 * new_width, 3}, taps);
        pixels = std::move(made), now_wide = new_width;
    };
    const auto go_down = [&] {
        if (new_height == height && y0 == 0.0F && y1 == static_cast<float>(new_height)) return;
        const auto taps = lanczos_taps(height, y0, y1, new_height);
        std::vector<std::uint8_t> made(3 * now_wide * new_height);
        const Lines columns{3 * now_wide, 1, 3 * now_wide};
        filter(pixels.data(), columns, made.data(), columns, taps);
        pixels = std::move(made), now_tall = new_height;
    };
    // Pillow 13 resizes the height first if it shrinks by more than twice as many pixels as the width. The order
    // matters because each pass rounds to bytes.
    const auto less_tall = h - static_cast<double>(new_height), less_wide = w - static_cast<double>(new_width);
    const bool down_first = less_tall > 0 && less_tall > 2 * less_wide;
    if (down_first) go_down();
    go_across();
    if (!down_first) go_down();
    return pixels;
}

void to_rgb(const float* pixels, std::size_t plane, std::size_t stride, std::uint8_t* rgb) {
    for (std::size_t i = 0; i < plane; ++i)
        for (std::size_t c = 0; c < 3; ++c) {
            const float x = pixels[c * stride + i];
            if (!std::isfinite(x)) fail_backend("a frame has NaN or infinite pixels; use a wider precision");
            const float unit = std::clamp(x * 0.5F + 0.5F, 0.0F, 1.0F);
            rgb[3 * i + c] = static_cast<std::uint8_t>(unit * 255.0F);
        }
}

std::vector<float> planes(const std::vector<std::uint8_t>& rgb, std::size_t frames, std::size_t pixels) {
    std::vector<float> values(rgb.size());
    for (std::size_t f = 0; f < frames; ++f)
        for (std::size_t i = 0; i < pixels; ++i)
            for (std::size_t c = 0; c < 3; ++c)
                values[(c * frames + f) * pixels + i] =
                    static_cast<float>(rgb[(f * pixels + i) * 3 + c]) / 127.5F - 1.0F;
    return values;
}

std::vector<float> resample(const std::vector<float>& pixels, std::size_t height, std::size_t width,
                            std::size_t new_height, std::size_t new_width) {
    const auto down = resampling_matrix(height, new_height), across = resampling_matrix(width, new_width);
    const std::size_t channels = pixels.size() / (height * width);
    std::vector<float> result(channels * new_height * new_width);
    std::vector<double> rows(new_height * width);
    for (std::size_t c = 0; c < channels; ++c) {
        const auto* plane = pixels.data() + c * height * width;
        std::fill(rows.begin(), rows.end(), 0.0);
        for (std::size_t i = 0; i < new_height; ++i)
            for (std::size_t y = 0; y < height; ++y)
                if (const double weight = down[i * height + y]; weight != 0.0)
                    for (std::size_t x = 0; x < width; ++x)
                        rows[i * width + x] += weight * static_cast<double>(plane[y * width + x]);
        for (std::size_t i = 0; i < new_height; ++i)
            for (std::size_t j = 0; j < new_width; ++j) {
                double sum = 0.0;
                for (std::size_t x = 0; x < width; ++x) sum += across[j * width + x] * rows[i * width + x];
                result[(c * new_height + i) * new_width + j] = static_cast<float>(sum);
            }
    }
    return result;
}

}  // namespace higen::core
