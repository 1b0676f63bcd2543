// Groups of schedules and solvers, and checks of names, for schedule.cpp and schedule_checks.cpp.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "errors.h"
#include "schedule.h"

namespace higen::core {

inline bool among(std::string_view value, std::initializer_list<std::string_view> all) {
    return std::find(all.begin(), all.end(), value) != all.end();
}

inline bool discrete(const NoiseSchedule& schedule) { return among(schedule.kind, {"linear", "scaled_linear", "cosine"}); }
inline bool own_grid(const Solver& solver) { return among(solver.spacing, {"leading-floor", "trailing-ceil"}); }
inline bool multistep(const Solver& solver) { return solver.name == "dpm++2m"; }

// Solvers with grids of ratios sigma / alpha, which may lie between two timesteps.
inline bool on_ratios(const Solver& solver) { return among(solver.name, {"euler", "euler_ancestral", "heun"}); }

inline void require(bool good, const std::string& message) {
    if (!good) fail_manifest(message);
}

template <typename Names>
void one_of(const std::string& what, std::string_view value, const Names& allowed) {
    if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return;
    std::string message = what + "='" + std::string(value) + "': one of ";
    const char* comma = "";
    for (const std::string_view name : allowed) {
        message += comma + ("'" + std::string(name) + "'");
        comma = ", ";
    }
    fail_manifest(message);
}

inline void one_of(const std::string& what, std::string_view value, std::initializer_list<std::string_view> allowed) {
    one_of(what, value, std::vector<std::string_view>(allowed));
}

}  // namespace higen::core
