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

from higen.terminal import JSON, Commands, needs, reported
from higen.train.cli import cues, evaluate, train
from higen.version import __version__

__all__ = ["main"]

MODEL = click.option("--model", type=click.Path(path_type=Path), help="Model directory.  [the built-in small model]")
BACKEND = click.option("--backend", default="auto", show_default=True, help="Where the stages run; see `higen doctor`.")


def numbers(text: str) -> float | list[float]:
    """One number, or the list of comma-separated numbers."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r}: a number, or numbers separated by commas") from None
    return values[0] if len(values) == 1 else values


def _whole(value: Any) -> Any:
    """Numbers without a fraction as ints, so that `--steps 50` is a whole number; others are refused later."""
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="higen")
def main() -> None:
    """Text to video with HiGen: a key frame is drawn, then brought to life."""


@main.command()
@click.argument("prompt")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("higen.mp4"),
    show_default=True,
    help="File to write: .mp4 .webm .gif .webp .png (a sequence) .npy",
)
@MODEL
@click.option("--image", type=click.Path(path_type=Path), help="Picture to bring to life instead of a drawn key frame.")
@click.option("--negative-prompt", default="", help="What the video should not show.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=numbers, help="Denoising steps: one number, or two for the two stages.")
@click.option("--guidance", type=numbers, help="Guidance scale: one number, or two for the two stages.")
@click.option("--solver", help="ddim or dpm++2m.")
@click.option("--frames", type=int)
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--fps", type=int)
@click.option("--motion", type=numbers, help="How much moves: one number, or one per pair of frames.")
@click.option("--appearance", type=numbers, help="How much the look changes: one number (0 still), or one per frame.")
@BACKEND
@click.option("--device", help="cpu, cuda, and for torch cuda:1, ...  [a GPU if there is one]")
@click.option("--precision", help="What the stages compute in: fp32, fp16, bf16, int8, ...  [fp32 on a CPU]")
@click.option("--threads", type=int, help="CPU threads of one stage.  [the library's choice]")
@click.option(
    "--low-memory", is_flag=True, help="One TensorRT engine on the GPU at a time, for cards that hold no more."
)
@JSON
def generate(
    prompt: str,
    output: Path,
    model: Path | None,
    image: Path | None,
    backend: str,
    device: str | None,
    precision: str | None,
    threads: int | None,
    low_memory: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a video of PROMPT.

    What is not given is the model's default.
    """
    with reported(as_json):
        from higen.api import default_model, load
        from higen.backends.select import check_backend
        from higen.bundle import Bundle
        from higen.images import load_image
        from higen.request import make_request
        from higen.video import check_output

        given = {name: value for name, value in options.items() if value is not None}
        given |= {name: _whole(given[name]) for name in ("steps",) if name in given}
        # The pipeline checks all this again; here it is found out before the weights are loaded.
        check_output(output)
        check_backend(backend)
        request = make_request(Bundle.open(model or default_model()).config, prompt, **given)
        if image is not None:
            load_image(image, request.width, request.height)
        with load(
            model, backend, device=device, precision=precision, threads=threads, low_memory=low_memory
        ) as pipeline:
            video = pipeline(prompt, image=image, progress=False if as_json else None, **given)
            written = video.save(output)
        if as_json:
            click.echo(
                json.dumps(
                    {
                        "file": str(written),
                        "frames": len(video),
                        "width": video.width,
                        "height": video.height,
                        "fps": video.fps,
                        **video.metadata,
                    }
                )
            )
        else:
            spent = sum(video.metadata["seconds"].values())
            click.echo(
                f"{written}: {len(video)} frames, {video.width}x{video.height}, {video.fps:g} fps, {spent:.1f} s"
            )


@main.command()
@click.option(
    "--denoiser",
    type=click.Path(path_type=Path),
    required=True,
    help="cvpr2024.t2v.e003.non_ema_0725000.pth, or the same as .safetensors",
)
@click.option(
    "--text-encoder",
    type=click.Path(path_type=Path),
    required=True,
    help="open_clip_pytorch_model.bin, or a Stable Diffusion 2.1 folder in diffusers' format",
)
@click.option(
    "--autoencoder",
    type=click.Path(path_type=Path),
    required=True,
    help="v2-1_512-ema-pruned.ckpt, or a Stable Diffusion 2.1 folder in diffusers' format",
)
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace a model directory that exists.")
@click.argument("output", type=click.Path(path_type=Path))
@JSON
def convert(
    denoiser: Path, text_encoder: Path, autoencoder: Path, dtype: Any, overwrite: bool, output: Path, as_json: bool
) -> None:
    """Turn the released HiGen files into the model directory OUTPUT."""
    with reported(as_json):
        with needs("torch", "higen convert"):
            from higen.convert import convert as run

        with _bytes_bar(not as_json) as progress:
            bundle = run(
                denoiser, text_encoder, autoencoder, output, dtype=dtype, overwrite=overwrite, progress=progress
            )
        if as_json:
            click.echo(json.dumps({"model": str(bundle.path), "files": sorted(bundle.files)}))
        else:
            size = sum(record.size for record in bundle.files.values())
            click.echo(f"{bundle.path}: {len(bundle.files)} files, {size / 1e9:.2f} GB")


@contextmanager
def _bytes_bar(wanted: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over all that is written, where a person is watching; yields (file, bytes done, all bytes)."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, disable=not (wanted and sys.stderr.isatty())) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description_str(name, refresh=False)
            bar.update(done - bar.n)

        yield show


@main.command()
@MODEL
@JSON
def prompts(model: Path | None, as_json: bool) -> None:
    """List prompts that a model draws well, and the words it knows."""
    with reported(as_json):
        from higen import bundle as files
        from higen.api import default_model
        from higen.bundle import Bundle
        from higen.tokenizer import PromptTokenizer

        opened = Bundle.open(model or default_model())
        listed = list(opened.config.prompts)
        words = PromptTokenizer.from_file(opened.file(files.TOKENIZER), opened.config.text).words()
        if as_json:
            click.echo(json.dumps({"prompts": listed, "words": words}))
        else:
            click.echo("\n".join(listed) or "The model lists none.")
            click.echo(f"\n{_vocabulary(words)}")


def _vocabulary(words: list[str] | None) -> str:
    """The words, as wide as the terminal."""
    if words is None:
        return "It reads any word."
    width = shutil.get_terminal_size().columns
    lines = textwrap.wrap("  ".join(words), width, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"It knows {len(words)} words, and no others:", *lines])


@main.command()
@MODEL
@JSON
def doctor(model: Path | None, as_json: bool) -> None:
    """Say what works here, what runs each stage of a model, and why the better ways do not."""
    with reported(as_json):
        from higen.doctor import report

        found = report(model)
        click.echo(json.dumps(found.as_json()) if as_json else found.as_text())
    if not found.healthy:
        sys.exit(1)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
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


main.add_command(train)
main.add_command(cues)
main.add_command(evaluate)
