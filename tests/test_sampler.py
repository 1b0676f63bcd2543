"""The denoising loop against closed forms: the ODE of Gaussian data, the DDIM formula in eps; and its calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from numpy.typing import NDArray

from higen.backends import RecordingBackend
from higen.config import ScheduleConfig
from higen.sampler import Step, denoise
from higen.schedule import SOLVERS, alphas_cumprod, solver_table
from higen.stages import STAGES, STEP_COLUMNS

SCHEDULE = ScheduleConfig()
MEAN, STD = 0.7, 0.4


class GaussianData:
    """A denoising stage for data N(MEAN, STD^2), pixel by pixel: the exact E[x0 | x] in place of a network.

    x0 = mean + alpha s^2 / (alpha^2 s^2 + sigma^2) (x - alpha mean), and v = (alpha x - x0) / sigma. The two guidance
    branches are equal here, so guidance has no effect; the solver's update is the stage's own (higen/stages.py).
    """

    def __init__(self) -> None:
        self.previous: list[NDArray[np.float32]] = []

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        row = {name: tensors[name].astype(np.float64).reshape(-1, 1, 1, 1, 1) for name in STEP_COLUMNS}
        x, alpha, sigma = tensors["latents"], row["alpha"], row["sigma"]
        self.previous.append(tensors["previous"])
        expected = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        v = (alpha * x - expected) / sigma
        x0 = alpha * x - sigma * v
        return {"latents": row["A"] * x + row["B"] * v + row["C"] * tensors["previous"], "previous": x0}


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def solve(solver: str, steps: int, x: NDArray[np.float32]) -> list[Step]:
    return list(denoise(GaussianData(), "spatial_unet", x, solver_table(solver, steps, SCHEDULE), 1.0))


def exact(x: NDArray[np.float32], start: int, alpha_end: float, sigma_end: float) -> NDArray[np.float64]:
    """The probability-flow ODE of Gaussian data keeps (x - alpha mean) / sqrt(alpha^2 s^2 + sigma^2)."""
    abar = alphas_cumprod(SCHEDULE)[start]
    spread = np.sqrt((alpha_end**2 * STD**2 + sigma_end**2) / (abar * STD**2 + 1 - abar))
    solution: NDArray[np.float64] = alpha_end * MEAN + spread * (x - np.sqrt(abar) * MEAN)
    return solution


def error_of(steps: list[Step], x: NDArray[np.float32], last: int) -> float:
    """Largest distance to the exact solution after all steps but `last`; the state there is at timestep `t`."""
    t = steps[-last].t if last else 0
    abar = alphas_cumprod(SCHEDULE)[t]
    return float(np.abs(steps[-1 - last].latents - exact(x, steps[0].t, abar**0.5, (1 - abar) ** 0.5)).max())


def test_ddim_solves_the_ode_of_gaussian_data() -> None:
    x = noise(2, 4, 1, 3, 3)
    errors = {steps: error_of(solve("ddim", steps, x), x, last=0) for steps in (50, 1000)}
    assert errors[1000] < 5e-3
    assert errors[1000] < errors[50] / 10  # of first order


@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_dpm_solver_follows_the_ode_more_closely(steps: int) -> None:
    """Up to its last step, which jumps to the expected clean latent whatever the solver."""
    x = noise(2, 4, 1, 3, 3)
    made = solve("dpm++2m", steps, x)
    assert error_of(made, x, last=1) < error_of(solve("ddim", steps, x), x, last=1) / 5
    np.testing.assert_allclose(made[-1].latents, made[-1].previous, atol=1e-6)


def test_one_step_from_pure_noise_is_the_mean() -> None:
    made = solve("dpm++2m", 1, noise(1, 4, 1, 3, 3))
    np.testing.assert_allclose(made[-1].latents, MEAN, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_ddim_is_the_formula_in_eps(steps: int) -> None:
    """Song et al. 2021, equation 12 with sigma 0, where the signal is not zero."""
    x = noise(1, 4, 1, 3, 3)
    abar = alphas_cumprod(SCHEDULE)
    state = x.astype(np.float64)
    made = solve("ddim", steps, x)
    grid = [step.t for step in made]
    for t, after in zip(grid, [*grid[1:], 0], strict=True):
        a, b = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        predicted = MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (state - a * MEAN)
        eps = (state - a * predicted) / b
        state = np.sqrt(abar[after]) * (state - b * eps) / a + np.sqrt(1 - abar[after]) * eps
    np.testing.assert_allclose(made[-1].latents, state, atol=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_feeds_both_outputs_back(solver: str) -> None:
    x = noise(2, 4, 1, 3, 3)
    backend = GaussianData()
    made = list(denoise(backend, "spatial_unet", x, solver_table(solver, 5, SCHEDULE), 1.0))
    assert not backend.previous[0].any()
    for given, step in zip(backend.previous[1:], made, strict=False):
        assert given is step.previous
    assert [(step.index, step.total, step.stage) for step in made] == [(i, 5, "spatial_unet") for i in range(5)]
    assert [step.t for step in made] == solver_table(solver, 5, SCHEDULE).t.tolist()


@pytest.mark.parametrize("stage", ["spatial_unet", "temporal_unet"])
def test_the_calls_of_a_loop(stage: str) -> None:
    """Every input of the stage table, columns per sample, and nothing else."""
    backend = RecordingBackend(TINY)
    frames = 1 if stage == "spatial_unet" else 5
    conditions = {
        "context": np.zeros((3, 4, 32), np.float32),
        "empty_context": np.zeros((3, 4, 32), np.float32),
        "frame_embedding": np.zeros((3, frames, 128), np.float32),
    }
    if stage == "temporal_unet":
        conditions["prior"] = np.zeros((3, 4, 8, 12), np.float32)
    table = solver_table("dpm++2m", 4, SCHEDULE)
    made = list(denoise(backend, stage, np.zeros((3, 4, frames, 8, 12), np.float32), table, 7.5, **conditions))
    assert [name for name, _ in backend.calls] == [stage] * 4
    shapes = {name: value.shape for name, value in conditions.items()}
    state = (3, 4, frames, 8, 12)
    columns = dict.fromkeys(STEP_COLUMNS, (3,))
    assert all(given == {"latents": state, "previous": state, **columns, **shapes} for _, given in backend.calls)
    assert {t.name for t in STAGES[stage].inputs} == set(backend.calls[0][1])
    assert made[-1].latents.shape == state


def test_the_columns_are_the_rows_of_the_table() -> None:
    given: list[dict[str, Any]] = []

    class Columns:
        def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
            given.append(tensors)
            return {"latents": tensors["latents"], "previous": tensors["previous"]}

    table = solver_table("dpm++2m", 6, SCHEDULE)
    list(denoise(Columns(), "spatial_unet", noise(2, 4, 1, 2, 2), table, 7.5))
    for i, tensors in enumerate(given):
        for name in ("A", "B", "C", "alpha", "sigma"):
            assert tensors[name].dtype == np.float32
            assert tensors[name].tolist() == [np.float32(getattr(table, name)[i])] * 2
        assert tensors["t"].dtype == np.int64
        assert tensors["t"].tolist() == [table.t[i]] * 2
        assert tensors["guidance"].tolist() == [7.5, 7.5]


def test_nothing_runs_before_a_step_is_asked_for() -> None:
    backend = GaussianData()
    steps = denoise(backend, "spatial_unet", noise(1, 4, 1, 2, 2), solver_table("ddim", 50, SCHEDULE), 1.0)
    assert backend.previous == []
    next(steps)
    next(steps)
    assert len(backend.previous) == 2
