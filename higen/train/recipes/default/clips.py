"""Training batches of the default model, made from the cached latents: the same step number gives the same batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from higen.errors import TrainingError
from higen.families.higen.cues import appearance_cue, motion_cue
from higen.families.higen.spec import UNetConfig
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
LATE_WINDOWS = ((4, 12), (8, 6), (16, 3), (16, 3))
"""The same after the part LATE of the run: mostly whole clips."""
LATE = 0.5
EARLY = 0.5
IMAGES = 12
TOLD = 32
"""Captions and cues per step that are told how much their clips move, no more: the U-Net does not run for them."""
TEXT_DROPOUT = 0.1
STYLE_PARTS = (0.4, 0.2, 0.15, 0.15, 0.1)
"""How often a caption has each of STYLES."""
CUES = ((False, False), (True, False), (False, True), (True, True))
CUES_PARTS = (0.35, 0.35, 0.15, 0.15)
"""Which of the two cues (motion, appearance) a clip comes with, and how often: as it is asked for, mostly with none or
with one. A clip at a speed without a name has at least one, else nothing would say how fast it is."""
PRIOR_NOISE = 0.05
UNSAID = 0.75
"""Part of the clips with a cue whose caption leaves the speed out, so that the cue decides it."""
SPEED_PARTS = (0.14, 0.27, 0.27, 0.04, 0.28)
"""How often a clip has each of SPEEDS, and any other speed: standing still is soon learned, moving fast is not."""


@dataclass(frozen=True)
class Batch:
    """x0 [B,32,F,8,8], prior [B,32,8,8] (zeros for images), motion [B,F,D], appearance [B,F,R], captions."""

    x0: Tensor
    prior: Tensor
    motion: Tensor
    appearance: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Told:
    """motion [B,F,D] and appearance [B,F,R] cues, captions, and the mean square [B,F] of the frames' distance from the
    prior, which is what a denoiser's gain should make of them."""

    motion: Tensor
    appearance: Tensor
    square: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Selection:
    """Which part of the data is used: indices of the subjects, and whether a clip's measured cues are ever given.

    Subjects in `new` are drawn twice as often in the run's first half.
    """

    subjects: tuple[int, ...] = tuple(range(len(SUBJECTS)))
    motion: bool = True
    appearance: bool = True
    new: tuple[int, ...] = ()


class Clips:
    """Clips and key frames over the latents cache; held-out combinations are left out."""

    def __init__(self, latents: Path, config: UNetConfig, selection: Selection | None = None) -> None:
        """`latents`: the cache's file. Raises TrainingError where it lacks a subject."""
        cache = load_latents(latents)
        self.config = config
        self.selection = selection or Selection()
        names = [SUBJECTS[s].name for s in self.selection.subjects]
        if missing := [name for name in names if f"latents/{name}" not in cache]:
            raise TrainingError(
                f"{latents}: no latents of {', '.join(missing)}; remove it, and `higen train default` makes it again"
            )
        self.loops = {s: cache[f"latents/{SUBJECTS[s].name}"] for s in self.selection.subjects}
        self._no_cues = (
            torch.from_numpy(motion_cue(None, FRAMES, config.base_channels)),
            torch.from_numpy(appearance_cue(None, FRAMES, config.appearance_columns)),
        )
        self.pairs = [(s, b) for s in self.loops for b in range(len(BACKGROUNDS)) if not is_held_out(s, b)]
        self._early_pairs = self.pairs + [pair for pair in self.pairs if pair[0] in self.selection.new]

    def clip(self, subject: int, background: int, speed: float) -> Tensor:
        """Latents of a whole clip, float32 [32, 16, 8, 8]."""
        loop = self.loops[subject]
        indices = clip_indices(loop.shape[1], SUBJECTS[subject].key_frame, speed)
        return loop[background, torch.from_numpy(indices)].float().transpose(0, 1)

    def images(self, random: torch.Generator, progress: float) -> Batch:
        """Key frames with any caption of theirs: motion 0, appearance 1, no prior. `progress`: 0 to 1 over the run."""
        x0, captions = [], []
        for _ in range(IMAGES):
            s, b = self._pair(random, progress)
            x0.append(self.loops[s][b, SUBJECTS[s].key_frame].float()[:, None])
            captions.append(self._caption(s, b, SPEEDS[_integer(random, len(SPEEDS))], random))
        motion = torch.from_numpy(motion_cue(0.0, 1, self.config.base_channels))
        appearance = torch.from_numpy(appearance_cue(0.0, 1, self.config.appearance_columns))
        batch = torch.stack(x0)
        return Batch(
            batch,
            torch.zeros_like(batch[:, :, 0]),
            motion.expand(IMAGES, -1, -1),
            appearance.expand(IMAGES, -1, -1),
            captions,
        )

    def windows(self, random: torch.Generator, progress: float) -> Batch:
        """Windows of whole clips, with the cues of the clip they are cut from."""
        choices = LATE_WINDOWS if progress > LATE else EARLY_WINDOWS
        length, count = choices[_integer(random, len(choices))]
        parts = [self._window(length, random, progress) for _ in range(count)]
        x0, prior, motion, appearance = (torch.stack([p[i] for p in parts]) for i in range(4))  # type: ignore[misc]
        return Batch(x0, prior, motion, appearance, [p[4] for p in parts])

    def told(self, random: torch.Generator, progress: float) -> Told:
        """Whole clips with their captions; half of them with no cue, as most prompts come, the others as windows."""
        parts = []
        for k in range(TOLD):
            s, b = self._pair(random, progress)
            speed = self._speed(random) if k % 2 else SPEEDS[_integer(random, len(SPEEDS))]
            clip = self.clip(s, b, speed.factor)
            square = residual_square(clip[None], clip[None, :, KEY_INDEX])[0]
            motion, appearance, said = self._cues(clip, random, speed) if k % 2 else (*self._no_cues, speed)
            parts.append((motion, appearance, square, self._caption(s, b, said, random)))
        motion, appearance, square = (torch.stack([p[i] for p in parts]) for i in range(3))  # type: ignore[misc]
        return Told(motion, appearance, square, [p[3] for p in parts])

    def _window(
        self, length: int, random: torch.Generator, progress: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
        s, b = self._pair(random, progress)
        speed = self._speed(random)
        clip = self.clip(s, b, speed.factor)  # [32, 16, 8, 8]
        motion, appearance, said = self._cues(clip, random, speed)
        start = _integer(random, FRAMES - length + 1)
        frames = slice(start, start + length)
        prior = clip[:, KEY_INDEX] + PRIOR_NOISE * _real(random) * torch.randn(
            clip[:, KEY_INDEX].shape, generator=random
        )
        return clip[:, frames], prior, motion[frames], appearance[frames], self._caption(s, b, said, random)

    def _cues(self, clip: Tensor, random: torch.Generator, speed: Speed) -> tuple[Tensor, Tensor, Speed]:
        """Cues measured from the clip, as a user or as a clip would give them, or left out where the speed has a name;
        and the speed that the caption should name."""
        motion = motion_of(clip[None])[0].float()
        if _real(random) < 0.5:
            motion = motion.mean().expand_as(motion)
        similarity = appearance_similarity(clip.transpose(0, 1).flatten(1)[None])
        rows = appearance_cue(
            float(appearance_factor(similarity)) if _real(random) < 0.5 else similarity[0].numpy(),
            FRAMES,
            self.config.appearance_columns,
        )
        least = 0 if speed in SPEEDS else 1
        gives_motion, gives_appearance = CUES[least + _weighted(random, CUES_PARTS[least:])]
        gives_motion &= self.selection.motion
        gives_appearance &= self.selection.appearance
        unsaid = _real(random) < UNSAID and (gives_motion or gives_appearance)
        return (
            torch.from_numpy(motion_cue(motion.numpy() if gives_motion else None, FRAMES, self.config.base_channels)),
            torch.from_numpy(
                appearance_cue(rows if gives_appearance else None, FRAMES, self.config.appearance_columns)
            ),
            SPEEDS[1] if unsaid else speed,
        )

    def _pair(self, random: torch.Generator, progress: float) -> tuple[int, int]:
        pairs = self._early_pairs if progress < EARLY else self.pairs
        return pairs[_integer(random, len(pairs))]

    def _speed(self, random: torch.Generator) -> Speed:
        """One of the named speeds or any other, which the caption calls by the nearest name."""
        choice = _weighted(random, SPEED_PARTS)
        if choice < len(SPEEDS):
            return SPEEDS[choice]
        factor = 0.4 * (2.2 / 0.4) ** _real(random)
        nearest = min((s for s in SPEEDS if s.factor), key=lambda s: abs(math.log(s.factor / factor)))
        return Speed(nearest.name, nearest.phrase, nearest.synonym, factor)

    def _caption(self, s: int, b: int, speed: Speed, random: torch.Generator) -> str:
        if _real(random) < TEXT_DROPOUT:
            return ""
        return caption(SUBJECTS[s], BACKGROUNDS[b], speed, STYLES[_weighted(random, STYLE_PARTS)])


def _integer(random: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=random))


def _weighted(random: torch.Generator, parts: Sequence[float]) -> int:
    """An index of `parts`, as often as they say."""
    return int(torch.multinomial(torch.tensor(parts), 1, generator=random))


def _real(random: torch.Generator) -> float:
    return float(torch.rand((), generator=random))
