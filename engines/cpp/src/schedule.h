// Noise schedules and solvers, as tables in float64: the twin of higen/schedule.py, which has the sources.
// Depends only on the standard library and errors.h. Both twins are tested against tests/schedule_vectors.json.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace higen::core {

inline constexpr std::array<std::string_view, 4> PREDICTIONS{"v", "epsilon", "sample", "flow"};
inline constexpr std::array<std::string_view, 6> SOLVERS{"ddim", "dpm++2m", "euler", "euler_ancestral", "heun", "lcm"};
inline constexpr std::array<std::string_view, 6> SPACINGS{"leading", "linspace",      "trailing",
                                                          "karras",  "leading-floor", "trailing-ceil"};

// How much noise each timestep has. The fields are the manifest's; each kind reads only its own.
struct NoiseSchedule {
    std::string kind = "scaled_linear";  // "linear", "scaled_linear", "cosine", "edm" or "flow"
    std::int64_t timesteps = 1000;
    double beta_start = 0.00085;  // linear, scaled_linear
    double beta_end = 0.012;
    bool zero_terminal_snr = false;  // linear, scaled_linear, cosine
    double sigma_min = 0.002;        // edm: the range of the ratio sigma / alpha; t is ln(ratio) / 4
    double sigma_max = 700.0;
    double shift = 1.0;  // flow
};

// A way from noise to clean latents. The fields are the manifest's; higen/schedule.py explains them.
struct Solver {
    std::string name;
    std::string spacing = "leading";
    std::int64_t offset = 0;     // added to the leading grids
    std::string final = "zero";  // where the last row ends: "zero" or "first"
    double eta = 0.0;            // ddim
    double rho = 7.0;            // karras
    std::int64_t original_steps = 50;  // lcm
};

// x0 = alpha x - sigma m and x' = A x + B m + C previous; previous' = x0. If `noise` is true, C multiplies fresh unit
// Gaussian noise, which the loop passes as `previous`. The row's state is x = start_alpha z + start_sigma n.
struct SolverRow {
    double t, A, B, C, alpha, sigma;
    bool noise;
    double start_alpha, start_sigma;
};

// Rows of a solver, first step first. The state of the first row is `initial` times unit Gaussian noise.
struct SolverTable {
    std::vector<SolverRow> rows;
    double initial;
};

// Throw a manifest error for values that do not make a schedule, a solver, or a table.
void check(const NoiseSchedule& schedule);
void check(const Solver& solver);
void check(const NoiseSchedule& schedule, const std::string& prediction, const Solver& solver);

// The cumulative signal variance abar = alpha^2, decreasing, within [0, 1).
// Throws a manifest error for the kinds edm and flow: they have no such table.
[[nodiscard]] std::vector<double> alphas_cumprod(const NoiseSchedule& schedule);

// alpha and sigma of the noisiest state.
[[nodiscard]] std::pair<double, double> last_level(const NoiseSchedule& schedule);

// The largest number of steps that the solver supports.
[[nodiscard]] std::int64_t max_steps(const NoiseSchedule& schedule, const Solver& solver);

// The rows of a solver for `steps` steps: 2 steps - 1 rows for heun, `steps` rows for the others. All are finite.
// Throws a manifest error if the first three do not fit each other, and a request error for steps outside 1 to
// max_steps.
[[nodiscard]] SolverTable solver_table(const NoiseSchedule& schedule, const std::string& prediction,
                                       const Solver& solver, std::int64_t steps);

// The rows from `first` on, for a state that begins at start_alpha z + start_sigma n of that row (SDEdit). No row comes
// before it, so its own x0 replaces `previous`. Throws a request error for a row outside the table.
[[nodiscard]] SolverTable tail(const SolverTable& table, std::int64_t first);

// The rows that carry clean latents up to the state before row `first` of solver_table(...): DDIM inversion
// (higen/schedule.py). Throws a request error for a solver that adds noise, for a network that predicts the sample at a
// level without noise, and for a row outside the table.
[[nodiscard]] SolverTable inversion_table(const NoiseSchedule& schedule, const std::string& prediction,
                                          const Solver& solver, std::int64_t steps, std::int64_t first);

}  // namespace higen::core
