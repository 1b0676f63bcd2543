// FreeInit (Wu et al. 2023): a clip is denoised again from its own low frequencies and fresh high frequencies. The twin
// of higen/free_init.py, which has the equations.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace higen::core {

constexpr const char* free_init_filters[] = {"butterworth", "gaussian", "ideal"};

// How often a loop is run, and the filter of the low frequencies: "butterworth", "gaussian" or "ideal".
struct FreeInit {
    std::int64_t iterations = 1;
    double spatial = 0.25, temporal = 0.25;  // stop frequencies, as fractions of the highest one
    std::int64_t order = 4;                  // of the Butterworth filter
    std::string filter = "butterworth";

    [[nodiscard]] bool operator==(const FreeInit& other) const {
        return iterations == other.iterations && spatial == other.spatial && temporal == other.temporal &&
               order == other.order && filter == other.filter;
    }
};

// `fresh` noise with the low frequencies of `noisy` latents. Both are [n, F, H, W]; `shape` is (F, H, W).
[[nodiscard]] std::vector<float> renewed(const std::vector<float>& noisy, std::vector<float> fresh,
                                         const std::array<std::size_t, 3>& shape, const FreeInit& settings);

}  // namespace higen::core
