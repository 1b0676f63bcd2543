#include "encodings.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "errors.h"

namespace higen::core {
namespace {

using Encoding = Control::Encoding;

std::string number_text(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
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
        const double position =
            std::clamp((static_cast<double>(i) + 0.5) * ratio - 0.5, 0.0, static_cast<double>(n) - 1);
        const auto lower = static_cast<std::size_t>(std::floor(position));
        const std::size_t upper = std::min(lower + 1, n - 1);
        const auto weight = static_cast<float>(position - static_cast<double>(lower));
        for (std::size_t k = 0; k < dim; ++k)
            resampled[i * dim + k] = rows[lower * dim + k] * (1.0F - weight) + rows[upper * dim + k] * weight;
    }
    return resampled;
}

// Entry i of n evenly spaced numbers from 0 to 1.
double fraction(std::size_t i, std::size_t n) {
    if (n == 1) return 0.0;
    return i + 1 == n ? 1.0 : static_cast<double>(i) * (1.0 / static_cast<double>(n - 1));
}

// |i/(frames-1) - k/(columns-1)|; 0 for a single frame.
double distance(std::size_t i, std::size_t frames, std::size_t k, std::size_t columns) {
    return frames == 1 ? 0.0 : std::abs(fraction(i, frames) - fraction(k, columns));
}

// Interpolates a row of numbers at `count` evenly spread positions.
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

// The value is a factor for all frames, a factor for each frame, a ready matrix, or a frame-to-frame matrix.
// Unspecified means a factor of 1, which tells each frame only its position.
std::vector<float> similarity(const MaybeValue& value, std::size_t frames, std::size_t columns) {
    std::vector<float> rows(frames * columns);
    const bool factors = value && value->columns == 1 && (value->rows == 1 || value->rows == frames);
    if (!value || factors) {
        for (std::size_t i = 0; i < frames; ++i) {
            const double factor = value ? value->numbers[value->rows == 1 ? 0 : i] : 1.0;
            const double own = value ? 1.0 : 0.0;
            for (std::size_t k = 0; k < columns; ++k)
                rows[i * columns + k] = static_cast<float>(own - factor * distance(i, frames, k, columns));
        }
    } else if (value->columns == columns) {
        rows.assign(value->numbers.begin(), value->numbers.end());
    } else {
        for (std::size_t i = 0; i < frames; ++i)
            interpolate(value->numbers.data() + i * frames, frames, rows.data() + i * columns, columns);
    }
    return rows;
}

// In words: what a control of this encoding takes for this many frames.
std::string allowed_shapes(const Control& control, std::size_t frames) {
    const auto f = std::to_string(frames), pairs = std::to_string(std::max<std::size_t>(frames - 1, 1));
    if (control.kind != Control::Kind::curve) return control.range();
    const auto each = ", each " + control.range();
    if (control.encoding == Encoding::similarity)
        return "one number, " + f + " numbers, or a matrix [" + f + ", R] or [" + f + ", " + f + "]" + each;
    return "one number, " + pairs + " (one per pair of frames) or " + f + " (one per frame)" + each;
}

bool fits_shape(const Control& control, const ControlValue& value, std::size_t frames) {
    const bool single = value.rows == 1 && value.columns == 1;
    if (single || control.kind != Control::Kind::curve) return single;
    if (control.encoding == Encoding::similarity) return value.rows == frames;  // the input decides the columns
    return value.columns == 1 && (value.rows == frames || value.rows == std::max<std::size_t>(frames - 1, 1));
}

}  // namespace

void check_value(const Control& control, const ControlValue& value, std::size_t frames) {
    if (control.kind == Control::Kind::text) return;
    if (control.kind == Control::Kind::choice) {
        std::string known;
        for (const auto& choice : control.choices) known += (known.empty() ? "'" : ", '") + choice + "'";
        if (std::find(control.choices.begin(), control.choices.end(), value.text) == control.choices.end())
            fail_request(control.name + "='" + value.text + "': one of " + known);
        return;
    }
    const auto allowed = allowed_shapes(control, frames);
    for (const double number : value.numbers) {
        const bool finite = std::abs(number) <= std::numeric_limits<float>::max();
        const bool whole = control.kind != Control::Kind::whole || number == std::floor(number);
        if (!finite || !whole || !control.allows(number))
            fail_request(control.name + " has the value " + number_text(number) + ": " + allowed);
    }
    if (value.numbers.size() != value.rows * value.columns || !fits_shape(control, value, frames))
        fail_request(control.name + " has shape [" + std::to_string(value.rows) + ", " + std::to_string(value.columns) +
                     "]: " + allowed);
}

std::vector<float> encode(const Control& control, const MaybeValue& value, std::size_t frames, std::size_t columns) {
    if (control.kind == Control::Kind::choice) {
        const auto& choices = control.choices;
        const auto found = std::find(choices.begin(), choices.end(), value ? value->text : "");
        return {static_cast<float>(found - choices.begin())};
    }
    if (control.encoding == Encoding::similarity) {
        const bool matrix = value && value->columns > 1;
        const auto given = value && value->rows > 1 ? value->rows : frames;
        if (matrix && value->columns != columns && value->columns != given)
            fail_request(control.name + " has shape [" + std::to_string(value->rows) + ", " +
                         std::to_string(value->columns) + "]: a matrix has " + std::to_string(columns) + " or " +
                         std::to_string(given) + " columns");
        return resample_in_time(similarity(value, given, columns), columns, frames);
    }
    if (!value) return std::vector<float>(frames * columns, 0.0F);
    std::vector<float> numbers(value->numbers.begin(), value->numbers.end());
    if (control.encoding == Encoding::number) return numbers;
    if (control.encoding == Encoding::curve) {
        if (numbers.size() == 1) numbers.assign(frames, numbers.front());
        return resample_in_time(std::move(numbers), 1, frames);
    }
    if (numbers.size() == 1) numbers.assign(std::max<std::size_t>(frames - 1, 1), numbers.front());
    return resample_in_time(sinusoid(numbers, columns), columns, frames);
}

std::vector<float> spread(const std::vector<double>& numbers, std::size_t count) {
    std::vector<float> values(count);
    interpolate(numbers.data(), numbers.size(), values.data(), count);
    return values;
}

}  // namespace higen::core
