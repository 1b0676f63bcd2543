"""The figures of `higen evaluate`, from a clip's measures to measures.json (see evaluate.py for what they mean).

A figure that was not measured is None, and does not appear in the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

from higen.train.emoji.evaluation.plan import Row
from higen.typed_json import LATER

__all__ = [
    "AskedDistances",
    "ColumnFigures",
    "CueFigures",
    "Distances",
    "FrechetFigures",
    "GroupFigures",
    "KnownCase",
    "KnownFigures",
    "Means",
    "Measures",
    "SpeedFigures",
    "SubjectFigures",
]


@dataclass(frozen=True, kw_only=True)
class Means:
    """Means of the rows' fields of the same names."""

    identity: float
    template: float
    correlation: float
    background: float
    psnr: float
    psnr_copy: float
    psnr_real_copy: float
    beats_copy: float
    beats_mean: float
    beats_real_copy: float
    flicker: float
    speckle: float
    sharpness: float
    difference: float

    @classmethod
    def of(cls, rows: Sequence[Row], **others: Any) -> Self:
        """The means over `rows`, at least one, together with the other fields of this class."""
        names = [mean.name for mean in fields(Means)]
        return cls(**{name: float(np.mean([getattr(row, name) for row in rows])) for name in names}, **others)


@dataclass(frozen=True, kw_only=True)
class ColumnFigures(Means):
    """The generated clips of a group, or the real clips for the same requests.

    motion_ratio       median of the motion divided by the real clip's
    template_relative  mean of the correlation divided by the real clip's
    template_close     fraction of the clips with a correlation of at least 0.85 of the real clip's
    still              mean difference of frames, in levels, of the clips with the words "standing still"
    """

    motion_ratio: float
    template_relative: float
    template_close: float
    still: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class SpeedFigures(Means):
    """The clips of a group with one requested speed."""

    clips: int


@dataclass(frozen=True, kw_only=True)
class SubjectFigures(Means):
    """The clips of one subject, over both groups, with the rank correlations of requested and measured cues."""

    clips: int
    motion_spearman: float | None = field(default=None, metadata=LATER)
    appearance_spearman: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Frechet distances to a draw of real clips. `floor`: distance of a second draw; `ratio`: generated / floor."""

    generated: float
    codec: float
    real: float
    floor: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class AskedDistances:
    """Frechet distances to the real clips of the requests."""

    generated: float
    codec: float


@dataclass(frozen=True, kw_only=True)
class FrechetFigures(Distances):
    """Distances to draws of any clips, to draws of the same composition (`alike`), and to the requested clips."""

    alike: Distances
    asked: AskedDistances


@dataclass(frozen=True, kw_only=True)
class GroupFigures:
    """A group of combinations, held out or trained. The keys of `by_speed` are names of `SPEEDS`."""

    clips: int
    generated: ColumnFigures
    codec: ColumnFigures
    real: ColumnFigures
    by_speed: dict[str, SpeedFigures]
    frechet: FrechetFigures

    @property
    def columns(self) -> tuple[ColumnFigures, ColumnFigures, ColumnFigures]:
        """The columns generated, codec and real."""
        return self.generated, self.codec, self.real


@dataclass(frozen=True, kw_only=True)
class CueFigures:
    """How well a cue is followed that was requested as a number: rank correlations of requested and measured cue.

    spearman         within a subject, as a mean over the subjects
    spearman_moving  the same without the request for 0
    spearman_pooled  over all clips
    codec, codec_pooled  spearman and spearman_pooled of the real clips through the codec
    zero             median difference of frames, in levels, of the clips with requested motion 0
    usual            the same of held-out clips from text at normal speed
    zero_part, zero_part_worst  the median and the largest difference at motion 0, divided by `usual`
    """

    clips: int
    spearman: float
    spearman_moving: float
    spearman_pooled: float
    codec: float
    codec_pooled: float
    zero: float | None = field(default=None, metadata=LATER)
    usual: float | None = field(default=None, metadata=LATER)
    zero_part: float | None = field(default=None, metadata=LATER)
    zero_part_worst: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class KnownCase:
    """The figures of one case and situation of known frames; see known.py. The keys of `psnr` and `inside` are "model",
    the names of the baselines, and "codec".
    """

    clips: int
    psnr: dict[str, float]
    inside: dict[str, float]
    gain: float
    inside_gain: float
    given: float
    given_codec: float
    motion: float
    seam: float


@dataclass(frozen=True, kw_only=True)
class KnownFigures:
    """The figures of known frames: of each case by the name of the situation, and of the swapped last frame (`end`).
    `subjects`: number of subjects.
    """

    ends: dict[str, KnownCase]
    second: dict[str, KnownCase]
    prefix: dict[str, KnownCase]
    end: float
    subjects: int

    def case(self, name: str) -> dict[str, KnownCase]:
        """The figures of the case `name`, by the name of the situation."""
        found: dict[str, KnownCase] = getattr(self, name)
        return found


@dataclass(frozen=True, kw_only=True)
class Measures:
    """All measures, by group, cue and subject. `model`: the measured model, and the options of the measurement."""

    groups: dict[str, GroupFigures]
    control: dict[str, CueFigures]
    subjects: dict[str, SubjectFigures] = field(default_factory=dict)
    known: KnownFigures | None = field(default=None, metadata=LATER)
    model: dict[str, Any] = field(default_factory=dict)
