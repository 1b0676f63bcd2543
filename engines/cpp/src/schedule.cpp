#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "errors.h"

namespace higen::core {
namespace {

using Rows = std::vector<SolverRow>;

// DDIM with eta 0 (Song et al. 2021, equation 12): x' = alpha' x0 + sigma' eps. The last row goes from t = 1 to t = 0,
// which still carries noise: as the reference does.
Rows ddim(const std::vector<double>& abar, std::int64_t steps) {
    const auto last = static_cast<std::int64_t>(abar.size()) - 1;
    Rows rows;
    for (std::int64_t k = steps - 1; k >= 0; --k) {
        const auto grid = [&](std::int64_t i) { return std::min(1 + i * (last + 1) / steps, last); };
        const std::int64_t t = grid(k), next = k == 0 ? 0 : grid(k - 1);
        const auto here = abar[static_cast<std::size_t>(t)], there = abar[static_cast<std::size_t>(next)];
        const double alpha = std::sqrt(here), sigma = std::sqrt(1.0 - here);
        const double alpha_next = std::sqrt(there), sigma_next = std::sqrt(1.0 - there);
        rows.push_back({t, alpha_next * alpha + sigma_next * sigma, sigma_next * alpha - alpha_next * sigma, 0.0, alpha,
                        sigma});
    }
    return rows;
}

// DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), on the trailing grid and ending at the clean latent. The first and
// the last step are of first order; so is one whose previous step began at zero SNR (its weight is 0).
Rows dpm_solver_2m(const std::vector<double>& abar, std::int64_t steps) {
    const auto train_steps = static_cast<std::int64_t>(abar.size());
    const auto n = static_cast<std::size_t>(steps);
    Rows rows(n);
    std::vector<double> half_logsnr(n);
    for (std::size_t i = 0; i < n; ++i) {
        const auto k = steps - static_cast<std::int64_t>(i);
        rows[i].t = (k * train_steps + steps - 1) / steps - 1;
        const double signal = abar[static_cast<std::size_t>(rows[i].t)];
        rows[i].alpha = std::sqrt(signal);
        rows[i].sigma = std::sqrt(1.0 - signal);
        half_logsnr[i] = std::log(rows[i].alpha) - std::log(rows[i].sigma);  // -inf at zero SNR
    }
    for (std::size_t i = 0; i < n; ++i) {
        const bool last = i + 1 == n;
        const double alpha_next = last ? 1.0 : rows[i + 1].alpha, sigma_next = last ? 0.0 : rows[i + 1].sigma;
        double weight = 0.0;  // 1/2r
        if (i > 0 && !last) {
            const double h = half_logsnr[i + 1] - half_logsnr[i], before = half_logsnr[i] - half_logsnr[i - 1];
            weight = h / (2.0 * before);
        }
        const double decay = sigma_next * rows[i].alpha / (alpha_next * rows[i].sigma);  // exp(-h)
        const double k = alpha_next * (1.0 - decay);
        rows[i].A = sigma_next / rows[i].sigma + k * (1.0 + weight) * rows[i].alpha;
        rows[i].B = -k * (1.0 + weight) * rows[i].sigma;
        rows[i].C = -k * weight;
    }
    return rows;
}

}  // namespace

std::vector<double> alphas_cumprod(const ScheduleConfig& config) {
    const auto n = static_cast<std::size_t>(config.timesteps);
    const double start = std::pow(config.beta_start, 0.5), stop = std::pow(config.beta_end, 0.5);
    const double spacing = (stop - start) / static_cast<double>(n - 1);
    std::vector<double> abar(n);
    double product = 1.0;
    for (std::size_t i = 0; i < n; ++i) {
        const double root = i + 1 == n ? stop : static_cast<double>(i) * spacing + start;
        product *= 1.0 - root * root;
        abar[i] = product;
    }
    if (!config.zero_terminal_snr) return abar;
    const double first = std::sqrt(abar.front()), last = std::sqrt(abar.back());
    for (auto& value : abar) {
        const double root = (std::sqrt(value) - last) * first / (first - last);
        value = root * root;
    }
    return abar;
}

bool is_solver(std::string_view name) { return name == "ddim" || name == "dpm++2m"; }

std::vector<SolverRow> solver_table(std::string_view solver, std::int64_t steps, const ScheduleConfig& config) {
    if (!is_solver(solver)) fail_request("solver='" + std::string(solver) + "': one of 'ddim', 'dpm++2m'");
    if (steps < 1 || steps > config.timesteps)
        fail_request("steps=" + std::to_string(steps) + ": a whole number from 1 to " +
                     std::to_string(config.timesteps));
    const auto abar = alphas_cumprod(config);
    return solver == "ddim" ? ddim(abar, steps) : dpm_solver_2m(abar, steps);
}

}  // namespace higen::core
