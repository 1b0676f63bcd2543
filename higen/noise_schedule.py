"""The noise schedules and solvers in a manifest's loops, and the values that their fields may have.

A state is x = alpha z + sigma n: clean latents z and unit Gaussian noise n, with alpha^2 + sigma^2 = 1 (kind "flow":
alpha + sigma = 1). higen/schedule.py turns a schedule and a solver into a table.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TypeGuard

from higen.errors import ManifestError

__all__ = ["DISCRETE", "ON_RATIOS", "OWN_GRIDS", "PREDICTIONS", "SOLVERS", "SPACINGS", "NoiseSchedule", "Solver"]
__all__ += ["check", "is_whole", "max_steps"]

DISCRETE = ("linear", "scaled_linear", "cosine")  # kinds with a table of abar, one entry per timestep
PREDICTIONS = ("v", "epsilon", "sample", "flow")
ON_RATIOS = ("euler", "euler_ancestral", "heun")  # their grids are ratios and may fall between two timesteps
SOLVERS = ("ddim", "dpm++2m", *ON_RATIOS, "lcm")
OWN_GRIDS = ("leading-floor", "trailing-ceil")  # from HiGen; the others are from diffusers
SPACINGS = ("leading", "linspace", "trailing", "karras", *OWN_GRIDS)
SPACINGS_OF_SOLVER = {"ddim": SPACINGS[:3] + OWN_GRIDS, "dpm++2m": SPACINGS, "lcm": SPACINGS[:1]}
SPACINGS_OF_SOLVER |= dict.fromkeys(ON_RATIOS, SPACINGS[:4])


def _require(true: bool, message: str) -> None:
    if not true:
        raise ManifestError(message)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{what}={value!r}: one of {', '.join(map(repr, allowed))}")


def is_whole(value: object, low: int, high: int) -> TypeGuard[int]:
    """Whether a value is a whole number in this range; booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high


@dataclass(frozen=True)
class NoiseSchedule:
    """The amount of noise at each timestep. Each kind reads its own fields. Raises ManifestError for invalid values."""

    kind: str = "scaled_linear"
    timesteps: int = 1000
    beta_start: float = 0.00085  # linear, scaled_linear
    beta_end: float = 0.012
    zero_terminal_snr: bool = False  # linear, scaled_linear, cosine
    sigma_min: float = 0.002  # edm: the range of the ratio sigma / alpha; t is ln(ratio) / 4
    sigma_max: float = 700.0
    shift: float = 1.0  # flow

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, (*DISCRETE, "edm", "flow"))
        _require(is_whole(self.timesteps, 2, 10**6), f"timesteps={self.timesteps!r}: a whole number from 2 to 1000000")
        if self.zero_terminal_snr:
            _one_of("zero_terminal_snr=true: kind", self.kind, DISCRETE)
        if self.kind in ("linear", "scaled_linear"):
            start, end = self.beta_start, self.beta_end
            _require(0 < start < end < 1, f"beta_start={start:g}, beta_end={end:g}: 0 < beta_start < beta_end < 1")
        if self.kind == "edm":
            low, high = self.sigma_min, self.sigma_max
            _require(0 < low < high < math.inf, f"sigma_min={low:g}, sigma_max={high:g}: 0 < sigma_min < sigma_max")
        if self.kind == "flow":
            _require(0 < self.shift < math.inf, f"shift={self.shift:g}: above 0")


@dataclass(frozen=True)
class Solver:
    """A method that turns noise into clean latents. Raises ManifestError for fields that do not fit the named solver.

    spacing   leading, linspace, trailing: Lin et al. 2023, table 2, as diffusers rounds them. karras: Karras et al.
              2022, equation 5, over the whole schedule. leading-floor and trailing-ceil are HiGen's: offset +
              floor(k T / steps) from k = 0, and ceil(k T / steps) - 1 from k = 1. lcm has only the spacing "leading";
              its grid is chosen from every (T / original_steps)-th timestep.
    offset    added to the leading grids; the result is limited to the last timestep
    final     where the last row ends: "zero": the clean latents (alpha 1, sigma 0), "first": the schedule's entry 0
    eta       ddim: the share of DDPM's noise that each step renews, 0 to 1
    rho       karras: the grid's exponent
    original_steps   lcm: the number of steps it was distilled with
    """

    name: str
    spacing: str = "leading"
    offset: int = 0
    final: str = "zero"
    eta: float = 0.0
    rho: float = 7.0
    original_steps: int = 50

    def __post_init__(self) -> None:
        name, eta, original = self.name, self.eta, self.original_steps
        _one_of("solver", name, SOLVERS)
        _one_of(f"solver {name!r}: spacing", self.spacing, SPACINGS_OF_SOLVER[name])
        _one_of(f"solver {name!r}: final", self.final, ("zero",) if name in ("heun", "lcm") else ("zero", "first"))
        most = 10**6 if self.spacing in ("leading", "leading-floor") and name != "lcm" else 0
        _require(is_whole(self.offset, 0, most), f"offset={self.offset!r}: a whole number from 0; 0 if not leading")
        _require(0 <= eta <= (1 if name == "ddim" else 0), f"eta={eta:g}: 0 to 1 for 'ddim', 0 for other solvers")
        _require(0 < self.rho < math.inf, f"rho={self.rho:g}: above 0")
        _require(is_whole(original, 1, 10**6), f"original_steps={original!r}: a whole number from 1")


def check(schedule: NoiseSchedule, prediction: str, solver: Solver) -> None:
    """Raise ManifestError if no table can be made from the three; the message says what is allowed."""
    kind, total, offset, original = schedule.kind, schedule.timesteps, solver.offset, solver.original_steps
    _one_of(f"kind {kind!r}: prediction", prediction, {"edm": ("v",), "flow": ("flow",)}.get(kind, PREDICTIONS[:3]))
    if kind not in DISCRETE:
        edm = kind == "edm"
        _one_of(f"kind {kind!r}: solver", solver.name, ("dpm++2m", *ON_RATIOS) if edm else ("euler",))
        _one_of(f"kind {kind!r}: spacing", solver.spacing, ("karras",) if edm else ("linspace", "trailing"))
        _one_of(f"kind {kind!r}: final", solver.final, ("zero",))
    if schedule.zero_terminal_snr:  # at zero SNR, epsilon says nothing about z
        _one_of("zero_terminal_snr=true: prediction", prediction, ("v", "sample"))
    _require(offset < total, f"offset={offset}: at most {total - 1}, the last timestep")
    _require(solver.name != "lcm" or original <= total, f"original_steps={original}: at most {total}, the timesteps")


def max_steps(schedule: NoiseSchedule, solver: Solver) -> int:
    """The largest number of steps that the solver has a grid for."""
    if solver.name == "lcm":
        return solver.original_steps
    return schedule.timesteps - (solver.name == "dpm++2m" and solver.spacing == "leading")
