"""The command `higen-export`. Its exit codes are those of `higen`."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from higen.bundle import Bundle
from higen.errors import MissingExtra, RequestError, quoted
from higen.export.contents import as_lines, as_values
from higen.precision import PRECISIONS, QUANTIZED
from higen.progress import is_watched
from higen.terminal import JSON, PATH, Commands, reported
from higen.version import __version__

if TYPE_CHECKING:
    from higen.export.parity import Parity

__all__ = ["main"]

MODEL = click.argument("model", type=PATH)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="higen-export")
def main() -> None:
    """Compile a model directory: write graphs of its stages next to the weights."""


@main.command()
@MODEL
@click.option(
    "--stage", "stages", multiple=True, help="Export only this stage (inspect lists them); repeatable.  [every stage]"
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="Precision of the graphs. Those in fp16 and bf16 have their own weights and do not replace fp32.",
)
@click.option(
    "--reuse", is_flag=True, help="Also export the steps that keep and reuse deep features (requests with `reuse`)."
)
@click.option("--static", help="Fix samples, frames, height and width: 1x32x256x448.  [dynamic]")
@click.option(
    "--opset",
    type=click.IntRange(21, 23),
    help="21 is portable. 22 and 23 need an ONNX Runtime newer than 1.20. 23 has attention as one operator; it is the "
    "newest that TensorRT for RTX takes.  [21; bf16: 23]",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted export; its finished graphs are kept.")
@JSON
def onnx(
    model: Path,
    stages: tuple[str, ...],
    precision: str,
    reuse: bool,
    static: str | None,
    opset: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Write an ONNX graph for every stage of MODEL, each checked against PyTorch at shapes it was not traced with.

    A graph is written as soon as it has passed; --resume makes those that are missing after an interruption.
    """
    with reported(as_json):
        with _export_extra():
            from higen.export.model_graphs import export_model
            from higen.export.shapes import static_sizes
        done: list[Parity] = []
        bundle = Bundle.open(model)
        bundle = export_model(
            bundle,
            stages or None,
            precision=precision,
            opset=opset,
            static=None if static is None else static_sizes(bundle.manifest, static),
            resume=resume,
            on_parity=_listing(done, as_json),
            on_line=_telling(as_json),
            reuse=reuse,
        )
        if as_json:
            click.echo(json.dumps({"model": str(bundle.path), "parity": [p.as_json() for p in done]}))


@main.command()
@MODEL
@click.option("--report", type=PATH, help="Folder for report.md and sheet.png.")
@click.option("--steps", type=int, default=10, show_default=True, help="Denoising steps of each loop.")
@JSON
def verify(model: Path, report: Path | None, steps: int, as_json: bool) -> None:
    """Verify MODEL: hashes, every graph against PyTorch, and whole loops on both. Exit code 1 if one fails."""
    passed = False
    with reported(as_json):
        with _export_extra():
            from higen.export.verify import check_folder, write
            from higen.export.verify import verify as run
        done: list[Parity] = []
        if report is not None:
            check_folder(report)
        found = run(Bundle.open(model), steps, on_parity=_listing(done, as_json))
        passed = found.passed
        if report is not None:
            write(found, report)
        if as_json:
            rows = [p.as_json() for p in done]
            click.echo(json.dumps({"passed": passed, "parity": rows, "loops": [p.as_json() for p in found.loops]}))
        else:
            for loop in found.loops:
                click.echo(loop.as_line())
    if not passed:
        sys.exit(1)


@contextmanager
def _export_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "export", "higen-export") from error


def _listing(done: list[Parity], as_json: bool) -> Callable[[Parity], None]:
    """Collects the parities, and prints each unless the output is JSON."""

    def show(parity: Parity) -> None:
        done.append(parity)
        if not as_json:
            click.echo(parity.as_line())

    return show


def _telling(as_json: bool) -> Callable[[str], None]:
    """Prints a line for the user: to standard error if standard output is JSON."""
    return lambda line: click.echo(line, err=as_json)


def _size(text: str) -> dict[str, int]:
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if found is None:
        raise RequestError(f"size={quoted(text)}: WIDTHxHEIGHT in pixels, such as 256x256")
    return {"width": int(found[1]), "height": int(found[2])}


def _check_finite(**given: float | None) -> None:
    """Raise RequestError for an option that is not a number, which click's ranges allow."""
    for name, value in given.items():
        if value is not None and math.isnan(value):
            raise RequestError(f"{name}=nan: a number is wanted")


@main.command()
@MODEL
@click.option("--precision", type=click.Choice(list(QUANTIZED)), default="int8.fp16", show_default=True)
@click.option(
    "--stage", "stages", multiple=True, help="Quantise only this denoising stage; repeatable.  [all that have a graph]"
)
@click.option(
    "--prompt", "prompts", multiple=True, help="Prompt of a calibration video; repeatable.  [some the model knows]"
)
@click.option("--steps", type=click.IntRange(1, 1000), default=10, show_default=True, help="Steps of the videos.")
@click.option(
    "--frames", type=click.IntRange(1), help="Frames of the calibration videos; fewer take less time.  [the model's]"
)
@click.option("--size", help="Width and height of the calibration videos: 256x256.  [the model's]")
@click.option(
    "--calls", type=click.IntRange(1, 1000), default=8, show_default=True, help="Calls of each stage to calibrate on."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=60,
    show_default=True,
    help="Time for the videos (at most half) and for measuring layers; layers not measured are not quantised.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    help="Largest relative error of a step; layers stay unquantised until it is met.  [0.05]",
)
@JSON
def quantize(
    model: Path,
    precision: str,
    stages: tuple[str, ...],
    prompts: tuple[str, ...],
    steps: int,
    frames: int | None,
    size: str | None,
    calls: int,
    minutes: float,
    tolerance: float | None,
    as_json: bool,
) -> None:
    """Write denoising graphs of MODEL that multiply in 8 or 4 bits, calibrated on real runs.

    int8.fp16, fp8.fp16 and nvfp4.fp16 are made from the float16 graphs, for engines. int8 and w8 are made from the
    float32 graphs, for ONNX Runtime on a CPU. w8 rounds only the weights, so that they take a quarter of the memory.
    """
    with reported(as_json):
        with _export_extra():
            from higen.export.model_graphs import current
            from higen.export.quantize import TOLERANCE, Report, check_graphs, record_calls
            from higen.export.quantize import quantize as run
            from higen.trial import known_prompts
        until = time.monotonic() + 60 * minutes
        sizes = ({} if frames is None else {"frames": frames}) | ({} if size is None else _size(size))
        _check_finite(minutes=minutes, tolerance=tolerance)
        bundle = current(Bundle.open(model), _telling(as_json))
        names = check_graphs(bundle, precision, stages or None)
        shown = not as_json and is_watched()
        texts = prompts or known_prompts(bundle.manifest, 3)
        recorded = record_calls(bundle, texts, steps, calls, names, shown, 30 * minutes, **sizes)
        done: list[Report] = []

        def show(report: Report) -> None:
            done.append(report)
            if not as_json:
                layers = f"{report.chosen} of {report.candidates} layers, {report.work:.0%} of the work"
                click.echo(f"{report.stage:<21} {report.precision:<12}{layers:<40}error {report.error:.3f}")

        allowed = TOLERANCE if tolerance is None else tolerance
        run(bundle, recorded, precision, names, allowed, show, shown, until - time.monotonic())
        if as_json:
            click.echo(json.dumps({"model": str(bundle.path), "stages": [report.as_json() for report in done]}))


@main.command()
@MODEL
@JSON
def inspect(model: Path, as_json: bool) -> None:
    """List what MODEL contains: stages, loops, controls, files."""
    with reported(as_json):
        bundle = Bundle.open(model)
        click.echo(json.dumps(as_values(bundle)) if as_json else "\n".join(as_lines(bundle)))
