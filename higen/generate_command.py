"""The command `higen generate`. It has an option for each control of the model that --model names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from higen.cpu import SLOW_BF16
from higen.errors import HigenError, RequestError, quoted
from higen.paths import given_path
from higen.tables import Control
from higen.terminal import JSON, PATH, reported, say

if TYPE_CHECKING:
    from higen.pipeline import Pipeline
    from higen.video import Video

__all__ = ["generate", "numbers"]


def numbers(text: str) -> float | list[float]:
    """One number, or the list of comma-separated numbers."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{quoted(text)}: a number, or numbers separated by commas") from None
    return values[0] if len(values) == 1 else values


def _curve(text: str) -> Any:
    """Numbers, a file that a curve is measured from, or the word that leaves the control to the model."""
    try:
        return numbers(text)
    except click.BadParameter:
        from higen.curve_source import curve_from
        from higen.request import UNSPECIFIED

        given = curve_from("file", text)
        if text == UNSPECIFIED or (given is not None and given.path is not None and given.path.suffix):
            return text
        raise click.BadParameter(f"{quoted(text)}: numbers separated by commas, or a clip or sound file") from None


def _frame(text: str) -> tuple[str, Path]:
    """The index of a frame and its picture; "" and a clip or folder, which gives every frame."""
    index, equals, file = text.partition("=")
    if not equals and text and given_path(text).exists():
        return "", given_path(text)
    if not equals or not file:
        raise click.BadParameter(f"{quoted(text)}: INDEX=FILE, such as 0=first.png, or a clip or folder")
    return index, given_path(file)


def _seed(text: str) -> int | str:
    """A whole number, or the word for a random one."""
    try:
        return text if text == "random" else int(text)
    except ValueError:
        raise click.BadParameter(f"{quoted(text)}: a whole number, or random") from None


def _given(name: str, value: Any) -> Any:
    """An option's value. Pictures of frames become a dict by index, each at most once, or the path of a clip."""
    if not isinstance(value, tuple):
        return value
    if len(value) == 1 and value[0][0] == "":
        return value[0][1]
    found = dict(value)
    if len(found) < len(value):
        raise RequestError(f"{name}: {', '.join(index for index, _ in value)}: each frame once")
    return found


def _whole(value: Any) -> Any:
    """Floats without a fraction become ints, so that `--steps 50` is a whole number. Other floats are refused later."""
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _FollowsModel(click.Command):
    """A command that has an option for each control of the model it is given."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> click.Context:
        """As in click, after the options for the model's controls were added."""
        own = [parameter for parameter in self.params if not isinstance(parameter, _ControlOption)]
        taken = {name for parameter in own for name in (*parameter.opts, parameter.name)}
        self.params = own + [
            option for option in _control_options(_model_of(args)) if not taken & {*option.opts, option.name}
        ]
        return super().make_context(info_name, args, *more, **extra)


class _ControlOption(click.Option):
    """An option that stands for a control of the model."""


def _model_of(args: Sequence[str]) -> Path | None:
    """The value of --model; None: the built-in one."""
    for i, word in enumerate(args):
        if word == "--model" and i + 1 < len(args):
            return given_path(args[i + 1])
        if word.startswith("--model="):
            return given_path(word.removeprefix("--model="))
    return None


def _control_options(model: Path | None) -> list[_ControlOption]:
    from higen.bundle import default_model
    from higen.manifest_file import read_manifest

    try:
        controls = read_manifest(model or default_model()).manifest.controls
    except HigenError:  # the command itself reports the error
        return []
    return [_option(control) for control in controls]


def _option(control: Control) -> _ControlOption:
    flag = f"--{control.name.replace('_', '-')}"
    default = "" if control.default is None else f"  [{control.default}]"
    if control.optional and control.default is None:
        default = "  [unspecified]"
    kinds: Mapping[str, Any] = {
        "number": float,
        "whole": int,
        "curve": _curve,
        "choice": click.Choice(control.choices),
        "text": str,
        "picture": PATH,
        "clip": PATH,
        "frames": _frame,
        "mask": PATH,
        "map": PATH,
    }
    meaning = control.meaning[:1].upper() + control.meaning[1:]
    metavar = {"curve": "NUMBERS|FILE", "frames": "INDEX=FILE|CLIP"}.get(control.kind)
    many = control.kind == "frames"
    flags = [flag.removesuffix("s")] if many else [flag]
    return _ControlOption(
        [*flags, control.name], type=kinds[control.kind], metavar=metavar, help=meaning + default, multiple=many
    )


@click.command(cls=_FollowsModel)
@click.argument("prompt", default="")
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("higen.mp4"),
    show_default=True,
    help="File to write: .mp4 .webm .gif .webp .png (a sequence) .npy",
)
@click.option("--model", type=PATH, help="Model directory.  [the built-in small model]")
@click.option("--negative-prompt", help="What the video should not show.")
@click.option("--seed", type=_seed, metavar="NUMBER", help="Same seed, same video; -1 or random draws one.  [0]")
@click.option("--steps", type=numbers, help="Denoising steps: one number, or one for each loop.")
@click.option("--guidance", type=_curve, help="Guidance scale: one number, one for each loop, or a file for a curve.")
@click.option("--solver", help="A solver of the model, for example ddim or dpm++2m.")
@click.option(
    "--guidance-interval", type=numbers, help="Part of the steps with guidance: 0.2,0.8. Other steps use scale 1."
)
@click.option("--windows", type=numbers, help="Make a long clip in windows: LENGTH,STRIDE in frames; 0: all at once.")
@click.option("--window-noise", help="Initial noise of a clip in windows: fresh, shuffled or repeated.")
@click.option("--free-init", type=numbers, help="FreeInit: ITERATIONS[,SPATIAL,TEMPORAL[,ORDER]].")
@click.option("--free-init-filter", help="Filter of FreeInit: butterworth, gaussian or ideal.")
@click.option("--reuse", type=numbers, help="Run the whole network only every N steps; other steps reuse its features.")
@click.option("--preset", help="A preset of the model, such as fast or full: it sets the options that are not given.")
@click.option("--inversion", help="Invert the clip into noise with this text, which describes it; else noise is added.")
@click.option("--frames", type=int)
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--fps", type=int)
@click.option("--audio", type=PATH, help="Sound file for the sound track of an .mp4 or .webm.")
@click.option("--backend", default="auto", show_default=True, help="Where the stages run; see `higen doctor`.")
@click.option(
    "--device", help="cpu, cuda, a GPU by its number: cuda:1, ..., openvino or webgpu.  [a GPU if there is one]"
)
@click.option("--precision", help="Precision of the stages: fp32, fp16, bf16, int8, ...  [fp32 on a CPU]")
@click.option("--threads", type=int, help="CPU threads of one stage.  [the library's choice]")
@click.option(
    "--low-memory", is_flag=True, help="Keep one TensorRT engine on the GPU at a time, for GPUs with little memory."
)
@click.option("--script", type=PATH, help="A scene script (JSON) in place of PROMPT: several scenes, one video.")
@click.option(
    "--keep-scenes", is_flag=True, help="With --script: keep the scenes, so that one of them can be changed later."
)
@JSON
def generate(
    prompt: str,
    output: Path,
    model: Path | None,
    backend: str,
    device: str | None,
    precision: str | None,
    threads: int | None,
    low_memory: bool,
    audio: Path | None,
    script: Path | None,
    keep_scenes: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a video of PROMPT.

    Options that are not given have the model's defaults. A request with only PROMPT, seed, frames, size and rate uses
    the model's usual preset, if it has one. With --script, a scene script replaces PROMPT
    (docs/planning.md). The last options are the model's own controls; --model DIR --help lists those of another model.
    """
    with reported(as_json):
        from higen.api import load
        from higen.video import check_output
        from higen.video_writer import import_codecs, read_track

        given = {name: _given(name, value) for name, value in options.items() if value not in (None, ())}
        given |= {name: _whole(given[name]) for name in ("steps", "windows", "reuse") if name in given}
        if script is not None and (prompt or given):
            words = ", ".join(["PROMPT"] * bool(prompt) + [f"--{name.replace('_', '-')}" for name in given])
            raise RequestError(f"{words}: the script says what is made; leave this out, or write it into {script}")
        # All these errors are found before the weights are loaded.
        check_output(output)
        with load(
            model, backend, device=device, precision=precision, threads=threads, low_memory=low_memory, prepare=False
        ) as pipeline:
            if script is not None:
                _play(pipeline, script, output, audio, keep_scenes, as_json)
                return
            request = pipeline.request(prompt, **given)
            pipeline.load_ahead(request)
            check_output(output, request.frames, request.fps)
            import_codecs(output)  # meanwhile
            if audio is not None:
                read_track(output, audio, request.frames / request.fps)
            pipeline.prepare(request)
            if any(SLOW_BF16 in choice.details for choice in pipeline.backend.choices.values()):
                say(SLOW_BF16)
            video = pipeline.make(request, progress=False if as_json else None)[0]
            written = video.save(output, audio=audio)
        _report(video, written, as_json, f", {sum(video.metadata['seconds'].values()):.1f} s")


def _report(video: Video, written: Path, as_json: bool, more: str = "") -> None:
    if as_json:
        shape = {"frames": len(video), "width": video.width, "height": video.height, "fps": video.fps}
        click.echo(json.dumps({"file": str(written), **shape, **video.metadata}))
    else:
        click.echo(f"{written}: {len(video)} frames, {video.width}x{video.height}, {video.fps:g} fps{more}")


def _play(pipeline: Pipeline, file: Path, output: Path, audio: Path | None, keep: bool, as_json: bool) -> None:
    """Make the video of a scene script. Finished scenes are kept next to the output file until it is complete."""
    from higen.film import KeptScenes, make_film, scene_requests
    from higen.script import read_script
    from higen.video_writer import check_output, read_track

    script = read_script(file, pipeline.manifest)
    audio = script.audio if audio is None else audio
    check_output(output, script.frames, script.fps)
    if audio is not None:
        read_track(output, audio, script.frames / script.fps)
    requests = scene_requests(pipeline, script)
    kept = KeptScenes(output.absolute().with_name(f"{output.stem}.scenes"))
    done = 0

    def ready(place: int, again: bool) -> None:
        nonlocal done
        done = place + 1
        if not as_json:
            say(f"scene {place + 1} of {len(script.scenes)}{': it was made before' if again else ''}")

    try:
        video, paths = make_film(pipeline, script, kept, False if as_json else None, ready, requests)
        written = video.save(output, audio=audio)
    except BaseException:
        if done:
            say(
                f"{done} of {len(script.scenes)} scenes are kept in {kept.folder}: the same command continues from "
                "there"
            )
        raise
    if not keep:
        kept.remove(paths)
    _report(video, written, as_json, f", {len(script.scenes)} scenes")
