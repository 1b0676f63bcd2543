"""The denoising loop: its calls, and its results against formulas and diffusers.

The formulas are the ODE of Gaussian data, DDIM in eps, and those of windows, edits and fresh noise. diffusers checks a
start in the table's tail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter_model import MANIFEST, Formulas, step
from numpy.typing import NDArray

from higen import noise as streams
from higen.backends import RecordingBackend
from higen.bundle import Bundle
from higen.errors import BackendError
from higen.families.higen import spec
from higen.sampler import Edit, Plan, Step, denoise, initial_state, tail, window_weights
from higen.schedule import NoiseSchedule, Solver, SolverTable, alphas_cumprod, solver_table
from higen.stages import STEP_COLUMNS, Stage
from higen.tables import Windows

SCHEDULE, SD = NoiseSchedule(zero_terminal_snr=True), NoiseSchedule()
SOLVERS = {"ddim": spec.DDIM, "dpm++2m": spec.DPM}
HIGEN = {stage.name: stage for stage in spec.stages()}
SPATIAL = HIGEN["spatial_unet"]
MEAN, STD = 0.7, 0.4
Array = NDArray[np.float32]


def plan_of(table: SolverTable, stage: Stage, x: Array, guidance: float = 1.0, **more: Any) -> Plan:
    """A loop with one stage and one guidance value."""
    conditions = more.pop("conditions", {})
    chosen = more.pop("choose", lambda _: stage)
    values: dict[str, Any] = {
        "loop": "loop",
        "stage": chosen,
        "conditions": lambda _: conditions,
        "table": table,
        "guidance": np.full((len(table), len(x), x.shape[2]), guidance, np.float32),
        "seeds": range(len(x)),
        "purpose": 5,
    }
    return Plan(**(values | more))


def table_of(solver: str, steps: int, schedule: NoiseSchedule = SCHEDULE) -> SolverTable:
    return solver_table(schedule, "v", SOLVERS[solver], steps)


class GaussianData:
    """A denoising stage for data N(MEAN, STD^2), pixel by pixel: the exact E[x0 | x] in place of a network.

    x0 = mean + alpha s^2 / (alpha^2 s^2 + sigma^2) (x - alpha mean), and v = (alpha x - x0) / sigma. The two guidance
    branches are equal here, so guidance has no effect. The stage itself applies the solver's update (higen/stages.py).
    """

    def __init__(self) -> None:
        self.previous: list[Array] = []

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        columns = ("A", "B", "C", "alpha", "sigma")
        row = {name: tensors[name].astype(np.float64).reshape(-1, 1, 1, 1, 1) for name in columns}
        x, alpha, sigma = tensors["latents"], row["alpha"], row["sigma"]
        self.previous.append(tensors["previous"])
        expected = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        v = (alpha * x - expected) / sigma
        x0 = alpha * x - sigma * v
        return {"latents": row["A"] * x + row["B"] * v + row["C"] * tensors["previous"], "previous": x0}

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        return np.asarray(tensor)


def noise(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def solve(solver: str, steps: int, x: Array) -> list[Step]:
    return list(denoise(GaussianData(), plan_of(table_of(solver, steps), SPATIAL, x), x))


def exact(x: Array, start: int, alpha_end: float, sigma_end: float) -> NDArray[np.float64]:
    """On the probability-flow ODE of Gaussian data, (x - alpha mean) / sqrt(alpha^2 s^2 + sigma^2) is constant."""
    abar = alphas_cumprod(SCHEDULE)[start]
    spread = np.sqrt((alpha_end**2 * STD**2 + sigma_end**2) / (abar * STD**2 + 1 - abar))
    solution: NDArray[np.float64] = alpha_end * MEAN + spread * (x - np.sqrt(abar) * MEAN)
    return solution


def error_of(steps: list[Step], x: Array, last: int) -> float:
    """Largest distance to the exact solution before the final `last` steps, where the state is at timestep `t`."""
    t = int(steps[-last].t) if last else 0
    abar = alphas_cumprod(SCHEDULE)[t]
    return float(np.abs(steps[-1 - last].latents - exact(x, int(steps[0].t), abar**0.5, (1 - abar) ** 0.5)).max())


def test_ddim_solves_the_ode_of_gaussian_data() -> None:
    x = noise(2, 4, 1, 3, 3)
    errors = {steps: error_of(solve("ddim", steps, x), x, last=0) for steps in (50, 1000)}
    assert errors[1000] < 5e-3
    assert errors[1000] < errors[50] / 10  # DDIM is of first order


@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_dpm_solver_follows_the_ode_more_closely(steps: int) -> None:
    """Without the last step, because every solver's last step jumps to the expected clean latent."""
    x = noise(2, 4, 1, 3, 3)
    made = solve("dpm++2m", steps, x)
    assert error_of(made, x, last=1) < error_of(solve("ddim", steps, x), x, last=1) / 5
    np.testing.assert_allclose(made[-1].latents, made[-1].previous, atol=1e-6)


def test_one_step_from_pure_noise_is_the_mean() -> None:
    made = solve("dpm++2m", 1, noise(1, 4, 1, 3, 3))
    np.testing.assert_allclose(made[-1].latents, MEAN, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_ddim_is_the_formula_in_eps(steps: int) -> None:
    """Song et al. 2021, equation 12 with sigma 0, for a nonzero signal."""
    x = noise(1, 4, 1, 3, 3)
    abar = alphas_cumprod(SCHEDULE)
    state = x.astype(np.float64)
    made = solve("ddim", steps, x)
    grid = [int(step.t) for step in made]
    for t, after in zip(grid, [*grid[1:], 0], strict=True):
        a, b = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        predicted = MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (state - a * MEAN)
        eps = (state - a * predicted) / b
        state = np.sqrt(abar[after]) * (state - b * eps) / a + np.sqrt(1 - abar[after]) * eps
    np.testing.assert_allclose(made[-1].latents, state, atol=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_feeds_both_outputs_back(solver: str) -> None:
    x, table = noise(2, 4, 1, 3, 3), table_of(solver, 5)
    backend = GaussianData()
    made = list(denoise(backend, plan_of(table, SPATIAL, x), x))
    assert not backend.previous[0].any()
    for handed_in, after in zip(backend.previous[1:], made, strict=False):
        assert handed_in is after.previous
    assert [(s.loop, s.index, s.total, s.stage) for s in made] == [("loop", i, 5, "spatial_unet") for i in range(5)]
    assert [s.t for s in made] == table.t.tolist()


@pytest.mark.parametrize("name", ["spatial_unet", "temporal_unet", "spatial_unet_plain", "temporal_unet_plain"])
def test_the_calls_of_a_loop(tiny_model: Path, name: str) -> None:
    """A call gets exactly the inputs of the stage table; columns have one value per sample."""
    manifest = Bundle.open(tiny_model).manifest
    backend, stage = RecordingBackend(manifest), manifest.stage(name)
    frames = 1 if "spatial" in name else 5
    sizes = {**manifest.fixed, "B": 3, "F": frames, "H": 8, "W": 12}
    conditions = {
        t.name: np.zeros([sizes[n] if isinstance(n, str) else n for n in t.shape], np.float32) for t in stage.conditions
    }
    assert ("prior" in conditions) is ("temporal" in name)
    table, x = table_of("dpm++2m", 4), np.zeros((3, 4, frames, 8, 12), np.float32)
    made = list(denoise(backend, plan_of(table, stage, x, 7.5, conditions=conditions), x))
    assert [called for called, _ in backend.calls] == [name] * 4
    shapes = {key: value.shape for key, value in conditions.items()}
    columns = dict.fromkeys(STEP_COLUMNS, (3,)) | {"guidance": (3, frames)}
    if not stage.guided:
        del columns["guidance"]
        assert not [key for key in conditions if key.startswith("empty_")]
    assert all(shape == {"latents": x.shape, "previous": x.shape, **columns, **shapes} for _, shape in backend.calls)
    assert {t.name for t in stage.inputs} == set(backend.calls[0][1])
    assert made[-1].latents.shape == x.shape


class Columns:
    """Leaves the state unchanged and records its inputs."""

    def __init__(self) -> None:
        self.given: list[tuple[str, dict[str, Any]]] = []

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        self.given.append((stage, tensors))
        return {"latents": tensors["latents"], "previous": tensors["previous"]}

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        return np.asarray(tensor)


def test_the_columns_are_the_rows_of_the_table() -> None:
    x, table, backend = noise(2, 4, 1, 2, 2), table_of("dpm++2m", 6), Columns()
    list(denoise(backend, plan_of(table, SPATIAL, x, 7.5), x))
    for i, (_, tensors) in enumerate(backend.given):
        for name in ("t", "A", "B", "C", "alpha", "sigma"):
            assert tensors[name].dtype == np.float32
            assert tensors[name].tolist() == [np.float32(getattr(table, name)[i])] * 2
        assert tensors["guidance"].dtype == np.float32
        assert tensors["guidance"].tolist() == [[7.5], [7.5]]


def test_nothing_runs_before_a_step_is_asked_for() -> None:
    backend, x = GaussianData(), noise(1, 4, 1, 2, 2)
    steps = denoise(backend, plan_of(table_of("ddim", 50), SPATIAL, x), x)
    assert backend.previous == []
    next(steps)
    next(steps)
    assert len(backend.previous) == 2


def test_each_row_is_run_by_the_stage_of_its_guidance() -> None:
    """Guidance per row, sample and frame. If all of a row's guidance is 1, the plain stage runs the row."""
    two, one = MANIFEST.stage("film_two"), MANIFEST.stage("film_one")
    x, table, backend = noise(2, 2, 3, 2, 2), table_of("ddim", 4), Columns()
    scales = np.ones((4, 2, 3), np.float32)
    scales[1] = [[1, 2, 3], [1, 1, 1]]
    scales[3, 1, 2] = np.nextafter(np.float32(1), np.float32(2))
    plan = plan_of(
        table,
        two,
        x,
        choose=lambda guidance: one if (guidance == 1).all() else two,
        guidance=scales,
    )
    plan = replace(plan, conditions=lambda stage: {"hints": stage.name})
    made = list(denoise(backend, plan, x))
    assert [name for name, _ in backend.given] == ["film_one", "film_two", "film_one", "film_two"]
    assert [s.stage for s in made] == [name for name, _ in backend.given]
    for row, (name, tensors) in enumerate(backend.given):
        assert tensors["hints"] == name  # the conditions of the stage that runs
        assert ("guidance" in tensors) is (name == "film_two")
        if name == "film_two":
            np.testing.assert_array_equal(tensors["guidance"], scales[row])


# ---- The initial state, and a start in the table's tail ----


def test_the_initial_state() -> None:
    unit, added, clean = noise(2, 2, 3, 2, 2), np.full((2, 2, 3, 1, 1), 0.5, np.float32), noise(2, 2, 3, 2, 2) * 3
    plain = table_of("ddim", 10)
    assert plain.initial == 1.0
    assert initial_state(plain, unit) is unit
    euler = solver_table(SD, "epsilon", Solver("euler", "linspace"), 10)
    assert euler.initial < 1.0
    np.testing.assert_array_equal(initial_state(euler, unit, added), np.float32(euler.initial) * unit + added)
    whole = unit + added
    for first in (0, 4, 9):
        made = initial_state(plain, unit, added, clean, first)
        alpha, sigma = np.float32(plain.start_alpha[first]), np.float32(plain.start_sigma[first])
        np.testing.assert_allclose(made, alpha * clean + sigma * whole, atol=1e-6)
        assert made.dtype == np.float32


@pytest.mark.parametrize(
    ("rows", "strength", "first"),
    [(10, 1.0, 0), (10, 0.5, 5), (10, 0.55, 5), (10, 0.0, 9), (10, 0.01, 9), (1, 0.3, 0), (4, 2.0, 0), (7, 0.999, 1)],
)
def test_the_tail_is_rounded_down_and_never_empty(rows: int, strength: float, first: int) -> None:
    assert tail(rows, strength) == first


Made = tuple[Solver, Callable[..., Any]]
BEGINS: dict[str, Made] = {
    "ddim": (
        Solver("ddim", "leading", offset=1),
        lambda **kind: diffusers.DDIMScheduler(**kind, steps_offset=1, clip_sample=False),
    ),
    "dpm++2m": (
        Solver("dpm++2m", "linspace"),
        lambda **kind: diffusers.DPMSolverMultistepScheduler(**kind, final_sigmas_type="zero"),
    ),
    "euler": (
        Solver("euler", "linspace"),
        lambda **kind: diffusers.EulerDiscreteScheduler(**kind, timestep_spacing="linspace"),
    ),
    "heun": (
        Solver("heun", "linspace"),
        lambda **kind: diffusers.HeunDiscreteScheduler(**kind, timestep_spacing="linspace"),
    ),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' warning
@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("name", BEGINS)
def test_a_start_in_the_tail_equals_diffusers_begin_index(name: str, strength: float) -> None:
    """As in diffusers' image-to-image: noise is added at the first timestep of the tail, and the tail is run."""
    solver, make = BEGINS[name]
    steps, kind = 20, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    clean, unit = torch.from_numpy(noise(1, 2, 1, 3, 3)), torch.from_numpy(noise(2, 2, 1, 3, 3)[1:])

    def predicted(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(0.5 * x) + 0.1 * np.sin(t / 100)

    theirs = make(**kind, num_train_timesteps=1000, prediction_type="epsilon")
    theirs.set_timesteps(steps)
    table = solver_table(SD, "epsilon", solver, steps)
    begin = steps - int(steps * strength)
    rows = 2 * begin if name == "heun" else begin
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(rows)
    state = theirs.add_noise(clean, unit, theirs.timesteps[rows : rows + 1])
    for t in theirs.timesteps[rows:]:
        seen = theirs.scale_model_input(state, t)
        state = theirs.step(predicted(seen, float(t)), t, state, return_dict=False)[0]

    def network(x: NDArray[Any], t: NDArray[Any], _: NDArray[Any]) -> NDArray[Any]:
        return predicted(torch.from_numpy(x), float(t.flat[0])).numpy()

    stage = MANIFEST.stage("draft_one")
    x = initial_state(table, unit.numpy(), None, clean.numpy(), rows)
    backend = Formulas(formulas={"draft_one": step(network)})
    conditions = {"hints": np.zeros((1, 1, 3), np.float32)}
    made = list(denoise(backend, plan_of(table, stage, x, conditions=conditions, first=rows), x))
    assert [s.index for s in made] == list(range(len(table) - rows))
    assert made[0].total == len(table) - rows
    # For some solvers diffusers' state is x / alpha. Both states end at alpha 1.
    np.testing.assert_allclose(made[-1].latents, state.numpy(), atol=2e-5 * np.abs(state.numpy()).max(), rtol=0)


# ---- Fresh noise ----


@pytest.mark.parametrize("first", [0, 3])
def test_a_noisy_row_is_handed_the_noise_of_its_own_stream(first: int) -> None:
    table = solver_table(SD, "epsilon", Solver("euler_ancestral", "linspace"), 6)
    assert table.noise.tolist() == [True] * 5 + [False]
    seeds, x, backend = (7, 2**64 - 1), noise(2, 3, 4, 2, 5), Columns()
    list(denoise(backend, plan_of(table, MANIFEST.stage("film_two"), x, seeds=seeds, purpose=9, first=first), x))
    assert len(backend.given) == 6 - first
    for row, (_, tensors) in enumerate(backend.given[:-1], start=first):
        for sample, seed in enumerate(seeds):
            flat = streams.normal(seed, 9 + 2**32 * (row + 1), 4 * 3 * 2 * 5)
            drawn = flat.reshape(4, 3, 2, 5)  # drawn in the order of frames
            np.testing.assert_array_equal(tensors["previous"][sample], drawn.swapaxes(0, 1))
    # The last row gets the output of the call before it.
    assert backend.given[-1][1]["previous"] is backend.given[-2][1]["previous"]


def test_ddim_with_eta_one_is_ddpm() -> None:
    """Ho et al. 2020, equation 7: the posterior's mean and variance."""
    table = solver_table(SD, "epsilon", Solver("ddim", "leading", eta=1.0), 10)
    x, backend = noise(1, 2, 1, 4, 4), Formulas(formulas={"draft_one": step(lambda x, t, _: 0.2 * x + t / 1000)})
    conditions = {"hints": np.zeros((1, 1, 3), np.float32)}
    plan = plan_of(table, MANIFEST.stage("draft_one"), x, conditions=conditions, seeds=(3,), purpose=1)
    made = list(denoise(backend, plan, x))
    abar, state = alphas_cumprod(SD), x.astype(np.float64)
    for row, t in enumerate(table.t.astype(int)):
        before = abar[t - 100] if t >= 100 else 1.0
        alpha = abar[t] / before
        z = (state - np.sqrt(1 - abar[t]) * (0.2 * state + t / 1000)) / np.sqrt(abar[t])
        mean = np.sqrt(before) * (1 - alpha) / (1 - abar[t]) * z + np.sqrt(alpha) * (1 - before) / (1 - abar[t]) * state
        spread = np.sqrt((1 - before) / (1 - abar[t]) * (1 - alpha))
        state = mean + spread * streams.normal(3, 1 + 2**32 * (row + 1), 32).reshape(x.shape)
        np.testing.assert_allclose(made[row].latents, state, atol=2e-5)


# ---- Edits of x0 ----


def edited(solver: Solver, mask: Array, known: Array, x: Array, prediction: str = "epsilon") -> list[Step]:
    stage, table = MANIFEST.stage("film_one"), solver_table(SD, prediction, solver, 6)
    backend = Formulas(formulas={"film_one": step(lambda x, t, _: 0.4 * x + t / 1000)})
    conditions = {"hints": np.zeros((1, 4, 3), np.float32), "still": np.zeros((1, 2, 3, 3), np.float32)}
    return list(denoise(backend, plan_of(table, stage, x, conditions=conditions, edit=Edit(known, mask)), x))


def test_an_edit_steps_as_if_the_network_had_estimated_the_known_latents() -> None:
    """x0* = x0 + mask (known - x0), and the step uses the corresponding m* = (alpha x - x0*) / sigma."""
    solver = Solver("dpm++2m", "linspace")
    x, known = noise(1, 2, 4, 3, 3), noise(1, 2, 4, 3, 3) * 2 + 1
    mask = np.zeros((1, 1, 4, 1, 1), np.float32)
    mask[:, :, 0], mask[:, :, 2] = 1.0, 0.3
    made = edited(solver, mask, known, x)
    table = solver_table(SD, "epsilon", solver, 6)
    state, previous = x.astype(np.float64), np.zeros_like(x, np.float64)
    for row, after in enumerate(made):
        a, b, c, alpha, sigma = (getattr(table, name)[row] for name in ("A", "B", "C", "alpha", "sigma"))
        x0 = alpha * state - sigma * (0.4 * state + table.t[row] / 1000)
        x0 = x0 + mask * (known - x0)
        state, previous = a * state + b * (alpha * state - x0) / sigma + c * previous, x0
        np.testing.assert_allclose(after.latents, state, atol=1e-4)
        np.testing.assert_allclose(after.previous, previous, atol=1e-4)
    np.testing.assert_allclose(made[-1].latents[:, :, 0], known[:, :, 0], atol=1e-5)  # mask 1: fully known
    free = edited(solver, np.zeros_like(mask), known, x)
    np.testing.assert_array_equal(free[-1].latents[:, :, 1], made[-1].latents[:, :, 1])  # frames are independent


def test_an_edit_everywhere_ends_at_the_known_latents() -> None:
    x, known = noise(1, 2, 4, 3, 3), noise(1, 2, 4, 3, 3) + 1
    for prediction in ("epsilon", "v", "sample"):
        made = edited(Solver("ddim"), np.ones((1, 1, 4, 3, 3), np.float32), known, x, prediction)
        np.testing.assert_allclose(made[-1].latents, known, atol=1e-5)


def test_an_edit_of_a_row_that_estimates_nothing_is_refused() -> None:
    table = solver_table(SD, "epsilon", Solver("ddim"), 3)
    table = replace(table, sigma=np.zeros(3))
    x = noise(1, 2, 1, 2, 2)
    edit = Edit(x, np.ones((1, 1, 1, 1, 1), np.float32))
    with pytest.raises(BackendError, match="sigma is 0"):
        list(denoise(Columns(), plan_of(table, MANIFEST.stage("draft_one"), x, edit=edit), x))


# ---- Windows ----


@settings(max_examples=100, deadline=None, derandomize=True)
@given(length=st.integers(1, 12), stride=st.integers(1, 12), frames=st.integers(1, 40))
def test_the_weights_of_every_frame_sum_to_one(length: int, stride: int, frames: int) -> None:
    stride, frames = min(stride, length), max(frames, length + 1)
    made = window_weights(frames, Windows(length, stride))
    total = np.zeros(frames)
    for start, weight in made:
        assert weight.dtype == np.float32
        assert (weight > 0).all()
        total[start : start + length] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    starts = [start for start, _ in made]
    assert starts[0] == 0
    assert starts[-1] == frames - length
    assert all(start == i * stride for i, start in enumerate(starts[:-1]))
    assert starts == sorted(set(starts))


def test_the_weights_by_hand() -> None:
    (a, first), (b, second) = window_weights(6, Windows(4, 2))
    assert (a, b) == (0, 2)
    np.testing.assert_allclose(first, [1, 1, 2 / 3, 1 / 3])
    np.testing.assert_allclose(second, [1 / 3, 2 / 3, 1, 1])


def test_windows_are_one_step_with_the_mixed_prediction() -> None:
    """The network's prediction depends on its window: on the mean of the frames and on the window's hints."""
    stage, windows, frames = MANIFEST.stage("film_two"), Windows(4, 3), 9
    table = solver_table(SD, "epsilon", Solver("dpm++2m", "linspace"), 5)
    x, hints, still = noise(2, 2, frames, 3, 3), noise(2, frames, 3), noise(2, 2, 3, 3)
    empty = np.zeros_like(hints)
    scales = np.random.default_rng(1).uniform(0, 4, (5, 2, frames)).astype(np.float32)

    def network(x: NDArray[Any], t: NDArray[Any], hints: NDArray[Any]) -> NDArray[Any]:
        return 0.3 * x + x.mean(axis=2, keepdims=True) + hints.mean(axis=2)[:, None, :, None, None] + t / 1000

    backend = Formulas(formulas={"film_two": step(network)})
    conditions = {"hints": hints, "empty_hints": empty, "still": still}
    plan = plan_of(table, stage, x, conditions=conditions, guidance=scales, windows=windows)
    made = list(denoise(backend, plan, x))
    assert [arrays["latents"].shape[2] for arrays in backend.of("film_two")] == [4] * 3 * 5
    assert all(arrays["still"].shape == still.shape for arrays in backend.of("film_two"))

    state, previous = x.astype(np.float64), np.zeros_like(x, np.float64)
    for row, after in enumerate(made):
        m = np.zeros_like(state)
        for start, weight in window_weights(frames, windows):
            cut = slice(start, start + 4)
            with_hints, without = (
                network(state[:, :, cut], np.float64(table.t[row]), h[:, cut]) for h in (hints, empty)
            )
            scale = scales[row][:, None, cut, None, None]
            m[:, :, cut] += weight[:, None, None] * (without + scale * (with_hints - without))
        a, b, c, alpha, sigma = (getattr(table, name)[row] for name in ("A", "B", "C", "alpha", "sigma"))
        x0 = alpha * state - sigma * m
        state, previous = a * state + b * m + c * previous, x0
        np.testing.assert_allclose(after.latents, state, atol=2e-4)
        np.testing.assert_allclose(after.previous, previous, atol=2e-4)


def test_a_network_that_sees_frames_one_by_one_is_not_changed_by_windows() -> None:
    stage, x = MANIFEST.stage("film_one"), noise(1, 2, 11, 3, 3)
    table = solver_table(SD, "epsilon", Solver("ddim"), 6)
    conditions = {"hints": noise(1, 11, 3), "still": noise(1, 2, 3, 3)}
    whole, windowed, short = (
        list(denoise(Formulas(), plan_of(table, stage, x, conditions=conditions, windows=windows), x))[-1].latents
        for windows in (None, Windows(4, 2), Windows(11, 2))
    )
    np.testing.assert_allclose(windowed, whole, atol=1e-5)
    np.testing.assert_array_equal(short, whole)  # a clip that fits into the window is one run
