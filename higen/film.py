"""Makes one video from a scene script. Each scene is one request; finished scenes are kept until all are done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.clip_tools import known_controls
from higen.errors import HigenError, OutputError, RequestError
from higen.known_frames import by_frame
from higen.media.files import check_bytes
from higen.output_file import check_folder
from higen.pipeline import Pipeline
from higen.request import Picture, Request
from higen.script import Scene, Script
from higen.version import __version__
from higen.video import Video

__all__ = ["KeptScenes", "make_film", "scene_requests"]


def scene_requests(pipeline: Pipeline, script: Script) -> list[Request]:
    """The checked request of each scene. A scene that continues the one before has a blank first frame for now.

    Raises RequestError naming the scene, before any work.
    """
    found: list[Request] = []
    for place, scene in enumerate(script.scenes):
        try:
            request = pipeline.request(scene.prompt, **scene.options)
            if scene.transition == "continue":  # a stand-in: the real picture does not exist yet
                blank = np.zeros((request.height, request.width, 3), np.uint8)
                request = _continued(pipeline, scene, blank)
            found.append(request)
        except RequestError as error:
            raise RequestError(f"scenes[{place}]: {error}") from error
    sizes = {(request.width, request.height) for request in found}
    if len(sizes) > 1:
        raise RequestError(f"scenes: sizes {sorted(sizes)}: all scenes need one size")
    try:
        check_bytes(script.frames, found[0].width, found[0].height)
    except OutputError as error:
        raise RequestError(f"scenes: {error}") from error
    return found


def _continued(pipeline: Pipeline, scene: Scene, first: NDArray[np.uint8]) -> Request:
    """The request of a scene that begins with the last frame of the scene before."""
    control, _ = known_controls(pipeline.manifest)
    given = scene.options.get(control) or {}
    if given and 0 in by_frame(control, given, scene.frames):
        raise RequestError(f"{control}: frame 0 is already given by transition='continue'; leave it out")
    options = {**scene.options, control: {**given, 0: first}}
    return pipeline.request(scene.prompt, warn=lambda warning: None, **options)


class KeptScenes:
    """A folder of finished scenes. File names contain a digest of the request: a changed scene gets a new file."""

    def __init__(self, folder: Path) -> None:
        """The folder is made when the first scene is finished. Raises OutputError if it cannot be used."""
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: is not a folder; finished scenes are kept there")
        check_folder(folder, folder if folder.is_dir() else folder.parent, writing=True)

    def path(self, place: int, key: str) -> Path:
        """The file of a scene; .webp is lossless and contains the metadata."""
        return self.folder / f"scene_{place + 1:03d}_{key[:24]}.webp"

    def load(self, path: Path, request: Request) -> Video | None:
        """A finished scene; None if there is no complete one."""
        if not path.is_file():
            return None
        try:
            video = Video.open(path)
        except HigenError:
            return None
        whole = video.frames.shape == (request.frames, request.height, request.width, 3)
        return video if whole else None

    def save(self, path: Path, video: Video) -> None:
        """Keep a finished scene. Raises OutputError."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made: {error.strerror}") from error
        video.save(path)

    def remove(self, paths: list[Path]) -> None:
        """Remove these scenes, and the folder if nothing else is in it."""
        for path in paths:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def make_film(
    pipeline: Pipeline,
    script: Script,
    kept: KeptScenes | None = None,
    progress: bool | None = None,
    on_scene: Callable[[int, bool], None] = lambda place, again: None,
    requests: list[Request] | None = None,
) -> tuple[Video, list[Path]]:
    """The video of a script, and the files in which its scenes are kept.

    kept      the folder in which finished scenes are kept and found again; None: they are not kept
    progress  as for `Pipeline.__call__`
    on_scene  called when a scene is ready, with its number from 0 and whether it had been kept before
    requests  the result of `scene_requests`, if it has been called already

    A scene's frames are those of its request, except for the frames that it shares with the scene before.
    Raises what a request raises.
    """
    requests = scene_requests(pipeline, script) if requests is None else requests
    model = sorted((name, record.sha256) for name, record in pipeline.bundle.files.items())
    videos: list[Video] = []
    paths: list[Path] = []
    for place, (scene, request) in enumerate(zip(script.scenes, requests, strict=True)):
        if scene.transition == "continue":
            request = _continued(pipeline, scene, videos[-1].frames[-1])
        path = None if kept is None else kept.path(place, _key(request, model))
        found = None if kept is None or path is None else kept.load(path, request)
        video = pipeline.make(request, progress)[0] if found is None else found
        if kept is not None and path is not None:
            if found is None:
                kept.save(path, video)
            paths.append(path)
        videos.append(video)
        on_scene(place, found is not None)
    return Video(_joined(script, videos), script.fps, _metadata(script, videos)), paths


def _key(request: Request, model: list[tuple[str, str]]) -> str:
    """A digest of everything that a scene's frames depend on, except for the rounding of different backends."""
    controls = {name: _plain(value) for name, value in request.controls.items()}
    fields = {name: getattr(request, name) for name in _FIELDS}
    text = json.dumps([__version__, model, fields, controls, request.settings.as_metadata()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


_FIELDS = ("prompts", "negative_prompt", "seeds", "steps", "guidance", "solvers", "frames", "height", "width", "fps")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Picture):
        return value.digest.hex()
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _joined(script: Script, videos: list[Video]) -> NDArray[np.uint8]:
    """All frames. In a crossfade of n frames, the new scene has the weight (k + 1) / (n + 1) in frame k.

    A continued scene and the scene before share one frame; it is taken from the scene before.
    """
    frames = np.empty((script.frames, *videos[0].frames.shape[1:]), np.uint8)
    end = 0
    for scene, video in zip(script.scenes, videos, strict=True):
        first, fade = end - scene.fade, scene.fade
        if scene.transition == "crossfade":
            weight = (np.arange(1, fade + 1) / (fade + 1))[:, None, None, None]
            mixed = (1 - weight) * frames[first:end] + weight * video.frames[:fade]
            frames[first:end] = np.rint(mixed)
        end = first + scene.frames
        frames[first + fade : end] = video.frames[fade:]
    return frames


def _metadata(script: Script, videos: list[Video]) -> dict[str, Any]:
    """The metadata of each scene, with its place: `first` is its first frame in the video, `frames` its length."""
    scenes, first = [], 0
    for scene, video in zip(script.scenes, videos, strict=True):
        first -= scene.fade
        place = {"first": first, "frames": scene.frames, "transition": scene.transition, "fade": scene.fade}
        scenes.append({**place, **video.metadata})
        first += scene.frames
    shared = {name: videos[0].metadata.get(name) for name in ("model", "licence", "versions")}
    return {"prompt": " / ".join(scene.prompt for scene in script.scenes), **shared, "scenes": scenes}
