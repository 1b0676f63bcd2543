"""Runs `higen evaluate` from its arguments to its files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from higen.api import default_model, load
from higen.backends.select import check_backend
from higen.bundle import Bundle
from higen.errors import OutputError, SettingsError, TrainingError
from higen.families.higen import spec
from higen.locks import claimed
from higen.output_file import check_own
from higen.precision import check_precision
from higen.presets import chosen_preset
from higen.train.denormals import flushed_denormals
from higen.train.emoji.evaluation import known as known_measures
from higen.train.emoji.evaluation.evaluate import evaluate
from higen.train.emoji.evaluation.figures import Measures
from higen.train.emoji.evaluation.journal import Journal
from higen.train.emoji.evaluation.judges import Judges
from higen.train.emoji.evaluation.plan import plan
from higen.train.emoji.evaluation.real_clips import RealClips
from higen.train.emoji.evaluation.report import as_text, write
from higen.train.emoji.packs import fetch
from higen.train.emoji.subjects import subjects_named
from higen.typed_json import to_json

__all__ = ["measure"]


def measure(
    model: Path | None,
    data: Path,
    output: Path,
    *,
    seeds: int = 8,
    quick: bool = False,
    known: bool = False,
    preset: str | None = None,
    backend: str = "auto",
    precision: str | None = None,
    download: bool = False,
    shown: bool = False,
) -> tuple[Measures, str]:
    """Measure a model directory (None: the built-in one) and write the files into `output`. Returns the measures and
    their table.

    `download`: the emoji may be fetched into `data`, about 700 MB. The judging networks and the measures of each clip
    are kept in `output`, and are used again for the same data and model, so a stopped run continues. `known`: known
    frames are measured too, again in every run. `preset`: name of the model's preset that draws the clips.

    Raises RequestError (backend, precision, preset), SettingsError (a model of another recipe, less than one seed),
    OutputError (a folder that cannot be written), TrainingError (missing data that cannot be fetched, another process
    that evaluates into `output`) and what loading a model raises.
    """
    # These errors come before the data is fetched.
    check_backend(backend)
    if precision is not None:
        check_precision(precision)
    bundle = Bundle.open(model or default_model())
    chosen_preset(bundle.manifest.presets, preset, bundle.manifest.name)
    subjects = subjects_named(bundle.manifest.prompts)
    shots = plan(subjects, seeds, quick)
    if known and all(loop.known is None for loop in bundle.manifest.loops):
        raise SettingsError(f"known: {bundle.manifest.name} takes no known frames")
    if output.is_dir():
        check_own(
            output, ("clips.jsonl", "measures.json", "per_subject.json", "sheet.png", "worst.png"), r"\A[0-9a-f]{64}\n"
        )
    judged = output / "judges"
    try:
        judged.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: no folder can be made there: {error.strerror}") from error
    if not os.access(judged, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: no permission to write there")
    with claimed(output, "evaluating"):
        try:
            fetch(data, download)
            real = RealClips.read(data)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"{data}: {error}") from error
        with (
            flushed_denormals(),
            load(bundle.path, backend, precision=precision) as pipeline,
            _writing(output),
        ):
            options = {} if preset is None else {"preset": preset}
            make, judges = known_measures.PipelineThrough(pipeline, options), Judges(real, judged, shown=shown)
            measured = {
                "name": bundle.manifest.name,
                "defaults": to_json(spec.config(bundle.manifest).defaults),
                "files": {name: record.sha256 for name, record in sorted(bundle.files.items())},
                "backend": pipeline.backend.name,
                "precision": precision or "by the device",
                **options,
            }
            journal = Journal(output / "clips.jsonl", measured | {"judges": judges.key})
            result = evaluate(make, make, real, judges, shots, shown, journal)
            if known:
                chosen = subjects[::4] if quick else subjects
                figures = known_measures.known_frames(make, real, chosen, shown=shown)
                result = replace(result, measures=replace(result.measures, known=figures))
            about = measured | {"subjects": len(subjects), "seeds": seeds, "quick": quick}
            result = replace(result, measures=replace(result.measures, model=about))
            write(result, real, make, output)
    text, frames = as_text(result.measures), result.measures.known
    return result.measures, text if frames is None else f"{text}\n{known_measures.as_text(frames)}"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full disk raises a single error. The measures so far are kept, so that the same command continues."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error
