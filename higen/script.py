"""A scene script: the scenes of one video as data (docs/planning.md), checked against a model before any work.

{"scenes": [{"prompt": "...", "seconds": 2, "transition": "cut", "seed": 0, ...}, ...], "fps": 8, ...}

A scene may have each of the model's controls by name. A curve may be words: "slow", or ["slow", "fast", "still"].
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from higen.curve_source import CurveFrom, curve_from
from higen.errors import RequestError, quoted
from higen.free_init import FILTERS
from higen.manifest import Manifest
from higen.paths import given_path
from higen.request import UNSPECIFIED
from higen.tables import SETTINGS, VISUAL, WINDOW_NOISE, Control
from higen.text_files import TextError, read_json

__all__ = ["TRANSITIONS", "WORDS", "Scene", "Script", "make_script", "read_script", "script_schema"]

WORDS: Mapping[str, float] = {
    "still": 0.0,
    "very slow": 0.15,
    "slow": 0.3,
    "medium": 0.5,
    "fast": 0.8,
    "very fast": 1.0,
}
"""Words for values of a curve, as fractions of the control's span."""

TRANSITIONS = ("cut", "crossfade", "continue")

MOST_SCENES = 1000
FADE = 0.5
"""The default seconds of a crossfade."""

_OPTIONS = ("negative_prompt", "steps", "guidance", "solver", *SETTINGS)
_SHARED = ("fps", "width", "height", *_OPTIONS)
_OF_SCRIPT = ("scenes", "audio", *_SHARED)
_OF_SCENE = ("prompt", "seconds", "seed", "transition", "fade", *_OPTIONS)


@dataclass(frozen=True)
class Scene:
    """A scene: its request, and how it begins.

    options     options of `Pipeline.request`, without the prompt
    transition  "cut"; "crossfade": the last `fade` frames of the scene before blend into the first of this one; or
                "continue": the first frame is the last frame of the scene before
    fade        the number of frames that it shares with the scene before; 1 for "continue"
    """

    prompt: str
    frames: int
    options: Mapping[str, Any]
    transition: str = "cut"
    fade: int = 0


@dataclass(frozen=True)
class Script:
    """The scenes of a video, in order, with one frame rate and size. `audio`: the sound to add to the video."""

    scenes: tuple[Scene, ...]
    fps: int
    audio: Path | None = None

    @property
    def frames(self) -> int:
        """Frames of the whole video; frames that two scenes share count once."""
        return sum(scene.frames - scene.fade for scene in self.scenes)


def read_script(path: str | os.PathLike[str], manifest: Manifest) -> Script:
    """The script in a JSON file. Paths in it are relative to its folder. Raises RequestError, naming the file."""
    file = given_path(path, "script")
    try:
        data = read_json(file)
    except (OSError, TextError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"script={quoted(str(file))}: cannot be read: {reason}") from error
    try:
        return make_script(data, manifest, file.parent)
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from error


def make_script(data: object, manifest: Manifest, folder: Path | None = None) -> Script:
    """A script from JSON data. `folder`: the folder of the files that it names; None: it must not name files.

    Raises RequestError naming the scene, the key, its value and what is allowed. Values that a request checks (sizes,
    steps, the values of controls) are checked later, when the requests are made.
    """
    if not isinstance(data, dict):
        raise RequestError(f"{quoted(data)}: an object with the key scenes")
    _known(data, _OF_SCRIPT, "")
    scenes = data.get("scenes")
    if not isinstance(scenes, list) or not 1 <= len(scenes) <= MOST_SCENES:
        raise RequestError(f"scenes={quoted(scenes)}: a list of 1 to {MOST_SCENES} scenes")
    fps = data.get("fps", manifest.sizes.fps)
    if type(fps) is not int or not 1 <= fps <= 240:
        raise RequestError(f"fps={quoted(fps)}: a whole number from 1 to 240")
    audio = None if data.get("audio") is None else _file("audio", data["audio"], folder)
    shared = {name: data[name] for name in _SHARED if data.get(name) is not None} | {"fps": fps}
    made: list[Scene] = []
    for place, row in enumerate(scenes):
        try:
            start = sum(scene.frames - scene.fade for scene in made)
            made.append(_scene(row, manifest, shared, made[-1] if made else None, _Place(start, folder, audio)))
        except RequestError as error:
            raise RequestError(f"scenes[{place}]{'' if str(error).startswith('.') else ': '}{error}") from error
    for place, (scene, after) in enumerate(pairwise(made)):
        if scene.fade + after.fade > scene.frames:
            raise RequestError(f"scenes[{place}]: {scene.frames} frames are fewer than its two crossfades need")
    return Script(tuple(made), fps, audio)


@dataclass(frozen=True)
class _Place:
    """The place of a scene: its first frame in the video, the folder of its files, and the script's sound."""

    start: int
    folder: Path | None
    audio: Path | None


def _known(row: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    if unknown := [name for name in row if name not in names]:
        raise RequestError(f"{where}{quoted(unknown[0])}: unknown key; known are {', '.join(names)}")


def _file(name: str, value: object, folder: Path | None) -> Path:
    if folder is None:
        raise RequestError(f"{name}={quoted(value)}: no files are allowed here")
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name}={quoted(value)}: a file's path")
    return folder / given_path(value, name)


def _scene(row: object, manifest: Manifest, shared: Mapping[str, Any], before: Scene | None, place: _Place) -> Scene:
    if not isinstance(row, dict):
        raise RequestError(f"{quoted(row)}: an object with the key prompt")
    controls = {control.name: control for control in manifest.controls}
    _known(row, (*_OF_SCENE, *controls), "")
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise RequestError(f"prompt={quoted(prompt)}: a text")
    fps = shared["fps"]
    frames = _frames(manifest, row.get("seconds"), fps)
    seed = row.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise RequestError(
            f"seed={quoted(seed)}: a whole number from 0 to 2^64 - 1, because a script must give the same video again"
        )
    options = {**shared, "frames": frames, "seed": seed}
    options |= {name: row[name] for name in _OPTIONS if row.get(name) is not None}
    for name, control in controls.items():
        if row.get(name) is not None:
            options[name] = _control(control, row[name], frames, place, fps)
    return Scene(prompt, frames, options, *_transition(row, before, frames, fps))


def _frames(manifest: Manifest, seconds: object, fps: int) -> int:
    low, default, high = manifest.sizes.frames
    if seconds is None:
        return default
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
        raise RequestError(f"seconds={quoted(seconds)}: a number above 0")
    frames = max(round(seconds * fps), 1)
    if not low <= frames <= high:
        raise RequestError(
            f"seconds={seconds:g}: {frames} frames at {fps} a second; {manifest.name} makes {low} to {high}: "
            f"{low / fps:g} to {high / fps:g} s"
        )
    return frames


def _transition(row: Mapping[str, Any], before: Scene | None, frames: int, fps: int) -> tuple[str, int]:
    """The transition's name and the number of frames in its fade."""
    name = row.get("transition", "cut")
    if name not in TRANSITIONS:
        raise RequestError(f"transition={quoted(name)}: one of {', '.join(map(repr, TRANSITIONS))}")
    fade = row.get("fade")
    if fade is not None and name != "crossfade":
        raise RequestError(f"fade={quoted(fade)}: only for transition='crossfade', not {name!r}")
    if before is None and name != "cut":
        raise RequestError(f"transition={name!r}: the first scene has no previous scene")
    if name == "continue" and frames < 2:
        raise RequestError(
            "transition='continue': needs a scene of at least 2 frames, because its first frame is the last one of "
            "the previous scene"
        )
    if name != "crossfade":
        return name, int(name == "continue")
    seconds = FADE if fade is None else fade
    good = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds < 1e6
    count = max(round(seconds * fps), 1) if good else 0
    assert before is not None
    most = min(before.frames, frames)
    if not 1 <= count <= most:
        raise RequestError(f"fade={quoted(seconds)}: at most {most / fps:g} seconds, the length of the shorter scene")
    return name, count


# Curves.


def _control(control: Control, value: Any, frames: int, place: _Place, fps: int) -> Any:
    """A control's value in a script, in the form that a request takes."""
    name = control.name
    if control.kind == "frames" and isinstance(value, dict):
        return {index: str(_file(name, picture, place.folder)) for index, picture in value.items()}
    if control.kind in VISUAL:
        return str(_file(name, value, place.folder))
    if control.kind != "curve" or value == UNSPECIFIED or (isinstance(value, (int, float)) and value is not True):
        return value
    count = max(frames - 1, 1) if control.encoding == "sinusoid" else frames
    if isinstance(value, str):
        return _word(control, value) if value in WORDS else _followed(name, value, place, fps)
    if not isinstance(value, list) or not value:
        raise RequestError(f"{name}={quoted(value)}: a number, numbers, {', '.join(WORDS)}, or a list of these words")
    if all(isinstance(one, str) for one in value):
        if len(value) > count:
            raise RequestError(f"{name} has {len(value)} words: at most {count}, as many as the scene has changes")
        marks = [_word(control, one) for one in value]
        return [marks[i * len(marks) // count] for i in range(count)]
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in value):
        return value  # a matrix, or a value that the request refuses
    if len(value) in (count, frames):
        return [float(one) for one in value]
    return np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(value)), value).tolist()


def _word(control: Control, word: object) -> float:
    if not isinstance(word, str) or word not in WORDS:
        raise RequestError(f"{control.name}={quoted(word)}: one of {', '.join(map(repr, WORDS))}")
    if control.span is None:
        raise RequestError(f"{control.name}={word!r}: the model names no range for it; give numbers")
    low, high = control.span
    return low + (high - low) * WORDS[word]


def _followed(name: str, value: str, place: _Place, fps: int) -> CurveFrom:
    """A curve from a file. If the file is the script's own sound, it is measured from the scene's start on."""
    given = curve_from(name, value)
    assert given is not None
    if given.path is None or not given.path.suffix:
        raise RequestError(f"{name}={quoted(value)}: a number, numbers, {', '.join(WORDS)}, or a clip or sound file")
    file = _file(name, str(given.path), place.folder)
    start = place.start / fps if file == place.audio and not given.start else given.start
    return CurveFrom(str(file), given.feature, given.low, given.high, start)


# The schema.


def script_schema(manifest: Manifest, files: bool = True) -> dict[str, Any]:
    """The JSON schema of scripts for a model (draft 2020-12). `files=False`: for scripts that name no files."""
    low, _, high = manifest.sizes.frames
    fps = manifest.sizes.fps
    shared: dict[str, Any] = {
        "negative_prompt": {"type": "string"},
        "steps": {},
        "guidance": {},
        "solver": {"type": ["string", "array"]},
        "guidance_interval": {"type": "array", "description": "Start and end of the part of the steps with guidance."},
        "windows": {"type": ["integer", "array"], "description": "Length and stride of a long scene's windows."},
        "window_noise": {"enum": list(WINDOW_NOISE)},
        "free_init": {"type": ["number", "array"], "description": "Iterations of FreeInit."},
        "free_init_filter": {"enum": list(FILTERS)},
        "reuse": {"type": ["integer", "array"], "description": "N: only every N-th step runs the whole network."},
        "preset": {"type": "string", "description": "A preset of the model."},
        "inversion": {
            "type": "string",
            "description": "A text with which a clip to start from is inverted into noise.",
        },
    }
    scene: dict[str, Any] = {
        "prompt": {"type": "string", "minLength": 1, "description": "What the scene shows."},
        "seconds": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": f"{low / fps:g} to {high / fps:g} at the model's {fps} frames a second",
        },
        "seed": {"type": "integer", "minimum": 0},
        "transition": {"enum": list(TRANSITIONS), "description": "How the scene begins. The first scene has cut."},
        "fade": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": f"Seconds of a crossfade, by default {FADE:g}.",
        },
        **shared,
    }
    for control in manifest.controls:
        if files or control.kind not in VISUAL:
            scene[control.name] = {**_schema_of(control, files), "description": control.meaning}
    whole = {"type": "integer", "minimum": 1}
    script = {"fps": {**whole, "maximum": 240}, "width": whole, "height": whole, **shared}
    if files:
        script["audio"] = {"type": "string", "description": "A sound file."}
    scenes = {"type": "array", "minItems": 1, "maxItems": MOST_SCENES, "items": _object(scene, ["prompt"])}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_object({"scenes": scenes, **script}, ["scenes"]),
    }


def _object(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def _schema_of(control: Control, files: bool) -> dict[str, Any]:
    limits = {"minimum": control.low, "maximum": control.high}
    number = {"type": "number", **{name: value for name, value in limits.items() if value is not None}}
    if control.kind == "curve":
        word: dict[str, Any] = {"enum": [*WORDS, *([UNSPECIFIED] if control.optional else [])]}
        words = {"type": "array", "minItems": 1, "items": {"enum": list(WORDS)}}
        numbers = {"type": "array", "minItems": 1, "items": number}
        given = [number, numbers, *([word, words] if control.span is not None else [])]
        return {"anyOf": [*given, *([{"type": "string"}] if files else [])]}
    if control.kind == "choice":
        return {"enum": list(control.choices)}
    if control.kind == "frames":
        index = {"pattern": "^-?[0-9]{1,6}$"}
        file = {"type": "string"}
        frames = {"type": "object", "minProperties": 1, "propertyNames": index, "additionalProperties": file}
        return {"anyOf": [frames, file]}  # a file: a clip, which gives every frame
    return {"number": number, "whole": {**number, "type": "integer"}}.get(control.kind, {"type": "string"})
