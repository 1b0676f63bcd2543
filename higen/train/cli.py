"""The commands `higen train` and `higen cues`. Importing this module loads no torch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import click

from higen.errors import SettingsError
from higen.progress import is_watched
from higen.terminal import JSON, PATH, needs, reported, say
from higen.typed_json import to_json

__all__ = ["cues", "evaluate", "train"]


class _ConfigOrRecipe(click.Group):
    """`higen train CONFIG.toml` is short for `higen train config CONFIG.toml`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["config", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_ConfigOrRecipe, subcommand_metavar="CONFIG.toml | RECIPE [OPTIONS]")
def train() -> None:
    """Train a model as CONFIG.toml says, or the built-in model by its recipe (`default`).

    Ctrl-C stops cleanly; the same command continues where it stopped, also after a crash.
    """


@train.command("config")
@click.argument("config", type=PATH)
@click.option("--resume/--fresh", default=None, help="Require a checkpoint, or start over.  [continue if there is one]")
@click.option("--export", type=PATH, help="Write the newest checkpoint as a model directory; do not train.")
@click.option("--overwrite", is_flag=True, help="Replace the model directory of --export.")
def from_config(config: Path, resume: bool | None, export: Path | None, overwrite: bool) -> None:
    """Train as the file CONFIG says.

    The file higen/train/sections.py describes its keys. May be launched by torchrun.
    """
    with reported(False):
        from higen.train.settings import read_settings

        settings = read_settings(config)
        with needs("train", "higen train"):
            from higen.train import trainer

        if export is None:
            bundle = trainer.train(settings, resume=resume, say=say, progress=is_watched())
        else:
            bundle = trainer.export(settings, export, overwrite)
        if os.environ.get("RANK", "0") == "0":  # only one of the processes prints it
            click.echo(str(bundle.path))


@train.command("default")
@click.option("--work", type=PATH, required=True, help="Folder for data and state; a run resumes from it.")
@click.option("--output", type=PATH, required=True, help="Model directory to write.")
@click.option("--steps", type=click.IntRange(1), help="Training steps of the denoiser.  [the recipe's]")
@click.option("--codec-minutes", type=float, default=45.0, show_default=True, help="Training time of the autoencoder.")
@click.option("--start", type=PATH, help="Model of this recipe to start from.  [random weights]")
@click.option("--bf16", is_flag=True, help="Mixed precision: faster on some processors, slower on others.")
@click.option("--few-steps", "few", type=PATH, help="Also write a model directory that draws in few steps (distilled).")
def from_recipe(
    work: Path,
    output: Path,
    steps: int | None,
    codec_minutes: float,
    start: Path | None,
    bf16: bool,
    few: Path | None,
) -> None:
    """Train the built-in model. The first step downloads its npm packages."""
    with reported(False):
        if not (math.isfinite(codec_minutes) and codec_minutes >= 0):
            raise SettingsError(f"--codec-minutes={codec_minutes:g}: a number of minutes, 0 or more")
        if codec_minutes == 0 and start is None:
            raise SettingsError("--codec-minutes=0: more than 0, unless --start names a model whose codec is kept")
        with needs("train", "higen train"):
            from higen.train.emoji.run import run

        click.echo(str(run(work, output, steps, codec_minutes, start, bf16, few).path))


@click.command()
@click.argument("video", type=PATH, metavar="FILE")
@click.option("--model", type=PATH, help="Model with the latents, rate and ranges to use.  [the built-in small model]")
@click.option("--fps", type=int, help="Frames a second to look at.  [the model's]")
@click.option("--frames", type=int, help="From the middle of a video, or the start of a sound.  [all that can be used]")
@click.option("--openclip", type=PATH, help="CLIP picture tower, in transformers' format.")
@click.option("--plot", type=PATH, help="Draw the curves into this picture.")
@JSON
def cues(
    video: Path,
    model: Path | None,
    fps: int | None,
    frames: int | None,
    openclip: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure the motion and appearance cues of a video, as training does, or the energy and onsets of a sound.

    With --json, a sound's output also has its numbers for each control that takes a curve, in the form that the server,
    C++ and Triton take.
    """
    with reported(as_json):
        from higen.api import default_model
        from higen.bundle import Bundle
        from higen.families.higen import spec
        from higen.media.sound import SOUNDS
        from higen.output_file import check_file
        from higen.train.curves import as_text, measure, other_likeness, save_plot
        from higen.train.sound_curves import measure_sound

        if plot is not None:
            check_file(plot)
        opened = Bundle.open(model or default_model())
        if video.suffix.lower() in SOUNDS:
            sound = measure_sound(opened.manifest, video, fps, frames)
            if plot is not None:
                sound.save_plot(plot)
            click.echo(json.dumps(sound.as_json()) if as_json else sound.as_text())
            return
        curves = measure(
            opened,
            video,
            fps=fps,
            frames=frames,
            openclip=None if openclip is None else str(openclip),
        )
        if line := other_likeness(spec.config(opened.manifest), None if openclip is None else str(openclip)):
            say(line)
        for line in curves.notes:
            say(line)
        if plot is not None:
            save_plot(curves, plot)
        click.echo(json.dumps(curves.as_json()) if as_json else as_text(curves))


@click.command()
@click.argument("model", type=PATH, required=False)
@click.option("--clips", type=PATH, help="Measure against these clips: a data set as `higen train` reads it.")
@click.option("--limit", type=int, help="With --clips: number of clips, spread over the data set.  [all]")
@click.option("--data", type=PATH, help="Folder of the emoji, for a model made by the default recipe.")
@click.option("--output", type=PATH, required=True, help="Folder for the measures and contact sheets.")
@click.option("--fetch", is_flag=True, help="Download the emoji where --data has none: npm packages, about 700 MB.")
@click.option("--seeds", type=int, help="Clips of each held-out prompt.  [8; 1 with --clips]")
@click.option("--quick", is_flag=True, help="Measure only every fourth subject, with one seed.")
@click.option("--known", is_flag=True, help="Measure known frames too: first and last, every second frame, first half.")
@click.option("--preset", help="Draw the clips with this preset of the model.")
@click.option("--backend", default="auto", show_default=True, help="Where the stages run; see `higen doctor`.")
@click.option("--precision", help="Precision of the stages: fp32, fp16, bf16, int8, ...  [fp32 on a CPU]")
@JSON
def evaluate(
    model: Path | None,
    clips: Path | None,
    limit: int | None,
    data: Path | None,
    output: Path,
    fetch: bool,
    seeds: int | None,
    quick: bool,
    known: bool,
    preset: str | None,
    backend: str,
    precision: str | None,
    as_json: bool,
) -> None:
    """Measure MODEL against real clips: your own, or those of the default recipe.  [the built-in small model]

    What is sampled and what the figures mean: higen/train/clip_evaluation.py; for the recipe,
    higen/train/emoji/evaluation/evaluate.py.
    """
    with reported(as_json):
        if (clips is None) == (data is None):
            raise SettingsError("--clips, --data: give one of the two, your own clips or the folder of the emoji")
        if clips is not None:
            if fetch or quick:
                raise SettingsError("--fetch, --quick: only with --data; --limit takes fewer clips")
            with needs("train", "higen evaluate"):
                from higen.train.clip_report import measure_clips

            found, text = measure_clips(
                model,
                clips,
                output,
                seeds=1 if seeds is None else seeds,
                limit=limit,
                preset=preset,
                backend=backend,
                precision=precision,
                shown=_watched(as_json),
            )
            click.echo(json.dumps(found) if as_json else text)
            return
        if limit is not None:
            raise SettingsError(f"--limit={limit}: only with --clips")
        assert data is not None
        with needs("train", "higen evaluate"):
            from higen.train.emoji.evaluation.command import measure

        measures, text = measure(
            model,
            data,
            output,
            seeds=1 if quick else 8 if seeds is None else seeds,
            quick=quick,
            known=known,
            preset=preset,
            backend=backend,
            precision=precision,
            download=fetch,
            shown=_watched(as_json),
        )
        click.echo(json.dumps(to_json(measures)) if as_json else text)


def _watched(as_json: bool) -> bool:
    return is_watched() and not as_json
