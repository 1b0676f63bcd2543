"""What a training sample is drawn to be: its noise level, its window of a clip, and the noise on its prior."""

from __future__ import annotations

import torch
from torch import Tensor

from higen.train.settings import ObjectiveSettings

__all__ = ["LATE", "draw_timesteps", "draw_window", "noisy_prior"]

LATE = 0.5
"""Part of a run after which `late_windows` are taken."""


def draw_timesteps(
    count: int, clips: bool, settings: ObjectiveSettings, timesteps: int, random: torch.Generator
) -> Tensor:
    """Timesteps int64 [count] of a schedule of `timesteps`, for pictures or clips."""
    if not settings.high_part and not (clips and settings.clip_levels == "high"):
        return torch.randint(timesteps, (count,), generator=random)
    levels = torch.rand(count, generator=random)
    if clips and settings.clip_levels == "high":
        levels = levels.sqrt()
    high = torch.rand(count, generator=random) < settings.high_part
    levels = torch.where(high, 1 - settings.high_levels * torch.rand(count, generator=random), levels)
    return (levels * timesteps).long().clamp(max=timesteps - 1)


def draw_window(settings: ObjectiveSettings, frames: int, progress: float, random: torch.Generator) -> int:
    """How many frames the clips of a step have; `progress`: the part of the run that is over."""
    choices = settings.late_windows if settings.late_windows and progress > LATE else settings.windows
    return choices[int(torch.randint(len(choices), (), generator=random))] if choices else frames


def noisy_prior(prior: Tensor, settings: ObjectiveSettings, random: torch.Generator) -> Tensor:
    """A clip's prior [C,H,W] as the network is given it: what the spatial stage draws is not exact either."""
    if not settings.prior_noise:
        return prior
    deviation = settings.prior_noise * float(torch.rand((), generator=random))
    return prior + deviation * torch.randn(prior.shape, generator=random)
