"""Runs `higen evaluate --clips` and writes its files: measures.json and report.md."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from higen.api import default_model, load
from higen.backends.select import check_backend
from higen.bundle import Bundle
from higen.errors import OutputError, SettingsError
from higen.locks import claimed
from higen.output_file import check_own
from higen.precision import check_precision
from higen.presets import chosen_preset
from higen.staging import whole_file
from higen.train.clip_evaluation import REQUESTS, Evaluation, check_clips, evaluate_clips
from higen.train.pipeline_maker import PipelineMaker

__all__ = ["as_markdown", "measure_clips"]

FILES = ("report.md", "measures.json")
TITLE = "# Clips, measured"
TABLE = (
    ("PSNR of the clip", "psnr", "psnr_codec", "{:.2f} dB"),
    ("PSNR of its middle frame, repeated", "psnr_copy", "psnr_real_copy", "{:.2f} dB"),
    ("closer than its middle frame, repeated", "beats_copy", None, "{:.1%}"),
    ("difference of frames, in levels", "difference", "difference_real", "{:.2f}"),
    ("motion", "motion", "motion_real", "{:.1f}"),
    ("appearance", "appearance", "appearance_real", "{:.3f}"),
)
"""Rows of the report: title, name of the drawn clips' mean, name of the mean to compare with, format of both."""


def measure_clips(
    model: Path | None,
    clips: Path,
    output: Path,
    *,
    seeds: int = 1,
    limit: int | None = None,
    preset: str | None = None,
    backend: str = "auto",
    precision: str | None = None,
    shown: bool = False,
) -> tuple[dict[str, Any], str]:
    """Measure a model directory (None: the built-in one) against the clips of a data set, and write the files into
    `output`. Returns the measures, and the report as Markdown. `preset`: name of the preset that draws the clips.

    Raises RequestError (backend, precision, preset), SettingsError (less than one seed or clip, and what `check_clips`
    raises), OutputError (a folder that cannot be written or holds other files of these names), TrainingError (another
    process that evaluates into `output`) and what loading a model raises.
    """
    check_backend(backend)
    if precision is not None:
        check_precision(precision)
    for name, value in (("seeds", seeds), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise SettingsError(f"--{name}={value}: a whole number from 1")
    bundle = Bundle.open(model or default_model())
    chosen_preset(bundle.manifest.presets, preset, bundle.manifest.name)
    found = check_clips(clips, bundle, limit)
    check_own(output, FILES, rf"\A{TITLE}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with claimed(output, "evaluating"), load(bundle.path, backend, precision=precision) as pipeline:
            options = {} if preset is None else {"preset": preset}
            result = evaluate_clips(PipelineMaker(pipeline, options), found, seeds, shown)
            files = {name: record.sha256 for name, record in sorted(bundle.files.items())}
            about = {"name": bundle.manifest.name, "backend": pipeline.backend.name, "files": files, **options}
            measures = {"model": about, "frame": asdict(found.frame), "means": result.means(), **asdict(result)}
            text = as_markdown(result, bundle.manifest.name)
            for name, content in zip(FILES, (text, json.dumps(measures, indent=1)), strict=True):
                with whole_file(output / name) as temporary:
                    temporary.write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
    return measures, text


def as_markdown(result: Evaluation, name: str) -> str:
    """The report as Markdown."""
    means = result.means()
    lines = [TITLE, "", f"{name}; {len(result.rows)} clips from their captions.", ""]
    lines += ["| | drawn | real (PSNR: through the autoencoder) |", "|---|---|---|"]
    for title, own, beside, form in TABLE:
        lines.append(
            f"| {title} | {form.format(means[own])} | {'' if beside is None else form.format(means[beside])} |"
        )
    if result.distances is not None:
        found = result.distances
        floor = "" if found.floor is None else f"; one half of the real clips to the other: {found.floor:.2f}"
        lines += ["", f"Frechet distance to the real clips: {found.drawn:.2f}; theirs through the autoencoder: "]
        lines[-1] += f"{found.codec:.2f}{floor}."
    parts = ", ".join(f"{part:g}" for part in REQUESTS)
    lines += [
        "",
        f"Cues asked for at {parts} times the real clip's; Spearman's rank correlation with what is measured:",
    ]
    lines += ["", "| cue | clips | within a prompt | over all |", "|---|---|---|---|"]
    lines += [f"| {c.cue} | {c.clips} | {c.spearman:.2f} | {c.spearman_pooled:.2f} |" for c in result.cues]
    return "\n".join(lines)
