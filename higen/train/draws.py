"""Random choices for a training sample: its noise level, its window of a clip, and the noise on its prior."""

from __future__ import annotations

import torch
from torch import Tensor

from higen.train.sections import KNOWN_SETS, ObjectiveSettings

__all__ = ["LATE", "draw_known", "draw_timesteps", "draw_window", "noisy_known", "noisy_prior"]

LATE = 0.5
"""Fraction of a run after which `late_windows` are used."""


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
    """Number of frames in the clips of a step. `progress`: fraction of the run that is done."""
    choices = settings.late_windows if settings.late_windows and progress > LATE else settings.windows
    return choices[int(torch.randint(len(choices), (), generator=random))] if choices else frames


def noisy_prior(prior: Tensor, settings: ObjectiveSettings, random: torch.Generator) -> Tensor:
    """A clip's prior [C,H,W] with noise, as the network receives it: the spatial stage's prior is not exact either."""
    if not settings.prior_noise:
        return prior
    deviation = settings.prior_noise * float(torch.rand((), generator=random))
    return prior + deviation * torch.randn(prior.shape, generator=random)


def draw_known(settings: ObjectiveSettings, frames: int, random: torch.Generator) -> Tensor:
    """Which frames of a clip are given, drawn as the settings say: float32 [frames], 1 if given, else 0. At least one
    frame is not given.

    The length of a prefix is drawn uniformly from 0 to frames - 1 (0 counts as 1), and the place of a single frame
    from all places.
    """
    parts = torch.tensor([settings.known.get(name, 0.0) for name in KNOWN_SETS])
    name = KNOWN_SETS[int(torch.multinomial(parts, 1, generator=random))]
    place, number = torch.arange(frames), int(torch.randint(frames, (), generator=random))
    chance, drawn = torch.rand((), generator=random), torch.rand(frames, generator=random)
    mask = {
        "none": place < 0,
        "first": place == 0,
        "ends": (place == 0) | (place == frames - 1),
        "second": place % 2 == 0,
        "prefix": place < max(number, 1),
        "one": place == number,
        "some": drawn < chance,
    }[name]
    if mask.all():
        mask[number] = False
    return mask.float()


def noisy_known(clip: Tensor, settings: ObjectiveSettings, random: torch.Generator) -> Tensor:
    """Known frames [C,F,H,W] with noise, as the network receives them: frames of drawn clips are not exact either."""
    if not settings.known_noise:
        return clip
    deviation = settings.known_noise * float(torch.rand((), generator=random))
    return clip + deviation * torch.randn(clip.shape, generator=random)
