"""Noise schedules and solvers, as tables in float64.

A state is x = alpha z + sigma n: clean latents z and unit Gaussian noise n, with alpha^2 + sigma^2 = 1 (kind "flow":
alpha + sigma = 1). The network predicts m from x and t. Every step of every solver here is linear in its inputs:

    x0 = alpha x - sigma m                 the estimate of z from m, with the row's alpha and sigma
    x' = A x + B m + C previous            previous' = x0

So a solver is a table of rows (t, A, B, C, alpha, sigma), and all runtimes share one loop (higen/sampler.py).
A solver is written as formulas over the symbols x, m, previous and noise. A formula is the array of their coefficients,
float64 [4, rows]. A stochastic row does not use `previous`; there, C multiplies fresh noise instead.

k-diffusion and EDM write the state as x / alpha and call sigma / alpha "sigma"; here, that is the *ratio*. Their input
scaling c_in turns the state into x, so their solvers have tables of x, too. The C++ twin of this file is
engines/cpp/src/schedule.cpp; tests/schedule_vectors.json checks that both give the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from higen.errors import ManifestError, RequestError, quoted
from higen.noise_schedule import (
    DISCRETE,
    ON_RATIOS,
    OWN_GRIDS,
    PREDICTIONS,
    SOLVERS,
    SPACINGS,
    NoiseSchedule,
    Solver,
    check,
    is_whole,
    max_steps,
)

__all__ = ["PREDICTIONS", "SOLVERS", "SPACINGS", "NoiseSchedule", "Solver", "SolverTable"]
__all__ += ["alphas_cumprod", "check", "inversion_table", "last_level", "max_steps", "solver_table", "tail"]

Float = NDArray[np.float64]

SMALLEST_SIGNAL = 2.0**-24  # replaces an abar of 0 if a grid needs finite ratios; the number is from diffusers


@dataclass(frozen=True)
class SolverTable:
    """Rows of a solver, first step first. float64 [rows], `noise` bool [rows].

    `t` is the network's input: whole numbers for most grids, fractions for others.
    If `noise` is True, C multiplies fresh unit Gaussian noise, which the loop passes as `previous`.
    A row's state is x = start_alpha z + start_sigma n. `initial` times unit noise is the state of the first row.
    """

    t: Float
    A: Float
    B: Float
    C: Float
    alpha: Float
    sigma: Float
    noise: NDArray[np.bool_]
    start_alpha: Float
    start_sigma: Float
    initial: float

    def __len__(self) -> int:
        return len(self.t)

    def tail(self, first: int) -> SolverTable:
        """The rows from `first` on, for a state that begins at start_alpha[first] z + start_sigma[first] n (SDEdit).

        The new first row has no row before it, so its own x0 is used as `previous`. This turns a row of DPM++2M into a
        first-order step, and the second row of a Heun pair (odd `first`) into a row that leaves the state unchanged.
        Raises RequestError for a `first` outside the table.
        """
        if not is_whole(first, 0, len(self) - 1):
            raise RequestError(f"first={quoted(first)}: a row from 0 to {len(self) - 1}")
        rows = {name: column[first:].copy() for name, column in vars(self).items() if name != "initial"}
        if not rows["noise"][0]:
            rows["A"][0] += rows["C"][0] * rows["alpha"][0]
            rows["B"][0] -= rows["C"][0] * rows["sigma"][0]
            rows["C"][0] = 0.0
        return SolverTable(**rows, initial=self.initial if first == 0 else float(self.start_sigma[first]))


def alphas_cumprod(schedule: NoiseSchedule) -> Float:
    """The cumulative signal variance abar = alpha^2, float64 [timesteps], decreasing, within [0, 1).

    cosine: Nichol and Dhariwal 2021, equation 17; no beta above 0.999. With zero terminal SNR, sqrt(abar) is shifted
    and scaled so that its last entry is 0 and its first entry is unchanged (Lin et al. 2023, algorithm 1).
    Raises ManifestError for the kinds edm and flow, which have no such table.
    """
    if schedule.kind not in DISCRETE:
        kinds = ", ".join(map(repr, DISCRETE))
        raise ManifestError(f"a table of abar: kind={schedule.kind!r}: one of {kinds}")
    total, start, end = schedule.timesteps, schedule.beta_start, schedule.beta_end
    if schedule.kind == "cosine":
        f = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
        betas = np.array([min(1.0 - f[i + 1] / f[i], 0.999) for i in range(total)])
    elif schedule.kind == "linear":
        betas = np.linspace(start, end, total, dtype=np.float64)
    else:
        betas = np.linspace(start**0.5, end**0.5, total, dtype=np.float64) ** 2
    abar = np.cumprod(1.0 - betas, dtype=np.float64)
    if not schedule.zero_terminal_snr:
        return abar
    root = np.sqrt(abar)
    rescaled: Float = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return rescaled


def last_level(schedule: NoiseSchedule) -> tuple[float, float]:
    """alpha and sigma of the noisiest state of a schedule."""
    if schedule.kind in DISCRETE:
        abar = float(alphas_cumprod(schedule)[-1])
        return math.sqrt(abar), math.sqrt(1.0 - abar)
    if schedule.kind == "edm":
        length = math.hypot(1.0, schedule.sigma_max)
        return 1.0 / length, schedule.sigma_max / length
    return 0.0, 1.0


class _Grid(NamedTuple):
    """float64 [rows] each: the network's t; alpha and sigma of the states at which a row starts and ends."""

    t: Float
    alpha: Float
    sigma: Float
    alpha_next: Float
    sigma_next: Float


def _chain(t: Float, alpha: Float, sigma: Float, last: tuple[float, float]) -> _Grid:
    """Each row ends where the next one starts; the last ends at (alpha, sigma) = `last`."""
    return _Grid(t, alpha, sigma, np.append(alpha[1:], last[0]), np.append(sigma[1:], last[1]))


def _chain_of_ratios(t: Float, ratio: Float, last: tuple[float, float]) -> _Grid:
    length = np.sqrt(1.0 + ratio**2)
    return _chain(t, 1.0 / length, ratio / length, last)


def _log(values: Float) -> Float:
    """The C library's logarithm, -inf at 0. The last bit of numpy's logarithm differs between processors."""
    return np.array([math.log(v) if v > 0 else -math.inf for v in values])


def _timesteps(solver: Solver, steps: int, total: int) -> Float:
    """`steps` descending timesteps out of `total`, float64: whole numbers, except linspace for the solvers on ratios.

    For DPM++2M with leading or linspace, diffusers takes steps + 1 points and leaves out the last.
    """
    points = steps + 1 if solver.name == "dpm++2m" else steps
    k = np.arange(points, dtype=np.int64)
    if solver.name == "lcm":
        chosen = np.floor(np.linspace(0, solver.original_steps, steps, endpoint=False))
        return (solver.original_steps - chosen) * (total // solver.original_steps) - 1.0
    if solver.spacing == "trailing":
        stride = (total + -total / steps) - total  # rounds like numpy.arange(total, 0, -total / steps)
        return np.round(total + k[:steps] * stride) - 1.0
    if solver.spacing == "linspace":
        line: Float = np.linspace(0, total - 1, points, dtype=np.float64)
        return (line if solver.name in ON_RATIOS else np.round(line))[::-1][:steps]
    if solver.spacing == "leading":
        grid = solver.offset + k * (total // points)
    elif solver.spacing == "leading-floor":
        grid = solver.offset + k[:steps] * total // steps
    else:
        grid = -(-(k[:steps] + 1) * total // steps) - 1
    return np.minimum(grid, total - 1)[::-1][:steps].astype(np.float64)


def _karras(low: float, high: float, steps: int, rho: float) -> Float:
    """`steps` ratios from `high` down to `low`, with evenly spaced powers 1/rho (Karras et al. 2022, equation 5)."""
    start, stop = high ** (1.0 / rho), low ** (1.0 / rho)
    ratios = np.array([(start + ramp * (stop - start)) ** rho for ramp in np.linspace(0.0, 1.0, steps).tolist()])
    ratios[-1], ratios[0] = low, high
    return ratios


def _flow_grid(schedule: NoiseSchedule, solver: Solver, steps: int) -> _Grid:
    """Rectified flow: x = (1 - s) z + s n, t = s T; s is linear from 1 on, then shifted (Esser et al. 2024, eq. 23).

    The linear values end at 1 / steps for trailing; for linspace, at an already shifted 1 / T, as in diffusers.
    """
    total, shift = schedule.timesteps, schedule.shift
    low = shift / total / (1.0 + (shift - 1.0) / total)
    line = np.linspace(1.0, 1.0 / steps if solver.spacing == "trailing" else low, steps)
    s = shift * line / (1.0 + (shift - 1.0) * line)
    return _chain(s * total, 1.0 - s, s, (1.0, 0.0))


def _grid(schedule: NoiseSchedule, solver: Solver, steps: int) -> _Grid:
    if schedule.kind == "flow":
        return _flow_grid(schedule, solver, steps)
    if schedule.kind == "edm":
        ratio = _karras(schedule.sigma_min, schedule.sigma_max, steps, solver.rho)
        return _chain_of_ratios(0.25 * _log(ratio), ratio, (1.0, 0.0))
    total, abar, multistep = schedule.timesteps, alphas_cumprod(schedule), solver.name == "dpm++2m"
    if schedule.zero_terminal_snr and solver.name not in ("ddim", "lcm") and solver.spacing not in OWN_GRIDS:
        abar[-1] = min(SMALLEST_SIGNAL, abar[-2])
    last_abar = 1.0 if solver.final == "zero" else float(abar[0])
    last = (math.sqrt(last_abar), math.sqrt(1.0 - last_abar))
    every, ratios = np.arange(total), np.sqrt((1.0 - abar) / abar)
    if solver.spacing == "karras":
        # diffusers takes the range from linspace's grid; with a single step, that grid is only timestep 0.
        # For DPM++2M it takes the range of the whole schedule, and rounds the network's t.
        high = ratios[0] if steps == 1 and not multistep else ratios[-1]
        ratio = _karras(float(ratios[0]), float(high), steps, solver.rho)
        t = np.interp(_log(ratio), _log(ratios), every)
        if multistep:
            t = np.trunc(t) if schedule.kind == "cosine" else np.round(t)
        return _chain_of_ratios(t, ratio, last)
    t = _timesteps(solver, steps, total)
    if solver.name in ON_RATIOS:
        return _chain_of_ratios(t, np.interp(t, every, ratios), last)
    at = t.astype(np.int64)
    alpha, sigma = np.sqrt(abar[at]), np.sqrt(1.0 - abar[at])
    if solver.name != "ddim" or solver.spacing in OWN_GRIDS:
        return _chain(t, alpha, sigma, last)
    # diffusers' DDIM steps to t - T // steps, even if that is not the next row's t.
    target = at - total // steps
    there = np.where(target >= 0, abar[np.maximum(target, 0)], last_abar)
    return _Grid(t, alpha, sigma, np.sqrt(there), np.sqrt(1.0 - there))


X, M, PREVIOUS, NOISE = np.split(np.eye(4), 4, axis=1)  # the formula of each symbol


def _estimates(prediction: str, alpha: Float, sigma: Float) -> tuple[Float, Float]:
    """The formulas of z (x0) and n (epsilon) in x = alpha z + sigma n, from x and m.

    v = alpha n - sigma z: Salimans and Ho 2022, appendix D. flow = n - z: Liu et al. 2023, equation 1.
    """
    if prediction == "v":
        return alpha * X - sigma * M, sigma * X + alpha * M
    if prediction == "epsilon":
        return (X - sigma * M) / alpha, np.ones_like(alpha) * M
    if prediction == "sample":
        return np.ones_like(alpha) * M, (X - alpha * M) / sigma
    return X - sigma * M, X + alpha * M


def _first_order(grid: _Grid, x0: Float, epsilon: Float, eta: float) -> Float:
    """DDIM (Song et al. 2021, equations 12 and 16), the same step as Euler's method on the ratio:

        x' = alpha' x0 + sqrt(sigma'^2 - u^2) epsilon + u noise,   u = eta sigma'/sigma sqrt(1 - alpha^2/alpha'^2)

    With eta 1, it is also the ancestral Euler step of k-diffusion. With eta 0, on a flow, it is Euler's method in s.
    """
    shrink = np.where(grid.alpha < grid.alpha_next, grid.alpha / grid.alpha_next, 1.0)
    u = eta * grid.sigma_next / grid.sigma * np.sqrt(1.0 - shrink**2)
    kept = np.sqrt(np.maximum(grid.sigma_next**2 - u**2, 0.0))
    return grid.alpha_next * x0 + kept * epsilon + u * NOISE


def _dpm_solver_2m(grid: _Grid, x0: Float, final: str) -> Float:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), with lambda = ln(alpha/sigma) and h = lambda' - lambda:

        x' = sigma'/sigma x + alpha' (1 - exp(-h)) ((1 + w) x0 - w previous),   w = h / (2 h_before)

    w is 0 in the first row and after a row that began at zero SNR (h_before is infinite). w is also 0 in the last row
    if h is infinite or (as in diffusers) the table has fewer than 15 rows.
    """
    h = np.diff(_log(np.append(grid.alpha, grid.alpha_next[-1])) - _log(np.append(grid.sigma, grid.sigma_next[-1])))
    w = np.zeros(len(h))
    w[1:] = np.where(h[:-1] > 0.0, h[1:] / (2.0 * h[:-1]), 0.0)
    if final == "zero" or len(h) < 15:
        w[-1] = 0.0
    decay = grid.sigma_next * grid.alpha / (grid.alpha_next * grid.sigma)  # exp(-h), even if h is infinite
    k = np.where(grid.alpha < grid.alpha_next, grid.alpha_next * (1.0 - decay), 0.0)
    step = grid.sigma_next / grid.sigma * X + k * (1.0 + w) * x0
    step[2] = -k * w  # the formula of `previous`: it is in neither x nor x0
    return step


def _heun(grid: _Grid, prediction: str) -> tuple[_Grid, Float, Float]:
    """Heun's method on the ratio r = sigma/alpha (Karras et al. 2022, algorithm 1): two rows per step, one in the last.

    The first row of a pair is an Euler step. The second row gets the predicted state x at (alpha', sigma'), its x0 and
    epsilon, and `previous`, the first row's x0. The first row's epsilon was (x - alpha' previous) / sigma', so

        x' = alpha' (previous + (r + r')/2 (x - alpha' previous)/sigma' + (r' - r)/2 epsilon)

    Returns the grid of the rows, and their x0 and x'.
    """
    node = np.repeat(np.arange(len(grid.t)), 2)[1:]  # the grid point of each row: 0, 1, 1, 2, 2, ...
    rows = _Grid(*(column[node] for column in grid))
    x0, epsilon = _estimates(prediction, rows.alpha, rows.sigma)
    step = _first_order(rows, x0, epsilon, 0.0)
    alpha, sigma, ratio = grid.alpha[1:], grid.sigma[1:], grid.sigma / grid.alpha
    mean, half = (ratio[:-1] + ratio[1:]) / 2.0, (ratio[1:] - ratio[:-1]) / 2.0
    first_epsilon = (X - alpha * PREVIOUS) / sigma
    step[:, 1::2] = alpha * (PREVIOUS + mean * first_epsilon + half * epsilon[:, 1::2])
    return rows, x0, step


def _lcm(grid: _Grid, x0: Float) -> tuple[Float, Float]:
    """Latent consistency sampling (Luo et al. 2023, algorithm 3): x' = alpha' denoised + sigma' noise,

        denoised = c_out x0 + c_skip x,   c_out = u/sqrt(u^2 + 1/4),   c_skip = (1/4)/(u^2 + 1/4),   u = 10 t

    Returns `denoised`, which is the row's x0, and x'.
    """
    u = 10.0 * grid.t
    denoised = u / np.sqrt(u**2 + 0.25) * x0 + 0.25 / (u**2 + 0.25) * X
    return denoised, grid.alpha_next * denoised + grid.sigma_next * NOISE


def solver_table(schedule: NoiseSchedule, prediction: str, solver: Solver, steps: int) -> SolverTable:
    """The rows of `solver` for `steps` steps: 2 steps - 1 rows for heun, `steps` rows for the others. All are finite.

    Raises ManifestError if the first three do not fit together, RequestError for steps outside 1 to max_steps.
    """
    check(schedule, prediction, solver)
    if not is_whole(steps, 1, max_steps(schedule, solver)):
        raise RequestError(f"steps={quoted(steps)}: a whole number from 1 to {max_steps(schedule, solver)}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        grid = _grid(schedule, solver, int(steps))
        x0, epsilon = _estimates(prediction, grid.alpha, grid.sigma)
        if solver.name == "heun":
            grid, x0, step = _heun(grid, prediction)
        elif solver.name == "dpm++2m":
            step = _dpm_solver_2m(grid, x0, solver.final)
        elif solver.name == "lcm":
            x0, step = _lcm(grid, x0)
        else:
            step = _first_order(grid, x0, epsilon, 1.0 if solver.name == "euler_ancestral" else solver.eta)
    if not np.isfinite([*step, *x0, grid.t]).all():
        raise ManifestError(f"kind {schedule.kind!r}: no signal is left at a timestep of solver {solver.name!r}")
    # diffusers' first state is noise times sigma_max for these grids, times sqrt(sigma_max^2 + 1) for the others.
    at_sigma = solver.name in ON_RATIOS and solver.spacing != "leading" and schedule.kind in DISCRETE
    initial = float(grid.sigma[0]) if at_sigma else 1.0
    noise = step[3] != 0.0
    C = np.where(noise, step[3], step[2])
    return SolverTable(grid.t, step[0], step[1], C, x0[0], -x0[1], noise, grid.alpha, grid.sigma, initial)


def tail(rows: int, strength: float) -> int:
    """The first row to run, if this fraction of the rows is to run (rounded down, at least one row)."""
    return rows - max(1, min(rows, int(rows * strength)))


def inversion_table(
    schedule: NoiseSchedule, prediction: str, solver: Solver, steps: int, first: int = 0
) -> SolverTable:
    """The rows that carry clean latents up to the state before row `first` of `solver_table(...)`: DDIM inversion.

    The grid of that table is run backwards (Song et al. 2021, section 4.3; Mokady et al. 2023). A row begins where the
    row of the table ends, and ends where it starts. The network gets the t of the noisier end. For DDIM, the rows are
    those of diffusers' DDIMInverseScheduler. Other solvers are run backwards by first-order steps on their own grid.

    Raises RequestError for a solver that adds noise, and if the network predicts the sample at a level without noise.
    """
    table = solver_table(schedule, prediction, solver, steps)
    if table.noise.any():
        raise RequestError(f"inversion: the solver {solver.name!r} adds noise, so its steps cannot be run backwards")
    node = (first + 1) // 2 if solver.name == "heun" else first  # the step in which row `first` starts
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        t, alpha_up, sigma_up, alpha, sigma = (column[node:][::-1] for column in _grid(schedule, solver, int(steps)))
        x0, epsilon = _estimates(prediction, alpha, sigma)
    if not np.isfinite([*x0, *epsilon]).all():
        raise RequestError(
            f"inversion: the solver {solver.name!r} ends without noise, where a network that predicts the sample says "
            "nothing about the noise"
        )
    step, unused = alpha_up * x0 + sigma_up * epsilon, np.zeros(len(t))
    return SolverTable(t, step[0], step[1], unused, x0[0], -x0[1], unused != 0.0, alpha, sigma, 1.0)
