"""The command `higen-export`. Exit codes as those of `higen`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from higen.bundle import Bundle, graph_file
from higen.errors import MissingExtra
from higen.stages import STAGES
from higen.terminal import JSON, reported
from higen.version import __version__

__all__ = ["main"]

MODEL = click.argument("model", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="higen-export")
def main() -> None:
    """Compile a model directory: graphs for every stage, beside its weights."""


@main.command()
@MODEL
@click.option("--stage", "stages", multiple=True, type=click.Choice(list(STAGES)), help="Only these.  [every stage]")
@click.option("--opset", type=click.IntRange(21, 23), default=23, show_default=True)
@JSON
def onnx(model: Path, stages: tuple[str, ...], opset: int, as_json: bool) -> None:
    """Write an ONNX graph for every stage of MODEL, each checked against PyTorch at shapes it was not traced with."""
    with reported(as_json):
        try:
            from higen.export.model import Parity, export_model
        except ImportError as error:
            raise MissingExtra(error.name or "onnx", "export", "higen-export onnx") from error

        done: list[Parity] = []

        def show(parity: Parity) -> None:
            done.append(parity)
            if not as_json:
                mark = "ok" if parity.passed else "OVER"
                click.echo(f"{parity.stage:<14}{parity.shape:<24}{parity.error:9.1e}  {mark}")

        bundle = export_model(Bundle.open(model), stages or tuple(STAGES), opset, show)
        if as_json:
            rows = [{"stage": p.stage, "shape": p.shape, "error": p.error} for p in done]
            click.echo(json.dumps({"model": str(bundle.path), "parity": rows}))


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
