"""Training batches of the default model from the cached latents. The same step number gives the same batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from higen.errors import TrainingError
from higen.families.higen.spec import UNetConfig
from higen.tokenizer import PromptTokenizer
from higen.train.batches import GIVEN, Batch, GainBatch, StepBatches, clip_cues, picture_cues
from higen.train.draws import draw_known, draw_timesteps, draw_window, noisy_known, noisy_prior
from higen.train.emoji.configuration import recipe
from higen.train.emoji.latent_cache import load_latents
from higen.train.emoji.packs import clip_indices
from higen.train.emoji.subjects import (
    BACKGROUNDS,
    FRAMES,
    SPEEDS,
    STYLES,
    SUBJECTS,
    Speed,
    caption,
    is_held_out,
)
from higen.train.emoji.subjects import (
    KEY_INDEX as KEY,
)
from higen.train.loop import step_generator
from higen.train.objective import residual_square
from higen.train.settings import Settings

__all__ = ["Clips", "EmojiSource", "Pictured", "Selection"]

EARLY = 0.5
"""First part of the run, in which new subjects are drawn more often, as a fraction."""
STYLE_PARTS = (0.4, 0.2, 0.15, 0.15, 0.1)
"""Probability of each of STYLES for a caption."""
UNSAID = 0.75
"""For a clip with a cue: how often the caption leaves out the speed, so that the cue decides it."""
SPEED_PARTS = (0.14, 0.27, 0.27, 0.04, 0.28)
"""Probability of each of SPEEDS, and of any other speed. Standing still is rare, because it is learned sooner than fast
motion."""


@dataclass(frozen=True)
class Pictured:
    """x0 [B,32,F,8,8], prior [B,32,8,8] (zeros for images), motion [B,F,D], appearance [B,F,R], captions. With known
    frames also known [B,32,F,8,8] and mask [B,F]."""

    x0: Tensor
    prior: Tensor
    motion: Tensor
    appearance: Tensor
    captions: list[str]
    known: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Told:
    """motion [B,F,D] and appearance [B,F,R] cues, captions, and the mean square [B,F] of the frames' distance from the
    prior. The gain has to predict this square from the cues and the captions.
    """

    motion: Tensor
    appearance: Tensor
    square: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Selection:
    """The part of the data to use: indices of the subjects, and whether each cue of a clip may be given.

    Subjects in `new` are drawn twice as often in the first half of the run.
    """

    subjects: tuple[int, ...] = tuple(range(len(SUBJECTS)))
    motion: bool = True
    appearance: bool = True
    new: tuple[int, ...] = ()


class Clips:
    """Clips and key frames from the cache of latents. Held-out combinations are left out."""

    def __init__(
        self,
        latents: Path,
        config: UNetConfig,
        selection: Selection | None = None,
        settings: Settings | None = None,
    ) -> None:
        """`latents`: the cache's file. `settings`: None: the recipe's. Raises TrainingError for a missing subject."""
        self.settings = settings or recipe()
        cache = load_latents(latents)
        self.config = config
        self.selection = selection or Selection()
        names = [SUBJECTS[s].name for s in self.selection.subjects]
        if missing := [name for name in names if f"latents/{name}" not in cache]:
            raise TrainingError(
                f"{latents}: no latents of {', '.join(missing)}; remove it, and `higen train default` makes it again"
            )
        self.loops = {s: cache[f"latents/{SUBJECTS[s].name}"] for s in self.selection.subjects}
        self.pairs = [(s, b) for s in self.loops for b in range(len(BACKGROUNDS)) if not is_held_out(s, b)]

    def clip(
        self, subject: int, background: int, speed: float, later: int = 0, warp: float = 0.0, turn: float = 0.0
    ) -> Tensor:
        """Latents of a whole clip, float32 [32, 16, 8, 8]. It starts `later` loop frames after the recipe's clip.
        `warp` and `turn` as in `clip_indices`."""
        loop = self.loops[subject]
        key = SUBJECTS[subject].key_frame + later
        indices = clip_indices(loop.shape[1], key, speed, warp=warp, turn=turn)
        return loop[background, torch.from_numpy(indices)].float().transpose(0, 1)

    def images(self, random: torch.Generator, progress: float) -> Pictured:
        """Key frames, each with one of its captions: motion 0, appearance 1, no prior. `progress`: 0 to 1 over the
        run."""
        x0, captions = [], []
        count = self.settings.data.images
        for _ in range(count):
            s, b = self._pair(random, progress)
            x0.append(self.loops[s][b, SUBJECTS[s].key_frame].float()[:, None])
            captions.append(self._caption(s, b, SPEEDS[_integer(random, len(SPEEDS))], random))
        batch = torch.stack(x0)
        motion, appearance = (cue.expand(count, -1, -1) for cue in picture_cues(self.config))
        return Pictured(batch, torch.zeros_like(batch[:, :, 0]), motion, appearance, captions)

    def windows(self, random: torch.Generator, progress: float) -> Pictured:
        """Windows of whole clips. Each has the cues of the clip from which it is cut."""
        length = draw_window(self.settings.objective, FRAMES, progress, random)
        count = self.settings.data.videos * FRAMES // length
        parts = [self._window(length, random, progress) for _ in range(count)]
        x0, prior, motion, appearance = (torch.stack([p[i] for p in parts]) for i in range(4))  # type: ignore[misc]
        return Pictured(x0, prior, motion, appearance, [p[4] for p in parts])

    def known(self, random: torch.Generator, progress: float) -> Pictured:
        """The same number of windows, with given frames. If a window has a given frame, its clip starts at a random
        phase of the loop, and half of these clips change their speed. Only the given frames can show this phase."""
        objective = self.settings.objective
        length = draw_window(objective, FRAMES, progress, random)
        count = self.settings.data.videos * FRAMES // length
        masks = [draw_known(objective, length, random) for _ in range(count)]
        parts = [self._window(length, random, progress, other=bool(mask.any())) for mask in masks]
        known = torch.stack([noisy_known(part[0], objective, random) for part in parts])
        x0, prior, motion, appearance = (torch.stack([p[i] for p in parts]) for i in range(4))  # type: ignore[misc]
        return Pictured(x0, prior, motion, appearance, [p[4] for p in parts], known, torch.stack(masks))

    def told(self, random: torch.Generator, progress: float) -> Told:
        """Whole clips with their captions. Half of them have no cue, like most prompts; the others have cues as windows
        do."""
        parts = []
        for k in range(self.settings.objective.gain_clips):
            s, b = self._pair(random, progress)
            speed = self._speed(random) if k % 2 else SPEEDS[_integer(random, len(SPEEDS))]
            clip = self.clip(s, b, speed.factor)
            square = residual_square(clip[None], clip[None, :, KEY])[0]
            cues = self._cues(clip, random, speed) if k % 2 else (*self._inputs(clip, given=(False, False)), speed)
            motion, appearance, said = cues
            parts.append((motion, appearance, square, self._caption(s, b, said, random)))
        motion, appearance, square = (torch.stack([p[i] for p in parts]) for i in range(3))  # type: ignore[misc]
        return Told(motion, appearance, square, [p[3] for p in parts])

    def _window(
        self, length: int, random: torch.Generator, progress: float, other: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
        """`other`: the clip starts at another phase than the recipe's. Its prior is still the canonical pose."""
        s, b = self._pair(random, progress)
        speed = self._speed(random)
        clip = key = self.clip(s, b, speed.factor)  # [32, 16, 8, 8]
        if other:
            away, warped, turn = (_real(random) for _ in range(3))
            # Most given frames come from clips that begin near the recipe's phase, such as the model's own.
            away = 0.5 * away**2 * (1 if _real(random) < 0.5 else -1)
            warp = max(0.0, 2 * warped - 1)
            clip = self.clip(s, b, speed.factor, round(away * self.loops[s].shape[1]), warp, turn)
        motion, appearance, said = self._cues(clip, random, speed)
        start = _integer(random, FRAMES - length + 1)
        frames = slice(start, start + length)
        prior = noisy_prior(key[:, KEY], self.settings.objective, random)
        return clip[:, frames], prior, motion[frames], appearance[frames], self._caption(s, b, said, random)

    def _cues(self, clip: Tensor, random: torch.Generator, speed: Speed) -> tuple[Tensor, Tensor, Speed]:
        """Cues measured from the clip, and the speed for the caption. Each cue is given as a single number or as a
        curve, or is left out. Both are left out only if the speed has a name.
        """
        number = self.settings.cues.as_numbers
        numbers = _real(random) < number, _real(random) < number
        least = 0 if speed in SPEEDS else 1
        gives_motion, gives_appearance = GIVEN[least + _weighted(random, self.settings.cues.given[least:])]
        given = gives_motion and self.selection.motion, gives_appearance and self.selection.appearance
        unsaid = _real(random) < UNSAID and any(given)
        return (*self._inputs(clip, numbers, given), SPEEDS[1] if unsaid else speed)

    def _inputs(
        self, clip: Tensor, numbers: tuple[bool, bool] = (False, False), given: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor, Tensor]:
        return clip_cues(self.config, clip, None, numbers, given)

    def _pair(self, random: torch.Generator, progress: float) -> tuple[int, int]:
        pairs = self.pairs
        if progress < EARLY:
            pairs = pairs + [pair for pair in pairs if pair[0] in self.selection.new]
        return pairs[_integer(random, len(pairs))]

    def _speed(self, random: torch.Generator) -> Speed:
        """One of the named speeds, or another speed, for which the caption uses the nearest name."""
        choice = _weighted(random, SPEED_PARTS)
        if choice < len(SPEEDS):
            return SPEEDS[choice]
        factor = 0.4 * (2.2 / 0.4) ** _real(random)
        nearest = min((s for s in SPEEDS if s.factor), key=lambda s: abs(math.log(s.factor / factor)))
        return Speed(nearest.name, nearest.phrase, nearest.synonym, factor)

    def _caption(self, s: int, b: int, speed: Speed, random: torch.Generator) -> str:
        if _real(random) < self.settings.objective.text_dropout:
            return ""
        return caption(SUBJECTS[s], BACKGROUNDS[b], speed, STYLES[_weighted(random, STYLE_PARTS)])


class EmojiSource:
    """The batches of a run over the emoji (`higen.train.batches.Source`).

    Clips have a prior if the network has prior preconditioning. A network without it draws clips from the text, and the
    noise levels of its clips are drawn as for pictures.
    """

    def __init__(self, clips: Clips, tokenizer: PromptTokenizer, timesteps: int) -> None:
        self.clips, self.tokenizer, self.timesteps = clips, tokenizer, timesteps
        self.has_prior = clips.config.prior_preconditioning

    def batches(self, step: int) -> StepBatches:
        """The batches of step `step`."""
        run = self.clips.settings.run
        random, progress = step_generator(run.seed, step), step / run.steps
        wanted = self.clips.settings.data.images
        images = self._batch(self.clips.images(random, progress), False, random) if wanted else None
        drawn = self.clips.known if self.clips.settings.objective.known else self.clips.windows
        videos = self._batch(drawn(random, progress), self.has_prior, random)
        gains = None
        if self.has_prior and self.clips.settings.objective.gain_clips:
            told = self.clips.told(random, progress)
            gains = GainBatch(told.motion, told.appearance, told.square, self._tokens(told.captions))
        return StepBatches(images, videos if self.has_prior else replace(videos, prior=None), gains)

    def _batch(self, drawn: Pictured, levelled: bool, random: torch.Generator) -> Batch:
        """`levelled`: the noise levels are drawn as for clips."""
        t = draw_timesteps(len(drawn.x0), levelled, self.clips.settings.objective, self.timesteps, random)
        noise = torch.randn(drawn.x0.shape, generator=random)
        tokens, given = self._tokens(drawn.captions), (drawn.known, drawn.mask)
        return Batch(drawn.x0, noise, t, drawn.prior, drawn.motion, drawn.appearance, tokens, *given)

    def _tokens(self, captions: list[str]) -> Tensor:
        return torch.from_numpy(self.tokenizer.encode(captions))

    def close(self) -> None:
        """Does nothing, because nothing is open."""


def _integer(random: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=random))


def _weighted(random: torch.Generator, parts: Sequence[float]) -> int:
    """A random index into `parts`, which are its probabilities."""
    return int(torch.multinomial(torch.tensor(parts), 1, generator=random))


def _real(random: torch.Generator) -> float:
    return float(torch.rand((), generator=random))
