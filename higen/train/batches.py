"""Training batches: latents, noise and cues of the samples of a step.

Each sample draws from a generator of its own (seed, kind, step, index), in a fixed order, so that neither the number
of processes nor a restart changes what it draws.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higen.errors import PromptWarning, SettingsError, quoted
from higen.families.higen.cues import appearance_cue, motion_cue
from higen.families.higen.spec import ModelConfig
from higen.tokenizer import PromptTokenizer
from higen.train.cues import appearance_factor, appearance_similarity, motion_of
from higen.train.data import VIDEO
from higen.train.reader import Sample
from higen.train.settings import CueSettings, ObjectiveSettings

__all__ = ["Batch", "Batches", "Source", "StepBatches", "generator"]


@dataclass(frozen=True)
class Batch:
    """x0 and noise [B,C,F,H,W], t int64 [B], prior [B,C,H,W] (zeros for pictures), motion [B,F,D],
    appearance [B,F,R], tokens int64 [B,L].
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    prior: Tensor
    motion: Tensor
    appearance: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def split(self, parts: int) -> list[Batch]:
        """The samples in `parts` batches of the same size."""
        columns = (getattr(self, f.name).chunk(parts) for f in fields(self))
        return [Batch(*rows) for rows in zip(*columns, strict=True)]


@dataclass(frozen=True)
class StepBatches:
    """What a process trains on in a step; None: nothing of the kind."""

    images: Batch | None
    videos: Batch | None

    def split(self, parts: int) -> list[StepBatches]:
        """The samples in `parts` batches of the same size."""
        columns = (None if batch is None else batch.split(parts) for batch in (self.images, self.videos))
        images, videos = ([None] * parts if column is None else column for column in columns)
        return [StepBatches(*pair) for pair in zip(images, videos, strict=True)]

    def singly(self) -> list[StepBatches]:
        """The same, each kind alone."""
        images = [] if self.images is None else [StepBatches(self.images, None)]
        return images if self.videos is None else [*images, StepBatches(None, self.videos)]


class Source(Protocol):
    """Yields the batches of a run."""

    def batches(self, step: int) -> StepBatches:
        """This process's batches of step `step`, on its device: a function of the seed and the step alone."""
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
    ) -> None:
        """Raises SettingsError for cue dropout with a model that does not know unspecified cues."""
        if cues.dropout and not config.optional_cues:
            raise SettingsError(
                f"cues.dropout={cues.dropout}: {config.name} takes no unspecified cues; "
                "0, or an architecture with optional_cues = true"
            )
        self.config, self.tokenizer, self.cues, self.objective, self.seed = config, tokenizer, cues, objective, seed
        self._warned = False

    def batch(self, samples: list[Sample], kind: int, step: int, indices: range) -> Batch:
        """The batch of samples `indices` of a step, all of one kind."""
        rows = [
            self._row(sample, kind, generator(self.seed, kind, step, index))
            for sample, index in zip(samples, indices, strict=True)
        ]
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _row(self, sample: Sample, kind: int, random: torch.Generator) -> tuple[Tensor, ...]:
        x0 = sample.encoded.sample(random)  # [C, F, H, W]
        t = torch.randint(self.config.schedule.timesteps, (), generator=random)
        noise = torch.randn(x0.shape, generator=random)
        offset = torch.randn((*x0.shape[:2], 1, 1), generator=random)
        drop_text, *chances = torch.rand(5, generator=random, dtype=torch.float64).tolist()
        caption = "" if drop_text < self.objective.text_dropout else sample.caption
        if kind == VIDEO:
            motion, appearance = self._clip_cues(x0, sample.encoded.features, chances)
            prior = x0[:, x0.shape[1] // 2]
        else:
            motion = motion_cue(0.0, 1, self.config.unet.base_channels)
            appearance = appearance_cue(0.0, 1, self.config.unet.appearance_columns)
            prior = torch.zeros_like(x0[:, 0])
        tokens = self._tokens(caption)
        return (
            x0,
            noise + self.objective.offset_noise * offset,
            t,
            prior,
            torch.from_numpy(motion),
            torch.from_numpy(appearance),
            torch.from_numpy(tokens),
        )

    def _tokens(self, caption: str) -> NDArray[np.int64]:
        """A caption's tokens; what the tokenizer has to say against captions is said once."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptWarning)
            tokens = self.tokenizer.encode([caption])[0]
        if caught and not self._warned:
            self._warned = True
            text = f"caption {quoted(caption)}: {caught[0].message}; other captions are not reported"
            warnings.warn(text, PromptWarning, stacklevel=2)
        return tokens

    def _clip_cues(
        self, x0: Tensor, features: Tensor | None, chances: list[float]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The motion [F,D] and appearance [F,R] input of a clip [C,F,H,W], measured from it."""
        frames, unet = x0.shape[1], self.config.unet
        motion = motion_of(x0[None])[0].double().numpy()
        if features is None:
            features = x0.transpose(0, 1).flatten(1)
        similarity = appearance_similarity(features[None])
        appearance: float | NDArray[np.float32] = similarity[0].numpy()
        told_motion, told_appearance, without_motion, without_appearance = chances
        if told_motion < self.cues.as_numbers:
            motion = np.full_like(motion, motion.mean())
        if told_appearance < self.cues.as_numbers:
            appearance = float(appearance_factor(similarity))
        return (
            motion_cue(None if without_motion < self.cues.dropout else motion, frames, unet.base_channels),
            appearance_cue(
                None if without_appearance < self.cues.dropout else appearance, frames, unet.appearance_columns
            ),
        )
