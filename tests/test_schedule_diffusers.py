"""Solver tables, compared with diffusers' schedulers over whole loops of made-up predictions."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from higen.schedule import SOLVERS, SPACINGS, NoiseSchedule, Solver, SolverTable, alphas_cumprod, solver_table

diffusers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' warning

SD, LINEAR, COSINE = (NoiseSchedule(kind) for kind in ("scaled_linear", "linear", "cosine"))
ZERO_SNR = NoiseSchedule(zero_terminal_snr=True)
SVD = NoiseSchedule("edm")
COLUMNS = ("A", "B", "C", "alpha", "sigma")
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lcm": diffusers.LCMScheduler,
}
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
TYPES = {"v": "v_prediction", "epsilon": "epsilon", "sample": "sample"}
X_T = np.random.default_rng(1).standard_normal((1, 4, 6))
OUTPUTS, NOISE = np.random.default_rng(2).standard_normal((2, 128, *X_T.shape))


class InDouble:
    """A module with float64 in place of float32. diffusers' schedulers name their precision through torch and numpy."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, "float64" if name == "float32" else name)


@contextmanager
def precision(scheduler: type, dtype: type) -> Iterator[None]:
    """diffusers computes in `dtype`, and takes its fresh noise from NOISE, one entry per draw."""
    module: Any = sys.modules[scheduler.__module__]
    draws = iter(NOISE)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(draws).astype(dtype)))
        if dtype is np.float64:
            patch.setattr(module, "torch", InDouble(torch))
            patch.setattr(module, "np", InDouble(np), raising=False)
            torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def network(call: int, x: np.ndarray, t: float) -> np.ndarray:
    """A made-up prediction that depends on the state, on t and on the call."""
    return (np.tanh(x) + 0.5 * OUTPUTS[call] + 0.1 * np.sin(t)).astype(x.dtype)


def scheduler_of(schedule: NoiseSchedule, prediction: str, solver: Solver) -> Any:
    options: dict[str, Any] = {
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": KINDS[schedule.kind],
        "prediction_type": TYPES[prediction],
    }
    if schedule.zero_terminal_snr:
        options["rescale_betas_zero_snr"] = True
    if solver.name == "lcm":
        return diffusers.LCMScheduler(**options, original_inference_steps=solver.original_steps)
    options["steps_offset"] = solver.offset
    options["timestep_spacing"] = "linspace" if solver.spacing == "karras" else solver.spacing
    if solver.name == "ddim":
        options.update(clip_sample=False, set_alpha_to_one=solver.final == "zero")
    if solver.name in ("euler", "dpm++2m"):
        options["final_sigmas_type"] = "zero" if solver.final == "zero" else "sigma_min"
    if solver.spacing == "karras":
        options["use_karras_sigmas"] = True
    return SCHEDULERS[solver.name](**options)


def their_loop(
    scheduler: Any, steps: int, dtype: type, eta: float = 0.0, **grid: Any
) -> tuple[np.ndarray, list[float]]:
    """diffusers' final state from the noise X_T, and the timesteps that the network saw."""
    scheduler.set_timesteps(**(grid or {"num_inference_steps": steps}))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # as in pipelines; else one step of a repeated timestep is skipped
    x = torch.from_numpy(X_T.astype(dtype)) * getattr(scheduler, "init_noise_sigma", 1.0)
    more = {"eta": eta} if eta else {}
    for call, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.from_numpy(network(call, scaled.numpy(), float(t))), t, x, **more).prev_sample
    return x.numpy(), scheduler.timesteps.tolist()


def run(made: SolverTable, x: np.ndarray) -> np.ndarray:
    """The loop that all runtimes share, in the precision of `x`."""
    previous, number = np.zeros_like(x), x.dtype.type
    for i in range(len(made)):
        m = network(i, x, float(number(made.t[i])))
        previous = NOISE[i].astype(x.dtype) if made.noise[i] else previous
        A, B, C, alpha, sigma = (number(getattr(made, name)[i]) for name in COLUMNS)
        x, previous = A * x + B * m + C * previous, alpha * x - sigma * m
    return x


def error(made: SolverTable, theirs: np.ndarray, ratio: float = 0.0) -> float:
    """Relative error of our final state. diffusers' state can be x / alpha, with sigma / alpha = `ratio` at the end."""
    ours = run(made, X_T.astype(theirs.dtype) * theirs.dtype.type(made.initial))
    return float(np.abs(ours * math.sqrt(1 + ratio**2) - theirs).max() / np.abs(theirs).max())


def compare(schedule: NoiseSchedule, prediction: str, solver: Solver, steps: int, dtype: type) -> float:
    with precision(SCHEDULERS[solver.name], dtype):
        theirs, t = their_loop(scheduler_of(schedule, prediction, solver), steps, dtype, solver.eta)
    made = solver_table(schedule, prediction, solver, steps)
    if dtype is np.float64:
        np.testing.assert_allclose(made.t, t, rtol=1e-9, atol=1e-9)
    if not np.isfinite(theirs).all():  # eta 1 at zero SNR: rounding makes the value under a root negative
        assert solver.eta == 1.0
        assert np.isfinite(run(made, X_T)).all()
        return 0.0
    abar = alphas_cumprod(schedule)[0]
    on_ratios = solver.name == "euler" and solver.final == "first"
    return error(made, theirs, math.sqrt((1 - abar) / abar) if on_ratios else 0.0)


def theirs_of(solver: str) -> Iterator[Solver]:
    """Every configuration of one solver that both libraries have."""
    grids = ["leading"] if solver == "lcm" else ["leading", "linspace", "trailing", "karras"]
    if solver in ("ddim", "euler_ancestral"):
        grids.remove("karras")
    finals = ("zero", "first") if solver in ("ddim", "euler", "dpm++2m") else ("zero",)
    for spacing, final, eta in product(grids, finals, (0.0, 1.0) if solver == "ddim" else (0.0,)):
        for offset in (0, 1) if spacing == "leading" and solver != "lcm" else (0,):
            yield Solver(solver, spacing, offset, final, eta)


@pytest.mark.parametrize("solver", [s for name in SOLVERS for s in theirs_of(name)], ids=str)
def test_every_table_equals_diffusers_in_double(solver: Solver) -> None:
    """diffusers' own code with float64 in place of float32, so that any difference is in a formula, not in rounding."""
    for schedule, zero_terminal_snr, prediction in product((SD, LINEAR, COSINE), (False, True), TYPES):
        unknown = solver.name == "heun" or prediction == "epsilon" if zero_terminal_snr else False
        if unknown or (solver.name == "euler_ancestral" and prediction == "sample"):  # one library lacks it
            continue
        chosen = replace(schedule, zero_terminal_snr=zero_terminal_snr)
        for steps in (1, 2, 4, 10, 25, 50):
            found = compare(chosen, prediction, solver, steps, np.float64)
            assert found <= (1e-7 if solver.eta else 2e-9), (chosen, prediction, steps, found)


AS_THEY_RUN = [
    (SD, "epsilon", Solver("ddim", offset=1, final="first")),  # Stable Diffusion 1.5, ModelScope
    (SD, "v", Solver("ddim", offset=1, final="first")),  # Stable Diffusion 2.1
    (SD, "epsilon", Solver("ddim", offset=1, final="first", eta=1.0)),
    (SD, "sample", Solver("ddim")),
    (LINEAR, "epsilon", Solver("ddim", "linspace", final="first")),  # AnimateDiff
    (SD, "epsilon", Solver("ddim", "trailing")),
    (ZERO_SNR, "v", Solver("ddim", "trailing")),
    *((SD, p, Solver("dpm++2m", s)) for p in TYPES for s in SPACINGS[:4]),
    (ZERO_SNR, "v", Solver("dpm++2m", "linspace")),
    *((SD, p, Solver("euler", s)) for p in TYPES for s in SPACINGS[:3]),
    *((SD, p, Solver("euler_ancestral", s)) for p in ("epsilon", "v") for s in SPACINGS[:3]),
    *((SD, "epsilon", Solver("heun", s)) for s in ("leading", "trailing")),
    *((s, "epsilon", Solver("lcm")) for s in (SD, LINEAR)),  # LCM, AnimateLCM
    (ZERO_SNR, "v", Solver("lcm")),
]
# diffusers' float32 abar is off by 1e-5 at the end of a cosine schedule, and moves Karras' t by 1e-3. float64 agrees.
AS_THEY_ROUND = [
    (replace(COSINE, zero_terminal_snr=True), "v", Solver("ddim", offset=1)),  # I2VGen-XL
    *((SD, p, Solver("euler", "karras")) for p in TYPES),
]


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 25, 50])
@pytest.mark.parametrize(
    ("schedule", "prediction", "solver", "tolerance"),
    [(*c, 2e-5) for c in AS_THEY_RUN] + [(*c, 1e-4) for c in AS_THEY_ROUND],
    ids=str,
)
def test_the_usual_configurations_equal_diffusers_as_they_run(
    schedule: NoiseSchedule, prediction: str, solver: Solver, tolerance: float, steps: int
) -> None:
    assert compare(schedule, prediction, solver, steps, np.float32) <= tolerance


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 14, 25, 50])
def test_svd_equals_diffusers(steps: int) -> None:
    """The scheduler of Stable Video Diffusion's folder. Its states reach 700, so few float32 steps lose up to 4e-5."""
    made = solver_table(SVD, "v", Solver("euler", "karras"), steps)
    for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 2e-5 if steps > 2 else 1e-4)):
        with precision(diffusers.EulerDiscreteScheduler, dtype):
            scheduler = diffusers.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                use_karras_sigmas=True,
                sigma_min=0.002,
                sigma_max=700.0,
                timestep_spacing="leading",
                timestep_type="continuous",
                steps_offset=1,
            )
            theirs, t = their_loop(scheduler, steps, dtype)
        np.testing.assert_allclose(made.t, t, rtol=1e-6, atol=1e-6)
        assert error(made, theirs) <= tolerance


@pytest.mark.parametrize("steps", [1, 2, 10, 25])
@pytest.mark.parametrize("schedule", [SVD, NoiseSchedule("edm", sigma_min=0.01, sigma_max=80.0)])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [("euler", diffusers.EDMEulerScheduler), ("dpm++2m", diffusers.EDMDPMSolverMultistepScheduler)],
)
def test_edm_equals_diffusers_for_unit_data(schedule: NoiseSchedule, name: str, theirs: Any, steps: int) -> None:
    """With sigma_data 1, EDM's preconditioning is v-prediction."""
    with precision(theirs, np.float64):
        scheduler = theirs(
            sigma_min=schedule.sigma_min,
            sigma_max=schedule.sigma_max,
            sigma_data=1.0,
            prediction_type="v_prediction",
            rho=5.0,
        )
        wanted, t = their_loop(scheduler, steps, np.float64)
    made = solver_table(schedule, "v", Solver(name, "karras", rho=5.0), steps)
    np.testing.assert_allclose(made.t, t, rtol=1e-9)
    assert error(made, wanted) <= 1e-9


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 25, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_flow_matching_equals_diffusers(spacing: str, shift: float, steps: int) -> None:
    grid = {"sigmas": np.linspace(1.0, 1.0 / steps, steps)} if spacing == "trailing" else {}
    with precision(diffusers.FlowMatchEulerDiscreteScheduler, np.float64):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        theirs, t = their_loop(scheduler, steps, np.float64, **grid)
    made = solver_table(NoiseSchedule("flow", shift=shift), "flow", Solver("euler", spacing), steps)
    np.testing.assert_allclose(made.t, t, rtol=1e-9)
    assert error(made, theirs) <= 1e-9
    np.testing.assert_allclose(made.start_alpha + made.start_sigma, 1.0, rtol=1e-15)


@pytest.mark.parametrize(
    ("solver", "first"),
    [
        (Solver("ddim", offset=1, final="first"), 8),
        (Solver("dpm++2m", "linspace"), 8),
        (Solver("dpm++2m", "karras"), 1),
        (Solver("euler", "linspace"), 8),
        (Solver("heun", "linspace"), 16),
        (Solver("euler", "trailing"), 0),
    ],
    ids=str,
)
def test_a_tail_equals_diffusers_from_its_begin_index(solver: Solver, first: int) -> None:
    z, n = np.random.default_rng(3).standard_normal((2, *X_T.shape))
    with precision(SCHEDULERS[solver.name], np.float64):
        scheduler = scheduler_of(SD, "epsilon", solver)
        scheduler.set_timesteps(20)
        timesteps = scheduler.timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = scheduler.add_noise(torch.from_numpy(z), torch.from_numpy(n), timesteps[:1])
        for call, t in enumerate(timesteps):
            m = network(call, scheduler.scale_model_input(x, t).numpy(), float(t))
            x = scheduler.step(torch.from_numpy(m), t, x).prev_sample
    made = solver_table(SD, "epsilon", solver, 20)
    rest = made.tail(first)
    assert len(rest) == len(made) - first
    assert rest.initial == (made.initial if first == 0 else made.start_sigma[first])
    ours = run(rest, made.start_alpha[first] * z + made.start_sigma[first] * n)
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-9, atol=1e-9)
