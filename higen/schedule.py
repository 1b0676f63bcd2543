"""Noise schedule and solvers, as tables in float64.

With v-prediction a solver step is linear in what it sees (higen/stages.py), so a solver is a table of rows
(t, A, B, C, alpha, sigma) and every runtime shares one loop. x_t = alpha_t x_0 + sigma_t eps, with
alpha = sqrt(abar) and sigma = sqrt(1 - abar); v = alpha eps - sigma x_0 (Salimans and Ho 2022, appendix D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from higen.config import ScheduleConfig
from higen.errors import RequestError

__all__ = ["SOLVERS", "SolverTable", "alphas_cumprod", "solver_table", "timesteps_ddim", "timesteps_trailing"]

Float = NDArray[np.float64]


@dataclass(frozen=True)
class SolverTable:
    """Rows of a solver, first step first. `t` int64 [n]; all others float64 [n]."""

    t: NDArray[np.int64]
    A: Float
    B: Float
    C: Float
    alpha: Float
    sigma: Float

    def __len__(self) -> int:
        return len(self.t)


def alphas_cumprod(config: ScheduleConfig) -> Float:
    """The cumulative signal variance abar, float64 [timesteps], decreasing.

    With zero terminal SNR, sqrt(abar) is shifted and scaled so that its last entry is 0 and its first is kept
    (Lin et al. 2023, algorithm 1; reference tools/modules/diffusions/schedules.py).
    """
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=np.float64) ** 2
    abar = np.cumprod(1.0 - betas, dtype=np.float64)
    if not config.zero_terminal_snr:
        return abar
    root = np.sqrt(abar)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    scaled: Float = root**2
    return scaled


def timesteps_ddim(steps: int, train_steps: int = 1000) -> NDArray[np.int64]:
    """`steps` descending timesteps: 1 + floor(k train_steps / steps), never above train_steps - 1.

    Where `steps` divides `train_steps` this is the reference's grid (diffusion_ddim.py: ddim_sample_loop).
    """
    grid = 1 + np.arange(steps, dtype=np.int64) * train_steps // steps
    return np.minimum(grid, train_steps - 1)[::-1].copy()


def timesteps_trailing(steps: int, train_steps: int = 1000) -> NDArray[np.int64]:
    """`steps` descending timesteps that start at the last one (Lin et al. 2023, "trailing")."""
    grid = -(-np.arange(1, steps + 1, dtype=np.int64) * train_steps // steps) - 1
    return grid[::-1].copy()


def _ddim(abar: Float, steps: int) -> SolverTable:
    """DDIM with eta 0 (Song et al. 2021, equation 12): x' = alpha' x0 + sigma' eps.

    The last row goes from t = 1 to t = 0, which still carries noise: as the reference does.
    eps is taken as sigma x + alpha v, which is defined at zero SNR too.
    """
    t = timesteps_ddim(steps, len(abar))
    target = abar[np.append(t[1:], 0)]
    alpha, sigma = np.sqrt(abar[t]), np.sqrt(1.0 - abar[t])
    alpha_next, sigma_next = np.sqrt(target), np.sqrt(1.0 - target)
    return SolverTable(
        t=t,
        A=alpha_next * alpha + sigma_next * sigma,
        B=sigma_next * alpha - alpha_next * sigma,
        C=np.zeros(steps),
        alpha=alpha,
        sigma=sigma,
    )


def _dpm_solver_2m(abar: Float, steps: int) -> SolverTable:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), on the trailing grid and ending at the clean latent.

        x' = sigma'/sigma x - alpha' expm1(-h) D,   D = (1 + 1/2r) x0 - 1/2r previous,   r = h_previous / h

    The first and the last step are of first order; so is one whose previous step began at zero SNR (r is infinite).
    """
    t = timesteps_trailing(steps, len(abar))
    alpha, sigma = np.sqrt(abar[t]), np.sqrt(1.0 - abar[t])
    alpha_next, sigma_next = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    with np.errstate(divide="ignore"):
        half_logsnr = np.log(alpha) - np.log(sigma)  # lambda; -inf at zero SNR
    weight = np.zeros(steps)  # 1/2r
    h = np.diff(half_logsnr)  # h[i]: the length of step i
    if steps > 2:
        weight[1:-1] = h[1:] / (2.0 * h[:-1])
    decay = sigma_next * alpha / (alpha_next * sigma)  # exp(-h)
    k = alpha_next * (1.0 - decay)
    return SolverTable(
        t=t,
        A=sigma_next / sigma + k * (1.0 + weight) * alpha,
        B=-k * (1.0 + weight) * sigma,
        C=-k * weight,
        alpha=alpha,
        sigma=sigma,
    )


SOLVERS: dict[str, Callable[[Float, int], SolverTable]] = {"ddim": _ddim, "dpm++2m": _dpm_solver_2m}


def solver_table(solver: str, steps: int, config: ScheduleConfig) -> SolverTable:
    """The rows of `solver` ("ddim" or "dpm++2m") for `steps` steps, 1 to config.timesteps: always `steps` rows.

    Raises RequestError for an unknown solver or a number of steps out of range.
    """
    if solver not in SOLVERS:
        raise RequestError(f"solver={solver!r}: one of {', '.join(map(repr, SOLVERS))}")
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= config.timesteps:
        raise RequestError(f"steps={steps!r}: a whole number from 1 to {config.timesteps}")
    return SOLVERS[solver](alphas_cumprod(config), int(steps))
