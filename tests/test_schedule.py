"""Solvers as tables: the reference's DDIM step by step, diffusers' DPM-Solver++, and an equation solved exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from higen.config import ScheduleConfig
from higen.errors import ManifestError, RequestError
from higen.schedule import SOLVERS, SolverTable, alphas_cumprod, solver_table, timesteps_ddim, timesteps_trailing

ZERO_SNR, PLAIN = ScheduleConfig(), ScheduleConfig(zero_terminal_snr=False)
DIVISORS = [n for n in range(1, 1001) if 1000 % n == 0]
COLUMNS = ("A", "B", "C", "alpha", "sigma")


def test_signal_variance_by_the_reference() -> None:
    beta = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    plain, product = [], 1.0
    for b in beta:
        product *= 1.0 - b
        plain.append(product)
    np.testing.assert_allclose(alphas_cumprod(PLAIN), plain, rtol=1e-12)
    root = [math.sqrt(a) for a in plain]
    shifted = [((r - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 for r in root]
    np.testing.assert_allclose(alphas_cumprod(ZERO_SNR), shifted, rtol=1e-9, atol=1e-16)
    assert alphas_cumprod(ZERO_SNR)[-1] == 0.0
    np.testing.assert_allclose(
        alphas_cumprod(ZERO_SNR)[[0, 1, 501, 981]], [0.99915, 0.99823345, 0.23968224, 6.8865716e-5], rtol=1e-7
    )


@pytest.mark.parametrize("steps", DIVISORS)
def test_ddim_grid_is_the_references_where_steps_divide_1000(steps: int) -> None:
    reference = np.clip(np.arange(0, 1000, 1000 // steps) + 1, 0, 999)[::-1]
    assert timesteps_ddim(steps).tolist() == reference.tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_number_of_steps_gives_that_many_finite_rows(solver: str) -> None:
    for steps in range(1, 1001):
        table = solver_table(solver, steps, ZERO_SNR)
        assert len(table) == steps
        assert table.t.dtype == np.int64
        assert all(getattr(table, c).shape == (steps,) and getattr(table, c).dtype == np.float64 for c in COLUMNS)
        assert all(np.isfinite(getattr(table, c)).all() for c in COLUMNS), steps
        assert table.t[0] <= 999
        assert table.t[-1] >= 0
        assert (np.diff(table.t) <= 0).all()
        np.testing.assert_allclose(table.alpha**2 + table.sigma**2, 1.0, rtol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("config", [ZERO_SNR, PLAIN])
def test_columns_of_the_network_are_those_of_its_timestep(solver: str, config: ScheduleConfig) -> None:
    abar, table = alphas_cumprod(config), solver_table(solver, 37, config)
    np.testing.assert_allclose(table.alpha, np.sqrt(abar[table.t]))
    np.testing.assert_allclose(table.sigma, np.sqrt(1 - abar[table.t]))


@pytest.mark.parametrize("steps", [n for n in DIVISORS if n < 500])
def test_ddim_is_the_references_step_by_step(steps: int) -> None:
    """ddim_sample of the reference, with eps as it writes it: (x / sqrt(abar) - x0) / sqrt(1 / abar - 1)."""
    abar, table = alphas_cumprod(ZERO_SNR), solver_table("ddim", steps, ZERO_SNR)
    x, v = np.random.default_rng(steps).standard_normal((2, 64))
    for i, t in enumerate(table.t):
        x0 = math.sqrt(abar[t]) * x - math.sqrt(1.0 - abar[t]) * v
        eps = (x / math.sqrt(abar[t]) - x0) / math.sqrt(1.0 / abar[t] - 1.0)
        previous = abar[max(t - 1000 // steps, 0)]
        expected = math.sqrt(previous) * x0 + math.sqrt(1.0 - previous) * eps
        np.testing.assert_allclose(table.A[i] * x + table.B[i] * v, expected, rtol=1e-9, atol=1e-9)
        assert table.C[i] == 0.0
        x, v = expected, np.cos(3.0 * expected) + 0.1 * v


def test_ddim_ends_at_the_first_timestep_and_not_at_the_clean_latent() -> None:
    table, abar = solver_table("ddim", 50, ZERO_SNR), alphas_cumprod(ZERO_SNR)
    x0, eps = 0.7, -1.3
    x = table.alpha[-1] * x0 + table.sigma[-1] * eps
    v = table.alpha[-1] * eps - table.sigma[-1] * x0
    assert table.A[-1] * x + table.B[-1] * v == pytest.approx(math.sqrt(abar[0]) * x0 + math.sqrt(1 - abar[0]) * eps)


@settings(max_examples=60, deadline=None)
@given(solver=st.sampled_from(sorted(SOLVERS)), steps=st.integers(1, 200), seed=st.integers(0, 99))
def test_a_perfect_prediction_stays_on_its_path(solver: str, steps: int, seed: int) -> None:
    """With the true x0 and eps at hand, every step of every solver lands on alpha' x0 + sigma' eps."""
    x0, eps = np.random.default_rng(seed).standard_normal((2, 16))
    table = solver_table(solver, steps, ZERO_SNR)
    x, previous = table.alpha[0] * x0 + table.sigma[0] * eps, np.zeros(16)
    for i in range(steps):
        v = table.alpha[i] * eps - table.sigma[i] * x0
        x, previous = table.A[i] * x + table.B[i] * v + table.C[i] * previous, x0
        if i + 1 < steps:
            np.testing.assert_allclose(x, table.alpha[i + 1] * x0 + table.sigma[i + 1] * eps, atol=1e-9)
    last = alphas_cumprod(ZERO_SNR)[0] if solver == "ddim" else 1.0
    np.testing.assert_allclose(x, math.sqrt(last) * x0 + math.sqrt(1 - last) * eps, atol=1e-9)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 250])
def test_dpm_solver_is_diffusers(steps: int) -> None:
    """Without zero terminal SNR, which diffusers replaces by a small one."""
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=PLAIN.beta_start,
        beta_end=PLAIN.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    table = solver_table("dpm++2m", steps, PLAIN)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    theirs = torch.randn(256, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    ours, previous = theirs.numpy().copy(), np.zeros(256)
    for i, t in enumerate(scheduler.timesteps):
        v = np.sin(2.0 * ours + float(t) / 300.0)
        theirs = scheduler.step(torch.sin(2.0 * theirs + float(t) / 300.0), t, theirs).prev_sample
        x0 = table.alpha[i] * ours - table.sigma[i] * v
        ours, previous = table.A[i] * ours + table.B[i] * v + table.C[i] * previous, x0
        np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-5)  # its tables are float32


def solve_gaussian(table: SolverTable, spread: float) -> float:
    """Relative error at a quarter of the way to the end when the data are N(0, spread^2).

    There the best prediction is linear, x0 = alpha spread^2 x / var with var = alpha^2 spread^2 + sigma^2, and the
    flow's exact solution keeps x / sqrt(var).
    """
    variance = table.alpha**2 * spread**2 + table.sigma**2
    x, previous = math.sqrt(variance[0]), 0.0
    for i in range(len(table)):
        if table.t[i] in (249, 251):  # a timestep of both grids for every number of steps that 4 divides
            return abs(x / math.sqrt(variance[i]) - 1.0)
        x0 = table.alpha[i] * spread**2 / variance[i] * x
        v = (table.alpha[i] * x - x0) / table.sigma[i]
        x, previous = table.A[i] * x + table.B[i] * v + table.C[i] * previous, x0
    raise AssertionError(f"{table.t}: no timestep to compare at")


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++2m", 2)])
@pytest.mark.parametrize("config", [ZERO_SNR, PLAIN])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_order_of_convergence_on_an_equation_solved_exactly(
    solver: str, order: int, config: ScheduleConfig, spread: float
) -> None:
    errors = [solve_gaussian(solver_table(solver, steps, config), spread) for steps in (40, 100, 200, 500)]
    measured = math.log(errors[0] / errors[-1]) / math.log(500 / 40)
    assert measured == pytest.approx(order, abs=0.3), errors


def test_dpm_solver_is_of_first_order_after_zero_snr_and_at_both_ends() -> None:
    table = solver_table("dpm++2m", 20, ZERO_SNR)
    assert table.t[0] == 999
    assert table.alpha[0] == 0.0
    assert table.C[[0, 1, -1]].tolist() == [0.0, 0.0, 0.0]
    assert (table.C[2:-1] != 0).all()
    assert (table.A[-1], table.B[-1]) == (pytest.approx(table.alpha[-1]), pytest.approx(-table.sigma[-1]))


def test_trailing_grid() -> None:
    assert timesteps_trailing(4).tolist() == [999, 749, 499, 249]
    assert timesteps_trailing(1).tolist() == [999]
    assert timesteps_trailing(1000).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, "4", None])
def test_wrong_steps(steps: object) -> None:
    with pytest.raises(RequestError, match="a whole number from 1 to 1000"):
        solver_table("ddim", steps, ZERO_SNR)  # type: ignore[arg-type]


def test_numpy_steps() -> None:
    assert len(solver_table("ddim", np.int64(4), ZERO_SNR)) == 4  # type: ignore[arg-type]


def test_unknown_solver() -> None:
    with pytest.raises(RequestError, match=r"solver='euler': one of 'ddim', 'dpm\+\+2m'"):
        solver_table("euler", 4, ZERO_SNR)


@pytest.mark.parametrize("change", [{"timesteps": 1}, {"beta_start": 0.0}, {"beta_start": 0.02}, {"beta_end": 1.0}])
def test_impossible_schedules(change: dict[str, float]) -> None:
    with pytest.raises(ManifestError):
        ScheduleConfig(**change)  # type: ignore[arg-type]
