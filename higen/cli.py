"""The command `higen`; its exit codes are those of `higen.terminal`."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from higen.progress import is_watched
from higen.terminal import JSON, PATH, LateCommands, needs, reported, say
from higen.version import __version__

__all__ = ["main"]

MODEL = click.option("--model", type=PATH, help="Model directory.  [the built-in small model]")


LATE = {
    "batch": "higen.batch_command:batch",
    "cues": "higen.train.cli:cues",
    "evaluate": "higen.train.cli:evaluate",
    "generate": "higen.generate_command:generate",
    "plan": "higen.plan_command:plan",
    "serve": "higen.serve_command:serve",
    "train": "higen.train.cli:train",
}
"""Commands in separate modules."""


@click.group(cls=LateCommands, late=LATE, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="higen")
def main() -> None:
    """Text to video: a key frame is drawn, then animated."""


@main.command()
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="[SOURCES]... OUTPUT")
@click.option("--family", help="Model family of the sources.  [the family that recognises them]")
@click.option("--denoiser", type=PATH, help="cvpr2024.t2v.e003.non_ema_0725000.pth")
@click.option(
    "--text-encoder",
    type=PATH,
    help="open_clip_pytorch_model.bin, or a Stable Diffusion 2.1 folder in diffusers' format",
)
@click.option(
    "--autoencoder",
    type=PATH,
    help="v2-1_512-ema-pruned.ckpt, or a Stable Diffusion 2.1 folder in diffusers' format",
)
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True)
@click.option("--prediction", type=click.Choice(["epsilon", "v"]), help="Prediction, if the files do not say it.")
@click.option("--network", help="Kind of network, if the file's name does not say which of several kinds it is.")
@click.option("--frames", type=int, help="Frames of the training clips, if the files do not say it.")
@click.option("--group-norm", help="Range of the group norms' statistics, if the files do not say it.")
@click.option(
    "--control-kind",
    type=click.Choice(["edges", "given"]),
    help="Input of a ControlNet among the sources: the edges of pictures, or the given maps.",
)
@click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE]", help="Add a LoRA to the weights; repeatable.")
@click.option("--preview", type=PATH, help="Add a tiny decoder (TAESD) for previews: a diffusers folder, or a file.")
@click.option("--spatial", type=PATH, help="For HiGen: a personalised Stable Diffusion 2.1, for the spatial layers.")
@click.option("--base", type=PATH, help="Model that --spatial was fine-tuned from; the difference of the two is added.")
@click.option("--overwrite", is_flag=True, help="Replace a model directory that exists.")
@JSON
def convert(
    paths: tuple[Path, ...],
    family: str | None,
    denoiser: Path | None,
    text_encoder: Path | None,
    autoencoder: Path | None,
    dtype: str,
    prediction: str | None,
    network: str | None,
    frames: int | None,
    group_norm: str | None,
    control_kind: str | None,
    loras: tuple[str, ...],
    preview: Path | None,
    spatial: Path | None,
    base: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn released checkpoints into the model directory OUTPUT.

    For HiGen, --denoiser, --text-encoder and --autoencoder name its three files. Another family's SOURCES stand before
    OUTPUT; the family that recognises them converts them. If the source is a model directory, OUTPUT is a copy
    with the adapters of --lora or the tiny decoder of --preview added; its weights keep their precision.
    """
    *sources, output = paths
    named = [path for path in (denoiser, text_encoder, autoencoder) if path is not None]
    if bool(sources) == bool(named) or len(named) not in (0, 3):
        raise click.UsageError(
            "give SOURCES before OUTPUT, or all three of --denoiser, --text-encoder and --autoencoder"
        )
    with reported(as_json):
        with needs("torch", "higen convert"):
            from higen.convert import convert_sources
            from higen.families import FIRST
            from higen.models.lora import parse_lora

        given: dict[str, Any] = {
            "prediction": prediction,
            "network": network,
            "frames": frames,
            "group_norm": group_norm,
            "control_kind": control_kind,
        }
        given |= {"preview": preview, "spatial": spatial, "base": base}
        of_family = {name: value for name, value in given.items() if value is not None}
        of_family |= {"loras": [parse_lora(lora) for lora in loras]} if loras else {}
        with _bytes_bar(not as_json) as progress:
            bundle = convert_sources(
                sources or named,
                output,
                family=family if sources else FIRST,
                dtype=dtype,
                overwrite=overwrite,
                progress=progress,
                on_note=say,
                **of_family,
            )
        if as_json:
            click.echo(json.dumps({"model": str(bundle.path), "files": sorted(bundle.files)}))
        else:
            size = sum(record.size for record in bundle.files.values())
            click.echo(f"{bundle.path}: {len(bundle.files)} files, {size / 1e9:.2f} GB")


@contextmanager
def _bytes_bar(wanted: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar over all files, in a terminal or notebook. Yields a function of (file, bytes done, all bytes)."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, disable=not (wanted and is_watched())) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description_str(name, refresh=False)
            bar.update(done - bar.n)

        yield show


@main.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.argument("output", type=PATH)
@click.option("--overwrite", is_flag=True, help="Replace a model directory that exists.")
@JSON
def compose(first: Path, second: Path, output: Path, overwrite: bool, as_json: bool) -> None:
    """Join two models: FIRST draws a picture, and SECOND makes a clip of this picture.

    OUTPUT has the weights of both, as hard links where the file system allows. Engines must be built again.
    """
    with reported(as_json):
        from higen.compose import compose as run

        bundle = run(first, second, output, overwrite=overwrite)
        say(f"licence: {bundle.manifest.licence}")
        if as_json:
            click.echo(json.dumps({"model": str(bundle.path), "files": sorted(bundle.files)}))
        else:
            controls = ", ".join(control.name for control in bundle.manifest.controls)
            click.echo(f"{bundle.path}: {len(bundle.manifest.stages)} stages, controls: {controls}")


@main.command()
@MODEL
@JSON
def prompts(model: Path | None, as_json: bool) -> None:
    """List prompts that a model draws well, and the words it knows."""
    with reported(as_json):
        from higen.api import default_model
        from higen.bundle import Bundle
        from higen.tokenizer import PromptTokenizer

        opened = Bundle.open(model or default_model())
        listed, text = list(opened.manifest.prompts), opened.manifest.text
        words = [] if text is None else PromptTokenizer.from_file(opened.file(text.tokenizer), text).words()
        if as_json:
            click.echo(json.dumps({"prompts": listed, "words": words}))
        else:
            click.echo("\n".join(listed) or "The model lists none.")
            click.echo(f"\n{_vocabulary(words)}")


def _vocabulary(words: list[str] | None) -> str:
    """The words, wrapped to the terminal's width."""
    if words is None:
        return "It reads any word."
    if not words:
        return "It reads no text."
    width = shutil.get_terminal_size().columns
    lines = textwrap.wrap("  ".join(words), width, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"It knows {len(words)} words, and no others:", *lines])


@main.command()
@MODEL
@JSON
def doctor(model: Path | None, as_json: bool) -> None:
    """Report what works here, what runs each stage of a model, and why better backends cannot."""
    with reported(as_json):
        from higen.doctor import report

        found = report(model)
        click.echo(json.dumps(found.as_json()) if as_json else found.as_text())
    if not found.healthy:
        sys.exit(1)


@main.command()
@click.argument("directory", type=PATH)
@click.option("--only", help="Run the cases whose name contains this.")
@JSON
def parity(directory: Path, only: str | None, as_json: bool) -> None:
    """Compare this installation with the reference's numbers in the fixture DIRECTORY."""
    failed = 0
    with reported(as_json):
        with needs("torch", "higen parity"):
            from higen.parity import HEADER, line, run

        cases = []
        if not as_json:
            click.echo(HEADER)
        for case in run(directory, only=only):
            failed += not case.passed
            cases.append(case)
            if not as_json:
                click.echo(line(case))
        if as_json:
            click.echo(json.dumps({"passed": not failed, "cases": [case.as_json() for case in cases]}))
        else:
            click.echo(f"{len(cases)} cases, {failed} over")
    if failed:
        sys.exit(1)


@main.command()
@click.argument("directory", type=PATH)
@click.option("--reseal", is_flag=True, help="Accept tables that were edited by hand; they are still checked.")
@JSON
def upgrade(directory: Path, reseal: bool, as_json: bool) -> None:
    """Rewrite the manifest of the model DIRECTORY in the current version; weights and graphs do not change."""
    with reported(as_json):
        from higen.upgrade import upgrade as run

        done = run(directory, reseal=reseal)
        click.echo(json.dumps(done.as_json()) if as_json else "\n".join(done.as_lines()))
