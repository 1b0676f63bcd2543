"""Measures a model of the default recipe against the real clips it was trained on (`higen evaluate`).

Poses and backgrounds are fixed, so the real clip of a prompt is known pixel by pixel. These clips are drawn, with n
seeds:

held-out   every subject on the background that was kept out of training: every seed at normal speed, and every second
           seed also at another speed, fast and slow alternating
trained    the same on one trained background, with a quarter of the seeds (at least one)
still      held-out and trained combinations with the words "standing still", with a quarter of the seeds (at least one)
motion     the held-out prompts at normal speed, seed 0, with a `motion` number: that of the real clip at 0, 0.5, 1, 1.5
           and 2 times real time
appearance the same with an `appearance` number: that of the real clip at 0, 0.5, 1 and 2 times real time

Each figure is reported with the same measure of the real clips through the autoencoder ("codec", the upper bound for a
denoiser) and of the unchanged real clips ("real"):

identity   the subject is right, by a classifier that was trained on real frames
template   the subject is right: the correlation with its real frames is higher than with any other subject's frames. It
           is also above a threshold, half way between the best other subject's and the real clip's correlation
background the requested background is the closest one
psnr, psnr_copy, beats_copy      PSNR in dB against the real clip, of the clip and of its own key frame repeated, and
           how often the clip is closer. beats_mean: how often the clip is closer than its own mean frame repeated. (A
           clip with noise in every frame is not closer.) psnr_real_copy, beats_real_copy: the same with the real key
           frame repeated
flicker, speckle, sharpness      see higen/measures/fidelity.py
spearman   rank correlation of requested and measured cues: within a subject (the mean), within a subject without the
           request for 0, and over all clips. A model that obeys 0 and orders the other requests at random reaches 0.5
           with the request for 0, and 0 without it
motion_ratio    motion as training measures it, relative to the real clip's
difference      mean difference of consecutive frames
frechet    distance of features to a random draw of as many real clips: the same subjects and speeds, any background,
           up to an eighth of a second earlier or later. The floor is the distance between two such draws without common
           clips. "real" are the real clips of the requests. Their distance is far above this floor, because a few
           requests with many seeds each give fewer different clips. "alike" are draws with the same composition as the
           requests: as many clips of each subject and speed, on one background. There the distance of the real clips is
           near the floor. "asked" is the distance to the real clips of the requests; its lower bound is the codec's
           distance
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from higen.errors import PromptWarning, TrainingError
from higen.measures import fidelity
from higen.measures.statistics import spearman
from higen.train.emoji.evaluation.figures import (
    ColumnFigures,
    CueFigures,
    GroupFigures,
    Measures,
    SpeedFigures,
    SubjectFigures,
)
from higen.train.emoji.evaluation.frechet import Features, Request, frechet
from higen.train.emoji.evaluation.journal import Journal
from higen.train.emoji.evaluation.judges import Judges
from higen.train.emoji.evaluation.plan import FAST, GROUPS, NORMAL, SLOW, Row, Shot
from higen.train.emoji.evaluation.real_clips import RealClips
from higen.train.emoji.subjects import KEY_INDEX, SPEEDS, SUBJECTS
from higen.train.pipeline_maker import PipelineMaker, measured_cues

__all__ = ["Codec", "Maker", "PipelineMaker", "Result", "evaluate"]

Frames = NDArray[np.uint8]
CLOSER = 0.01
"""Least difference in PSNR, in dB, by which a clip counts as closer. It excludes differences by rounding."""


class Maker(Protocol):
    """Makes clips."""

    def __call__(self, prompt: str, seed: int, motion: float | None, appearance: float | None) -> Frames:
        """A clip uint8 [16,128,128,3]. A cue that is None is left to the prompt."""
        ...


class Codec(Protocol):
    """An autoencoder: encodes and decodes clips."""

    def encode(self, clip: Frames) -> NDArray[np.float32]:
        """Latents [C,F,h,w] of uint8 [F,H,W,3]."""
        ...

    def decode(self, latents: NDArray[np.float32]) -> Frames:
        """A clip uint8 [F,H,W,3] of latents [C,F,h,w]."""
        ...


@dataclass
class Result:
    """All results: a row for each shot, the figures, and the clips to show (seed 0, normal speed)."""

    shots: list[Shot]
    rows: list[Row]
    measures: Measures
    shown: list[tuple[Shot, Frames]]


def evaluate(
    make: Maker,
    codec: Codec,
    real: RealClips,
    judges: Judges,
    shots: Sequence[Shot],
    shown: bool = False,
    journal: Journal | None = None,
) -> Result:
    """Make and measure every shot. `shown`: with a progress bar. Clips with an entry in `journal` are not made again,
    except the clips to show.
    """
    measure = _Measure(codec, real, judges)
    measured: list[tuple[Shot, Row, NDArray[np.float64]]] = []
    sheet: list[tuple[Shot, Frames]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        for shot in tqdm(shots, desc="clips", disable=not shown):
            is_shown = shot.kind == "text" and shot.seed == 0 and shot.speed == NORMAL
            kept = None if journal is None else journal.find(shot)
            if kept is not None and not is_shown:
                measured.append((shot, *kept))
                continue
            try:
                clip = make(shot.prompt, shot.seed, *measure.cues(shot))
            except PromptWarning as warning:
                raise TrainingError(
                    f"{shot.prompt!r}: the model does not know what it should draw: {warning}"
                ) from None
            if is_shown:
                sheet.append((shot, clip))
            if kept is None:
                kept = measure.row(shot, clip), judges.features([clip])[0]
                if journal is not None:
                    journal.add(shot, *kept)
            measured.append((shot, *kept))
    conditions = sorted({_request(shot) for shot in shots if shot.kind in ("text", "still")})
    bounds: dict[Request, _Bound] = {}
    for request in tqdm(sorted(conditions, key=lambda c: c[1]), desc="bounds", disable=not shown):
        bounds[request] = measure.bound(*request)
    rows, features = [row for _, row, _ in measured], np.array([f for *_, f in measured])
    measures = Measures(
        groups={
            group: _group(group, shots, rows, features, bounds, judges)
            for group in GROUPS
            if any(shot.group == group for shot in shots)
        },
        control=_control(shots, rows, measure),
        subjects={
            SUBJECTS[s].name: _subject([(shot, row) for shot, row, _ in measured if shot.subject == s])
            for s in sorted({shot.subject for shot in shots})
        },
    )
    return Result(list(shots), rows, measures, sheet)


def _request(shot: Shot) -> Request:
    return shot.subject, shot.background, shot.factor


@dataclass(frozen=True)
class _Bound:
    """Measures of the real clip of a request, through the codec and unchanged."""

    codec: Row
    real: Row
    codec_features: NDArray[np.float64]
    real_features: NDArray[np.float64]


class _Measure:
    """Measures clips, and keeps the measured cues of the real clips."""

    def __init__(self, codec: Codec, real: RealClips, judges: Judges) -> None:
        self.codec, self.real, self.judges = codec, real, judges
        self._cues: dict[Request, tuple[float, float]] = {}
        self._codec_cues: dict[Request, tuple[float, float]] = {}

    def real_cues(self, s: int, b: int, factor: float) -> tuple[float, float]:
        """Motion and appearance factor of a real clip."""
        if (s, b, factor) not in self._cues:
            self._cues[s, b, factor] = measured_cues(self.codec.encode(self.real.clip(s, b, factor)))
        return self._cues[s, b, factor]

    def codec_cues(self, s: int, b: int, factor: float) -> tuple[float, float]:
        """The same for the real clip through the codec, which shows the error of the measurement itself."""
        if (s, b, factor) not in self._codec_cues:
            encoded = self.codec.encode(self.real.clip(s, b, factor))
            self._codec_cues[s, b, factor] = measured_cues(self.codec.encode(self.codec.decode(encoded)))
        return self._codec_cues[s, b, factor]

    def cues(self, shot: Shot) -> tuple[float | None, float | None]:
        """Requested motion and appearance. A cue that is None is left to the prompt."""
        if shot.requested is None:
            return None, None
        motion, appearance = self.real_cues(shot.subject, shot.background, shot.requested)
        return (motion, None) if shot.kind == "motion" else (None, appearance)

    def row(self, shot: Shot, clip: Frames) -> Row:
        """All measures of the clip for a shot."""
        return self.measured(shot.subject, shot.background, shot.factor, clip)

    def bound(self, s: int, b: int, factor: float) -> _Bound:
        """All measures of the real clip, through the codec and unchanged."""
        clip = self.real.clip(s, b, factor)
        through = self.codec.decode(self.codec.encode(clip))
        features = self.judges.features([through, clip])
        codec = self.measured(s, b, factor, through)
        self._codec_cues[s, b, factor] = codec.motion, codec.appearance
        return _Bound(codec, self.measured(s, b, factor, clip), features[0], features[1])

    def measured(self, s: int, b: int, factor: float, clip: Frames) -> Row:
        """All measures of a clip that should show a subject on a background at a speed."""
        wanted = self.real.clip(s, b, factor)
        match = self.judges.templates(b).match(clip, s)
        outside = self.real.outside[s]
        score = fidelity.psnr(clip, wanted)
        copy = fidelity.psnr(np.broadcast_to(clip[KEY_INDEX], clip.shape), wanted)
        real_copy = fidelity.psnr(np.broadcast_to(wanted[KEY_INDEX], wanted.shape), wanted)
        mean = fidelity.psnr(np.broadcast_to(clip.mean(axis=0), clip.shape), wanted)
        motion, appearance = measured_cues(self.codec.encode(clip))
        return Row(
            identity=self.judges.subject(clip) == s,
            template=match.winner == s and match.score >= self.judges.threshold(s, b),
            correlation=match.score,
            background=fidelity.nearest(clip, self.real.pictures, outside) == b,
            psnr=score,
            psnr_copy=copy,
            psnr_real_copy=real_copy,
            beats_copy=score > copy + CLOSER,
            beats_mean=score > mean + CLOSER,
            beats_real_copy=score > real_copy + CLOSER,
            flicker=fidelity.flicker(clip, outside),
            speckle=fidelity.speckle(clip, wanted),
            sharpness=fidelity.sharpness(clip, wanted),
            difference=fidelity.difference(clip),
            motion=motion,
            appearance=appearance,
        )


def _group(
    group: str,
    shots: Sequence[Shot],
    rows: Sequence[Row],
    features: NDArray[np.float64],
    bounds: Mapping[Request, _Bound],
    judges: Judges,
) -> GroupFigures:
    """The figures of a group's clips from text, and of the real clips for the same requests."""
    chosen = [i for i, shot in enumerate(shots) if shot.group == group and shot.kind == "text"]
    asked = [_request(shots[i]) for i in chosen]
    own = [bounds[request] for request in asked]
    real = [bound.real for bound in own]
    still = [i for i, shot in enumerate(shots) if shot.group == group and shot.kind == "still"]
    kept = [bounds[shots[i].subject, shots[i].background, 0.0] for i in still]
    by_speed = {speed: [rows[i] for i in chosen if shots[i].speed == speed] for speed in (SLOW, NORMAL, FAST)}
    return GroupFigures(
        clips=len(chosen),
        generated=_column([rows[i] for i in chosen], real, [rows[i] for i in still]),
        codec=_column([bound.codec for bound in own], real, [bound.codec for bound in kept]),
        real=_column(real, real, [bound.real for bound in kept]),
        by_speed={SPEEDS[speed].name: SpeedFigures.of(r, clips=len(r)) for speed, r in by_speed.items() if r},
        frechet=frechet(
            asked,
            Features(
                features[chosen],
                np.array([bound.codec_features for bound in own]),
                np.array([bound.real_features for bound in own]),
            ),
            judges,
        ),
    )


def _column(rows: Sequence[Row], real: Sequence[Row], still: Sequence[Row]) -> ColumnFigures:
    """The figures of `rows`. `real`: the rows of their real clips. `still`: the rows of clips that stand still."""
    pairs = list(zip(rows, real, strict=True))
    relative = np.array([row.correlation / wanted.correlation for row, wanted in pairs])
    return ColumnFigures.of(
        rows,
        motion_ratio=float(np.median([row.motion / max(wanted.motion, 1e-6) for row, wanted in pairs])),
        template_relative=float(np.mean(relative)),
        template_close=float(np.mean(relative >= 0.85)),
        still=float(np.mean([row.difference for row in still])) if still else None,
    )


def _control(shots: Sequence[Shot], rows: Sequence[Row], measure: _Measure) -> dict[str, CueFigures]:
    """How well cues are followed that were requested as numbers."""
    measured = list(zip(shots, rows, strict=True))
    zero = [row.difference for shot, row in measured if shot.kind == "motion" and shot.requested == 0]
    usual = [
        row.difference
        for shot, row in measured
        if shot.kind == "text" and shot.group == "held-out" and shot.speed == NORMAL
    ]
    control: dict[str, CueFigures] = {}
    for kind in ("motion", "appearance"):
        chosen = [i for i, shot in enumerate(shots) if shot.kind == kind]
        if not chosen:
            continue
        index = 0 if kind == "motion" else 1
        wanted = [measure.cues(shots[i])[index] or 0.0 for i in chosen]
        found = [getattr(rows[i], kind) for i in chosen]
        through = [measure.codec_cues(*_request(shots[i]))[index] for i in chosen]
        subjects = [shots[i].subject for i in chosen]
        moving = [k for k, i in enumerate(chosen) if shots[i].requested]
        standing = kind == "motion" and bool(zero)
        control[kind] = CueFigures(
            clips=len(chosen),
            spearman=_within(subjects, wanted, found),
            spearman_moving=_within(
                [subjects[k] for k in moving], [wanted[k] for k in moving], [found[k] for k in moving]
            ),
            spearman_pooled=spearman(wanted, found),
            codec=_within(subjects, wanted, through),
            codec_pooled=spearman(wanted, through),
            zero=float(np.median(zero)) if standing else None,
            usual=float(np.median(usual)) if standing else None,
            zero_part=float(np.median(zero) / np.median(usual)) if standing else None,
            zero_part_worst=float(np.max(zero) / np.median(usual)) if standing else None,
        )
    return control


def _within(subjects: Sequence[int], wanted: Sequence[float], found: Sequence[float]) -> float:
    """Mean over the subjects of the rank correlation within a subject's clips."""
    each = []
    for s in sorted(set(subjects)):
        pairs = [(w, f) for owner, w, f in zip(subjects, wanted, found, strict=True) if owner == s]
        each.append(spearman(*zip(*pairs, strict=True)))
    return float(np.mean(each))


def _subject(pairs: Sequence[tuple[Shot, Row]]) -> SubjectFigures:
    """The figures of one subject, over both groups."""
    text = [row for shot, row in pairs if shot.kind == "text"]
    return SubjectFigures.of(
        text,
        clips=len(text),
        motion_spearman=_own_spearman(pairs, "motion"),
        appearance_spearman=_own_spearman(pairs, "appearance"),
    )


def _own_spearman(pairs: Sequence[tuple[Shot, Row]], kind: str) -> float | None:
    """Rank correlation of a subject's requested and measured cue; None if it was not requested."""
    chosen = [(shot.requested or 0.0, getattr(row, kind)) for shot, row in pairs if shot.kind == kind]
    return spearman(*zip(*chosen, strict=True)) if chosen else None


def worst(result: Result, count: int = 12) -> list[int]:
    """Indices of the worst clips from text, at most two per subject. Clips with a wrong subject or background come
    first, then those that improve least on the PSNR of their repeated key frame."""
    order = sorted(
        (i for i, shot in enumerate(result.shots) if shot.kind == "text"),
        key=lambda i: (
            result.rows[i].identity and result.rows[i].template and result.rows[i].background,
            result.rows[i].psnr - result.rows[i].psnr_copy,
        ),
    )
    taken: list[int] = []
    for i in order:
        if sum(result.shots[j].subject == result.shots[i].subject for j in taken) < 2:
            taken.append(i)
    return taken[:count]
