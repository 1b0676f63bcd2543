"""Turns the fields of a request (OpenAI's fields, higen's, and the model's controls) into arguments of a pipeline.

Everything is checked before the request is accepted, including pictures.
"""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higen.errors import RequestError, quoted
from higen.images import load_picture
from higen.manifest import Manifest
from higen.media.files import reason
from higen.memory import enough_memory
from higen.noise_schedule import is_whole
from higen.request import Request, make_request
from higen.serve.fields import Fields, data_url
from higen.serve.refusals import Refusal
from higen.serve.results import Results
from higen.serve.settings import Limits
from higen.serve.store import Upload
from higen.tables import SETTINGS

__all__ = ["FIELDS", "Checked", "check", "opened", "schema_of"]

RENAMED = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "solver": "solver",
    **{name: name for name in SETTINGS},
    "num_frames": "frames",
    "fps": "fps",
}
"""Fields of a request, and the pipeline's name for each."""

FIELDS = (*RENAMED, "model", "seconds", "size", "input_reference", "controls")

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes of a mask's file if it is a picture; otherwise it is a clip."""

_FRAME = re.compile(r"-?\d{1,6}")
_SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")
_SECONDS = re.compile(r"\d{1,6}(\.\d{1,6})?")
_CLIP_BYTES = 2**30
_READING = threading.Semaphore(2)


@dataclass(frozen=True)
class Checked:
    """A valid request. `arguments`: of the pipeline, in JSON types. `uploads`: files. `asked`: the fields as given."""

    arguments: dict[str, Any]
    uploads: dict[str, Upload]
    asked: dict[str, Any]


def check(manifest: Manifest, fields: Fields, limits: Limits, results: Results) -> Checked:
    """The checked request. Raises RequestError, and Refusal for an unknown field or control."""
    values = {name: value for name, value in fields.values.items() if value is not None}
    if unknown := sorted(name for name in {*values, *(f.partition(".")[0] for f in fields.files)} - set(FIELDS)):
        raise Refusal(
            422, "unknown_field", f"{quoted(unknown[0])}: unknown; fields are {', '.join(FIELDS)}", unknown[0]
        )
    uploads = _uploads(manifest, values, fields.files)
    controls = _controls(manifest, values.get("controls", {}), uploads)
    arguments = {argument: values[name] for name, argument in RENAMED.items() if name in values}
    arguments.setdefault("prompt", "")
    if not isinstance(arguments["prompt"], str):
        raise RequestError(f"prompt={quoted(arguments['prompt'])}: a text")
    if isinstance(arguments.get("seed"), list):
        raise RequestError(f"seed={quoted(arguments['seed'])}: one whole number")
    arguments |= _size(values.get("size"))
    if "seconds" in values:
        arguments["frames"] = _frames(manifest, values)
    _check_limits(manifest, arguments, limits)
    request = _made(manifest, arguments, controls, uploads, limits, results)
    _check_steps(manifest, request, limits)
    arguments |= {"seed": request.seeds[0], "controls": controls}
    arguments |= {"frames": request.frames, "fps": request.fps, "width": request.width, "height": request.height}
    return Checked(arguments, uploads, values)


def _uploads(manifest: Manifest, values: dict[str, Any], files: Mapping[str, Upload]) -> dict[str, Upload]:
    """Files by their control, including those given in `values` as data URLs."""
    kinds = ("picture", "clip", "mask", "map")
    takers = [control.name for kind in kinds for control in manifest.controls if control.kind == kind]
    found: dict[str, Upload] = {}
    given: dict[str, Upload] = dict(files)
    reference = values.get("input_reference")
    if isinstance(reference, dict):
        if set(reference) != {"image_url"}:
            raise RequestError("input_reference: a file, a data URL, or {image_url: a data URL}; file ids are not kept")
        reference = reference["image_url"]
    if reference is not None:
        given["input_reference"] = data_url("input_reference", reference)
    controls = values.get("controls")
    if isinstance(controls, dict):
        for name in [name for name in takers if controls.get(name) is not None]:
            given[f"controls.{name}"] = data_url(f"controls.{name}", controls[name])
        for name in [control.name for control in manifest.controls if control.kind == "frames"]:
            found |= _frame_uploads(name, controls[name]) if controls.get(name) is not None else {}
    for field, upload in given.items():
        name = field.partition(".")[2] or (takers[0] if takers else "")
        if field == "input_reference" and not takers:
            raise Refusal(422, "unknown_field", "input_reference: this model takes no picture", "input_reference")
        if name not in takers:
            names = ", ".join(takers) or "there is none"
            raise Refusal(422, "unknown_control", f"{quoted(field)}: no control that takes a file: {names}", field)
        if name in found:
            raise RequestError(f"input_reference: the control {name} is given too")
        if not upload.data:
            raise RequestError(f"{field}: the file is empty")
        found[name] = upload
    return found


def _frame_uploads(name: str, pictures: Any) -> dict[str, Upload]:
    """The pictures of known frames, given as {index: a data URL}, as files named NAME[INDEX]."""
    if not isinstance(pictures, dict) or not pictures:
        wanted = "an object of frames' indices and data URLs"
        raise RequestError(f"controls.{name}={quoted(pictures)}: {wanted}")
    for index in pictures:
        if not _FRAME.fullmatch(index):
            raise RequestError(f"controls.{name}: frame {quoted(index)}: the index of a frame, a whole number")
    found = {f"{name}[{index}]": data_url(f"controls.{name}[{index}]", text) for index, text in pictures.items()}
    if empty := [field for field, upload in found.items() if not upload.data]:
        raise RequestError(f"controls.{empty[0]}: the file is empty")
    return found


def _controls(manifest: Manifest, given: Any, uploads: Mapping[str, Upload]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise RequestError(f"controls={quoted(given)}: an object of names and values")
    known = [control.name for control in manifest.controls]
    if unknown := sorted(set(given) - set(known)):
        names = ", ".join(known) or "none"
        raise Refusal(
            422, "unknown_control", f"{quoted(unknown[0])}: unknown; this model's controls: {names}", "controls"
        )
    files = {field.partition("[")[0] for field in uploads}
    return {name: value for name, value in given.items() if value is not None and name not in files}


def _size(text: Any) -> dict[str, int]:
    if text is None:
        return {}
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise RequestError(f"size={quoted(text)}: WIDTHxHEIGHT in pixels")
    return {"width": int(found[1]), "height": int(found[2])}


def _frames(manifest: Manifest, values: Mapping[str, Any]) -> int:
    """Number of frames of a clip with the given seconds."""
    if "num_frames" in values:
        raise RequestError("seconds: num_frames is given too; one of the two is enough")
    given = values["seconds"]
    text = given if isinstance(given, str) else repr(given)
    if isinstance(given, bool) or not isinstance(given, (str, int, float)) or not _SECONDS.fullmatch(text):
        raise RequestError(f"seconds={quoted(given)}: a number of seconds, such as 4 or 1.5")
    fps = values.get("fps", manifest.sizes.fps)
    if not is_whole(fps, 1, 240):
        raise RequestError(f"fps={quoted(fps)}: a whole number from 1 to 240")
    frames = max(1, round(float(text) * fps))
    least, _, most = manifest.sizes.frames
    if not least <= frames <= most:
        raise RequestError(f"seconds={quoted(given)}: {least / fps:g} to {most / fps:g} at {fps} frames a second")
    return frames


def _check_limits(manifest: Manifest, arguments: Mapping[str, Any], limits: Limits) -> None:
    """Raise RequestError for values over the server's limits. Values that are not numbers are checked later."""
    sizes = manifest.sizes
    frames = arguments.get("frames", sizes.frames[1])
    if is_whole(frames, 1, 2**60) and frames > limits.frames:
        raise RequestError(f"num_frames={frames}: this server makes at most {limits.frames}")
    sides = arguments.get("width", sizes.width), arguments.get("height", sizes.height)
    if sides[0] * sides[1] > limits.pixels:
        raise RequestError(f"size={sides[0]}x{sides[1]}: this server makes frames of at most {limits.pixels} pixels")
    steps = arguments.get("steps")
    for one in steps if isinstance(steps, list) else [steps]:
        if is_whole(one, 1, 2**60) and one > limits.steps:
            raise RequestError(f"num_inference_steps={one}: this server makes at most {limits.steps} steps")
    again = arguments.get("free_init", 1)
    again = again[0] if isinstance(again, list) and again else again
    if is_whole(again, 1, 2**60) and again * max(_steps_of(manifest, steps)) > limits.steps:
        raise RequestError(f"free_init={again}: this server makes at most {limits.steps} steps, in all iterations")
    if arguments.get("inversion") is not None and 2 * max(_steps_of(manifest, steps)) > limits.steps:
        raise RequestError(f"inversion: it doubles the steps, and this server makes at most {limits.steps}")


def _check_steps(manifest: Manifest, request: Request, limits: Limits) -> None:
    """Raise RequestError if a preset, or the defaults, ask for more steps than the server allows."""
    steps = max((n for loop, n in zip(manifest.loops, request.steps, strict=True) if request.runs(loop)), default=0)
    if steps > limits.steps:
        given = f"this request takes {steps} steps; this server makes at most {limits.steps}"
        raise RequestError(f"num_inference_steps: {given}; give fewer, or another preset")


def _steps_of(manifest: Manifest, steps: Any) -> list[int]:
    """Steps of each loop over frames. A value that is not a whole number is replaced by the loop's default."""
    each = steps if isinstance(steps, list) and len(steps) == len(manifest.loops) else [steps] * len(manifest.loops)
    pairs = [(loop, one) for loop, one in zip(manifest.loops, each, strict=True) if loop.frames != 1]
    return [one if is_whole(one, 1, 2**60) else loop.steps for loop, one in pairs] or [1]


def _made(
    manifest: Manifest,
    arguments: Mapping[str, Any],
    controls: Mapping[str, Any],
    uploads: Mapping[str, Upload],
    limits: Limits,
    results: Results,
) -> Request:
    try:
        with _READING, opened(manifest, uploads, limits, results) as files, enough_memory("request"):
            return make_request(
                manifest, **arguments, controls={**controls, **files}, load=load_picture, warn=lambda _: None
            )
    except Refusal:
        raise
    except RequestError as error:
        raise RequestError(_in_our_names(str(error))) from error


def _in_our_names(message: str) -> str:
    """A message of the pipeline's check, with the API's name for the argument."""
    names = {argument: name for name, argument in RENAMED.items()} | {"width": "size: width", "height": "size: height"}
    return re.sub(r"^\w+", lambda found: names.get(found[0], found[0]), message)


@contextmanager
def opened(
    manifest: Manifest, uploads: Mapping[str, Upload], limits: Limits, results: Results
) -> Iterator[dict[str, Any]]:
    """The files of a request in the form for the pipeline: pictures decoded, clips as paths. Raises RequestError."""
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for name, upload in uploads.items():
            control, _, index = name.removesuffix("]").partition("[")
            kind = manifest.control(control).kind
            if kind == "frames":
                files.setdefault(control, {})[index] = _picture(name, upload.data, limits.picture)
            elif kind == "picture" or (kind in ("mask", "map") and upload.suffix in _PICTURES):
                files[name] = _picture(name, upload.data, limits.picture)
            else:
                path = stack.enter_context(results.temporary(upload.data, upload.suffix))
                _check_clip(name, path, min(limits.frames, manifest.sizes.frames[2]), limits.picture)
                files[name] = path
        yield files


def _picture(name: str, data: bytes, most: int) -> Any:
    import PIL.Image

    try:
        image = PIL.Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if math.prod(image.size) > most:
            raise RequestError(f"{name} has {image.width}x{image.height} pixels: at most {most} are read")
        image.load()
    except RequestError:
        raise
    except Exception as error:  # a decoder may raise anything on corrupt data
        raise RequestError(f"{name}: cannot be read as a PNG, JPEG or WebP picture: {reason(error)}") from error
    return image


def _check_clip(name: str, path: Path, frames: int, most: int) -> None:
    """Raise RequestError if a frame has more than `most` pixels, or if the clip's frames take more than 1 GiB."""
    from higen.media import open_clip

    try:
        width, height = open_clip(path).size
    except Exception as error:  # a decoder may raise anything on corrupt data
        raise RequestError(f"{name}: cannot be read as a clip: {reason(error)}") from error
    if width * height > min(most, _CLIP_BYTES // (3 * frames)):
        raise RequestError(f"{name} has {width}x{height} pixels: too many for {frames} frames; shrink it")


def schema_of(manifest: Manifest) -> dict[str, Any]:
    """The JSON schema of the object `controls` for a model."""
    properties: dict[str, Any] = {}
    for control in manifest.controls:
        number: dict[str, Any] = {"type": "integer" if control.kind == "whole" else "number"}
        number |= {} if control.low is None else {"minimum": control.low}
        number |= {} if control.high is None else {"maximum": control.high}
        row: dict[str, Any] = {"description": control.meaning, "default": control.default}
        if control.kind == "curve":
            rows = [{"type": "array", "items": number}]
            if control.encoding == "similarity":
                rows.append({"type": "array", "items": {"type": "array", "items": number}})
            row["anyOf"] = [number, *rows]
        elif control.kind in ("number", "whole"):
            row["anyOf"] = [number]
        elif control.kind == "choice":
            row["enum"] = list(control.choices)
        elif control.kind == "frames":
            url = {"type": "string", "format": "data-url", "contentMediaType": "image/*"}
            row |= {"type": "object", "patternProperties": {r"^-?\d{1,6}$": url}, "additionalProperties": False}
        else:
            row["type"] = "string"
            if control.kind != "text":
                row |= {"format": "data-url", "contentMediaType": "video/*" if control.kind == "clip" else "image/*"}
        if control.optional:
            row.setdefault("anyOf", []).append({"const": "unspecified"})
        row["x-kind"] = control.kind
        row |= {} if control.encoding is None else {"x-encoding": control.encoding}
        properties[control.name] = row
    return {"type": "object", "properties": properties, "additionalProperties": False}
