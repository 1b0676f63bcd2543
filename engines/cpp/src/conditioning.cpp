#include "conditioning.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "errors.h"

namespace higen::core {
namespace {

std::string shape(const CueValues& cue) {
    return "[" + std::to_string(cue.rows) + ", " + std::to_string(cue.columns) + "]";
}

void check_finite(const char* name, const CueValues& cue, const std::string& allowed) {
    for (const double value : cue.values)
        if (!(std::abs(value) <= std::numeric_limits<float>::max()))
            fail_request(std::string(name) + " has the value " + std::to_string(value) + ": " + allowed);
}

// The motion cue as one number per pair of frames or per frame.
std::vector<float> motion_values(const CueValues& motion, std::size_t frames) {
    const std::size_t pairs = std::max<std::size_t>(frames - 1, 1);
    const std::string allowed = "one number, " + std::to_string(pairs) + " (one per pair of frames) or " +
                                std::to_string(frames) + " (one per frame), each finite and >= 0";
    check_finite("motion", motion, allowed);
    const bool single = motion.rows == 1;
    if (motion.columns != 1 || (!single && motion.rows != pairs && motion.rows != frames))
        fail_request("motion has shape " + shape(motion) + ": " + allowed);
    for (const double value : motion.values)
        if (value < 0) fail_request("motion has the value " + std::to_string(value) + ": " + allowed);
    std::vector<float> values(motion.values.begin(), motion.values.end());
    if (single) values.assign(pairs, values.front());
    return values;
}

// Sinusoidal embedding, [n, dim]: cosines first, then sines; an odd dim ends with a zero.
std::vector<float> sinusoid(const std::vector<float>& values, std::size_t dim) {
    const std::size_t half = dim / 2;
    std::vector<float> table(values.size() * dim, 0.0F);
    for (std::size_t k = 0; k < half; ++k) {
        const float exponent = -static_cast<float>(k) / static_cast<float>(half);
        const auto frequency = static_cast<float>(std::pow(10000.0, static_cast<double>(exponent)));
        for (std::size_t i = 0; i < values.size(); ++i) {
            const float angle = values[i] * frequency;
            table[i * dim + k] = std::cos(angle);
            table[i * dim + half + k] = std::sin(angle);
        }
    }
    return table;
}

// Linear resampling of rows: source position (i + .5) n/frames - .5, clamped at the ends.
std::vector<float> resample_in_time(std::vector<float> rows, std::size_t dim, std::size_t frames) {
    const std::size_t n = rows.size() / dim;
    if (n == frames) return rows;
    std::vector<float> resampled(frames * dim);
    const double ratio = static_cast<double>(n) / static_cast<double>(frames);
    for (std::size_t i = 0; i < frames; ++i) {
        const double position = std::clamp((static_cast<double>(i) + 0.5) * ratio - 0.5, 0.0, static_cast<double>(n) - 1);
        const auto lower = static_cast<std::size_t>(std::floor(position));
        const std::size_t upper = std::min(lower + 1, n - 1);
        const auto weight = static_cast<float>(position - static_cast<double>(lower));
        for (std::size_t k = 0; k < dim; ++k)
            resampled[i * dim + k] = rows[lower * dim + k] * (1.0F - weight) + rows[upper * dim + k] * weight;
    }
    return resampled;
}

// Entry i of n numbers from 0 to 1, evenly spaced.
double fraction(std::size_t i, std::size_t n) {
    if (n == 1) return 0.0;
    return i + 1 == n ? 1.0 : static_cast<double>(i) * (1.0 / static_cast<double>(n - 1));
}

// |i/(frames-1) - k/(columns-1)|; a single frame stands at every position at once.
double distance(std::size_t i, std::size_t frames, std::size_t k, std::size_t columns) {
    return frames == 1 ? 0.0 : std::abs(fraction(i, frames) - fraction(k, columns));
}

// A row of numbers at `count` places spread evenly over it.
void interpolate(const double* row, std::size_t n, float* out, std::size_t count) {
    for (std::size_t k = 0; k < count; ++k) {
        const double x = fraction(k, count);
        std::size_t j = 0;
        while (j + 1 < n && fraction(j + 1, n) <= x) ++j;
        if (j + 1 >= n) {
            out[k] = static_cast<float>(row[n - 1]);
            continue;
        }
        const double slope = (row[j + 1] - row[j]) / (fraction(j + 1, n) - fraction(j, n));
        out[k] = static_cast<float>(slope * (x - fraction(j, n)) + row[j]);
    }
}

std::vector<float> appearance_rows(const CueValues& cue, std::size_t frames, std::size_t columns) {
    const std::string f = std::to_string(frames);
    const std::string allowed = "one number, " + f + " numbers, or a matrix [" + f + ", " + std::to_string(columns) +
                                "] or [" + f + ", " + f + "], each finite";
    check_finite("appearance", cue, allowed);
    std::vector<float> rows(frames * columns);
    if (cue.columns == 1 && (cue.rows == 1 || cue.rows == frames)) {
        for (std::size_t i = 0; i < frames; ++i) {
            const double factor = cue.values[cue.rows == 1 ? 0 : i];
            for (std::size_t k = 0; k < columns; ++k)
                rows[i * columns + k] = static_cast<float>(1.0 - factor * distance(i, frames, k, columns));
        }
    } else if (cue.rows == frames && cue.columns == columns) {
        rows.assign(cue.values.begin(), cue.values.end());
    } else if (cue.rows == frames && cue.columns == frames) {
        for (std::size_t i = 0; i < frames; ++i)
            interpolate(cue.values.data() + i * frames, frames, rows.data() + i * columns, columns);
    } else {
        fail_request("appearance has shape " + shape(cue) + ": " + allowed);
    }
    return rows;
}

}  // namespace

std::vector<float> motion_cue(const Cue& motion, std::size_t frames, std::size_t dim) {
    if (!motion) return std::vector<float>(frames * dim, 0.0F);
    return resample_in_time(sinusoid(motion_values(*motion, frames), dim), dim, frames);
}

std::vector<float> appearance_cue(const Cue& appearance, std::size_t frames, std::size_t columns) {
    if (appearance) return appearance_rows(*appearance, frames, columns);
    std::vector<float> rows(frames * columns);
    for (std::size_t i = 0; i < frames; ++i)
        for (std::size_t k = 0; k < columns; ++k)
            rows[i * columns + k] = static_cast<float>(-distance(i, frames, k, columns));
    return rows;
}

}  // namespace higen::core
