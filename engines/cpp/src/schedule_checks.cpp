#include <cmath>
#include <sstream>

#include "schedule_rules.h"

namespace higen::core {
namespace {

constexpr std::int64_t MILLION = 1'000'000;

std::string shown(double value) {
    std::ostringstream text;
    text << value;
    return text.str();
}

}  // namespace

void check(const NoiseSchedule& schedule) {
    one_of("kind", schedule.kind, {"linear", "scaled_linear", "cosine", "edm", "flow"});
    require(schedule.timesteps >= 2 && schedule.timesteps <= MILLION,
            "timesteps=" + std::to_string(schedule.timesteps) + ": a whole number from 2 to 1000000");
    if (schedule.zero_terminal_snr)
        one_of("zero_terminal_snr=true: kind", schedule.kind, {"linear", "scaled_linear", "cosine"});
    if (among(schedule.kind, {"linear", "scaled_linear"}))
        require(0 < schedule.beta_start && schedule.beta_start < schedule.beta_end && schedule.beta_end < 1,
                "beta_start=" + shown(schedule.beta_start) + ", beta_end=" + shown(schedule.beta_end) +
                    ": 0 < beta_start < beta_end < 1");
    if (schedule.kind == "edm")
        require(0 < schedule.sigma_min && schedule.sigma_min < schedule.sigma_max && std::isfinite(schedule.sigma_max),
                "sigma_min=" + shown(schedule.sigma_min) + ", sigma_max=" + shown(schedule.sigma_max) +
                    ": 0 < sigma_min < sigma_max");
    if (schedule.kind == "flow")
        require(0 < schedule.shift && std::isfinite(schedule.shift), "shift=" + shown(schedule.shift) + ": above 0");
}

void check(const Solver& solver) {
    one_of("solver", solver.name, SOLVERS);
    const std::string where = "solver '" + solver.name + "': ";
    std::vector<std::string_view> spacings(SPACINGS.begin(), SPACINGS.end());
    if (solver.name == "ddim") spacings = {"leading", "linspace", "trailing", "leading-floor", "trailing-ceil"};
    if (on_ratios(solver)) spacings = {"leading", "linspace", "trailing", "karras"};
    if (solver.name == "lcm") spacings = {"leading"};
    one_of(where + "spacing", solver.spacing, spacings);
    if (among(solver.name, {"heun", "lcm"}))
        one_of(where + "final", solver.final, {"zero"});
    else
        one_of(where + "final", solver.final, {"zero", "first"});
    const bool leading = among(solver.spacing, {"leading", "leading-floor"}) && solver.name != "lcm";
    require(solver.offset >= 0 && solver.offset <= (leading ? MILLION : 0),
            "offset=" + std::to_string(solver.offset) + ": a whole number from 0; 0 if not leading");
    require(solver.eta >= 0 && solver.eta <= (solver.name == "ddim" ? 1 : 0),
            "eta=" + shown(solver.eta) + ": 0 to 1 for 'ddim', 0 for other solvers");
    require(solver.rho > 0 && std::isfinite(solver.rho), "rho=" + shown(solver.rho) + ": above 0");
    require(solver.original_steps >= 1 && solver.original_steps <= MILLION,
            "original_steps=" + std::to_string(solver.original_steps) + ": a whole number from 1");
}

void check(const NoiseSchedule& schedule, const std::string& prediction, const Solver& solver) {
    check(schedule);
    check(solver);
    const std::string where = "kind '" + schedule.kind + "': ";
    if (schedule.kind == "edm") {
        one_of(where + "prediction", prediction, {"v"});
        one_of(where + "solver", solver.name, {"dpm++2m", "euler", "euler_ancestral", "heun"});
        one_of(where + "spacing", solver.spacing, {"karras"});
    } else if (schedule.kind == "flow") {
        one_of(where + "prediction", prediction, {"flow"});
        one_of(where + "solver", solver.name, {"euler"});
        one_of(where + "spacing", solver.spacing, {"linspace", "trailing"});
    } else {
        one_of(where + "prediction", prediction, {"v", "epsilon", "sample"});
    }
    if (!discrete(schedule)) one_of(where + "final", solver.final, {"zero"});
    if (schedule.zero_terminal_snr)  // at the last timestep, epsilon does not determine z
        one_of("zero_terminal_snr=true: prediction", prediction, {"v", "sample"});
    const auto total = schedule.timesteps;
    require(solver.offset < total, "offset=" + std::to_string(solver.offset) + ": at most " +
                                       std::to_string(total - 1) + ", the last timestep");
    require(solver.name != "lcm" || solver.original_steps <= total,
            "original_steps=" + std::to_string(solver.original_steps) + ": at most " + std::to_string(total) +
                ", the timesteps");
}

std::int64_t max_steps(const NoiseSchedule& schedule, const Solver& solver) {
    if (solver.name == "lcm") return solver.original_steps;
    return multistep(solver) && solver.spacing == "leading" ? schedule.timesteps - 1 : schedule.timesteps;
}

}  // namespace higen::core
