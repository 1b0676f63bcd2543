"""The commands `higen-export build-engines` and `compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from higen.progress import is_watched
from higen.terminal import JSON, PATH, reported, say

if TYPE_CHECKING:
    from higen.engines.model_engines import Event

__all__ = ["build_engines", "compare"]

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """A number of bytes: 1073741824, 512M or 1.5G."""
    if value is None:
        return None
    text = value.strip().lower().removesuffix("b").removesuffix("i")
    unit = text[-1:] if text[-1:] in UNITS else ""
    try:
        size = float(text.removesuffix(unit)) * UNITS[unit]
    except ValueError:
        size = 0.0
    if not 1 <= size < 2**63:
        raise click.BadParameter(f"{value!r}: a size in bytes, such as 512M or 8G")
    return int(size)


@click.command("build-engines")
@click.argument("model", type=PATH)
@click.option(
    "--target",
    required=True,
    help="rtx-sm89 (or several: rtx-sm89,rtx-sm120), rtx (one portable plan), or tensorrt (for the GPU here).",
)
@click.option("--stage", "stages", multiple=True, help="Build only this stage; repeatable.  [every stage]")
@click.option("--precision", default="fp32", show_default=True, help="Precision of the graphs and of the engines.")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    default=("default",),
    show_default=True,
    help="Shapes to build for: default, interactive, batch, flexible, or a .toml file; several for one engine.",
)
@click.option("--workspace", callback=_bytes, help="Largest scratch memory of a layer, for example 2G.  [all there is]")
@click.option("--weight-streaming", is_flag=True, help="Let weights stay on the host if the GPU cannot hold them.")
@JSON
def build_engines(
    model: Path,
    target: str,
    stages: tuple[str, ...],
    precision: str,
    profiles: tuple[str, ...],
    workspace: int | None,
    weight_streaming: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines from the graphs of MODEL, into MODEL/engines/<target>.

    Engines of TensorRT for RTX (rtx...) are built ahead of time and need no GPU. Engines that still fit are kept, so
    an interrupted build continues where it stopped. A target holds one engine of each stage: another --precision, other
    profiles or options replace it.
    """
    with reported(as_json):
        from higen.bundle import Bundle
        from higen.engines.build import Options
        from higen.engines.model_engines import build_engines as build
        from higen.engines.shapes import read_profile
        from higen.engines.targets import parse_targets

        targets = parse_targets(target)
        bundle = Bundle.open(model)
        chosen = [read_profile(name, bundle.manifest) for name in dict.fromkeys(profiles)]
        bars = _Bars(shown=not as_json and is_watched(), lines=not as_json)
        try:
            records = build(
                bundle,
                targets,
                chosen,
                stages or None,
                precision,
                Options(workspace, weight_streaming),
                on_event=bars.show,
            )
        finally:
            bars.close()
        if as_json:
            made = [
                {"target": r.target, "stage": r.stage, "size": r.size, "seconds": r.seconds, "sha256": r.sha256}
                for r in records
            ]
            click.echo(json.dumps({"model": str(bundle.path), "engines": made}))


class _Bars:
    """A progress bar for the plan being built, and a line for each plan that is finished or kept."""

    def __init__(self, shown: bool, lines: bool) -> None:
        self._shown = shown
        self._lines = lines
        self._bar: Any = None

    def show(self, event: Event) -> None:
        """Show an event."""
        from tqdm import tqdm

        name = f"{event.target}/{event.stage}"
        if event.state == "waiting":
            say(f"waiting for another build of {event.target}")
            return
        if event.state == "building":
            if event.replaced is not None and self._bar is None and self._lines:
                old = f"{event.replaced.precision} engine for {', '.join(p.name for p in event.replaced.profiles)}"
                click.echo(f"{name:<32}replaces the {old}: {event.reason}")
            if self._bar is None:
                form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}"
                self._bar = tqdm(desc=name, total=1.0, disable=not self._shown, bar_format=form, leave=False)
            self._bar.update(event.part - self._bar.n if self._shown else 0)
            return
        self.close()
        record = event.record
        if self._lines and record is not None:
            did = "is there already" if event.state == "kept" else f"built in {record.seconds:.0f} s ({event.reason})"
            click.echo(f"{name:<32}{record.precision:<6}{record.size / 1e6:8.1f} MB  {did}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@click.command()
@click.argument("model", type=PATH)
@click.option(
    "--with", "other", default="onnx", show_default=True, help="Backend to compare: onnx, or tensorrt on a GPU."
)
@click.option("--precision", default="fp16", show_default=True, help="Precision of this backend.")
@click.option("--stage", "stages", multiple=True, help="Compare only this stage; repeatable.  [every stage]")
@click.option("--prompt", help="Prompt of the video that gives the inputs.  [one that the model knows]")
@click.option("--steps", type=click.IntRange(1, 1000), default=4, show_default=True, help="Steps of the video.")
@click.option(
    "--tolerance", type=click.FloatRange(0, min_open=True), help="Largest error / largest output.  [by precision]"
)
@JSON
def compare(
    model: Path,
    other: str,
    precision: str,
    stages: tuple[str, ...],
    prompt: str | None,
    steps: int,
    tolerance: float | None,
    as_json: bool,
) -> None:
    """Compare stages of MODEL with its float32 graphs on ONNX Runtime, over a video. Exit code 1 if one fails."""
    passed = False
    with reported(as_json):
        from higen.bundle import Bundle
        from higen.engines.compare import compare as run

        rows = run(Bundle.open(model), other, precision, stages or None, prompt, steps, tolerance)
        passed = all(row.passed for row in rows)
        if as_json:
            click.echo(json.dumps({"passed": passed, "outputs": [row.as_json() for row in rows]}))
        else:
            click.echo(f"{'stage':<22}{'output':<18}{'calls':>6}{'largest':>11}{'mean':>11}{'allowed':>11}")
            for row in rows:
                click.echo(
                    f"{row.stage:<22}{row.output:<18}{row.calls:>6}{row.largest:>11.2e}{row.mean:>11.2e}"
                    f"{row.allowed:>11.2e}  {'ok' if row.passed else 'OVER'}"
                )
    if not passed:
        sys.exit(1)
