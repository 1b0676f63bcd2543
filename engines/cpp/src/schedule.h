// Noise schedule and solvers, as tables in float64 (higen/schedule.py).
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "config.h"

namespace higen::core {

// Rows of a solver, first step first: x' = A x + B v + C previous, x0 = alpha x - sigma v.
struct SolverRow {
    std::int64_t t;
    double A, B, C, alpha, sigma;
};

// The cumulative signal variance abar, decreasing; with zero terminal SNR rescaled (Lin et al. 2023, algorithm 1).
[[nodiscard]] std::vector<double> alphas_cumprod(const ScheduleConfig& config);

// "ddim" and "dpm++2m" are known.
[[nodiscard]] bool is_solver(std::string_view name);

// The rows of a solver for `steps` steps, 1 to config.timesteps. Throws a request error for anything else.
[[nodiscard]] std::vector<SolverRow> solver_table(std::string_view solver, std::int64_t steps,
                                                  const ScheduleConfig& config);

}  // namespace higen::core
