"""Measures edits of the built-in model that change a clip's background, and prints the table of docs/keyframes.md.

    python benchmarks/edits.py DATA [--subjects 8] [--model MODEL]

DATA is the folder of the emoji (docs/training.md). The clips are real ones, of subjects on the background that training
never showed with them, at two phases of their loop. Each edit asks for another background. The real clip on that
background is known, so the columns are:

background   edits whose new background is the wanted one of the model's ten, as `higen evaluate` decides it
correlation  of the curve of frame differences with that of the clip: whether the motion is kept
PSNR         against the real clip on the new background, dB

The first row is the wanted clip itself through the autoencoder, which no edit can exceed by much.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import higen
from higen.measures import fidelity
from higen.train.emoji.evaluation.real_clips import RealClips
from higen.train.emoji.subjects import BACKGROUNDS, SPEEDS, SUBJECTS, caption, is_held_out

Frames = NDArray[np.uint8]
WHITE, RED = 0, 1
NORMAL = SPEEDS[1]


@dataclass(frozen=True)
class Case:
    """A clip to edit: its subject, its background and its phase in frames of the loop."""

    subject: int
    background: int
    offset: int

    @property
    def wanted(self) -> int:
        """The new background."""
        return RED if self.background == WHITE else WHITE

    def text(self, background: int) -> str:
        """The caption of the clip on a background."""
        return caption(SUBJECTS[self.subject], BACKGROUNDS[background], NORMAL)


@dataclass
class Row:
    """The measures of one kind of edit."""

    backgrounds: list[bool] = field(default_factory=list)
    correlations: list[float] = field(default_factory=list)
    psnrs: list[float] = field(default_factory=list)

    def measure(self, real: RealClips, case: Case, made: Frames) -> None:
        """Add an edited clip [16,H,W,3]."""
        clip = real.clip(case.subject, case.background, NORMAL.factor, case.offset)
        wanted = real.clip(case.subject, case.wanted, NORMAL.factor, case.offset)
        found = fidelity.nearest(made, real.pictures, real.outside[case.subject])
        self.backgrounds.append(found == case.wanted)
        self.correlations.append(float(np.corrcoef(differences(made), differences(clip))[0, 1]))
        self.psnrs.append(fidelity.psnr(made, wanted))

    def as_line(self, name: str) -> str:
        """A row of the Markdown table."""
        right = f"{sum(self.backgrounds)} of {len(self.backgrounds)}"
        return f"| {name} | {right} | {np.mean(self.correlations):.2f} | {np.mean(self.psnrs):.1f} |"


def differences(clip: Frames) -> NDArray[np.float64]:
    """The mean absolute difference of each pair of neighbouring frames, [F - 1]."""
    return np.abs(np.diff(clip.astype(np.float64), axis=0)).mean(axis=(1, 2, 3))


def cases(real: RealClips, count: int) -> list[Case]:
    """`count` subjects, spread evenly, on their held-out background, at two phases."""
    found = []
    for s in range(0, len(SUBJECTS), max(len(SUBJECTS) // count, 1))[:count]:
        background = next(b for b in range(len(BACKGROUNDS)) if is_held_out(s, b))
        found += [Case(s, background, offset) for offset in (0, len(real.loops[s]) // 3)]
    return found


def edits(real: RealClips) -> dict[str, Callable[[Case], dict[str, Any]]]:
    """The options of each kind of edit, by its name in the table."""

    def keep_subject(case: Case) -> Frames:
        shown = real.coverage(case.subject, NORMAL.factor, case.offset)
        return np.rint(255 * (1 - shown)).astype(np.uint8)

    def always(**options: Any) -> Callable[[Case], dict[str, Any]]:
        return lambda _: options

    return {
        '`key="drawn", strength=0, steps=(8, 100)`': always(key="drawn", strength=0, steps=(8, 100)),
        '`key="drawn", strength=0, steps=(8, 40)`': always(key="drawn", strength=0, steps=(8, 40)),
        '`key="drawn", strength=0.15, steps=(8, 20)`': always(key="drawn", strength=0.15, steps=(8, 20)),
        "`strength=0.7`": always(strength=0.7),
        "`strength=1`, a `mask` that keeps the subject": lambda case: {"strength": 1, "mask": keep_subject(case)},
        "`inversion` with the clip's caption, `strength=1, steps=(8, 12)`": lambda case: {
            "inversion": case.text(case.background),
            "strength": 1,
            "steps": (8, 12),
        },
        '`inversion` with the new prompt, `key="drawn", strength=0.5, steps=(8, 12)`': lambda case: {
            "inversion": case.text(case.wanted),
            "key": "drawn",
            "strength": 0.5,
            "steps": (8, 12),
        },
        "`strength=0.7, steps=(8, 12)`": always(strength=0.7, steps=(8, 12)),
    }


def through_autoencoder(pipe: higen.Pipeline, clip: Frames) -> Frames:
    """A clip uint8 [F,H,W,3], encoded and decoded."""
    loop = next(one for one in pipe.manifest.loops if one.start is not None and one.frames == "F")
    assert loop.start is not None
    options: dict[str, Any] = {loop.start.control: clip, "frames": len(clip)}
    request = pipe.request("a clip", height=clip.shape[1], width=clip.shape[2], **options)
    made: Frames = pipe.decode(pipe.start_latents(request, loop), request)[0]
    return made


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure edits of the built-in model that change the background.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    real = RealClips.read(given.data)
    pipe = higen.load(given.model)
    print("| edit | new background | correlation | PSNR, dB |\n|---|---|---|---|")
    chosen, bound = cases(real, given.subjects), Row()
    for case in chosen:
        wanted = real.clip(case.subject, case.wanted, NORMAL.factor, case.offset)
        bound.measure(real, case, through_autoencoder(pipe, wanted))
    print(bound.as_line("none: the wanted clip through the autoencoder"))
    for name, options in edits(real).items():
        row = Row()
        for case in chosen:
            clip = real.clip(case.subject, case.background, NORMAL.factor, case.offset)
            made = pipe.edit(clip, case.text(case.wanted), seed=1, progress=False, **options(case))
            row.measure(real, case, made.frames)
        print(row.as_line(name), flush=True)


if __name__ == "__main__":
    main()
