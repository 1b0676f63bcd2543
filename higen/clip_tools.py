"""Makes a clip longer, slower, endless or edited. The new clip must pass through known frames of the old one.

Each tool makes a few requests of a pipeline and takes the options of a request. The tools need a model with known
frames (docs/manifest.md, "Known frames"); `edit` needs a model that can start from a video.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from higen.conditioning import measured_curve
from higen.errors import OutputError, RequestError, one_line, quoted
from higen.manifest import Manifest
from higen.noise_schedule import is_whole
from higen.plain_values import plain
from higen.request import MAX_SEED, Request
from higen.tables import Loop
from higen.video import Video

if TYPE_CHECKING:
    from higen.images import Clip

__all__ = ["SOURCE", "edit", "extend", "interpolate", "known_controls", "loop"]

SOURCE = "source"
"""The value of a curve that is to be measured from the edited clip."""

DRAWN = "drawn"
"""The key frame of an edit that the model draws for the prompt."""

MOST_FACTOR = 64
MOST_FRAMES = 2**16

Frames = NDArray[np.uint8]


class Maker(Protocol):
    """What the tools need of a pipeline."""

    @property
    def manifest(self) -> Manifest:
        """The model's tables."""
        ...

    def request(self, prompt: str = ..., **options: Any) -> Request:
        """A checked request."""
        ...

    def make(self, request: Request, progress: bool | None = None) -> list[Video]:
        """The videos of a checked request."""
        ...

    def start_latents(self, request: Request, loop: Loop) -> NDArray[np.float32]:
        """The latents that a loop begins from, [B, C, F, H, W]."""
        ...

    def decode(self, latents: Any, request: Request) -> Frames:
        """Latents as frames, uint8 [B, F, H, W, 3]."""
        ...


def extend(
    pipe: Maker,
    video: Clip,
    frames: int,
    *,
    prompt: str | None = None,
    overlap: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Video:
    """The clip with `frames` new frames at its end, made in as many requests as needed.

    Each request makes a clip of the model's usual length (or of `length` in options). It passes through the last
    `overlap` frames made so far, by default half of its length.

    video    a path, a `Video` or uint8 frames [n, H, W, 3]; frames of the request's size are kept unchanged
    prompt   what happens; default: the prompt in the video's metadata
    options  as for a call, the same for every request; the seed goes up by one with each request

    Raises RequestError before work starts, for example for a clip without frames.
    """
    given, options = _opened(pipe, video, options)
    control, _ = known_controls(pipe.manifest)
    _check_own(options, control, "frames")
    _check_text(prompt)
    frames, overlap = plain(frames), plain(overlap)
    fewest, usual, most = pipe.manifest.sizes.frames
    length = plain(options.pop("length", max(fewest, min(usual, most))))
    if not is_whole(length, max(fewest, 2), most):
        raise RequestError(f"length={quoted(length)}: a whole number from {max(fewest, 2)} to {most}")
    if not is_whole(frames, 1, MOST_FRAMES):
        raise RequestError(f"frames={quoted(frames)}: a whole number of new frames from 1 to {MOST_FRAMES}")
    overlap = min(length // 2, len(given)) if overlap is None else overlap
    if not is_whole(overlap, 1, min(length - 1, len(given))):
        most_known = min(length - 1, len(given))
        raise RequestError(f"overlap={quoted(overlap)}: a whole number from 1 to {most_known}, the known frames")
    parts = [given.frames]
    last, wanted, made = given.frames, frames, given
    for own in _seeded(options):
        known = dict(enumerate(last[-overlap:]))
        request = pipe.request(_prompt(prompt, given), frames=length, **{**own, control: known})
        made = pipe.make(request, progress)[0]
        new = made.frames[overlap : overlap + wanted]
        parts.append(new)
        last = np.concatenate([last, new])[-length:]
        wanted -= len(new)
        if not wanted:
            break
    return Video(np.concatenate(parts), given.fps, {**made.metadata, "tool": "extend", "new_frames": frames})


def interpolate(
    pipe: Maker,
    video: Clip,
    factor: int = 2,
    *,
    prompt: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Video:
    """The clip with new frames between its own: (n - 1) factor + 1 frames at `factor` times the rate.

    Each pass doubles the frames; every second frame is known. A long clip is processed in parts that share one frame.

    factor   2, 4, 8, ... up to 64
    others   as for `extend`

    Raises RequestError before work starts.
    """
    given, options = _opened(pipe, video, options)
    control, _ = known_controls(pipe.manifest)
    _check_own(options, control, "frames")
    _check_text(prompt)
    factor = plain(factor)
    if not is_whole(factor, 2, MOST_FACTOR) or factor & (factor - 1):
        raise RequestError(f"factor={quoted(factor)}: 2, 4, 8, ... up to {MOST_FACTOR}")
    fewest, usual, most = pipe.manifest.sizes.frames
    if len(given) < 2:
        raise RequestError(
            f"video has {len(given)} frame: at least two are wanted, because new frames are made between them"
        )
    if (len(given) - 1) * factor >= MOST_FRAMES:
        raise RequestError(f"factor={factor}: {len(given)} frames become more than {MOST_FRAMES}")
    at_once = max((min(max(usual, fewest, 3), most) + 1) // 2, 2)  # known frames of a part, which has 2 n - 1 frames
    if 2 * at_once - 1 > most or 2 * min(at_once, len(given)) - 1 < fewest:
        raise RequestError(
            f"video has {len(given)} frames: interpolation needs clips of at least 3 frames, but this model makes "
            f"{fewest} to {most}"
        )
    frames, fps, made = given.frames, given.fps, given
    seeds = _seeded(options)
    while factor > 1:
        whole = np.repeat(frames, 2, axis=0)[:-1]  # each frame at twice its index; those with an odd index are made
        for start in _parts(len(frames), at_once):
            known = frames[start : start + at_once]
            places = {2 * i: frame for i, frame in enumerate(known)}
            own = {**next(seeds), control: places}
            request = pipe.request(_prompt(prompt, given), frames=2 * len(known) - 1, **own)
            made = pipe.make(request, progress)[0]
            between = np.arange(1, len(made), 2)
            whole[2 * start + between] = made.frames[between]
        frames, fps, factor = whole, 2 * fps, factor // 2
    return Video(frames, fps, {**made.metadata, "fps": fps, "tool": "interpolate"})


def loop(pipe: Maker, prompt: str = "", *, progress: bool | None = None, **options: Any) -> Video:
    """A clip that can be repeated without a visible cut.

    A first request draws the first frame. A second request passes through that frame at index 0 and after the last
    frame. Options as for a call. Raises RequestError before work starts.
    """
    control, _ = known_controls(pipe.manifest)
    _check_text(prompt)
    fewest, usual, most = pipe.manifest.sizes.frames
    frames = plain(options.pop("frames", None))
    frames = min(usual, most - 1) if frames is None else frames
    if not is_whole(frames, max(fewest - 1, 2), most - 1):
        allowed = f"a whole number from {max(fewest - 1, 2)} to {most - 1}, because one more frame is made"
        raise RequestError(f"frames={quoted(frames)}: {allowed}")
    if options.get(control) is not None:
        raise RequestError(f"{control}: loop() sets the known frame itself; leave it out")
    if options.get("steps") is None and options.get("preset") is None:
        options["steps"] = [None] * len(pipe.manifest.loops)  # no usual preset: both requests draw in the same way
    request = pipe.request(prompt, frames=frames + 1, **options)
    first = pipe.make(request, progress)[0].frames[0]
    own = {**options, "seed": request.seeds[0], control: {0: first, -1: first}}
    closed = pipe.request(prompt, frames=frames + 1, **own)
    made = pipe.make(closed, progress)[0]
    return Video(made.frames[:-1], made.fps, {**made.metadata, "tool": "loop"})


def edit(
    pipe: Maker,
    video: Clip,
    prompt: str,
    *,
    strength: float | None = None,
    mask: Any = None,
    key: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> Video:
    """The clip redrawn to fit `prompt`: only the last rows of the solver's table run (Meng et al. 2022, SDEdit).

    strength  the part of the table that runs, from 0 (only the last row) to 1 (all new); None: the model's default
    mask      a picture, or a clip with the same number of frames: white parts are redrawn, black parts are kept;
              None: everything is redrawn
    key       a picture to which the clip is moved first, or "drawn": the picture that the model draws for `prompt`,
              with the middle frame of a control map. In the latents, every frame keeps its difference from the frame
              that is closest to the picture. A small `strength` then redraws little, and keeps most of the motion.
    options   as for a call. A curve that can be measured is "source" by default: it is measured from the clip, so
              that the motion is kept. "unspecified" leaves it to the model.

    Raises RequestError before work starts: for a model that cannot start from a video, for a clip with more frames
    than the model makes, and for `key="drawn"` if the model makes no single pictures.
    """
    given, options = _opened(pipe, video, options)
    _check_own(options, "frames")
    _check_text(prompt)
    row = next((one for one in pipe.manifest.loops if one.start is not None and one.frames == "F"), None)
    if row is None or row.start is None:
        raise RequestError(f"edit: {pipe.manifest.name} cannot start from a video")
    fewest, _, most = pipe.manifest.sizes.frames
    if not fewest <= len(given) <= most:
        raise RequestError(f"video has {len(given)} frames: {pipe.manifest.name} edits clips of {fewest} to {most}")
    options |= {"frames": len(given), row.start.control: given.frames}
    if strength is not None:
        if not isinstance(row.start.strength, str):
            raise RequestError(f"strength: {pipe.manifest.name} fixes it at {row.start.strength:g}; leave it out")
        options[row.start.strength.partition(":")[2]] = strength
    if mask is not None:
        control, name = known_controls(pipe.manifest)
        if name is None:
            raise RequestError(f"mask: {pipe.manifest.name} takes none")
        _check_own(options, control)
        options |= {control: dict(enumerate(given.frames)), name: mask}
    measured = {
        one.name: one
        for one in pipe.manifest.controls
        if one.measured is not None and _from_source(options.get(one.name))
    }
    options = {name: value for name, value in options.items() if name not in measured}
    if key is not None or (measured and len(given) > 1):
        request = pipe.request(prompt, **options)
        picture = None if key is None else _key(pipe, prompt, key, options, request)
        latents = pipe.start_latents(request, row)
        if picture is not None:
            options |= _moved(pipe, row, request, latents, picture, {"prompt": prompt, **options})
        if len(given) > 1:
            options |= {name: measured_curve(str(one.measured), latents[0]) for name, one in measured.items()}
    made = pipe.make(pipe.request(prompt, **options), progress)[0]
    return Video(made.frames, given.fps, {**made.metadata, "tool": "edit"})


def _key(pipe: Maker, prompt: str, key: Any, options: Mapping[str, Any], request: Request) -> Frames:
    """The key frame of an edit, uint8 [H, W, 3]: drawn for the prompt, or the picture `key` in the request's size."""
    if not (isinstance(key, str) and key == DRAWN):
        from higen.images import load_map

        pixels = load_map(key, 1, options["width"], options["height"], "key").pixels
        picture: Frames = np.rint((pixels[:, 0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        return picture
    if pipe.manifest.sizes.frames[0] > 1:
        raise RequestError(f"key={DRAWN!r}: {pipe.manifest.name} makes no single pictures; give a picture")
    alone = _of_middle_frame(pipe.manifest, options, request)
    drawn: Frames = pipe.make(pipe.request(prompt, **alone), progress=False)[0].frames[0]
    return drawn


def _of_middle_frame(manifest: Manifest, options: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """The options of a clip's request for its middle frame alone: a control map's picture, its strength, and guidance.

    Other controls that describe a clip are left out.
    """
    of_clips = {one.name for one in manifest.controls if one.kind in ("frames", "mask", "map", "clip", "curve")}
    alone = {name: value for name, value in options.items() if name not in of_clips | {"inversion"}}
    maps = {loop.variant.control for loop in manifest.wanted(1) if loop.variant is not None}
    maps &= {one.name for one in manifest.controls if one.kind == "map" and options.get(one.name) is not None}
    if maps:
        from higen.images import map_frame

        alone |= {name: map_frame(options[name], request.frames // 2, name) for name in maps}
        strengths = [one.name for one in manifest.controls if one.kind == "curve" and one.encoding == "curve"]
        alone |= {name: _middle(request.controls[name]) for name in strengths if options.get(name) is not None}
    if options.get("steps") is None and options.get("preset") is None:
        alone["steps"] = [None] * len(manifest.loops)  # no usual preset, because the clip's request has none
    if options.get("guidance") is not None:
        alone["guidance"] = [_middle(scale) for scale in request.guidance]
    return {**alone, "frames": 1}


def _middle(values: Any) -> float:
    """A number, or the middle one of the numbers per frame."""
    numbers = np.atleast_1d(values)
    return float(numbers[len(numbers) // 2])


def _moved(
    pipe: Maker,
    row: Loop,
    request: Request,
    latents: NDArray[np.float32],
    key: Frames,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Options that replace the clip from which the loop `row` begins by the same clip on another key frame.

    The clip's latents z become z - z[a] + latents of the key frame, where a is the frame whose latents are closest to
    those of the key frame: there the subject's pose differs least. If the model draws a key frame before the clip, this
    one takes its place.
    """
    assert row.start is not None
    control, frames = row.start.control, latents.shape[2]
    standing = pipe.request(**{**options, control: np.repeat(key[None], frames, axis=0)})
    wanted = pipe.start_latents(standing, row)[:, :, frames // 2, None]
    nearest = int(np.square(latents - wanted).sum(axis=(0, 1, 3, 4), dtype=np.float64).argmin())
    moved = pipe.decode(latents - latents[:, :, nearest, None] + wanted, request)[0]
    first = next((loop.replaced.control for loop in pipe.manifest.loops if loop.replaced is not None), None)
    return {control: moved, **({first: key} if first is not None else {})}


def _opened(pipe: Maker, video: Clip, options: Mapping[str, Any]) -> tuple[Video, dict[str, Any]]:
    """The clip in the request's size, and the options with that size; default: the clip's, if the model allows it."""
    clip = _read(video)
    sizes, options = pipe.manifest.sizes, dict(options)
    own = all(side % sizes.multiple == 0 for side in (clip.width, clip.height))
    for name, side, usual in (("width", clip.width, sizes.width), ("height", clip.height, sizes.height)):
        if options.get(name) is None:
            options[name] = side if own else usual
    if not (is_whole(options["width"], 1, MOST_FRAMES) and is_whole(options["height"], 1, MOST_FRAMES)):
        pipe.request("a", **{name: options[name] for name in ("width", "height")})  # its error says what is allowed
    if (clip.width, clip.height) != (options["width"], options["height"]):
        from higen.images import load_clip

        pixels = load_clip(clip, len(clip), options["width"], options["height"], "video")
        frames = np.rint((pixels.transpose(1, 2, 3, 0) + 1) * 127.5).astype(np.uint8)
        clip = Video(frames, clip.fps, clip.metadata)
    return clip, options


def _check_own(options: Mapping[str, Any], *names: str) -> None:
    """Raise RequestError for an option that the tool sets itself."""
    for name in names:
        if options.get(name) is not None:
            raise RequestError(f"{name}: this tool sets it itself; leave it out")


def _check_text(prompt: object) -> None:
    """Raise RequestError for several prompts."""
    if isinstance(plain(prompt), (list, tuple)):
        raise RequestError(f"prompt={quoted(prompt)}: one text, because this tool makes one video")


def _read(video: Clip) -> Video:
    try:
        if isinstance(video, (str, os.PathLike)):
            return Video.open(video)
        return video if isinstance(video, Video) else Video(np.asarray(video), 8.0)
    except OutputError as error:
        raise RequestError(f"video: cannot be read as a clip: {one_line(error)}") from error


def known_controls(manifest: Manifest) -> tuple[str, str | None]:
    """The control for known frames, and that for a mask. Raises RequestError."""
    rows = [one.known for one in manifest.loops if one.known is not None and one.frames == "F"]
    if not rows:
        raise RequestError(f"{manifest.name} takes no known frames: no loop of it has `known`")
    return rows[-1].control, rows[-1].mask


def _from_source(value: object) -> bool:
    return value is None or (isinstance(value, str) and value == SOURCE)


def _prompt(prompt: str | None, video: Video) -> str:
    return str(video.metadata.get("prompt") or "") if prompt is None else prompt


def _seeded(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The options of one request after another. A given seed goes up by one; a random one is drawn each time."""
    seed = plain(options.get("seed"))
    for count in itertools.count():
        if seed is None or is_whole(seed, 0, MAX_SEED):
            yield {**options, "seed": ((seed or 0) + count) % (MAX_SEED + 1)}
        else:
            yield dict(options)


def _parts(total: int, length: int) -> Iterator[int]:
    """The first frames of parts of `length` frames. Neighbours share a frame; the last part ends with the clip."""
    step = length - 1
    for start in range(0, max(total - 1, 1), step):
        yield max(min(start, total - length), 0)
