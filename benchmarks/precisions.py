"""Writes a table of a model's precisions on a CPU: time, size, distance from float32's videos, `evaluate`'s measures.

    python benchmarks/precisions.py WORK --data DATA --report benchmarks/precisions.md     # --quick: some minutes

WORK keeps a copy of the model (by default the built-in one) with the graphs of every precision, and the measures of
each. The same command continues where it stopped, and starts again if the model has changed. DATA is the folder of the
emoji (`higen evaluate`); without it, the measures are left out.

Times are CPU times of the process on one thread, so other work on the machine is not counted. The precisions take
turns, video by video.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hardware import processor

import higen
from higen.api import default_model
from higen.bundle import Bundle, graph_file
from higen.export.model_graphs import export_model
from higen.export.quantize import quantize, record_calls
from higen.measures.fidelity import psnr
from higen.precision import QUANTIZED, precision_named
from higen.train.emoji.evaluation.command import measure
from higen.train.emoji.evaluation.report import COLUMNS
from higen.trial import known_prompts
from higen.typed_json import to_json

PRECISIONS = ("fp32", "fp16", "int8")

MEASURED = (
    "identity",
    "template",
    "background",
    "psnr",
    "beats_copy",
    "flicker",
    "speckle",
    "sharpness",
    "motion_ratio",
)
"""The measures of held-out combinations that the table shows (higen/train/emoji/evaluation/evaluate.py)."""


@dataclass(frozen=True)
class Row:
    """A precision: CPU seconds per video, bytes of the files it needs, and PSNR in dB of its videos against those of
    the first precision (`psnr` the mean, `worst` the least; infinite for the first precision).
    """

    precision: str
    seconds: float
    size: int
    psnr: float
    worst: float


def prepare(model: Path, work: Path, precisions: Sequence[str]) -> tuple[Bundle, dict[str, dict[str, Any]]]:
    """A copy of a model with the graphs of every precision, and reports of quantised stages by precision and stage."""
    copy, reports = work / "model", work / "quantized.json"
    if copy.exists() and not Bundle.open(model).files.items() <= Bundle.open(copy).files.items():
        print(f"{model} has changed: everything is made again")
        shutil.rmtree(copy)
        for old in (reports, *work.glob("measures.*.json")):
            old.unlink(missing_ok=True)
    if not copy.exists():
        aside = work / ".model.part"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(model, aside)
        aside.replace(copy)
    bundle = Bundle.open(copy)
    found: dict[str, dict[str, Any]] = json.loads(reports.read_text(encoding="utf-8")) if reports.exists() else {}
    for precision in precisions:
        if precision not in QUANTIZED:
            if missing := [stage for stage in bundle.manifest.stage_names if precision not in bundle.precisions(stage)]:
                print(f"exporting {precision}", flush=True)
                bundle = export_model(bundle, missing, precision=precision)
        elif precision not in found:
            print(f"quantising {precision}", flush=True)
            calls = record_calls(bundle, known_prompts(bundle.manifest, 3), 10, 8)
            made: dict[str, Any] = {}
            bundle = quantize(
                bundle, calls, precision, on_report=lambda r, made=made: made.update({r.stage: r.as_json()})
            )
            found[precision] = made
            write(reports, json.dumps(found, indent=1))
    return bundle, found


def needed(bundle: Bundle, precision: str) -> set[str]:
    """The files that a precision needs, without tokenizer and manifest."""
    files = set()
    for stage in bundle.manifest.stage_names:
        chosen = next(p for p in precision_named(precision).stand_ins if p in bundle.precisions(stage))
        files |= {graph_file(stage, chosen), bundle.weights(stage, chosen)}
    return files


def compare(
    bundle: Bundle,
    precisions: Sequence[str],
    prompts: Sequence[str],
    options: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Make a video of each prompt in each precision, in turns, and compare with the first precision."""
    given = dict(options or {})
    pipes = {p: higen.load(bundle.path, "onnx", device="cpu", precision=p, threads=1) for p in precisions}
    seconds: dict[str, list[float]] = {p: [] for p in precisions}
    distances: dict[str, list[float]] = {p: [] for p in precisions}
    try:
        for pipe in pipes.values():  # a warm-up
            pipe(prompts[0], progress=False, **given)
        for number, prompt in enumerate(prompts):
            frames: dict[str, Any] = {}
            for precision, pipe in pipes.items():
                start = time.process_time()
                frames[precision] = pipe(prompt, seed=number, progress=False, **given).frames
                seconds[precision].append(time.process_time() - start)
            first = frames[precisions[0]]
            for precision in precisions:
                same = np.array_equal(frames[precision], first)
                distances[precision].append(float("inf") if same else psnr(frames[precision], first))
    finally:
        for pipe in pipes.values():
            pipe.close()
    return [
        Row(
            precision,
            statistics.median(seconds[precision]),
            sum(bundle.files[name].size for name in needed(bundle, precision)),
            statistics.fmean(distances[precision]),
            min(distances[precision]),
        )
        for precision in precisions
    ]


def evaluated(bundle: Bundle, work: Path, data: Path, precision: str, quick: bool, seeds: int) -> dict[str, Any]:
    """The measures of `higen evaluate` in a precision; kept in WORK."""
    kept = work / f"measures.{precision}{'.quick' if quick else ''}.json"
    if not kept.exists():
        print(f"evaluating {precision}", flush=True)
        found, _ = measure(
            bundle.path,
            data,
            work / "evaluated",
            seeds=1 if quick else seeds,
            quick=quick,
            backend="onnx",
            precision=precision,
            shown=True,
        )
        write(kept, json.dumps(to_json(found), indent=1))
    content: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return content


def table(rows: Sequence[Row], reports: Mapping[str, Any], measures: Mapping[str, Any]) -> list[str]:
    """The table's lines: a column for each precision."""

    def line(title: str, cells: Sequence[str]) -> str:
        return f"| {' | '.join([title, *cells])} |"

    def decibels(value: float) -> str:
        return "the same" if value == float("inf") else f"{value:.1f}"

    lines = [line("", [row.precision for row in rows]), "|---" * (len(rows) + 1) + "|"]
    lines += [
        line("CPU seconds for a video", [f"{r.seconds:.2f} ({r.seconds / rows[0].seconds:.2f} x)" for r in rows]),
        line("graphs and weights, MB", [f"{row.size / 1e6:.1f}" for row in rows]),
    ]
    for stage in dict.fromkeys(stage for report in reports.values() for stage in report):
        found = [reports.get(row.precision, {}).get(stage) for row in rows]
        cells = ["" if r is None else f"{r['chosen']} of {r['candidates']}, {r['work']:.0%} of the work" for r in found]
        lines.append(line(f"{stage}: layers in 8 bits", cells))
        lines.append(line(f"{stage}: error of a step", ["" if r is None else f"{r['error']:.3f}" for r in found]))
    lines.append(line(f"PSNR against {rows[0].precision}'s video, dB", [decibels(row.psnr) for row in rows]))
    lines.append(line("the worst of them", [decibels(row.worst) for row in rows]))
    if measures:
        groups = [measures[row.precision]["groups"]["held-out"] for row in rows]
        for key, title, form in COLUMNS:
            if key in MEASURED:
                lines.append(line(title, [form.format(group["generated"][key]) for group in groups]))
        lines.append(line("Frechet distance, of real against real", [f"{g['frechet']['ratio']:.2f} x" for g in groups]))
        for name in measures[rows[0].precision]["control"]:
            cells = [f"{measures[row.precision]['control'][name]['spearman']:.2f}" for row in rows]
            lines.append(line(f"{name} cue followed, Spearman", cells))
    return lines


def hardware() -> str:
    """The processor's name, and the machine's load."""
    busy = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{processor()}, one thread, load before {busy}"


def write(path: Path, text: str) -> None:
    """Write a temporary file, then move it into place."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(path)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compare a model's precisions on a CPU.")
    parser.add_argument("work", type=Path, help="folder for the models and measures")
    parser.add_argument("--model", type=Path, default=default_model(), help="model directory")
    parser.add_argument("--data", type=Path, help="folder of the emoji")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--prompts", type=int, default=12, help="number of videos that are timed and compared")
    parser.add_argument("--seeds", type=int, default=2, help="measured clips per held-out prompt")
    parser.add_argument("--quick", action="store_true", help="evaluate's quick measures")
    parser.add_argument("--report", type=Path, help="file to write")
    arguments = parser.parse_args()
    about = hardware()
    precisions = arguments.precisions.split(",")
    arguments.work.mkdir(parents=True, exist_ok=True)
    bundle, reports = prepare(arguments.model, arguments.work, precisions)
    prompts = known_prompts(bundle.manifest, arguments.prompts)
    rows = compare(bundle, precisions, prompts)
    measures = {}
    if arguments.data is not None:
        for precision in precisions:
            measures[precision] = evaluated(
                bundle, arguments.work, arguments.data, precision, arguments.quick, arguments.seeds
            )
    clips = [f"{measures[p]['groups']['held-out']['clips']} held-out clips" for p in precisions[:1] if measures]
    lines = [
        f"{about}; {bundle.manifest.name}, ONNX Runtime; {', '.join([f'{len(prompts)} videos', *clips])}.",
        "",
        *table(rows, reports, measures),
    ]
    print("\n".join(lines))
    if arguments.report is not None:
        command = f"python benchmarks/precisions.py WORK --data DATA{' --quick' if arguments.quick else ''}"
        write(arguments.report, "\n".join(["# Precisions on a CPU", "", "```", command, "```", "", *lines]))


if __name__ == "__main__":
    main()
