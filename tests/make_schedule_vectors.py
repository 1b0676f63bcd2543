"""Write tests/schedule_vectors.json, the numbers of the solvers' tables for Python and C++.

    python tests/make_schedule_vectors.py

Run it after a deliberate change of higen/schedule.py, and read the difference before you commit.
tests/test_schedule.py and engines/cpp/tests/schedule_tests.cpp compare both implementations with the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from higen.errors import HigenError, ManifestError
from higen.schedule import NoiseSchedule, Solver, alphas_cumprod, inversion_table, solver_table

VECTORS = Path(__file__).with_name("schedule_vectors.json")
COLUMNS = ("t", "A", "B", "C", "alpha", "sigma", "noise", "start_alpha", "start_sigma")

SD = {"kind": "scaled_linear"}
LINEAR = {"kind": "linear"}
COSINE = {"kind": "cosine"}
SVD = {"kind": "edm"}
SHIFTED = {"kind": "flow", "shift": 3.0}


def zero_snr(schedule: dict[str, Any]) -> dict[str, Any]:
    return {**schedule, "zero_terminal_snr": True}


def solver(name: str, spacing: str = "leading", **fields: Any) -> dict[str, Any]:
    return {"name": name, "spacing": spacing, **fields}


HIGEN = [solver("ddim", "leading-floor", offset=1, final="first"), solver("dpm++2m", "trailing-ceil")]

# schedule, prediction, solver, steps
CASES: list[tuple[dict[str, Any], str, dict[str, Any], int]] = [
    *((schedule, "v", s, steps) for s in HIGEN for schedule in (SD, zero_snr(SD)) for steps in (1, 7, 16)),
    # As many steps as timesteps, and an offset, so that the first two rows are both at zero SNR.
    *(({**zero_snr(SD), "timesteps": 4}, "v", solver(n, "leading-floor", offset=1), 4) for n in ("ddim", "dpm++2m")),
    (SD, "epsilon", solver("ddim", offset=1, final="first"), 10),
    (SD, "v", solver("ddim", offset=1, final="first"), 3),
    (SD, "sample", solver("ddim"), 4),
    (LINEAR, "epsilon", solver("ddim", "linspace", final="first"), 7),
    (SD, "epsilon", solver("ddim", "trailing"), 3),
    (zero_snr(SD), "v", solver("ddim", "trailing"), 6),
    (zero_snr(COSINE), "v", solver("ddim", offset=1), 5),
    (COSINE, "sample", solver("ddim", "linspace", eta=0.5), 5),
    (SD, "epsilon", solver("ddim", offset=1, final="first", eta=1.0), 6),
    (zero_snr(LINEAR), "v", solver("ddim", "trailing", eta=1.0), 4),
    (SD, "epsilon", solver("ddim"), 1),
    (SD, "epsilon", solver("dpm++2m", offset=1), 6),
    (SD, "v", solver("dpm++2m", "linspace"), 5),
    (SD, "epsilon", solver("dpm++2m", "linspace", final="first"), 16),
    (LINEAR, "sample", solver("dpm++2m", "trailing", final="first"), 5),
    (SD, "epsilon", solver("dpm++2m", "karras"), 7),
    (COSINE, "v", solver("dpm++2m", "karras"), 5),
    (zero_snr(SD), "v", solver("dpm++2m", "trailing"), 5),
    (zero_snr(SD), "sample", solver("dpm++2m", "karras", rho=5.0), 5),
    (SD, "v", solver("dpm++2m", "leading-floor", offset=1, final="first"), 4),
    (SD, "epsilon", solver("euler"), 6),
    (SD, "epsilon", solver("euler", offset=1, final="first"), 4),
    (SD, "v", solver("euler", "linspace"), 6),
    (SD, "sample", solver("euler", "trailing"), 6),
    (LINEAR, "epsilon", solver("euler", "linspace"), 5),
    (SD, "epsilon", solver("euler", "karras"), 6),
    (SD, "v", solver("euler", "karras", final="first", rho=3.0), 4),
    (SD, "v", solver("euler", "karras"), 1),
    (SD, "v", solver("euler", "linspace"), 1),
    (zero_snr(SD), "v", solver("euler", "trailing"), 5),
    (zero_snr(LINEAR), "sample", solver("euler", "karras"), 5),
    (COSINE, "v", solver("euler", "linspace"), 5),
    ({**SD, "timesteps": 100, "beta_start": 0.001, "beta_end": 0.1}, "epsilon", solver("euler", "trailing"), 7),
    (SD, "epsilon", solver("euler_ancestral", "linspace"), 6),
    (SD, "v", solver("euler_ancestral", offset=1), 5),
    (zero_snr(SD), "sample", solver("euler_ancestral", "trailing"), 5),
    (SD, "epsilon", solver("euler_ancestral", "karras"), 5),
    (SD, "epsilon", solver("heun", "linspace"), 4),
    (SD, "v", solver("heun", offset=1), 4),
    (LINEAR, "sample", solver("heun", "trailing"), 4),
    (SD, "epsilon", solver("heun", "karras"), 4),
    (zero_snr(SD), "v", solver("heun", "trailing"), 3),
    (SD, "epsilon", solver("heun", "karras"), 1),
    (SD, "epsilon", solver("lcm"), 4),
    (SD, "epsilon", solver("lcm"), 7),
    (LINEAR, "epsilon", solver("lcm"), 6),
    (zero_snr(SD), "v", solver("lcm", original_steps=20), 3),
    (SD, "epsilon", solver("lcm"), 1),
    (SVD, "v", solver("euler", "karras"), 14),
    (SVD, "v", solver("euler", "karras"), 1),
    ({**SVD, "sigma_min": 0.01, "sigma_max": 80.0}, "v", solver("dpm++2m", "karras", rho=5.0), 6),
    (SVD, "v", solver("heun", "karras"), 4),
    (SVD, "v", solver("euler_ancestral", "karras"), 5),
    (SHIFTED, "flow", solver("euler", "linspace"), 6),
    ({"kind": "flow"}, "flow", solver("euler", "trailing"), 5),
    (SHIFTED, "flow", solver("euler", "trailing"), 1),
]

# Only timesteps, which C++ must round like numpy: ties, and step counts for which numpy.arange gives too many values.
GRIDS = [
    (SD, "v", solver(name, spacing), steps)
    for name in ("ddim", "dpm++2m")
    for spacing in ("leading", "linspace", "trailing")
    for steps in (48, 61)
]

TAILS = [  # schedule, prediction, solver, steps, first row
    (SD, "epsilon", solver("ddim", offset=1, final="first"), 6, 2),
    (SD, "epsilon", solver("dpm++2m", "linspace"), 6, 3),
    (SD, "v", solver("heun", "linspace"), 4, 3),
    (SD, "epsilon", solver("lcm"), 4, 1),
    (SD, "epsilon", solver("euler", "linspace"), 4, 0),
]

INVERSIONS = [  # schedule, prediction, solver, steps, first row
    (zero_snr(SD), "v", solver("ddim", "leading-floor", offset=1, final="first"), 5, 0),
    (zero_snr(SD), "v", solver("dpm++2m", "trailing-ceil"), 6, 2),
    (SD, "epsilon", solver("ddim", offset=1, final="first"), 6, 2),
    (LINEAR, "sample", solver("ddim", final="first"), 3, 1),
    (SD, "v", solver("heun", "linspace"), 4, 3),
    (SD, "epsilon", solver("heun", "karras"), 4, 4),
    (SVD, "v", solver("euler", "karras"), 4, 1),
    (SHIFTED, "flow", solver("euler", "linspace"), 5, 4),
    (SHIFTED, "flow", solver("euler", "trailing"), 1, 0),
]

NOT_INVERTED: list[tuple[dict[str, Any], str, dict[str, Any], int]] = [
    (SD, "epsilon", solver("lcm"), 4),
    (SD, "v", solver("euler_ancestral"), 4),
    (SD, "epsilon", solver("ddim", eta=0.5), 4),
    (SD, "sample", solver("ddim"), 4),
    (LINEAR, "sample", solver("heun", "trailing"), 4),
    (SD, "v", solver("ddim", "karras"), 4),
]

REFUSED: list[tuple[dict[str, Any], str, dict[str, Any], int]] = [
    ({"kind": "sigmoid"}, "v", solver("ddim"), 4),
    ({**SD, "timesteps": 1}, "v", solver("ddim"), 4),
    ({**SD, "beta_start": 0.5}, "v", solver("ddim"), 4),
    ({**LINEAR, "beta_end": 1.5}, "v", solver("ddim"), 4),
    ({**SVD, "sigma_min": 0.0}, "v", solver("euler", "karras"), 4),
    ({**SHIFTED, "shift": 0.0}, "flow", solver("euler", "linspace"), 4),
    (zero_snr(SVD), "v", solver("euler", "karras"), 4),
    (SD, "v", solver("unipc"), 4),
    (SD, "v", solver("ddim", "karras"), 4),
    (SD, "v", solver("euler", "trailing-ceil"), 4),
    (SD, "v", solver("heun", "linspace", final="first"), 4),
    (SD, "v", solver("ddim", "linspace", offset=1), 4),
    (SD, "v", solver("ddim", offset=-1), 4),
    (SD, "v", solver("ddim", offset=1000), 4),
    (SD, "v", solver("ddim", eta=1.5), 4),
    (SD, "v", solver("euler", eta=0.5), 4),
    (SD, "v", solver("euler", "karras", rho=0.0), 4),
    (SD, "v", solver("lcm", original_steps=0), 4),
    (SD, "v", solver("lcm", original_steps=1001), 4),
    (SD, "score", solver("ddim"), 4),
    (SD, "flow", solver("euler"), 4),
    (zero_snr(SD), "epsilon", solver("ddim"), 4),
    (SVD, "epsilon", solver("euler", "karras"), 4),
    (SVD, "v", solver("ddim"), 4),
    (SVD, "v", solver("euler", "linspace"), 4),
    (SVD, "v", solver("euler", "karras", final="first"), 4),
    (SHIFTED, "flow", solver("heun", "linspace"), 4),
    (SHIFTED, "flow", solver("euler"), 4),
    ({**LINEAR, "timesteps": 1000000}, "epsilon", solver("euler", "trailing"), 4),
    (SD, "v", solver("ddim"), 0),
    (SD, "v", solver("ddim"), 1001),
    (SD, "v", solver("dpm++2m"), 1000),
    (SD, "v", solver("lcm"), 51),
]


def table(schedule: dict[str, Any], prediction: str, fields: dict[str, Any], steps: int, first: int = 0) -> Any:
    made = solver_table(NoiseSchedule(**schedule), prediction, Solver(**fields), steps)
    return made.tail(first) if first else made


def inverted(schedule: dict[str, Any], prediction: str, fields: dict[str, Any], steps: int, first: int = 0) -> Any:
    return inversion_table(NoiseSchedule(**schedule), prediction, Solver(**fields), steps, first)


def columns(made: Any, names: tuple[str, ...] = COLUMNS) -> dict[str, Any]:
    return {"initial": made.initial, **{name: getattr(made, name).tolist() for name in names}}


def refusal(make: Callable[..., Any], *arguments: Any) -> dict[str, str]:
    try:
        make(*arguments)
    except HigenError as error:
        return {"error": "manifest" if isinstance(error, ManifestError) else "request", "message": str(error)}
    raise AssertionError(f"{arguments}: not refused")


def case(schedule: dict[str, Any], prediction: str, fields: dict[str, Any], steps: int) -> dict[str, Any]:
    return {"schedule": schedule, "prediction": prediction, "solver": fields, "steps": steps}


def vectors() -> dict[str, list[dict[str, Any]]]:
    """The contents of the file."""
    betas = [SD, zero_snr(SD), LINEAR, zero_snr(LINEAR), COSINE, zero_snr(COSINE), {**LINEAR, "timesteps": 7}]
    return {
        "defaults": [{"schedule": asdict(NoiseSchedule()), "solver": asdict(Solver("ddim"))}],
        "abar": [
            {"schedule": schedule, "every_37th": alphas_cumprod(NoiseSchedule(**schedule))[::37].tolist()}
            for schedule in betas
        ],
        "tables": [{**case(*c), **columns(table(*c))} for c in CASES],
        "grids": [{**case(*c), **columns(table(*c), ("t",))} for c in GRIDS],
        "tails": [{**case(*c[:4]), "first": c[4], **columns(table(*c))} for c in TAILS],
        "refused": [{**case(*c), **refusal(table, *c)} for c in REFUSED],
        "inversions": [{**case(*c[:4]), "first": c[4], **columns(inverted(*c))} for c in INVERSIONS],
        "not_inverted": [{**case(*c), **refusal(inverted, *c)} for c in NOT_INVERTED],
    }


def text() -> str:
    """The file's text, one entry per line. Floats are written by Python's repr, so they read back to the same bits."""
    parts = (
        f'"{name}": [\n' + ",\n".join(json.dumps(entry, allow_nan=False) for entry in entries) + "\n]"
        for name, entries in vectors().items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    VECTORS.write_text(text(), encoding="utf-8")
