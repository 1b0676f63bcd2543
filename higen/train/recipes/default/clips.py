"""Training batches of the default model, made from the cached latents: the same step number gives the same batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from higen.conditioning import appearance_cue, appearance_rows, motion_cue
from higen.config import UNetConfig
from higen.train.cues import appearance_factor, appearance_similarity, motion_of
from higen.train.objective import residual_square
from higen.train.recipes.default.data import clip_indices
from higen.train.recipes.default.latents import load_latents
from higen.train.recipes.default.subjects import (
    BACKGROUNDS,
    FRAMES,
    KEY_INDEX,
    SPEEDS,
    STYLES,
    SUBJECTS,
    Speed,
    caption,
    is_held_out,
)

__all__ = ["Batch", "Clips", "Selection"]

EARLY_WINDOWS = ((4, 12), (4, 12), (4, 12), (16, 3))
"""Lengths of the windows cut out of clips, and how many make a batch of 48 frames: mostly short ones, which show the
network more clips a step."""
LATE_WINDOWS = ((4, 12), (8, 6), (16, 3))
"""The same after the part LATE of the run: as many whole clips."""
LATE = 0.7
IMAGES = 12
TOLD = 32
"""Captions per step that are told how much their clips move, no more: no network but the text's runs for them."""
TEXT_DROPOUT = 0.1
UNSPECIFIED = 0.35
"""Part of the clips whose two cues are both left out, so that the text alone says how fast; each alone: CUE_DROPOUT."""
CUE_DROPOUT = 0.15
PRIOR_NOISE = 0.05


@dataclass(frozen=True)
class Batch:
    """x0 [B,32,F,8,8], prior [B,32,8,8] (zeros for images), motion [B,F,D], appearance [B,F,R], captions."""

    x0: Tensor
    prior: Tensor
    motion: Tensor
    appearance: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Selection:
    """Which part of the data is used: indices of the subjects, and whether a clip's measured cues are ever given.

    Batches are `smaller` times (1 or 3) as small.
    """

    subjects: tuple[int, ...] = tuple(range(len(SUBJECTS)))
    motion: bool = True
    appearance: bool = True
    smaller: int = 1


class Clips:
    """Clips and key frames over the latents cache; held-out combinations are left out."""

    def __init__(self, latents: Path, config: UNetConfig, selection: Selection | None = None) -> None:
        cache = load_latents(latents)
        self.config = config
        self.selection = selection or Selection()
        self.loops = {s: cache[f"latents/{SUBJECTS[s].name}"] for s in self.selection.subjects}
        self._squares: dict[tuple[int, int, str], Tensor] = {}
        self.pairs = [(s, b) for s in self.loops for b in range(len(BACKGROUNDS)) if not is_held_out(s, b)]

    def clip(self, subject: int, background: int, speed: float) -> Tensor:
        """Latents of a whole clip, float32 [32, 16, 8, 8]."""
        loop = self.loops[subject]
        indices = clip_indices(loop.shape[1], SUBJECTS[subject].key_frame, speed)
        return loop[background, torch.from_numpy(indices)].float().transpose(0, 1)

    def images(self, random: torch.Generator) -> Batch:
        """Key frames with any caption of theirs; motion 0, appearance 1, no prior."""
        x0, captions = [], []
        count = IMAGES // self.selection.smaller
        for _ in range(count):
            s, b = self._pair(random)
            x0.append(self.loops[s][b, SUBJECTS[s].key_frame].float()[:, None])
            captions.append(self._caption(s, b, SPEEDS[_integer(random, len(SPEEDS))], random))
        motion = torch.from_numpy(motion_cue(0.0, 1, self.config.base_channels))
        appearance = torch.from_numpy(appearance_rows(0.0, 1, self.config.appearance_columns))
        batch = torch.stack(x0)
        return Batch(
            batch,
            torch.zeros_like(batch[:, :, 0]),
            motion.expand(count, -1, -1),
            appearance.expand(count, -1, -1),
            captions,
        )

    def windows(self, random: torch.Generator, progress: float) -> Batch:
        """Windows of whole clips, with the cues of the clip they are cut from; `progress` is 0 to 1 over the run."""
        choices = LATE_WINDOWS if progress > LATE else EARLY_WINDOWS
        length, count = choices[_integer(random, len(choices))]
        parts = [self._window(length, random) for _ in range(count // self.selection.smaller)]
        x0, prior, motion, appearance = (torch.stack([p[i] for p in parts]) for i in range(4))  # type: ignore[misc]
        return Batch(x0, prior, motion, appearance, [p[4] for p in parts])

    def told(self, random: torch.Generator) -> tuple[list[str], Tensor]:
        """Captions of clips without cues, and the mean square [TOLD,F] of their frames' distance from the prior."""
        captions, squares = [], []
        for _ in range(TOLD):
            (s, b), speed = self._pair(random), SPEEDS[_integer(random, len(SPEEDS))]
            if (s, b, speed.name) not in self._squares:
                clip = self.clip(s, b, speed.factor)[None]
                self._squares[s, b, speed.name] = residual_square(clip, clip[:, :, KEY_INDEX])[0]
            captions.append(self._caption(s, b, speed, random))
            squares.append(self._squares[s, b, speed.name])
        return captions, torch.stack(squares)

    def _window(self, length: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
        s, b = self._pair(random)
        speed = self._speed(random)
        clip = self.clip(s, b, speed.factor)  # [32, 16, 8, 8]
        motion, appearance = self._cues(clip, random, free=speed in SPEEDS)
        start = _integer(random, FRAMES - length + 1)
        frames = slice(start, start + length)
        prior = clip[:, KEY_INDEX] + PRIOR_NOISE * _real(random) * torch.randn(
            clip[:, KEY_INDEX].shape, generator=random
        )
        return clip[:, frames], prior, motion[frames], appearance[frames], self._caption(s, b, speed, random)

    def _cues(self, clip: Tensor, random: torch.Generator, free: bool) -> tuple[Tensor, Tensor]:
        """Cues measured from the clip, as a user or as a clip would give them, or left out (only where `free`)."""
        motion = motion_of(clip[None])[0].float()
        if _real(random) < 0.5:
            motion = motion.mean().expand_as(motion)
        similarity = appearance_similarity(clip.transpose(0, 1).flatten(1)[None])
        rows = appearance_rows(
            float(appearance_factor(similarity)) if _real(random) < 0.5 else similarity[0].numpy(),
            FRAMES,
            self.config.appearance_columns,
        )
        both = _real(random) < UNSPECIFIED
        drop_motion, drop_appearance = (both or _real(random) < CUE_DROPOUT for _ in range(2))
        give_motion = self.selection.motion and not (free and drop_motion)
        give_appearance = self.selection.appearance and not (free and drop_appearance)
        return (
            torch.from_numpy(motion_cue(motion.numpy() if give_motion else None, FRAMES, self.config.base_channels)),
            torch.from_numpy(appearance_cue(rows if give_appearance else None, FRAMES, self.config.appearance_columns)),
        )

    def _pair(self, random: torch.Generator) -> tuple[int, int]:
        return self.pairs[_integer(random, len(self.pairs))]

    def _speed(self, random: torch.Generator) -> Speed:
        """One of the named speeds or, as often as two of them, any other that the caption calls by the nearest name."""
        choice = _integer(random, len(SPEEDS) + 2)
        if choice < len(SPEEDS):
            return SPEEDS[choice]
        factor = 0.4 * (2.2 / 0.4) ** _real(random)
        nearest = min((s for s in SPEEDS if s.factor), key=lambda s: abs(math.log(s.factor / factor)))
        return Speed(nearest.name, nearest.phrase, nearest.synonym, factor)

    def _caption(self, s: int, b: int, speed: Speed, random: torch.Generator) -> str:
        if _real(random) < TEXT_DROPOUT:
            return ""
        weights = (0.4, 0.2, 0.15, 0.15, 0.1)
        style = STYLES[int(torch.multinomial(torch.tensor(weights), 1, generator=random))]
        return caption(SUBJECTS[s], BACKGROUNDS[b], speed, style)


def _integer(random: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=random))


def _real(random: torch.Generator) -> float:
    return float(torch.rand((), generator=random))
