"""The figures of `higen evaluate`, from a clip's measures to measures.json (see evaluate.py for what they mean).

A figure that was not measured is None, and is left out of the files.
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
        """The means over `rows`, 1 or more, beside the other fields of this class."""
        names = [mean.name for mean in fields(Means)]
        return cls(**{name: float(np.mean([getattr(row, name) for row in rows])) for name in names}, **others)


@dataclass(frozen=True, kw_only=True)
class ColumnFigures(Means):
    """The generated clips of a group, or the real clips for the same requests.

    motion_ratio       median of the motion over the real clip's
    template_relative  mean of the correlation over the real clip's
    template_close     part of the clips whose correlation is at least 0.85 of the real clip's
    still              mean difference of frames, in levels, where the subject stands still
    """

    motion_ratio: float
    template_relative: float
    template_close: float
    still: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class SpeedFigures(Means):
    """The clips of a group that were asked for at one speed."""

    clips: int


@dataclass(frozen=True, kw_only=True)
class SubjectFigures(Means):
    """The clips of one subject, over both groups; the rank correlations of requested and measured cue."""

    clips: int
    motion_spearman: float | None = field(default=None, metadata=LATER)
    appearance_spearman: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Frechet distances to a draw of real clips. `floor`: that of another draw; `ratio`: generated over floor."""

    generated: float
    codec: float
    real: float
    floor: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class AskedDistances:
    """Frechet distances to the very clips that were asked for."""

    generated: float
    codec: float


@dataclass(frozen=True, kw_only=True)
class FrechetFigures(Distances):
    """Distances to draws of any clips, to draws of the same make-up (`alike`), and to the requested clips."""

    alike: Distances
    asked: AskedDistances


@dataclass(frozen=True, kw_only=True)
class GroupFigures:
    """A group of combinations, held out or trained; `by_speed` has the names of `SPEEDS`."""

    clips: int
    generated: ColumnFigures
    codec: ColumnFigures
    real: ColumnFigures
    by_speed: dict[str, SpeedFigures]
    frechet: FrechetFigures

    @property
    def columns(self) -> tuple[ColumnFigures, ColumnFigures, ColumnFigures]:
        """Generated, codec, real."""
        return self.generated, self.codec, self.real


@dataclass(frozen=True, kw_only=True)
class CueFigures:
    """How a cue that was asked for as a number is followed: rank correlations of requested and measured cue.

    spearman         within a subject, the mean
    spearman_moving  the same without the request for 0
    spearman_pooled  over all clips
    codec, codec_pooled  of the real clips through the codec
    zero             median difference of frames, in levels, where motion 0 was asked for
    usual            that of held-out clips from text at normal speed
    zero_part, zero_part_worst  the median and the largest difference at motion 0, over `usual`
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
    """The clips of one case and situation of known frames, as known.py says. `psnr` and `inside` have "model", the
    names of the baselines, and "codec".
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
    """What known frames do: each case by the name of the situation, the swapped last frame, and how many subjects."""

    ends: dict[str, KnownCase]
    second: dict[str, KnownCase]
    prefix: dict[str, KnownCase]
    end: float
    subjects: int

    def case(self, name: str) -> dict[str, KnownCase]:
        """The situations of a case by its name."""
        found: dict[str, KnownCase] = getattr(self, name)
        return found


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Everything measured, by group, cue and subject. `model`: which model was measured, and how."""

    groups: dict[str, GroupFigures]
    control: dict[str, CueFigures]
    subjects: dict[str, SubjectFigures] = field(default_factory=dict)
    known: KnownFigures | None = field(default=None, metadata=LATER)
    model: dict[str, Any] = field(default_factory=dict)
