"""Solver tables against HiGen's first tables, closed forms and an exactly solved equation; vectors for C++; refusals.

tests/test_schedule_diffusers.py compares the tables with diffusers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_schedule_vectors import VECTORS, table, vectors

from higen.errors import ManifestError, RequestError
from higen.schedule import (
    SOLVERS,
    SPACINGS,
    NoiseSchedule,
    Solver,
    SolverTable,
    alphas_cumprod,
    check,
    max_steps,
    solver_table,
)

SD, LINEAR, COSINE = (NoiseSchedule(kind) for kind in ("scaled_linear", "linear", "cosine"))
ZERO_SNR = NoiseSchedule(zero_terminal_snr=True)
HIGEN_DDIM = Solver("ddim", "leading-floor", offset=1, final="first")
HIGEN_2M = Solver("dpm++2m", "trailing-ceil")
OWN = {"ddim": HIGEN_DDIM, "dpm++2m": HIGEN_2M}
DIVISORS = [n for n in range(1, 1001) if 1000 % n == 0]
COLUMNS = ("t", "A", "B", "C", "alpha", "sigma")

# ---- The noise schedule ----


def test_signal_variance_by_the_reference() -> None:
    beta = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    plain, value = [], 1.0
    for b in beta:
        value *= 1.0 - b
        plain.append(value)
    np.testing.assert_allclose(alphas_cumprod(SD), plain, rtol=1e-12)
    root = [math.sqrt(a) for a in plain]
    shifted = [((r - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 for r in root]
    np.testing.assert_allclose(alphas_cumprod(ZERO_SNR), shifted, rtol=1e-9, atol=1e-16)
    assert alphas_cumprod(ZERO_SNR)[-1] == 0.0
    np.testing.assert_allclose(
        alphas_cumprod(ZERO_SNR)[[0, 1, 501, 981]], [0.99915, 0.99823345, 0.23968224, 6.8865716e-5], rtol=1e-7
    )


def test_cosine_signal_variance_is_nichol_and_dhariwals_until_a_beta_reaches_its_limit() -> None:
    u = (np.arange(1, 901) / 1000 + 0.008) / 1.008
    closed = np.cos(u * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alphas_cumprod(COSINE)[:900], closed, rtol=1e-11)
    assert alphas_cumprod(COSINE)[-1] / alphas_cumprod(COSINE)[-2] == pytest.approx(0.001, rel=1e-12)


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_schedules_without_a_table_of_timesteps(kind: str) -> None:
    with pytest.raises(ManifestError, match=f"kind='{kind}': one of 'linear', 'scaled_linear', 'cosine'"):
        alphas_cumprod(NoiseSchedule(kind))


# ---- HiGen's first tables, from commit 86f7997 ----

FIRST_TABLES = {  # sha256 of the float32 columns
    ("ddim", False): "f723283941fc7a7e005d887f4178f4d714e4ee179711abf957269ced8d3a952c",
    ("ddim", True): "51d66697bcad9b9b19f850a210e9f147b66838634715ec59291c918653a96f79",
    ("dpm++2m", False): "645a851a4c8e7947dc82b3bc11d44336dd56ac618e7719c1e2fdd13195418aaa",
    ("dpm++2m", True): "ff7ead346ecd860a0a9e078d527e99ff32f4f8c1d672aa8509f97ebe47fa46be",
}


@pytest.mark.parametrize(("name", "zero_terminal_snr"), FIRST_TABLES)
def test_higens_tables_keep_their_bits(name: str, zero_terminal_snr: bool) -> None:
    digest = hashlib.sha256()
    for steps in (1, 2, 3, 4, 5, 7, 10, 15, 20, 25, 30, 50, 100, 250, 333, 500, 999, 1000):
        made = solver_table(NoiseSchedule(zero_terminal_snr=zero_terminal_snr), "v", OWN[name], steps)
        assert not made.noise.any()
        assert made.initial == 1.0
        for column in COLUMNS:
            digest.update(getattr(made, column).astype("<f4").tobytes())
    assert digest.hexdigest() == FIRST_TABLES[name, zero_terminal_snr]


def test_higens_tables_of_four_steps() -> None:
    ddim, dpm = (solver_table(ZERO_SNR, "v", solver, 4) for solver in (HIGEN_DDIM, HIGEN_2M))
    assert ddim.t.tolist() == [751, 501, 251, 1]
    assert dpm.t.tolist() == [999, 749, 499, 249]
    np.testing.assert_allclose(ddim.A, [0.94587035, 0.91025252, 0.83080147, 0.999917], rtol=1e-6)
    np.testing.assert_allclose(ddim.B, [-0.32454473, -0.41405356, -0.55656887, -0.012883529], rtol=1e-6)
    np.testing.assert_allclose(dpm.A, [0.98327439, 0.94553003, 1.0033605, 0.80881951], rtol=1e-6)
    np.testing.assert_allclose(dpm.B, [-0.1821304, -0.32553488, -0.57951218, -0.58805696], rtol=1e-6)
    np.testing.assert_allclose(dpm.C, [-0.0, -0.0, -0.18955701, -0.0], rtol=1e-6)


@pytest.mark.parametrize("steps", DIVISORS)
def test_higens_grid_equals_the_references_where_steps_divide_1000(steps: int) -> None:
    reference = np.clip(np.arange(0, 1000, 1000 // steps) + 1, 0, 999)[::-1]
    assert solver_table(ZERO_SNR, "v", HIGEN_DDIM, steps).t.tolist() == reference.tolist()


@pytest.mark.parametrize("steps", [n for n in DIVISORS if n < 500])
def test_ddim_equals_the_references_step_by_step(steps: int) -> None:
    """The reference's ddim_sample, with its form of eps: (x / sqrt(abar) - x0) / sqrt(1 / abar - 1)."""
    abar, made = alphas_cumprod(ZERO_SNR), solver_table(ZERO_SNR, "v", HIGEN_DDIM, steps)
    x, v = np.random.default_rng(steps).standard_normal((2, 64))
    for i, t in enumerate(made.t.astype(int)):
        x0 = math.sqrt(abar[t]) * x - math.sqrt(1.0 - abar[t]) * v
        eps = (x / math.sqrt(abar[t]) - x0) / math.sqrt(1.0 / abar[t] - 1.0)
        previous = abar[max(t - 1000 // steps, 0)]
        expected = math.sqrt(previous) * x0 + math.sqrt(1.0 - previous) * eps
        np.testing.assert_allclose(made.A[i] * x + made.B[i] * v, expected, rtol=1e-9, atol=1e-9)
        assert made.C[i] == 0.0
        x, v = expected, np.cos(3.0 * expected) + 0.1 * v


def test_dpm_solver_is_of_first_order_after_zero_snr_and_at_both_ends() -> None:
    made = solver_table(ZERO_SNR, "v", HIGEN_2M, 20)
    assert made.t[0] == 999
    assert made.alpha[0] == 0.0
    assert made.C[[0, 1, -1]].tolist() == [0.0, 0.0, 0.0]
    assert (made.C[2:-1] != 0).all()
    assert (made.A[-1], made.B[-1]) == (pytest.approx(made.alpha[-1]), pytest.approx(-made.sigma[-1]))


# ---- Tails ----


def test_a_tail_from_the_middle_of_heuns_pair_leaves_its_state_there() -> None:
    made = solver_table(SD, "epsilon", Solver("heun", "linspace"), 6)
    rest, x, m = made.tail(3), 0.7, -0.4
    assert rest.A[0] * x + rest.B[0] * m == pytest.approx(x, rel=1e-12)
    assert rest.C[0] == 0.0
    assert made.C[3] != 0.0  # the table itself is unchanged


@pytest.mark.parametrize("first", [-1, 4, True, 1.0])
def test_a_tail_outside_the_table(first: Any) -> None:
    with pytest.raises(RequestError, match=f"first={first}: a row from 0 to 3"):
        solver_table(SD, "v", HIGEN_2M, 4).tail(first)


# ---- Properties of all tables ----


def everything() -> Iterator[tuple[NoiseSchedule, str, Solver]]:
    """All valid combinations of schedule kind, prediction, and solver with its spacing."""
    kinds = [NoiseSchedule(kind, shift=2.0) for kind in ("linear", "scaled_linear", "cosine", "edm", "flow")]
    kinds += [replace(schedule, zero_terminal_snr=True) for schedule in (SD, LINEAR, COSINE)]
    for schedule, prediction, name, spacing in product(kinds, ("v", "epsilon", "sample", "flow"), SOLVERS, SPACINGS):
        try:
            solver = Solver(name, spacing, offset=int(spacing.startswith("leading") and name != "lcm"))
            check(schedule, prediction, solver)
        except ManifestError:
            continue
        yield schedule, prediction, solver


EVERYTHING = list(everything())


def test_what_goes_together() -> None:
    """3 kinds have 24 grids for each of 3 predictions (2 at zero terminal SNR). EDM has 4 solvers, flow has 2 grids."""
    assert len(EVERYTHING) == (9 + 6) * (5 + 6 + 4 + 4 + 4 + 1) + 4 + 2


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 49, 50, 61, 999, 1000])
def test_every_table_is_finite_and_has_its_rows(steps: int) -> None:
    for schedule, prediction, solver in EVERYTHING:
        if steps > max_steps(schedule, solver):
            continue
        made = solver_table(schedule, prediction, solver, steps)
        assert len(made) == (2 * steps - 1 if solver.name == "heun" else steps)
        for name in (*COLUMNS, "start_alpha", "start_sigma"):
            column = getattr(made, name)
            assert column.dtype == np.float64
            assert column.shape == (len(made),)
            assert np.isfinite(column).all(), (schedule, prediction, solver, name)
        assert made.noise.dtype == np.bool_
        assert (np.diff(made.t) <= 0).all()
        if schedule.kind not in ("edm", "flow"):
            assert 0 <= made.t[-1] <= made.t[0] <= 999
        if schedule.kind != "flow":
            np.testing.assert_allclose(made.start_alpha**2 + made.start_sigma**2, 1.0, rtol=1e-12)


@settings(max_examples=150, deadline=None)
@given(choice=st.sampled_from(EVERYTHING), steps=st.integers(1, 50), eta=st.sampled_from([0.0, 0.4, 1.0]))
def test_a_perfect_prediction_stays_on_its_path(
    choice: tuple[NoiseSchedule, str, Solver], steps: int, eta: float
) -> None:
    """With the exact prediction, a row's x0 is z, and x' = alpha' z + kept n + C noise with kept^2 + C^2 = sigma'^2.

    All is linear in z and n, so they are represented by the unit vectors (1, 0) and (0, 1).
    """
    schedule, prediction, solver = choice
    solver = replace(solver, eta=eta) if solver.name == "ddim" else solver
    made, (z, n) = solver_table(schedule, prediction, solver, steps), np.eye(2)
    for i in range(len(made)):
        alpha, sigma = made.start_alpha[i], made.start_sigma[i]
        x = alpha * z + sigma * n
        m = {"v": alpha * n - sigma * z, "epsilon": n, "sample": z, "flow": n - z}[prediction]
        x0, step = made.alpha[i] * x - made.sigma[i] * m, made.A[i] * x + made.B[i] * m
        if solver.name != "lcm":  # LCM's x0 is c_out z + c_skip x
            np.testing.assert_allclose(x0, z, atol=1e-9)
        step = step + (0.0 if made.noise[i] else made.C[i]) * x0
        fresh = made.C[i] if made.noise[i] else 0.0
        if i + 1 == len(made):
            wanted_alpha, wanted_sigma = 1.0, 0.0
        else:
            wanted_alpha, wanted_sigma = made.start_alpha[i + 1], made.start_sigma[i + 1]
        if solver.name == "ddim" and solver.spacing not in ("leading-floor", "trailing-ceil"):
            target = int(made.t[i]) - 1000 // steps
            abar = alphas_cumprod(schedule)[target] if target >= 0 else 1.0
            wanted_alpha, wanted_sigma = math.sqrt(abar), math.sqrt(1.0 - abar)
        tolerance = 1e-3 if solver.name == "lcm" else 1e-9  # LCM's c_skip is about 1 / (400 t^2)
        assert step[0] == pytest.approx(wanted_alpha, abs=tolerance)
        assert math.hypot(step[1], fresh) == pytest.approx(wanted_sigma, abs=tolerance)


def solve_gaussian(made: SolverTable, spread: float, rows_per_step: int) -> float:
    """Relative error when a quarter of the timesteps is left, for data N(0, spread^2).

    For such data the best prediction is linear, x0 = alpha spread^2 x / var with var = alpha^2 spread^2 + sigma^2, and
    x / sqrt(var) is constant on the exact solution of the probability flow.
    """
    alpha, sigma = made.start_alpha, made.start_sigma
    variance = alpha**2 * spread**2 + sigma**2
    x, previous = math.sqrt(variance[0]), 0.0
    for i in range(len(made)):
        if i % rows_per_step == 0 and made.t[i] in (249, 251):  # a quarter of 1000
            return abs(x / math.sqrt(variance[i]) - 1.0)
        x0 = alpha[i] * spread**2 / variance[i] * x
        v = (alpha[i] * x - x0) / sigma[i]
        x, previous = made.A[i] * x + made.B[i] * v + made.C[i] * previous, x0
    raise AssertionError(f"{made.t}: no timestep to compare at")


@pytest.mark.parametrize(
    ("schedule", "solver", "order", "rows_per_step"),
    [
        (ZERO_SNR, HIGEN_DDIM, 1, 1),
        (ZERO_SNR, HIGEN_2M, 2, 1),
        (SD, HIGEN_DDIM, 1, 1),
        (SD, HIGEN_2M, 2, 1),
        (SD, Solver("euler", "trailing"), 1, 1),
        (SD, Solver("heun", "trailing"), 2, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_order_of_convergence_on_an_equation_solved_exactly(
    schedule: NoiseSchedule, solver: Solver, order: int, rows_per_step: int, spread: float
) -> None:
    tables = [solver_table(schedule, "v", solver, steps) for steps in (40, 100, 200, 500)]
    errors = [solve_gaussian(made, spread, rows_per_step) for made in tables]
    measured = math.log(errors[0] / errors[-1]) / math.log(500 / 40)
    assert measured == pytest.approx(order, abs=0.3), errors


# ---- The vectors shared with C++, and refused input ----


def test_the_vectors_of_cpp_are_these_tables() -> None:
    assert VECTORS.stat().st_size < 200_000
    stored, made = json.loads(VECTORS.read_text(encoding="utf-8")), vectors()
    assert stored.keys() == made.keys()
    for name in made:
        assert len(stored[name]) == len(made[name])
        for ours, theirs in zip(made[name], stored[name], strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                if isinstance(value, (list, float)):
                    np.testing.assert_allclose(value, theirs[key], rtol=1e-13, err_msg=f"{name} {theirs}")
                else:
                    assert value == theirs[key]


@pytest.mark.parametrize(
    "refused", json.loads(VECTORS.read_text(encoding="utf-8"))["refused"], ids=lambda r: r["message"]
)
def test_refusals(refused: dict[str, Any]) -> None:
    wanted: type[Exception] = ManifestError if refused["error"] == "manifest" else RequestError
    with pytest.raises(wanted) as caught:
        table(refused["schedule"], refused["prediction"], refused["solver"], refused["steps"])
    assert str(caught.value) == refused["message"]


@pytest.mark.parametrize("steps", [-1, 2.0, True, "4", None])
def test_wrong_steps(steps: Any) -> None:
    with pytest.raises(RequestError, match=f"steps={steps!r}: a whole number from 1 to 1000"):
        solver_table(SD, "v", HIGEN_DDIM, steps)


def test_numpy_steps() -> None:
    assert len(solver_table(SD, "v", HIGEN_DDIM, np.int64(4))) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda: NoiseSchedule(timesteps=2.5),  # type: ignore[arg-type]
        lambda: NoiseSchedule(beta_end=math.nan),
        lambda: NoiseSchedule("edm", sigma_max=math.inf),
        lambda: NoiseSchedule("flow", shift=math.nan),
        lambda: Solver("ddim", offset=True),
        lambda: Solver("ddim", eta=math.nan),
        lambda: Solver("euler", "karras", rho=math.inf),
    ],
)
def test_impossible_values(change: Callable[[], object]) -> None:
    with pytest.raises(ManifestError):
        change()


def test_a_kind_ignores_the_fields_of_others() -> None:
    assert alphas_cumprod(NoiseSchedule("cosine", beta_start=2.0, sigma_min=-1.0, shift=0.0))[0] < 1
