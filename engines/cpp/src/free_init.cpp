#include "free_init.h"

#include <cmath>
#include <complex>

namespace higen::core {
namespace {

using Complex = std::complex<double>;

constexpr double pi = 3.141592653589793;

// The filter's value at a squared distance from frequency 0.
double passed(double d2, const FreeInit& settings) {
    if (settings.filter == "gaussian") return std::exp(-d2 / (2.0 * settings.spatial * settings.spatial));
    if (settings.filter == "ideal") return d2 <= 2.0 * settings.spatial ? 1.0 : 0.0;
    const double ratio = d2 / (settings.spatial * settings.spatial);
    return 1.0 / (1.0 + std::pow(ratio, static_cast<double>(settings.order)));
}

// The squared, scaled distance of each frequency k of n from the middle. Its shifted index is (k + n / 2) mod n.
std::vector<double> distances(std::size_t n, double scale) {
    std::vector<double> squared;
    for (std::size_t k = 0; k < n; ++k) {
        const auto place = static_cast<double>((k + n / 2) % n);
        const double away = scale * (2.0 * place / static_cast<double>(n) - 1.0);
        squared.push_back(away * away);
    }
    return squared;
}

std::vector<double> low_pass(const std::array<std::size_t, 3>& shape, const FreeInit& settings) {
    std::vector<double> mask;
    const auto f = distances(shape[0], settings.spatial / settings.temporal), h = distances(shape[1], 1.0),
               w = distances(shape[2], 1.0);
    for (const double a : f)
        for (const double b : h)
            for (const double c : w) mask.push_back(passed(a + b + c, settings));
    return mask;
}

// The discrete Fourier transform along one axis, in place, as sums over powers of a root of unity. sign -1: forward.
void transform(std::vector<Complex>& values, const std::array<std::size_t, 3>& shape, std::size_t axis, double sign) {
    const auto n = shape[axis];
    std::vector<Complex> roots;
    for (std::size_t k = 0; k < n; ++k)
        roots.push_back(std::polar(1.0, sign * 2.0 * pi * static_cast<double>(k) / static_cast<double>(n)));
    std::size_t step = 1;
    for (std::size_t i = axis + 1; i < 3; ++i) step *= shape[i];
    std::vector<Complex> line(n);
    for (std::size_t start = 0; start < values.size(); ++start) {
        if (start / step % n != 0) continue;
        for (std::size_t k = 0; k < n; ++k) {
            Complex sum = 0.0;
            for (std::size_t i = 0; i < n; ++i) sum += values[start + i * step] * roots[i * k % n];
            line[k] = sum;
        }
        for (std::size_t k = 0; k < n; ++k) values[start + k * step] = line[k];
    }
}

}  // namespace

std::vector<float> renewed(const std::vector<float>& noisy, std::vector<float> fresh,
                           const std::array<std::size_t, 3>& shape, const FreeInit& settings) {
    if (settings.spatial == 0.0 || settings.temporal == 0.0) return fresh;
    const auto mask = low_pass(shape, settings);
    const auto count = static_cast<double>(mask.size());
    std::vector<Complex> plane(mask.size());
    for (std::size_t first = 0; first < fresh.size(); first += plane.size()) {
        for (std::size_t i = 0; i < plane.size(); ++i)
            plane[i] = static_cast<double>(noisy[first + i]) - static_cast<double>(fresh[first + i]);
        for (std::size_t axis = 0; axis < 3; ++axis) transform(plane, shape, axis, -1.0);
        for (std::size_t i = 0; i < plane.size(); ++i) plane[i] *= mask[i];
        for (std::size_t axis = 0; axis < 3; ++axis) transform(plane, shape, axis, 1.0);
        for (std::size_t i = 0; i < plane.size(); ++i)
            fresh[first + i] = static_cast<float>(static_cast<double>(fresh[first + i]) + plane[i].real() / count);
    }
    return fresh;
}

}  // namespace higen::core
