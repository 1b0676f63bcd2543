#include "schedule.h"

#include <algorithm>
#include <cmath>

#include "schedule_rules.h"

namespace higen::core {
namespace {

using Column = std::vector<double>;

constexpr double SMALLEST_SIGNAL = 1.0 / (1 << 24);  // replaces an abar of 0 where a grid needs a finite ratio
constexpr double PI = 3.14159265358979323846;

// ---- Grids: where each row starts and ends ----

// The network's t, and alpha and sigma of the states that a row starts and ends at.
struct Node {
    double t, alpha, sigma, alpha_next, sigma_next;
};
using Grid = std::vector<Node>;

// numpy.linspace, with the same order of operations.
Column linspace(double start, double stop, std::size_t n) {
    Column line(n, start);
    const double step = n > 1 ? (stop - start) / static_cast<double>(n - 1) : 0.0;
    for (std::size_t i = 1; i < n; ++i) line[i] = i + 1 == n ? stop : static_cast<double>(i) * step + start;
    return line;
}

// numpy.interp at one x, for increasing xs.
double interpolate(double x, const Column& xs, const Column& ys) {
    const auto above = std::upper_bound(xs.begin(), xs.end(), x);
    if (above == xs.begin()) return ys.front();
    if (above == xs.end()) return ys.back();
    const auto j = static_cast<std::size_t>(above - xs.begin()) - 1;
    if (x == xs[j]) return ys[j];
    return (ys[j + 1] - ys[j]) / (xs[j + 1] - xs[j]) * (x - xs[j]) + ys[j];
}

// Each row ends where the next one starts; the last ends at `last`.
void chain(Grid& grid, double last_alpha, double last_sigma) {
    for (std::size_t i = 0; i < grid.size(); ++i) {
        const bool end = i + 1 == grid.size();
        grid[i].alpha_next = end ? last_alpha : grid[i + 1].alpha;
        grid[i].sigma_next = end ? last_sigma : grid[i + 1].sigma;
    }
}

Node at_ratio(double t, double ratio) {
    const double length = std::sqrt(1.0 + ratio * ratio);
    return {t, 1.0 / length, ratio / length, 0.0, 0.0};
}

// `steps` descending timesteps: whole numbers, except linspace for the solvers on ratios. diffusers' DPM++2M takes
// steps + 1 points for leading and linspace, and leaves out the last.
Column timesteps(const Solver& solver, std::int64_t steps, std::int64_t total) {
    const auto n = static_cast<std::size_t>(steps);
    const std::int64_t points = multistep(solver) ? steps + 1 : steps;
    const auto original = solver.original_steps;
    const double size = static_cast<double>(total);
    const double stride = (size + -size / static_cast<double>(steps)) - size;  // rounded as numpy.arange does
    const Column line = linspace(0.0, size - 1.0, static_cast<std::size_t>(points));
    Column t(n);
    for (std::size_t i = 0; i < n; ++i) {
        const auto row = static_cast<std::int64_t>(i);
        const std::int64_t k = steps - 1 - row;  // the row's index, counted from the last row
        if (solver.name == "lcm") {
            const double chosen =
                std::floor(static_cast<double>(i) * (static_cast<double>(original) / static_cast<double>(steps)));
            t[i] = (static_cast<double>(original) - chosen) * static_cast<double>(total / original) - 1.0;
        } else if (solver.spacing == "trailing") {
            t[i] = std::nearbyint(size + static_cast<double>(i) * stride) - 1.0;
        } else if (solver.spacing == "linspace") {
            const double at = line[static_cast<std::size_t>(points - 1 - row)];
            t[i] = on_ratios(solver) ? at : std::nearbyint(at);
        } else {
            std::int64_t whole = ((k + 1) * total + steps - 1) / steps - 1;  // trailing-ceil
            if (solver.spacing == "leading") whole = solver.offset + (points - 1 - row) * (total / points);
            if (solver.spacing == "leading-floor") whole = solver.offset + k * total / steps;
            t[i] = static_cast<double>(std::min(whole, total - 1));
        }
    }
    return t;
}

// `steps` ratios from `high` down to `low`, evenly spaced in their power 1/rho (Karras et al. 2022, equation 5).
Column karras(double low, double high, std::size_t steps, double rho) {
    const double start = std::pow(high, 1.0 / rho), stop = std::pow(low, 1.0 / rho);
    Column ratios = linspace(0.0, 1.0, steps);
    for (auto& ratio : ratios) ratio = std::pow(start + ratio * (stop - start), rho);
    ratios.back() = low;
    ratios.front() = high;
    return ratios;
}

// Rectified flow, x = (1 - s) z + s n and t = s T: a line from 1, bent by the shift (Esser et al. 2024, equation 23).
// trailing ends the line at 1 / steps; linspace ends it where diffusers does, at an already shifted 1 / T.
Grid flow_grid(const NoiseSchedule& schedule, const Solver& solver, std::int64_t steps) {
    const double total = static_cast<double>(schedule.timesteps), shift = schedule.shift;
    const double low = shift / total / (1.0 + (shift - 1.0) / total);
    const double end = solver.spacing == "trailing" ? 1.0 / static_cast<double>(steps) : low;
    Grid grid;
    for (const double x : linspace(1.0, end, static_cast<std::size_t>(steps))) {
        const double s = shift * x / (1.0 + (shift - 1.0) * x);
        grid.push_back({s * total, 1.0 - s, s, 0.0, 0.0});
    }
    chain(grid, 1.0, 0.0);
    return grid;
}

Grid edm_grid(const NoiseSchedule& schedule, const Solver& solver, std::int64_t steps) {
    Grid grid;
    const auto n = static_cast<std::size_t>(steps);
    for (const double ratio : karras(schedule.sigma_min, schedule.sigma_max, n, solver.rho))
        grid.push_back(at_ratio(0.25 * std::log(ratio), ratio));
    chain(grid, 1.0, 0.0);
    return grid;
}

// diffusers takes the range from linspace's grid; with one step its only point is timestep 0. For DPM++2M it takes the
// whole schedule and rounds the t that the network gets.
Grid karras_grid(const NoiseSchedule& schedule, const Solver& solver, std::int64_t steps, const Column& ratios) {
    const double high = steps == 1 && !multistep(solver) ? ratios.front() : ratios.back();
    Column logarithms, every;
    for (const double ratio : ratios) {
        every.push_back(static_cast<double>(every.size()));
        logarithms.push_back(std::log(ratio));
    }
    Grid grid;
    for (const double ratio : karras(ratios.front(), high, static_cast<std::size_t>(steps), solver.rho)) {
        double t = interpolate(std::log(ratio), logarithms, every);
        if (multistep(solver)) t = schedule.kind == "cosine" ? std::trunc(t) : std::nearbyint(t);
        grid.push_back(at_ratio(t, ratio));
    }
    return grid;
}

Grid make_grid(const NoiseSchedule& schedule, const Solver& solver, std::int64_t steps) {
    if (schedule.kind == "flow") return flow_grid(schedule, solver, steps);
    if (schedule.kind == "edm") return edm_grid(schedule, solver, steps);
    Column abar = alphas_cumprod(schedule);
    const auto total = static_cast<std::int64_t>(abar.size());
    if (schedule.zero_terminal_snr && !among(solver.name, {"ddim", "lcm"}) && !own_grid(solver))
        abar.back() = std::min(SMALLEST_SIGNAL, abar[abar.size() - 2]);
    const double last = solver.final == "zero" ? 1.0 : abar.front();
    Column ratios, every;
    for (const double signal : abar) {
        every.push_back(static_cast<double>(every.size()));
        ratios.push_back(std::sqrt((1.0 - signal) / signal));
    }
    Grid grid;
    if (solver.spacing == "karras") {
        grid = karras_grid(schedule, solver, steps, ratios);
    } else {
        for (const double t : timesteps(solver, steps, total)) {
            if (on_ratios(solver)) {
                grid.push_back(at_ratio(t, interpolate(t, every, ratios)));
            } else {
                const double signal = abar[static_cast<std::size_t>(t)];
                grid.push_back({t, std::sqrt(signal), std::sqrt(1.0 - signal), 0.0, 0.0});
            }
        }
    }
    chain(grid, std::sqrt(last), std::sqrt(1.0 - last));
    if (solver.name != "ddim" || own_grid(solver)) return grid;
    for (auto& node : grid) {  // diffusers' DDIM goes to t - T / steps, even if that is not the next row's t
        const auto target = static_cast<std::int64_t>(node.t) - total / steps;
        const double there = target >= 0 ? abar[static_cast<std::size_t>(target)] : last;
        node.alpha_next = std::sqrt(there);
        node.sigma_next = std::sqrt(1.0 - there);
    }
    return grid;
}

// ---- Solvers: formulas over x, m, previous and noise ----

struct Formula {
    double x, m, previous, noise;

    friend Formula operator+(const Formula& a, const Formula& b) {
        return {a.x + b.x, a.m + b.m, a.previous + b.previous, a.noise + b.noise};
    }
    friend Formula operator-(const Formula& a, const Formula& b) {
        return {a.x - b.x, a.m - b.m, a.previous - b.previous, a.noise - b.noise};
    }
    friend Formula operator*(double k, const Formula& a) { return {k * a.x, k * a.m, k * a.previous, k * a.noise}; }
    friend Formula operator/(const Formula& a, double k) { return {a.x / k, a.m / k, a.previous / k, a.noise / k}; }
};

constexpr Formula X{1, 0, 0, 0}, M{0, 1, 0, 0}, PREVIOUS{0, 0, 1, 0}, NOISE{0, 0, 0, 1};

// Estimates of z (x0) and n (epsilon) in x = alpha z + sigma n, as formulas of the network's output m.
struct Estimates {
    Formula x0, epsilon;
};

Estimates estimates(const std::string& prediction, const Node& at) {
    if (prediction == "v") return {at.alpha * X - at.sigma * M, at.sigma * X + at.alpha * M};
    if (prediction == "epsilon") return {(X - at.sigma * M) / at.alpha, M};
    if (prediction == "sample") return {M, (X - at.alpha * M) / at.sigma};
    return {X - at.sigma * M, X + at.alpha * M};  // flow
}

// DDIM (Song et al. 2021, equations 12 and 16), the same step as Euler's method on the ratio:
//     x' = alpha' x0 + sqrt(sigma'^2 - u^2) epsilon + u noise,   u = eta sigma'/sigma sqrt(1 - alpha^2/alpha'^2)
Formula first_order(const Node& at, const Estimates& sees, double eta) {
    const double shrink = at.alpha < at.alpha_next ? at.alpha / at.alpha_next : 1.0;
    const double u = eta * at.sigma_next / at.sigma * std::sqrt(1.0 - shrink * shrink);
    const double kept = std::sqrt(std::max(at.sigma_next * at.sigma_next - u * u, 0.0));
    return at.alpha_next * sees.x0 + kept * sees.epsilon + u * NOISE;
}

// The w of each row of DPM-Solver++(2M): h / (2 h_before), with lambda = ln(alpha/sigma) and h = lambda' - lambda.
// w is 0 in the first row, after a row that began at zero SNR, and in the last row if h is infinite or, as in
// diffusers, there are fewer than 15 rows.
Column second_order_weights(const Grid& grid, bool to_zero) {
    const std::size_t n = grid.size();
    Column h(n), w(n, 0.0);
    for (std::size_t i = 0; i < n; ++i)
        h[i] = (std::log(grid[i].alpha_next) - std::log(grid[i].sigma_next)) -
               (std::log(grid[i].alpha) - std::log(grid[i].sigma));
    for (std::size_t i = 1; i < n; ++i)
        if (h[i - 1] > 0.0) w[i] = h[i] / (2.0 * h[i - 1]);
    if (to_zero || n < 15) w[n - 1] = 0.0;
    return w;
}

// DPM-Solver++(2M) (Lu et al. 2022, algorithm 2):
//     x' = sigma'/sigma x + alpha' (1 - exp(-h)) ((1 + w) x0 - w previous)
Formula dpm_solver_2m(const Node& at, const Formula& x0, double w) {
    const double decay = at.sigma_next * at.alpha / (at.alpha_next * at.sigma);  // exp(-h), also for infinite h
    const double k = at.alpha < at.alpha_next ? at.alpha_next * (1.0 - decay) : 0.0;
    Formula step = at.sigma_next / at.sigma * X + k * (1.0 + w) * x0;
    step.previous = -k * w;  // x and x0 have no such term
    return step;
}

// The second row of a pair of Heun's method on the ratio r = sigma/alpha (Karras et al. 2022, algorithm 1). The pair
// goes from `first` to `at`. x is the predicted state at `at`, and `previous` is the first row's x0:
//     x' = alpha' (previous + (r + r')/2 (x - alpha' previous)/sigma' + (r' - r)/2 epsilon)
Formula heun_correction(const Node& first, const Node& at, const Formula& epsilon) {
    const double before = first.sigma / first.alpha, ratio = at.sigma / at.alpha;
    const Formula first_epsilon = (X - at.alpha * PREVIOUS) / at.sigma;
    return at.alpha * (PREVIOUS + (before + ratio) / 2.0 * first_epsilon + (ratio - before) / 2.0 * epsilon);
}

// Latent consistency sampling (Luo et al. 2023, algorithm 3): x' = alpha' denoised + sigma' noise,
//     denoised = c_out x0 + c_skip x,   c_out = u/sqrt(u^2 + 1/4),   c_skip = (1/4)/(u^2 + 1/4),   u = 10 t
Formula denoised(double t, const Formula& x0) {
    const double u = 10.0 * t;
    return u / std::sqrt(u * u + 0.25) * x0 + 0.25 / (u * u + 0.25) * X;
}

SolverRow row(const Node& at, const Formula& x0, const Formula& step) {
    const bool noise = step.noise != 0.0;
    SolverRow found{};
    found.t = at.t;
    found.A = step.x;
    found.B = step.m;
    found.C = noise ? step.noise : step.previous;
    found.alpha = x0.x;
    found.sigma = -x0.m;
    found.noise = noise;
    found.start_alpha = at.alpha;
    found.start_sigma = at.sigma;
    return found;
}

bool is_finite(const Formula& formula) {
    return std::isfinite(formula.x) && std::isfinite(formula.m) && std::isfinite(formula.previous) &&
           std::isfinite(formula.noise);
}

void check_row(const SolverTable& table, std::int64_t first) {
    const auto last = static_cast<std::int64_t>(table.rows.size()) - 1;
    if (first < 0 || first > last)
        fail_request("first=" + std::to_string(first) + ": a row from 0 to " + std::to_string(last));
}

}  // namespace

// ---- The table ----

std::vector<double> alphas_cumprod(const NoiseSchedule& schedule) {
    one_of("a table of abar: kind", schedule.kind, {"linear", "scaled_linear", "cosine"});
    const auto n = static_cast<std::size_t>(schedule.timesteps);
    Column betas;
    if (schedule.kind == "cosine") {
        const auto f = [&](std::size_t i) {
            const double cosine = std::cos((static_cast<double>(i) / static_cast<double>(n) + 0.008) / 1.008 * PI / 2);
            return cosine * cosine;
        };
        for (std::size_t i = 0; i < n; ++i) betas.push_back(std::min(1.0 - f(i + 1) / f(i), 0.999));
    } else if (schedule.kind == "linear") {
        betas = linspace(schedule.beta_start, schedule.beta_end, n);
    } else {
        betas = linspace(std::pow(schedule.beta_start, 0.5), std::pow(schedule.beta_end, 0.5), n);
        for (auto& root : betas) root *= root;
    }
    Column abar;
    double product = 1.0;
    for (const double beta : betas) abar.push_back(product *= 1.0 - beta);
    if (!schedule.zero_terminal_snr) return abar;
    const double first = std::sqrt(abar.front()), last = std::sqrt(abar.back());
    for (auto& value : abar) {
        const double root = (std::sqrt(value) - last) * first / (first - last);
        value = root * root;
    }
    return abar;
}

SolverTable solver_table(const NoiseSchedule& schedule, const std::string& prediction, const Solver& solver,
                         std::int64_t steps) {
    check(schedule, prediction, solver);
    const auto most = max_steps(schedule, solver);
    if (steps < 1 || steps > most)
        fail_request("steps=" + std::to_string(steps) + ": a whole number from 1 to " + std::to_string(most));
    const Grid grid = make_grid(schedule, solver, steps);
    const Column w = multistep(solver) ? second_order_weights(grid, solver.final == "zero") : Column(grid.size());
    const double eta = solver.name == "euler_ancestral" ? 1.0 : solver.eta;
    SolverTable table;
    for (std::size_t i = 0; i < grid.size(); ++i) {
        const Node& at = grid[i];
        const Estimates sees = estimates(prediction, at);
        if (solver.name == "heun" && i > 0)
            table.rows.push_back(row(at, sees.x0, heun_correction(grid[i - 1], at, sees.epsilon)));
        if (multistep(solver)) {
            table.rows.push_back(row(at, sees.x0, dpm_solver_2m(at, sees.x0, w[i])));
        } else if (solver.name == "lcm") {
            const Formula x0 = denoised(at.t, sees.x0);
            table.rows.push_back(row(at, x0, at.alpha_next * x0 + at.sigma_next * NOISE));
        } else {
            table.rows.push_back(row(at, sees.x0, first_order(at, sees, eta)));
        }
    }
    for (const auto& r : table.rows)
        for (const double value : {r.t, r.A, r.B, r.C, r.alpha, r.sigma})
            require(std::isfinite(value), "kind '" + schedule.kind + "': no signal is left at a timestep of solver '" +
                                              solver.name + "'");
    // diffusers scales the initial noise by sigma_max for these grids, and by sqrt(sigma_max^2 + 1) for the others.
    const bool at_sigma = on_ratios(solver) && solver.spacing != "leading" && discrete(schedule);
    table.initial = at_sigma ? grid.front().sigma : 1.0;
    return table;
}

SolverTable tail(const SolverTable& table, std::int64_t first) {
    check_row(table, first);
    SolverTable rest{{table.rows.begin() + first, table.rows.end()}, table.initial};
    if (first > 0) rest.initial = rest.rows.front().start_sigma;
    if (auto& begin = rest.rows.front(); !begin.noise) {
        begin.A += begin.C * begin.alpha;
        begin.B -= begin.C * begin.sigma;
        begin.C = 0.0;
    }
    return rest;
}

SolverTable inversion_table(const NoiseSchedule& schedule, const std::string& prediction, const Solver& solver,
                            std::int64_t steps, std::int64_t first) {
    const auto table = solver_table(schedule, prediction, solver, steps);
    check_row(table, first);
    if (std::any_of(table.rows.begin(), table.rows.end(), [](const auto& r) { return r.noise; }))
        fail_request("inversion: the solver '" + solver.name + "' adds noise, so its steps cannot be run backwards");
    // The step in which row `first` starts.
    const auto node = static_cast<std::size_t>(solver.name == "heun" ? (first + 1) / 2 : first);
    const Grid grid = make_grid(schedule, solver, steps);
    SolverTable up{{}, 1.0};
    for (std::size_t i = grid.size(); i-- > node;) {
        const Node at{grid[i].t, grid[i].alpha_next, grid[i].sigma_next, grid[i].alpha, grid[i].sigma};
        const Estimates sees = estimates(prediction, at);
        if (!is_finite(sees.x0) || !is_finite(sees.epsilon))
            fail_request("inversion: the solver '" + solver.name +
                         "' ends without noise, where a network that predicts the sample says nothing about the noise");
        up.rows.push_back(row(at, sees.x0, at.alpha_next * sees.x0 + at.sigma_next * sees.epsilon));
    }
    return up;
}

std::pair<double, double> last_level(const NoiseSchedule& schedule) {
    if (schedule.kind == "flow") return {0.0, 1.0};
    if (schedule.kind == "edm") {
        const double length = std::hypot(1.0, schedule.sigma_max);
        return {1.0 / length, schedule.sigma_max / length};
    }
    const double abar = alphas_cumprod(schedule).back();
    return {std::sqrt(abar), std::sqrt(1.0 - abar)};
}

}  // namespace higen::core
