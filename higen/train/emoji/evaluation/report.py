"""The output of `higen evaluate`: a table, measures.json, per_subject.json, contact sheets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from higen.staging import whole_file
from higen.train.emoji.evaluation.evaluate import Maker, Result, worst
from higen.train.emoji.evaluation.figures import ColumnFigures, Distances, FrechetFigures, Measures
from higen.train.emoji.evaluation.plan import Shot
from higen.train.emoji.evaluation.real_clips import RealClips
from higen.train.emoji.subjects import FPS
from higen.typed_json import to_json
from higen.video import Video, contact_sheet

__all__ = ["COLUMNS", "as_text", "cell", "frechet_lines", "write"]

Frames = NDArray[np.uint8]
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("identity", "subject, by a classifier", "{:.1%}"),
    ("template", "subject, by its real frames", "{:.1%}"),
    ("template_relative", "correlation with real frames, relative", "{:.1%}"),
    ("background", "background", "{:.1%}"),
    ("psnr", "PSNR, clip", "{:.2f} dB"),
    ("psnr_copy", "PSNR, its key frame repeated", "{:.2f} dB"),
    ("psnr_real_copy", "PSNR, the real key frame repeated", "{:.2f} dB"),
    ("beats_copy", "closer than its key frame repeated", "{:.1%}"),
    ("beats_mean", "closer than its own mean frame repeated", "{:.1%}"),
    ("beats_real_copy", "closer than the real key frame repeated", "{:.1%}"),
    ("flicker", "flicker of the background", "{:.2f}"),
    ("speckle", "speckle", "{:.2f}"),
    ("sharpness", "sharpness", "{:.2f}"),
    ("difference", "difference of frames", "{:.2f}"),
    ("motion_ratio", "motion / the real clip's motion", "{:.2f}"),
    ("still", "difference where it stands still", "{:.2f}"),
)
"""Key, title and format of a group's measures."""


def cell(column: ColumnFigures, key: str, form: str) -> str:
    """A figure of COLUMNS as text; empty if it was not measured."""
    value = getattr(column, key)
    return "" if value is None else form.format(value)


def frechet_lines(found: FrechetFigures) -> list[tuple[str, tuple[str, str, str]]]:
    """Titles of a group's Frechet distances, and their cells: generated, codec, real."""

    def over_floor(part: Distances) -> tuple[str, str, str]:
        generated, codec, real = (
            f"{value / max(part.floor, 1e-12):.2f}" for value in (part.generated, part.codec, part.real)
        )
        return generated, codec, real

    asked = (f"{found.asked.generated:.2f}", f"{found.asked.codec:.2f}", "0")
    return [
        ("Frechet distance / real against real", over_floor(found)),
        ("the same, for sets of equal composition", over_floor(found.alike)),
        ("Frechet distance to the clips asked for", asked),
    ]


def as_text(measures: Measures) -> str:
    """The table for a terminal: generated, codec and real for each group. Levels are of 255."""
    lines = []
    for name, group in measures.groups.items():
        lines.append(f"{name} combinations, {group.clips} clips{'':<10}generated       codec        real")
        for key, title, form in COLUMNS:
            if getattr(group.generated, key) is not None:
                cells = "".join(f"{cell(column, key, form):>12}" for column in group.columns)
                lines.append(f"  {title:<40}{cells}")
        for title, distances in frechet_lines(group.frechet):
            lines.append(f"  {title:<40}{''.join(f'{distance:>12}' for distance in distances)}")
        floors = " and ".join(f"{part.floor:.2f}" for part in (group.frechet, group.frechet.alike))
        lines.append(f"  (their floors: {floors}; these fall with the number of clips: compare equal numbers only)")
        lines.append("")
    for name, found in measures.control.items():
        lines.append(
            f"{name} factor, {found.clips} clips: Spearman {found.spearman:.2f} within a subject "
            f"({found.spearman_moving:.2f} without the request for 0), {found.spearman_pooled:.2f} over all "
            f"(real clips through the codec {found.codec:.2f}, {found.codec_pooled:.2f})"
        )
        if found.zero is not None:
            lines.append(
                f"  motion 0: difference {found.zero:.2f}, {found.zero_part:.1%} of the median clip's "
                f"{found.usual:.2f} (worst {found.zero_part_worst:.1%})"
            )
    return "\n".join(lines)


def write(result: Result, real: RealClips, make: Maker, folder: Path) -> None:
    """Write measures.json, per_subject.json, sheet.png (all subjects) and worst.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    measures = to_json(result.measures)
    _write_json(folder / "per_subject.json", measures.pop("subjects"))
    _write_json(folder / "measures.json", measures)
    shown = sorted((pair for pair in result.shown if pair[0].group == "held-out"), key=lambda pair: pair[0].subject)
    _save(pairs_sheet(shown, real), folder / "sheet.png")
    shots = [result.shots[i] for i in worst(result)]
    _save(pairs_sheet([(shot, make(shot.prompt, shot.seed, None, None)) for shot in shots], real), folder / "worst.png")


def pairs_sheet(clips: Sequence[tuple[Shot, Frames]], real: RealClips) -> Image.Image:
    """A contact sheet with the real clip above the generated one, eight frames each, for every clip."""
    videos = []
    for shot, frames in clips:
        wanted = real.clip(shot.subject, shot.background, shot.factor)
        videos.append(Video(wanted, FPS, {"prompt": f"real: {shot.prompt}"}))
        videos.append(Video(frames, FPS, {"prompt": f"generated, seed {shot.seed}"}))
    return contact_sheet(videos)


def _write_json(path: Path, content: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _save(sheet: Image.Image, path: Path) -> None:
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
