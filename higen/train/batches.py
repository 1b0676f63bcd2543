"""Training batches: latents, noise and cues of the samples of a step.

Each sample draws from its own generator (seed, kind, step, index), in a fixed order. Therefore neither the number of
processes nor a restart changes the draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higen.errors import PromptWarning, SettingsError, quoted
from higen.families.higen.cues import appearance_cue, motion_cue
from higen.families.higen.spec import ModelConfig, UNetConfig
from higen.tokenizer import PromptTokenizer
from higen.train.cues import appearance_factor, appearance_similarity, motion_of
from higen.train.data import VIDEO
from higen.train.draws import draw_known, draw_timesteps, noisy_known, noisy_prior
from higen.train.objective import residual_square
from higen.train.reader import Sample
from higen.train.settings import CueSettings, ObjectiveSettings, key_index

__all__ = ["GIVEN", "Batch", "Batches", "GainBatch", "Source", "StepBatches", "clip_cues", "generator", "picture_cues"]

GIVEN = ((False, False), (True, False), (False, True), (True, True))
"""Whether motion and appearance are given, for each number of `cues.given`."""


class _Columns:
    """Tensors with the samples as first axis. A column that is None is left out."""

    def _with(self, columns: Iterable[Tensor | None]) -> Self:
        return type(self)(*columns)

    @property
    def _columns(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Self:
        """The same samples on another device."""
        return self._with(None if column is None else column.to(device, non_blocking=True) for column in self._columns)

    def pin_memory(self) -> Self:
        """The same samples in memory from which a GPU copies fast. PyTorch's DataLoader calls this."""
        return self._with(None if column is None else column.pin_memory() for column in self._columns)

    def split(self, parts: int) -> list[Self]:
        """The samples in `parts` batches of the same size."""
        chunks = [[None] * parts if column is None else column.chunk(parts) for column in self._columns]
        return [self._with(rows) for rows in zip(*chunks, strict=True)]


@dataclass(frozen=True)
class Batch(_Columns):
    """x0 and noise [B,C,F,H,W], t int64 [B], prior [B,C,H,W] (zeros for pictures; None: clips are drawn without one),
    motion [B,F,D], appearance [B,F,R], tokens int64 [B,L]. With known frames: known [B,C,F,H,W], every frame as the
    network would receive it, and mask [B,F], 1 for the given frames. strength [B]: strength of the adapters for each
    sample (None: 1).
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    prior: Tensor | None
    motion: Tensor
    appearance: Tensor
    tokens: Tensor
    known: Tensor | None = None
    mask: Tensor | None = None
    strength: Tensor | None = None

    def chosen(self, rows: Tensor) -> Batch:
        """Only these samples."""
        return self._with(None if column is None else column[rows] for column in self._columns)


@dataclass(frozen=True)
class GainBatch(_Columns):
    """motion [B,F,D] and appearance [B,F,R] of whole clips, the mean square [B,F] of the frames' distance from the
    prior (`objective.residual_square`), tokens int64 [B,L].
    """

    motion: Tensor
    appearance: Tensor
    square: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class StepBatches:
    """A process's samples in a step: pictures, clips, and clips that train only the gain. None: no such samples."""

    images: Batch | None = None
    videos: Batch | None = None
    gains: GainBatch | None = None

    def to(self, device: torch.device) -> StepBatches:
        """The same samples on another device."""
        images, videos, gains = self._kinds
        return StepBatches(images and images.to(device), videos and videos.to(device), gains and gains.to(device))

    def pin_memory(self) -> StepBatches:
        """The same samples in memory from which a GPU copies fast."""
        images, videos, gains = self._kinds
        return StepBatches(images and images.pin_memory(), videos and videos.pin_memory(), gains and gains.pin_memory())

    @property
    def _kinds(self) -> tuple[Batch | None, Batch | None, GainBatch | None]:
        return self.images, self.videos, self.gains

    def split(self, parts: int) -> list[StepBatches]:
        """The samples in `parts` batches of the same size."""
        kinds = self._kinds
        columns = ([None] * parts if batch is None else batch.split(parts) for batch in kinds)
        return [StepBatches(*rows) for rows in zip(*columns, strict=True)]

    def evenly(self) -> list[tuple[float, float, StepBatches]]:
        """Parts with samples of one kind and one adapter strength each: the strength, the part's share of the samples
        of its kind, and the part. The losses of the parts, weighted by their shares, add up to the loss of the whole.
        Samples without strengths and clips that train the gain have strength 1.
        """
        found = []
        for kind in self.singly():
            batch = kind.images or kind.videos
            if batch is None or batch.strength is None:
                return [(1.0, 1.0, self)]
            for strength in batch.strength.unique().tolist():
                rows = (batch.strength == strength).nonzero()[:, 0]
                some = batch.chosen(rows)
                part = StepBatches(images=some) if kind.images else StepBatches(videos=some)
                found.append((strength, len(rows) / len(batch.strength), part))
        return found

    def singly(self) -> list[StepBatches]:
        """The same samples, with one kind in each element."""
        alone = (StepBatches(images=self.images), StepBatches(videos=self.videos), StepBatches(gains=self.gains))
        return [batches for batches, batch in zip(alone, self._kinds, strict=True) if batch is not None]


class Source(Protocol):
    """Yields the batches of a run."""

    def batches(self, step: int) -> StepBatches:
        """This process's batches of step `step`, on its device. They depend only on the seed and the step."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


def generator(seed: int, kind: int, step: int, index: int) -> torch.Generator:
    """The random numbers of one sample."""
    state = np.random.SeedSequence([seed, kind, step, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class Batches:
    """Turns the samples of a step into a batch."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PromptTokenizer,
        cues: CueSettings,
        objective: ObjectiveSettings,
        seed: int,
        key_frame: float = 0.5,
        strengths: bool = False,
    ) -> None:
        """`strengths`: batches contain the strength of the adapters for each sample.

        Raises SettingsError for settings that the model does not support: unspecified cues, clips that train the gain,
        and known frames.
        """
        left_out = {"dropout": cues.dropout, "given": list(cues.given) if any(cues.given[:3]) else 0}
        for name, value in left_out.items():
            if value and not config.optional_cues:
                raise SettingsError(
                    f"cues.{name}={value}: {config.name} takes no unspecified cues; "
                    "leave it out, or train an architecture with optional_cues = true"
                )
        if objective.known and not config.unet.takes_known:
            raise SettingsError(
                f"objective.known={objective.known}: {config.name} takes no known frames; "
                "model.known_frames = true gives it inputs for them"
            )
        if objective.gain_clips and not config.unet.prior_preconditioning:
            raise SettingsError(f"objective.gain_clips={objective.gain_clips}: {config.name} has no gain to train")
        self.config, self.tokenizer, self.cues, self.objective, self.seed = config, tokenizer, cues, objective, seed
        self.key_frame, self.strengths = key_frame, strengths
        self.noise_mix = config.defaults.noise_mix if objective.noise_mix is None else objective.noise_mix
        self._warned = False

    def batch(self, samples: list[Sample], kind: int, step: int, indices: range, length: int | None = None) -> Batch:
        """The batch of samples `indices` of a step, all of one kind; clips are cut to `length` frames."""
        rows = [
            self._row(sample, kind, generator(self.seed, kind, step, index), length)
            for sample, index in zip(samples, indices, strict=True)
        ]
        strength = torch.tensor([sample.scale for sample in samples]) if self.strengths else None
        return replace(Batch(*(torch.stack(column) for column in zip(*rows, strict=True))), strength=strength)

    def gains(self, samples: list[Sample], step: int, indices: range) -> GainBatch:
        """The clips of a step that train the gain. If the model knows unspecified cues, every second clip has no cues,
        because most prompts come without cues.
        """
        rows = []
        for sample, index in zip(samples, indices, strict=True):
            random = generator(self.seed, VIDEO, step, index)
            clip = sample.encoded.sample(random)
            drop_text, *chances = torch.rand(5, generator=random, dtype=torch.float64).tolist()
            bare = self.config.optional_cues and index % 2 == 0
            motion, appearance = self._clip_cues(clip, sample.encoded.features, chances, bare)
            prior = clip[:, key_index(clip.shape[1], self.key_frame)]
            caption = "" if drop_text < self.objective.text_dropout else sample.caption
            tokens = torch.from_numpy(self._tokens(caption))
            rows.append((motion, appearance, residual_square(clip[None], prior[None])[0], tokens))
        return GainBatch(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _row(self, sample: Sample, kind: int, random: torch.Generator, length: int | None) -> tuple[Tensor, ...]:
        clip = sample.encoded.sample(random)  # [C, F, H, W]
        frames = clip.shape[1]
        window = slice(0, frames)
        if kind == VIDEO and length is not None and length < frames:
            start = int(torch.randint(frames - length + 1, (), generator=random))
            window = slice(start, start + length)
        x0 = clip[:, window]
        (t,) = draw_timesteps(1, kind == VIDEO, self.objective, self.config.schedule.timesteps, random)
        noise = torch.randn(x0.shape, generator=random)
        offset = torch.randn((*x0.shape[:2], 1, 1), generator=random)
        drop_text, *chances = torch.rand(5, generator=random, dtype=torch.float64).tolist()
        caption = "" if drop_text < self.objective.text_dropout else sample.caption
        if kind == VIDEO:
            motion, appearance = self._clip_cues(clip, sample.encoded.features, chances)
            prior = noisy_prior(clip[:, key_index(frames, self.key_frame)], self.objective, random)
        else:
            motion, appearance = picture_cues(self.config.unet)
            prior = torch.zeros_like(x0[:, 0])
        tokens = torch.from_numpy(self._tokens(caption))
        noise = noise + self.objective.offset_noise * offset
        if self.noise_mix:
            noise = noise + self.noise_mix * prior[:, None]
        row = x0, noise, t, prior, motion[window], appearance[window], tokens
        if kind != VIDEO or not self.objective.known:
            return row
        mask = draw_known(self.objective, x0.shape[1], random)
        return *row, noisy_known(x0, self.objective, random), mask

    def _tokens(self, caption: str) -> NDArray[np.int64]:
        """A caption's tokens. Only the first warning of the tokenizer is passed on."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptWarning)
            tokens = self.tokenizer.encode([caption])[0]
        if caught and not self._warned:
            self._warned = True
            text = f"caption {quoted(caption)}: {caught[0].message}; other captions are not reported"
            warnings.warn(text, PromptWarning, stacklevel=2)
        return tokens

    def _clip_cues(
        self, clip: Tensor, features: Tensor | None, chances: list[float], bare: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The motion [F,D] and appearance [F,R] input of a clip [C,F,H,W]. `chances`: four random numbers from 0 to 1
        that decide how the cues are given.
        """
        told_motion, told_appearance, without_motion, without_appearance = chances
        numbers = told_motion < self.cues.as_numbers, told_appearance < self.cues.as_numbers
        given = without_motion >= self.cues.dropout, without_appearance >= self.cues.dropout
        if self.cues.given:
            place = int(np.searchsorted(np.cumsum(self.cues.given), without_motion, side="right"))
            given = GIVEN[min(place, len(GIVEN) - 1)]
        return clip_cues(self.config.unet, clip, features, numbers, (False, False) if bare else given)


def clip_cues(
    config: UNetConfig, clip: Tensor, features: Tensor | None, numbers: tuple[bool, bool], given: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The motion [F,D] and appearance [F,R] input of a clip [C,F,H,W], measured from it.

    features  [F,D]; the cosine between frames measures the appearance. None: the latents are used
    numbers   whether motion and appearance are given as a single number, as users give them
    given     whether motion and appearance are given at all
    """
    frames = clip.shape[1]
    motion = motion_of(clip[None])[0].double().numpy()
    similarity = appearance_similarity((clip.transpose(0, 1).flatten(1) if features is None else features)[None])
    appearance: float | NDArray[np.float32] = similarity[0].numpy()
    if numbers[0]:
        motion = np.full_like(motion, motion.mean())
    if numbers[1]:
        appearance = float(appearance_factor(similarity))
    return (
        torch.from_numpy(motion_cue(motion if given[0] else None, frames, config.base_channels)),
        torch.from_numpy(appearance_cue(appearance if given[1] else None, frames, config.appearance_columns)),
    )


def picture_cues(config: UNetConfig) -> tuple[Tensor, Tensor]:
    """The motion [1,D] and appearance [1,R] input of a still picture."""
    return (
        torch.from_numpy(motion_cue(0.0, 1, config.base_channels)),
        torch.from_numpy(appearance_cue(0.0, 1, config.appearance_columns)),
    )
