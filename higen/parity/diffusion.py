"""Compares sampling, training and their tables with the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higen.conditioning import sinusoid
from higen.errors import FixtureError, RequestError
from higen.families.higen import spec
from higen.families.higen.cues import appearance_cue, motion_cue
from higen.families.higen.network import VelocityPredictor
from higen.families.higen.reference_names import reference_names
from higen.families.higen.spec import ModelConfig
from higen.models.solver_step import SolverStep
from higen.parity.compare import RELATIVE, Difference, compare, largest, refuse_unknown
from higen.parity.fixtures import entry, take
from higen.parity.network import Network, motion_input
from higen.sampler import Plan, denoise
from higen.schedule import alphas_cumprod, solver_table

__all__ = ["misc", "sample", "train"]

RELATIVE_F64 = 1e-12
"""Allowed error of the tables that the reference keeps in float64, relative to their largest value."""
GRADIENT = 1e-3
"""Allowed error of a gradient stored in full, relative to its largest value (see `train`)."""
SAMPLING = 2e-3
"""Allowed error of latents in sampling (two independent implementations differ by 1e-4 to 2.4e-4)."""


class _Stages:
    """Runs the denoising stages of `higen.sampler.denoise` without a model directory."""

    def __init__(self, network: Network) -> None:
        self.stages = {stage.name: stage for stage in spec.stages()}
        networks = {"spatial_unet": network.spatial, "temporal_unet": network.denoiser.unet}
        self.modules = {name: SolverStep(self.stages[name], VelocityPredictor(unet)) for name, unet in networks.items()}

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage on numpy arrays or tensors, without gradients."""
        row = self.stages[stage]
        with torch.no_grad():
            outputs = self.modules[stage](*(torch.as_tensor(tensors[given.name]) for given in row.inputs))
        return dict(zip((out.name for out in row.outputs), outputs, strict=True))

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor as a numpy array."""
        return np.asarray(tensor)


def sample(network: Network, record: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> list[Difference]:
    """Both sampling stages from given noise. The second stage uses the result of the first."""
    steps, guidance = entry(record, "ddim_timesteps", int, where), entry(record, "guide_scale", float, where)
    strength = entry(record, "noise_strength", float, where)
    y, zero_y, spatial_noise, raw, offset, motion, appearance = take(
        tensors, where, "y", "zero_y", "spat_noise", "temp_noise_raw", "offset_noise", "motion_cond", "appearance_cond"
    )
    try:
        table = solver_table(ModelConfig().schedule, "v", spec.DDIM, steps)
    except RequestError as error:
        raise FixtureError(f"{where}: ddim_timesteps: {error}") from error
    batch, frames, dim = len(y), raw.shape[2], network.config.base_channels
    stages = _Stages(network)

    def conditions(motion_rows: Tensor, appearance_rows: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            context, embedding = network.denoiser.conditioner(y, motion_rows, appearance_rows)
            empty, _ = network.denoiser.conditioner(zero_y, motion_rows, appearance_rows)
        return {"context": context, "empty_context": empty, "frame_embedding": embedding}

    def run(stage: str, noise: Tensor, **given: Tensor) -> list[Tensor]:
        plan = Plan(
            loop=stage,
            stage=lambda _: stages.stages[stage],
            conditions=lambda _: given,
            table=table,
            guidance=np.full((len(table), batch, noise.shape[2]), guidance, np.float32),
            seeds=(),
            purpose=0,
        )
        return [noise, *(step.latents for step in denoise(stages, plan, noise.numpy()))]

    still = torch.from_numpy(motion_cue(0.0, 1, dim)).expand(batch, -1, -1)
    unchanged = torch.from_numpy(appearance_cue(1.0, 1, network.config.appearance_columns)).expand(batch, -1, -1)
    key = run("spatial_unet", spatial_noise, **conditions(still, unchanged))
    noise = raw + strength * offset
    prior = key[-1][:, :, 0]
    clip = run("temporal_unet", noise, **conditions(motion_input(motion, frames, dim, where), appearance), prior=prior)

    kept = record.get("temp_traj_steps", [])
    if not all(isinstance(step, int) and 0 <= step < len(table) for step in kept):
        raise FixtureError(f"{where}: temp_traj_steps={kept!r}: steps from 0 to {len(table) - 1}")
    ours = {
        "temp_noise": noise,
        "spat_traj": torch.stack(key[:-1]),
        "spat_data": prior,
        "spat_data_f64": prior,
        "temp_traj": torch.stack([clip[step] for step in kept]) if kept else torch.empty(0),
        "video_data": clip[-1],
        "video_data_f64": clip[-1],
    }
    refuse_unknown(tensors, ours, where)
    found = [
        compare(name, ours[name], stored, allowed=None if name == "temp_noise" else SAMPLING)
        for name, stored in tensors.items()
    ]
    if "timesteps" in record:
        grid = torch.tensor(record["timesteps"])
        found.append(compare("timesteps", torch.from_numpy(table.t), grid, allowed=0.0))
    columns = appearance.shape[2]
    factor, given = record.get("appearance_factor"), record.get("motion_factor")
    if isinstance(factor, (int, float)):
        rows = torch.from_numpy(appearance_cue(factor, frames, columns)).expand(batch, -1, -1)
        found.append(compare("appearance_cond", rows, appearance))
    if isinstance(given, (int, float)):
        found.append(compare("motion_cond", torch.full(motion.shape, float(given)), motion, allowed=0.0))
    return found


def train(network: Network, record: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> list[Difference]:
    """The training loss with given noise: values derived from the clean clip, the loss of each sample, gradients.

    Gradients are those of the mean loss. Some are sums that nearly cancel, so their rounding error has no bound
    relative to their size. `worst_grad_rel_err_fp32_vs_fp64` is the largest relative difference between the reference's
    float32 and float64 gradients (0.8% to 6%). The L2 norm of every gradient may differ by that much. The gradients
    stored in full are well conditioned (differences of 1e-6 occur). Relative to their largest value, they may differ by
    a tenth of that, and by at most 1e-3.
    """
    x0, noise, t, y, motion, appearance = take(
        tensors, where, "x0", "noise", "t", "y", "motion_cond", "appearance_cond"
    )
    frames, dim = x0.shape[2], network.config.base_channels
    abar = torch.from_numpy(alphas_cumprod(ModelConfig().schedule))[t]
    alpha, sigma = (c.float().reshape(-1, 1, 1, 1, 1) for c in (abar.sqrt(), (1.0 - abar).sqrt()))
    xt, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
    prior = x0[:, :, frames // 2] if frames > 1 else torch.zeros_like(x0[:, :, 0])

    network.denoiser.zero_grad(set_to_none=True)
    context, embedding = network.denoiser.conditioner(y, motion_input(motion, frames, dim, where), appearance)
    predicted = network.unet(frames)(xt, t, context, embedding, prior)
    losses = (predicted - v).square().mean(dim=(1, 2, 3, 4))
    losses.mean().backward()

    ours = {"xt": xt, "v_target": v, "spat_prior": prior, "loss": losses}
    if "clip_feats_normalised" in tensors:
        (features,) = take(tensors, where, "clip_feats_normalised")
        ours["sim"] = 5.0 * features @ features.transpose(1, 2) - 4.0  # [B, F, F]
        # With fewer frames than columns the reference does not take this matrix. For one frame it is a row of ones.
        if frames == 1 or frames == appearance.shape[2]:
            tensors["appearance_cond"], ours["appearance_cond"] = appearance, ours["sim"].expand(appearance.shape)
    gradients = _gradients(network)
    network.denoiser.zero_grad(set_to_none=True)
    ours |= {f"grad/{key}": gradient for key, gradient in gradients.items()}
    refuse_unknown(tensors, ours, where)

    worst = entry(record, "worst_grad_rel_err_fp32_vs_fp64", float, where)
    relative = max(RELATIVE, min(worst / 10.0, GRADIENT))
    found = [_motion_of(x0, motion)]
    for name, stored in tensors.items():
        if name.startswith("grad/"):
            # higen's weights lack the reference's kernel axes of length 1.
            gradient = ours[name].reshape(stored.shape) if ours[name].numel() == stored.numel() else ours[name]
            found.append(compare(name, gradient, stored, allowed=relative * largest(stored)))
        else:
            found.append(compare(name, ours[name], stored, _loss_noise(record) if name == "loss" else 0.0))
    if norms := record.get("grad_l2"):
        found.append(_worst_norm(gradients, norms, worst, where))
    return found


def _motion_of(x0: Tensor, stored: Tensor) -> Difference:
    """The motion cue of a clean clip, m = int(10 ||z' - z||): how far 10 ||z' - z|| is outside [m, m + 1).

    The norm is over channels and pixels. One frame has no motion: 0.
    """
    if x0.shape[2] == 1:
        return compare("motion_cond", torch.zeros(len(x0)), stored, allowed=0.0)
    value = 10.0 * x0.double().diff(dim=2).square().sum(dim=(1, 3, 4)).sqrt()
    if value.shape != stored.shape:
        return Difference("motion_cond", math.inf, 0.0)
    outside = torch.maximum(stored - value, value - (stored + 1.0)).clamp_min(0.0)
    return Difference("motion_cond", largest(outside), 1e-6 * largest(value))


def _gradients(network: Network) -> dict[str, Tensor]:
    """Gradients by the reference's names. An unused parameter has a gradient of zeros."""
    names = reference_names(network.config)
    return {
        names[ours]: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for ours, parameter in network.denoiser.named_parameters()
    }


def _worst_norm(gradients: Mapping[str, Tensor], norms: Mapping[str, float], worst: float, where: str) -> Difference:
    """The largest error of a gradient's L2 norm, relative to `worst` times the norm plus 2e-5 of the largest norm."""
    refuse_unknown(norms, gradients, where)
    floor = RELATIVE * max(norms.values())
    return max(
        (
            Difference(f"grad_l2/{key}", abs(float(gradients[key].double().norm()) - norm), worst * norm + floor)
            for key, norm in norms.items()
        ),
        key=lambda difference: difference.used,
    )


def _loss_noise(record: Mapping[str, Any]) -> float:
    """The distance between the reference's losses in float32 and in float64."""
    pairs = zip(record.get("loss", []), record.get("loss_f64", []), strict=True)
    return max((abs(a - b) for a, b in pairs), default=0.0)


def misc(record: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> Iterator[tuple[str, Difference]]:
    """Schedule tables (float64), sinusoids, appearance matrices and timestep grids, by name.

    Only grids of n steps with n a divisor of 1000 are compared: for other n the reference makes more than n steps, or
    starts at zero SNR and divides by zero. higen always makes n steps (higen/schedule.py).
    """
    abar = alphas_cumprod(ModelConfig().schedule)
    with np.errstate(divide="ignore"):
        tables = {
            "alphas_cumprod": abar,
            "betas": 1.0 - abar / np.concatenate([[1.0], abar[:-1]]),
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / abar - 1.0),
        }
    times = tensors.pop("sinusoid_t", None)
    for name, stored in tensors.items():
        ours = tables[name] if name in tables else _cue_table(name, times, where)
        allowed = RELATIVE_F64 * largest(stored) if stored.dtype == torch.float64 else None
        yield name, compare(name, torch.from_numpy(ours), stored, allowed=allowed)
    for steps, grid in (record.get("timesteps") or {}).items():
        if 1000 % int(steps) == 0:
            ddim = torch.from_numpy(solver_table(ModelConfig().schedule, "v", spec.DDIM, int(steps)).t)
            yield f"timesteps_{steps}", compare("timesteps", ddim, torch.tensor(grid), allowed=0.0)


def _cue_table(name: str, values: Tensor | None, where: str) -> NDArray[np.float32]:
    """`sinusoid_dim<D>` of the stored values, or `appearance_f<F>_a<factor>` [F,F]."""
    try:
        if name.startswith("sinusoid_dim") and values is not None:
            return sinusoid(values.numpy(), int(name.removeprefix("sinusoid_dim")))
        if name.startswith("appearance_f"):
            frames, _, factor = name.removeprefix("appearance_f").partition("_a")
            return appearance_cue(float(factor), int(frames), int(frames))
    except ValueError as error:
        raise FixtureError(f"{where}: unknown tensor {name}: {error}") from error
    raise FixtureError(f"{where}: unknown tensor {name}")
