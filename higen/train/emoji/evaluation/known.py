"""Measures of known frames, where the text does not determine the clip (`higen evaluate --known`).

The real clips have the background that was kept out of training. They start at other phases of the loop than the
recipe's clips, and some have a changing speed. Some frames of a real clip are given to the model, and the model's other
frames are compared with the real ones:

ends       the first and the last frame are given. Baselines: text only, and a cross-fade of the two frames
second     every second frame is given. Baselines: text only, and the mean of the two neighbours (for the last frame,
           the frame before it)
prefix     the first 8 frames are given. Baselines: text only, the last given frame held, and the given frames played
           backwards

psnr, inside   PSNR in dB of the frames that are not given: over all pixels, and over the subject's pixels, weighted by
           coverage. (Over all pixels, stillness has an advantage.) For the model, for each baseline, and for the codec,
           which is the upper bound. gain, inside_gain: the model's mean minus that of the best baseline
given      PSNR of the given frames, and the codec's for comparison
motion     median of the difference of consecutive frames, divided by the real clip's
seam       median of the difference of frames 7 and 8, divided by the median difference in the clip; for prefix
end        the given last frame has another phase: rank correlation of its phase with the phase of the frame before it
           (the phase of the most similar loop frame, compared at the subject's pixels); mean over the subjects
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from higen.measures.fidelity import difference, psnr
from higen.measures.statistics import spearman
from higen.train.emoji.evaluation.evaluate import PipelineMaker
from higen.train.emoji.evaluation.figures import KnownCase, KnownFigures
from higen.train.emoji.evaluation.plan import FAST, NORMAL
from higen.train.emoji.evaluation.real_clips import RealClips
from higen.train.emoji.subjects import BACKGROUNDS, FRAMES, SPEEDS, SUBJECTS, caption, is_held_out

__all__ = ["CASES", "SITUATIONS", "PipelineThrough", "Situation", "Through", "as_text", "known_frames"]

Frames = NDArray[np.uint8]
LATER = (6, 9)
"""Numbers of loop frames by which the clips start later than the recipe's."""
WARP = 0.7
KINDS = ("psnr", "inside")
SWAPPED = (-12, -6, 0, 6, 12)
"""Numbers of loop frames by which a swapped last frame is later than the clip's own last frame."""


class Through(Protocol):
    """Makes clips with given frames, and encodes and decodes clips."""

    def __call__(self, prompt: str, seed: int, motion: float | None, appearance: float | None) -> Frames:
        """A clip uint8 [16,128,128,3] from text only."""
        ...

    def through(self, prompt: str, seed: int, frames: Mapping[int, Frames]) -> Frames:
        """The same with given frames, uint8 [H,W,3] by index."""
        ...

    def encode(self, clip: Frames) -> NDArray[np.float32]:
        """Latents [C,F,h,w] of uint8 [F,H,W,3]."""
        ...

    def decode(self, latents: NDArray[np.float32]) -> Frames:
        """A clip uint8 [F,H,W,3] of latents [C,F,h,w]."""
        ...


@dataclass(frozen=True)
class PipelineThrough(PipelineMaker):
    """Implements `Through` with a model."""

    def through(self, prompt: str, seed: int, frames: Mapping[int, Frames]) -> Frames:
        """See Through."""
        options = {**self.options, "keyframes": dict(frames)}
        made: Frames = self.pipeline(prompt, seed=seed, progress=False, **options).frames
        return made


@dataclass(frozen=True)
class Situation:
    """A real clip: its speed (`SPEEDS`), by how many loop frames it starts later than the recipe's, and its warp."""

    name: str
    speed: int
    later: int
    warp: float = 0.0


SITUATIONS = (
    *(Situation("normal", NORMAL, later) for later in LATER),
    *(Situation("fast", FAST, later) for later in LATER),
    *(Situation("warped", NORMAL, later, WARP) for later in LATER),
)

CASES: Mapping[str, tuple[int, ...]] = {
    "ends": (0, FRAMES - 1),
    "second": tuple(range(0, FRAMES, 2)),
    "prefix": tuple(range(FRAMES // 2)),
}
"""The indices of the given frames."""


def crossfade(real: Frames) -> NDArray[np.float32]:
    """A cross-fade from the first frame to the last."""
    later = np.linspace(0, 1, len(real), dtype=np.float32)[:, None, None, None]
    return real[0] * (1 - later) + real[-1] * later


def neighbours(real: Frames) -> NDArray[np.float32]:
    """Each odd frame becomes the mean of its neighbours; the last frame becomes the frame before it."""
    found = real.astype(np.float32)
    found[1:-1:2] = (found[:-2:2] + found[2::2]) / 2
    if len(real) % 2 == 0:
        found[-1] = found[-2]
    return found


def held(real: Frames) -> NDArray[np.float32]:
    """Frame 7 is held until the end."""
    found = real.astype(np.float32)
    found[FRAMES // 2 :] = found[FRAMES // 2 - 1]
    return found


def backwards(real: Frames) -> NDArray[np.float32]:
    """The first 8 frames, and then the same frames backwards."""
    half = real[: FRAMES // 2].astype(np.float32)
    return np.concatenate([half, half[::-1]])


BASELINES: Mapping[str, Mapping[str, Callable[[Frames], NDArray[np.float32]]]] = {
    "ends": {"cross-fade": crossfade},
    "second": {"neighbours": neighbours},
    "prefix": {"held": held, "backwards": backwards},
}


@dataclass
class _Sums:
    """Values by name, with their means and medians."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **found: float) -> None:
        for name, value in found.items():
            self.values.setdefault(name, []).append(value)

    def mean(self, name: str) -> float:
        return float(np.mean(self.values[name]))

    def median(self, name: str) -> float:
        return float(np.median(self.values[name]))


def inside_psnr(clip: NDArray[np.generic], real: Frames, cover: NDArray[np.float32]) -> float:
    """PSNR of the pixels that the subject covers, weighted by `cover` [F,H,W]."""
    square = np.square(clip.astype(np.float32) - real).mean(axis=-1)
    error = float((square * cover).sum(dtype=np.float64) / max(float(cover.sum(dtype=np.float64)), 1e-9))
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def known_frames(
    make: Through,
    real: RealClips,
    subjects: Sequence[int],
    situations: Sequence[Situation] = SITUATIONS,
    shown: bool = False,
) -> KnownFigures:
    """The measures by case and by the name of the situation; see the module's docstring."""
    sums: dict[tuple[str, str], _Sums] = {}
    texts: dict[tuple[int, int], Frames] = {}
    ends = []
    for s in tqdm(subjects, desc="known frames", disable=not shown):
        b = next(b for b in range(len(BACKGROUNDS)) if is_held_out(s, b))
        for situation in situations:
            speed, prompt = situation.speed, _prompt(s, b, situation)
            wanted = _clip(real, s, b, situation)
            cover = real.coverage(s, SPEEDS[speed].factor, situation.later, situation.warp)
            codec = make.decode(make.encode(wanted))
            if (s, speed) not in texts:
                texts[s, speed] = make(prompt, 0, None, None)
            for case, given in CASES.items():
                made = make.through(prompt, 0, {i: wanted[i] for i in given})
                clips: dict[str, NDArray[Any]] = {"model": made, "codec": codec, "text": texts[s, speed]}
                clips |= {name: formula(wanted) for name, formula in BASELINES[case].items()}
                _measure(sums.setdefault((case, situation.name), _Sums()), clips, wanted, cover, given)
        ends.append(_end(make, real, s, b, situations[0]))
    found: dict[str, dict[str, KnownCase]] = {case: {} for case in CASES}
    for (case, name), columns in sums.items():
        found[case][name] = _row(columns, ("text", *BASELINES[case]))
    return KnownFigures(**found, end=float(np.mean(ends)), subjects=len(subjects))


def _prompt(s: int, b: int, situation: Situation) -> str:
    return caption(SUBJECTS[s], BACKGROUNDS[b], SPEEDS[situation.speed])


def _clip(real: RealClips, s: int, b: int, situation: Situation, more: int = 0) -> Frames:
    return real.clip(s, b, SPEEDS[situation.speed].factor, situation.later + more, situation.warp)


def _measure(
    sums: _Sums,
    clips: Mapping[str, NDArray[Any]],
    wanted: Frames,
    cover: NDArray[np.float32],
    given: Sequence[int],
) -> None:
    kept = list(given)
    rest = [i for i in range(len(wanted)) if i not in given]
    for name, clip in clips.items():
        sums.add(**{f"psnr {name}": psnr(clip[rest], wanted[rest])})
        sums.add(**{f"inside {name}": inside_psnr(clip[rest], wanted[rest], cover[rest])})
    made, codec = clips["model"], clips["codec"]
    steps = np.abs(np.diff(made.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
    sums.add(
        given=psnr(made[kept], wanted[kept]),
        given_codec=psnr(codec[kept], wanted[kept]),
        motion=difference(made) / max(difference(wanted), 1e-6),
        seam=float(steps[FRAMES // 2 - 1] / max(float(np.median(steps)), 1e-6)),
    )


def _row(sums: _Sums, baselines: Sequence[str]) -> KnownCase:
    """The figures of a case, with the model's gain over the best baseline."""
    columns = ("model", *baselines, "codec")
    whole, inside = ({name: sums.mean(f"{kind} {name}") for name in columns} for kind in KINDS)
    return KnownCase(
        clips=len(sums.values["given"]),
        psnr=whole,
        inside=inside,
        gain=whole["model"] - max(whole[name] for name in baselines),
        inside_gain=inside["model"] - max(inside[name] for name in baselines),
        given=sums.mean("given"),
        given_codec=sums.mean("given_codec"),
        motion=sums.median("motion"),
        seam=sums.median("seam"),
    )


def _end(make: Through, real: RealClips, s: int, b: int, situation: Situation) -> float:
    """Rank correlation of the phase of a swapped last frame with that of the frame before it."""
    wanted, cover = _clip(real, s, b, situation), real.coverage(s, 1.0).max(axis=0)
    # The last frames of clips that start one loop frame later each: candidates for the frame before the end.
    reach = range(2 * min(SWAPPED), 2 * max(SWAPPED) + 1)
    phases = np.stack([_clip(real, s, b, situation, more)[-1] for more in reach]).astype(np.float32)
    found = []
    for more in SWAPPED:
        last = _clip(real, s, b, situation, more)[-1]
        made = make.through(_prompt(s, b, situation), 0, {0: wanted[0], FRAMES - 1: last})
        square = np.square(phases - made[-2].astype(np.float32)).mean(axis=-1)
        found.append(float(reach[int((square * cover).sum(axis=(1, 2)).argmin())]))
    return spearman([float(more) for more in SWAPPED], found)


def as_text(measures: KnownFigures) -> str:
    """The table for a terminal."""
    lines = []
    for case in CASES:
        for name, row in measures.case(case).items():
            columns = zip(KINDS, (row.psnr, row.inside), strict=True)
            both = (f"{kind} " + ", ".join(f"{k} {dB:.2f}" for k, dB in values.items()) for kind, values in columns)
            lines.append(f"{case}, {name}: {row.clips} clips, dB: {'; '.join(both)}")
            seam = f", seam {row.seam:.2f}" if case == "prefix" else ""
            lines.append(
                f"  above the best baseline {row.gain:+.2f}, inside {row.inside_gain:+.2f}; given frames "
                f"{row.given:.2f} (codec {row.given_codec:.2f}); motion {row.motion:.2f}{seam}"
            )
    lines.append(f"a swapped last frame: Spearman {measures.end:.2f}")
    return "\n".join(lines)
