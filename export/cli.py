"""The command `higen-export`. Exit codes as those of `higen`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from higen.bundle import Bundle, graph_file
from higen.errors import MissingExtra
from higen.stages import STAGES
from higen.terminal import JSON, reported
from higen.version import __version__

if TYPE_CHECKING:
    from higen.export.model import Parity

__all__ = ["main"]

MODEL = click.argument("model", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="higen-export")
def main() -> None:
    """Compile a model directory: graphs for every stage, beside its weights."""


@main.command()
@MODEL
@click.option("--stage", "stages", multiple=True, type=click.Choice(list(STAGES)), help="Only these.  [every stage]")
@click.option("--opset", type=click.IntRange(21, 23), default=21, show_default=True)
@JSON
def onnx(model: Path, stages: tuple[str, ...], opset: int, as_json: bool) -> None:
    """Write an ONNX graph for every stage of MODEL, each checked against PyTorch at shapes it was not traced with."""
    with reported(as_json):
        with _export_extra():
            from higen.export.model import export_model
        done: list[Parity] = []
        bundle = export_model(Bundle.open(model), stages or tuple(STAGES), opset, _listing(done, as_json))
        if as_json:
            click.echo(json.dumps({"model": str(bundle.path), "parity": [p.as_json() for p in done]}))


@main.command()
@MODEL
@click.option("--report", type=click.Path(path_type=Path), help="Folder for report.md and sheet.png.")
@click.option("--steps", type=int, default=10, show_default=True, help="Steps of each stage of the whole loop.")
@JSON
def verify(model: Path, report: Path | None, steps: int, as_json: bool) -> None:
    """Prove MODEL: hashes, every graph against PyTorch, and the whole loop on both. Exit code 1 if one is over."""
    passed = False
    with reported(as_json):
        with _export_extra():
            from higen.export.verify import verify as run
            from higen.export.verify import write
        done: list[Parity] = []
        found = run(Bundle.open(model), steps, on_parity=_listing(done, as_json))
        passed = found.passed
        if report is not None:
            write(found, report)
        if as_json:
            rows = [p.as_json() for p in done]
            loop = {"latents": found.latents, "pixels": found.pixels}
            click.echo(json.dumps({"passed": passed, "parity": rows, "loop": loop}))
        else:
            click.echo(found.as_markdown().rstrip().rpartition("\n")[2])
    if not passed:
        sys.exit(1)


@contextmanager
def _export_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "export", "higen-export") from error


def _listing(done: list[Parity], as_json: bool) -> Callable[[Parity], None]:
    """Collects parities and, for a person, prints each."""

    def show(parity: Parity) -> None:
        done.append(parity)
        if not as_json:
            click.echo(f"{parity.stage:<14}{parity.shape:<24}{parity.error:9.1e}  {'ok' if parity.passed else 'OVER'}")

    return show


@main.command()
@MODEL
@JSON
def inspect(model: Path, as_json: bool) -> None:
    """Say what MODEL holds: architecture, stages, files."""
    with reported(as_json):
        bundle = Bundle.open(model)
        found = {name: graph_file(name) in bundle.files for name in STAGES}
        sizes = {name: record.size for name, record in bundle.files.items()}
        if as_json:
            click.echo(json.dumps({"name": bundle.config.name, "graphs": found, "files": sizes}))
            return
        click.echo(f"{bundle.config.name} ({bundle.config.licence})")
        for name, stage in STAGES.items():
            click.echo(f"  {name:<14}{'graph' if found[name] else 'no graph'}")
            for arrow, tensors in (("<-", stage.inputs), ("->", stage.outputs)):
                for t in tensors:
                    click.echo(f"    {arrow} {t.name:<16}{t.dtype:<9}{list(t.shape)}".replace("'", ""))
        for name, size in sizes.items():
            click.echo(f"  {name:<28}{size / 1e6:10.2f} MB")
