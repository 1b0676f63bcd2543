"""Translates a scheduler_config.json of diffusers into a loop's schedule, prediction and solvers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from higen.errors import CheckpointError, ManifestError
from higen.noise_schedule import NoiseSchedule, Solver, check

__all__ = ["Schedule", "schedule_of"]

Config = Mapping[str, Any]

_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
_UNSUPPORTED = {
    "trained_betas": None,
    "thresholding": False,
    "clip_sample": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}
"""Settings that the tables cannot express, each with its only supported value."""


@dataclass(frozen=True)
class Schedule:
    """The content of a scheduler's configuration. Its own solver is the first of `solvers`.

    notes  lines for the user about what was replaced
    """

    schedule: NoiseSchedule
    prediction: str
    solvers: tuple[Solver, ...]
    notes: tuple[str, ...] = ()


def schedule_of(config: Config, prediction: str | None = None) -> Schedule:
    """Read a scheduler's configuration. `prediction` overrides that of the configuration.

    The other solvers are those that diffusers' `from_config` makes from the same configuration.
    Raises CheckpointError naming an unsupported class or setting, and the nearest supported one.
    """
    kind = config.get("_class_name", "DDIMScheduler")
    notes: tuple[str, ...] = ()
    if kind == "PNDMScheduler":
        kind = "DDIMScheduler"
        notes = ("its scheduler, PNDM, is not supported: DDIM is the default solver instead",)
    if kind not in _SOLVERS:
        near = next((solver for word, solver in _NEAREST if word in kind), "ddim")
        raise CheckpointError(
            f"scheduler {kind}: known are {', '.join(sorted(_SOLVERS))}; take the solver {near!r}, the nearest to it: "
            f"write the configuration of {_CLASS_OF[near]} into scheduler_config.json"
        )
    for name, allowed in _UNSUPPORTED.items():
        if config.get(name, allowed) not in (allowed, None):
            raise CheckpointError(f"scheduler {kind}: {name}={config[name]!r}: only {allowed} is known")
    schedule = _noise_schedule(kind, config)
    given = prediction or _PREDICTIONS.get(config.get("prediction_type", "epsilon"))
    if given is None:
        raise CheckpointError(
            f"scheduler {kind}: prediction_type={config['prediction_type']!r}: one of {', '.join(_PREDICTIONS)}"
        )
    first = _checked(schedule, given, kind, config)
    others = [_row(schedule, given, name, config) for name in _SOLVERS if name != kind]
    return Schedule(schedule, given, (first, *(row for row in others if row is not None)), notes)


def _noise_schedule(kind: str, config: Config) -> NoiseSchedule:
    betas = config.get("beta_schedule", "linear")
    if betas not in _BETAS:
        raise CheckpointError(f"scheduler {kind}: beta_schedule={betas!r}: one of {', '.join(_BETAS)}")
    try:
        return NoiseSchedule(
            _BETAS[betas],
            timesteps=config.get("num_train_timesteps", 1000),
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        )
    except (ManifestError, TypeError) as error:
        raise CheckpointError(f"scheduler {kind}: {error}") from error


def _checked(schedule: NoiseSchedule, prediction: str, kind: str, config: Config) -> Solver:
    """The solver that a configuration names. Raises CheckpointError."""
    try:
        solver = _SOLVERS[kind](config)
        check(schedule, prediction, solver)
    except ManifestError as error:
        raise CheckpointError(f"scheduler {kind}: {error}") from error
    return solver


def _row(schedule: NoiseSchedule, prediction: str, kind: str, config: Config) -> Solver | None:
    """The solver of another scheduler class with the same configuration; None if there is none."""
    own = {"_class_name", "algorithm_type", "solver_order", "solver_type", "use_karras_sigmas", "final_sigmas_type"}
    shared = {name: value for name, value in config.items() if name not in own}
    try:
        return _checked(schedule, prediction, kind, shared)
    except CheckpointError:
        return None


def _leading(config: Config, default: str) -> dict[str, Any]:
    """Spacing and offset. The offset only matters for a leading grid."""
    spacing = config.get("timestep_spacing", default)
    return {"spacing": spacing, "offset": config.get("steps_offset", 0) if spacing == "leading" else 0}


def _on_ratios(name: str) -> Callable[[Config], Solver]:
    def solver(config: Config) -> Solver:
        _only(config, "final_sigmas_type", "zero")
        _only(config, "interpolation_type", "linear")
        _only(config, "timestep_type", "discrete")
        if config.get("use_karras_sigmas") and name != "euler_ancestral":
            return Solver(name, "karras")
        return Solver(name, **_leading(config, "linspace"))

    return solver


def _dpm(config: Config) -> Solver:
    _only(config, "algorithm_type", "dpmsolver++")
    _only(config, "solver_order", 2)
    _only(config, "solver_type", "midpoint")
    _only(config, "final_sigmas_type", "zero")
    if config.get("use_karras_sigmas"):
        return Solver("dpm++2m", "karras")
    return Solver("dpm++2m", **_leading(config, "linspace"))


def _ddim(config: Config) -> Solver:
    final = "zero" if config.get("set_alpha_to_one", True) else "first"
    return Solver("ddim", **_leading(config, "leading"), final=final)


def _lcm(config: Config) -> Solver:
    return Solver("lcm", original_steps=config.get("original_inference_steps", 50))


def _only(config: Config, name: str, allowed: object) -> None:
    if (value := config.get(name, allowed)) != allowed:
        raise ManifestError(f"{name}={value!r}: only {allowed!r} is known")


_SOLVERS: Mapping[str, Callable[[Config], Solver]] = {
    "DDIMScheduler": _ddim,
    "DPMSolverMultistepScheduler": _dpm,
    "EulerDiscreteScheduler": _on_ratios("euler"),
    "EulerAncestralDiscreteScheduler": _on_ratios("euler_ancestral"),
    "HeunDiscreteScheduler": _on_ratios("heun"),
    "LCMScheduler": _lcm,
}
_CLASS_OF = {
    "ddim": "DDIMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
_NEAREST = (
    ("KDPM", "heun"),
    ("UniPC", "dpm++2m"),
    ("DPM", "dpm++2m"),
    ("DEIS", "dpm++2m"),
    ("LMS", "euler"),
    ("Euler", "euler"),
)
