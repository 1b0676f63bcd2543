"""Computes the inputs of stages from the sources in the manifest (docs/manifest.md, "Sources"), for one sample each.

Each value has a key; two values with equal keys are equal. So within a request, a stage runs once per distinct input.
Outputs that depend only on texts and numbers are also kept for later requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen import noise
from higen.backends.base import Backend
from higen.bounded_cache import BoundedCache
from higen.conditioning import curve_rows, curve_values, resample_in_time, similarity_rows, sinusoid_rows
from higen.errors import RequestError
from higen.images import resampling
from higen.known_frames import as_video, latent_mask, placed
from higen.manifest import Manifest
from higen.prompt_chunks import Reading, joined_chunks, weighted
from higen.request import Picture, Request
from higen.sampler import Edit
from higen.stages import TOKENS, Source, Stage, Tensor, source
from higen.tables import Loop
from higen.video import to_uint8

__all__ = ["Kept", "Place", "Sources"]

Array = NDArray[Any]
Kept = BoundedCache[dict[str, NDArray[Any]]]
"""Outputs of stages that depend only on texts and numbers, by key, kept from one request to the next."""


@dataclass(frozen=True)
class Place:
    """The place that an input is for: the sample, the loop (None: after the last loop), the branch of guidance.
    `given`: the control with the frames that replace pictures and clips.
    """

    sample: int
    frames: int
    loop: Loop | None = None
    negative: bool = False
    given: str = ""


@dataclass(frozen=True, eq=False)
class _Value:
    """`key`: a digest, equal only for equal arrays. `lasting`: the value depends only on texts and numbers."""

    array: Array
    key: bytes
    lasting: bool


@dataclass(frozen=True, eq=False)
class _Made:
    """A stage's outputs, with a digest of its inputs. `lasting`: as in `_Value`."""

    outputs: Mapping[str, Array]
    key: bytes
    lasting: bool


def _digest(*parts: object) -> bytes:
    """A digest of 16 bytes; equal only for equal parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


class Sources:
    """Resolves the sources of one request. Not thread-safe."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        request: Request,
        tokens: Mapping[str, NDArray[np.int64]],
        kept: Kept,
        readings: Mapping[str, Reading] | None = None,
    ) -> None:
        """`tokens`: ids [1, L] of every text; `readings`: used instead if texts have chunks or weights."""
        self._manifest = manifest
        self._backend = backend
        self.request = request
        self._tokens = tokens
        self._kept = kept
        self._readings = readings or {}
        self._made: dict[bytes, dict[str, Array]] = {}
        self._placed: dict[Hashable, _Made] = {}
        self._encoded: dict[Hashable, _Value] = {}
        self._latents: dict[str, Array] = {}
        self._loops = {loop.name for loop in manifest.loops}

    def finish(self, loop: Loop, latents: Array) -> None:
        """Set the last latents [B, C, f, H, W] of a loop, for later stages that take them."""
        self._latents[loop.name] = latents

    def latents(self, loop: str) -> Array:
        """The last latents [B, C, f, H, W] of an earlier loop. Raises RequestError if there are none yet."""
        if loop not in self._latents:
            raise RequestError(f"preview: it needs the latents of the loop {loop}, which has not run yet")
        return self._latents[loop]

    def initial_noise(self, loop: Loop, iteration: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """The initial noise [B, C, f, H, W] of a loop, and the latents that are added to it. `iteration`: number of the
        run, for loops that are run repeatedly.
        """
        request, rule = self.request, loop.noise
        axis = self._manifest.stage(loop.stages[0]).input("latents").shape[1]
        channels = self._manifest.fixed[axis] if isinstance(axis, str) else axis
        factor, frames = self._manifest.sizes.factor, request.frames_of(loop)
        height, width = request.height // factor, request.width // factor
        orders = [self._order(loop, seed, iteration) for seed in request.seeds]
        drawn = [(seed, int(order.max()) + 1, order) for seed, order in zip(request.seeds, orders, strict=True)]
        purpose = noise.again(rule.purpose, iteration)
        unit = np.stack([noise.frame_noise(s, purpose, channels, n, height, width)[:, order] for s, n, order in drawn])
        assert unit.shape[2] == frames
        added: NDArray[np.float32] | None = None
        if rule.offset is not None:
            purpose, scale = noise.again(rule.offset.purpose, iteration), np.float32(request.number(rule.offset.scale))
            added = scale * np.stack([noise.offset_noise(s, purpose, channels, n)[:, order] for s, n, order in drawn])
        if rule.mix is not None:
            mixed = np.float32(request.number(rule.mix.scale)) * self.latents(rule.mix.loop)
            added = mixed if added is None else added + mixed
        return unit, added

    def _order(self, loop: Loop, seed: int, iteration: int) -> NDArray[np.int64]:
        """For each frame of a loop, the frame with its noise."""
        frames, windows = self.request.frames_of(loop), self.request.settings.windows.get(loop.name)
        if windows is None:
            return np.arange(frames)
        purpose = noise.again(loop.noise.purpose, iteration)
        return noise.frame_order(seed, purpose, frames, windows.length, windows.stride, windows.noise)

    def batch(self, stage: Stage, loop: Loop) -> dict[str, Array]:
        """The inputs of a denoising stage, without its state, for all samples: [B, ...] each."""
        rows = [self.inputs(stage, Place(i, self.request.frames_of(loop), loop)) for i in range(self.samples)]
        ragged = {tensor.name for tensor in stage.inputs if TOKENS in tensor.shape and TOKENS in self._manifest.free}
        most = max(self.chunks(i) for i in range(self.samples)) * self._length

        def whole(name: str, value: Array) -> Array:
            """Pad a text of fewer chunks with zeros; `ChunkRunner` cuts them off again."""
            return np.pad(value, ((0, 0), (0, most - value.shape[1]), (0, 0))) if name in ragged else value

        return {name: np.concatenate([whole(name, row[name]) for row in rows]) for name in rows[0]}

    def chunks(self, sample: int) -> int:
        """The number of chunks of a sample: the larger of its two prompts' numbers; 1 if texts have no chunks."""
        request = self.request
        texts = (request.prompts[sample], request.negative_prompt) if self._readings else ()
        return max((len(self._readings[text].ids) for text in texts), default=1)

    @property
    def _length(self) -> int:
        return self._manifest.text.length if self._manifest.text is not None else 0

    def inputs(self, stage: Stage, place: Place) -> dict[str, Array]:
        """The inputs of a stage, without its state, for one sample."""
        return {tensor.name: self._value(tensor, place).array for tensor in stage.conditions}

    def made(self, text: str, loop: Loop) -> Array:
        """The latents that a source gives, for all samples: [B, C, f, H, W]."""
        place = Place(0, self.request.frames_of(loop), loop)
        wanted = Tensor("latents", ("B", "C", "F", "H", "W"), source=text)
        return np.concatenate([self._value(wanted, replace(place, sample=i)).array for i in range(self.samples)])

    def known(self, loop: Loop) -> Edit | None:
        """The known frames of a loop; None if the request has none.

        known [B, C, f, H, W], 0 at the other frames; mask [B, 1, f, h, w], with h and w 1 if there is no mask.
        """
        if not self.request.passes(loop):
            return None
        frames = self.request.frames_of(loop)
        parts = [self._known(loop, Place(i, frames, loop)) for i in range(self.samples)]
        return Edit(np.concatenate([part.known for part in parts]), np.concatenate([part.mask for part in parts]))

    def _known(self, loop: Loop, place: Place) -> Edit:
        """The known frames of one sample."""
        row, request = loop.known, self.request
        assert row is not None
        wanted = Tensor("latents", ("B", "C", "F", "H", "W"), source=row.latents)
        known = self._value(wanted, place).array
        places = request.controls[row.control][place.sample].places
        mask = placed(np.ones((1, 1, len(places), 1, 1)), places, place.frames)
        if row.mask is not None and request.controls[row.mask] is not None:
            anew = latent_mask(request.controls[row.mask][place.sample].pixels, self._manifest.sizes.factor)
            mask = mask * (1 - anew)[None, None]
        return Edit(known, mask)

    def _known_input(self, name: str, tensor: Tensor, place: Place) -> _Value:
        """The input of a stage for known frames: their latents, or their mask; zeros if nothing is known."""
        edit = self._known(place.loop, place) if place.loop and self.request.passes(place.loop) else None
        array = np.zeros(self._shape(tensor, place), np.float32)
        if edit is not None and name == "latents":
            array = np.where(edit.mask > 0, edit.known, np.float32(0))
        elif edit is not None:
            array = np.broadcast_to(edit.mask, array.shape).copy() if array.ndim == 5 else edit.mask.min((1, 3, 4))
        return _Value(array, _digest("known", array.shape, array.tobytes()), lasting=False)

    @property
    def samples(self) -> int:
        """The number of samples in the request."""
        return len(self.request.prompts)

    def _value(self, tensor: Tensor, place: Place) -> _Value:
        origin = source(tensor.source)
        if origin.kind == "text":
            if self._readings:
                read = self._reading(origin, place)
                return _Value(read.ids, _digest("read", read.ids.tobytes(), read.weights.tobytes()), lasting=True)
            ids = self._tokens[self._text(origin, place)]
            return _Value(ids, _digest("tokens", ids.tobytes()), lasting=True)
        if origin.kind == "control":
            return self._control(origin.name, tensor, place)
        if place.given and (origin.shown or origin.kind in ("picture", "clip")):
            return self._given(place)
        if origin.kind in ("picture", "clip"):
            return self._picture(origin, tensor, place)
        if origin.kind in ("frames", "places"):
            return self._frames(origin, place)
        if origin.kind == "noise":
            return self._noise(int(origin.name), tensor, place)
        if origin.kind == "known":
            return self._known_input(origin.name, tensor, place)
        if origin.name in self._loops:
            latents = self.latents(origin.name)[place.sample : place.sample + 1]
            array = latents[:, :, 0] if len(tensor.shape) == 4 else latents
            key = _digest("latents", origin.name, place.sample, len(tensor.shape))
            return _Value(array, key, lasting=False)
        made = self._stage(
            self._manifest.stage(origin.name),
            replace(place, negative=place.negative or origin.negative, given=origin.given or place.given),
        )
        array = made.outputs[origin.output]
        if origin.shown:
            return self._shown(array, _digest(made.key, origin.output), origin.resampled, tensor, place)
        array = as_video(array) if len(tensor.shape) == 5 and array.ndim == 4 else array
        picture = self.request.controls[origin.given][place.sample] if origin.given else None
        if picture is not None and picture.places:
            array = placed(array, picture.places, place.frames)
        return _Value(array, _digest(made.key, origin.output, array.shape), made.lasting)

    def _text(self, origin: Source, place: Place) -> str:
        prompt = not (place.negative or origin.name == "negative")
        return self.request.prompts[place.sample] if prompt else self.request.negative_prompt

    def _reading(self, origin: Source, place: Place) -> Reading:
        """A text, padded to the number of chunks of its sample."""
        return self._readings[self._text(origin, place)].padded(self.chunks(place.sample))

    def _stage(self, stage: Stage, place: Place) -> _Made:
        """A stage's outputs, made once per distinct input."""
        loop = place.loop.name if place.loop is not None else None
        at = (stage.name, place.sample, place.frames, loop, place.negative, place.given)
        if at in self._placed:
            return self._placed[at]
        values = {tensor.name: self._value(tensor, place) for tensor in stage.conditions}
        key = _digest(stage.name, *(value.key for value in values.values()))
        lasting = all(value.lasting for value in values.values())
        inputs = {name: value.array for name, value in values.items()}
        if lasting:
            outputs = self._kept.get(key, lambda: self._run(stage, inputs, place))
        elif key in self._made:
            outputs = self._made[key]
        else:
            outputs = self._made[key] = self._run(stage, inputs, place)
        self._placed[at] = _Made(outputs, key, lasting)
        return self._placed[at]

    def _run(self, stage: Stage, inputs: Mapping[str, Array], place: Place) -> dict[str, Array]:
        """Run a stage for one sample. A stage that takes frames one by one (N) gets one chunk of frames at a time; a
        stage that reads a text gets one chunk of tokens at a time.
        """
        for tensor in stage.inputs if self._readings else ():
            origin = source(tensor.source)
            if origin.kind == "text":
                read = self._reading(origin, place)
                rows = (self._call(stage, {**inputs, tensor.name: ids[None]}) for ids in read.ids)
                pairs = zip(rows, read.weights, strict=True)
                return joined_chunks([{n: weighted(v, own) for n, v in row.items()} for row, own in pairs])
        frames = [name for name in inputs if stage.input(name).shape[0] == "N"]
        total = max((len(inputs[name]) for name in frames), default=1)
        chunk = self._manifest.sizes.chunk
        if total <= chunk:
            return self._call(stage, inputs)
        parts = [
            self._call(stage, {n: v[i : i + chunk] if n in frames else v for n, v in inputs.items()})
            for i in range(0, total, chunk)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _call(self, stage: Stage, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._backend.run(stage.name, **inputs)
        return {name: self._backend.to_numpy(value) for name, value in outputs.items()}

    def _control(self, name: str, tensor: Tensor, place: Place) -> _Value:
        """An encoded control, made once per request (but a loop may have its own value of the control)."""
        own = place.loop is not None and name in place.loop.controls
        key = (name, tensor.shape, place.frames, place.loop.name if own and place.loop else "")
        if key not in self._encoded:
            array = self._encode(name, tensor, place)
            self._encoded[key] = _Value(array, _digest(name, array.shape, array.tobytes()), lasting=True)
        return self._encoded[key]

    def _encode(self, name: str, tensor: Tensor, place: Place) -> NDArray[np.float32]:
        if name == "fps":
            return self._numbers(float(self.request.fps), tensor, place.frames)
        control = self._manifest.control(name)
        own = place.loop.controls if place.loop is not None else {}
        value = own.get(name, self.request.controls[name])
        # For a loop of one frame, the rows of all frames are resampled to one.
        frames = len(value) if np.ndim(value) and control.kind == "curve" else place.frames
        if control.encoding in ("sinusoid", "similarity"):
            last = tensor.shape[-1]
            width = self._manifest.fixed[last] if isinstance(last, str) else last
            if control.encoding == "similarity":
                return resample_in_time(similarity_rows(name, value, frames, width), place.frames)[None]
            values = None if value is None else curve_values(name, value, frames, control.low, control.high)
            return sinusoid_rows(values, place.frames, width)[None]
        if control.kind == "curve":
            return curve_rows(curve_values(name, value, frames, control.low, control.high), place.frames)[None]
        number = control.choices.index(value) if control.kind == "choice" else value
        return self._numbers(float(number), tensor, place.frames)

    @staticmethod
    def _numbers(value: float, tensor: Tensor, frames: int) -> NDArray[np.float32]:
        return np.full((1,) if len(tensor.shape) == 1 else (1, frames), value, np.float32)

    def _picture(self, origin: Source, tensor: Tensor, place: Place) -> _Value:
        pictures: tuple[Picture, ...] = self.request.controls[origin.name]
        picture = pictures[place.sample]
        if origin.kind == "clip":
            pixels = picture.pixels[:, : place.frames]
            array = pixels[None] if len(tensor.shape) == 5 else pixels.swapaxes(0, 1)
            key = _digest("clip", picture.digest, place.frames, len(tensor.shape))
            return _Value(np.ascontiguousarray(array), key, lasting=False)
        if not origin.resampled:
            return _Value(picture.pixels[None], _digest("picture", picture.digest), lasting=False)
        return self._resampled(picture.pixels, picture.digest, tensor, place)

    def _frames(self, origin: Source, place: Place) -> _Value:
        """The pictures of a control at their places, black elsewhere: [1,3,F,Y,X]; or 1 at these places: [1,F]."""
        picture: Picture = self.request.controls[origin.name][place.sample]
        if origin.kind == "frames":
            array = placed(as_video(picture.pixels), picture.places, place.frames, elsewhere=-1)
        else:
            array = placed(np.ones((1, 1, len(picture.places))), picture.places, place.frames)[0]
        return _Value(array, _digest(origin.kind, picture.digest, place.frames), lasting=False)

    def _given(self, place: Place) -> _Value:
        """The frames of a picture, a clip or known frames, for a stage that takes frames one by one: [n, 3, Y, X]."""
        picture: Picture = self.request.controls[place.given][place.sample]
        pixels, kind = picture.pixels, self._manifest.control(place.given).kind
        if kind == "picture":
            pixels = pixels[None]
        elif kind == "clip":
            pixels = pixels[:, : place.frames].swapaxes(0, 1)
        return _Value(np.ascontiguousarray(pixels), _digest("given", picture.digest, len(pixels)), lasting=False)

    def _resampled(self, pixels: NDArray[np.float32], digest: bytes, tensor: Tensor, place: Place) -> _Value:
        """A picture [3, Y, X] in the size of the input's last two axes."""
        *_, height, width = self._shape(tensor, place)
        down, across = resampling(pixels.shape[-2], height), resampling(pixels.shape[-1], width)
        array = (down @ pixels.astype(np.float64) @ across.T).astype(np.float32)
        return _Value(array[None], _digest("resampled", digest, height, width), lasting=False)

    def _shown(self, made: Array, key: bytes, resampled: bool, tensor: Tensor, place: Place) -> _Value:
        """The first frame of the pixels that a stage made, rounded as if written to a file and read again."""
        frame = np.asarray(made[:1] if made.ndim == 4 else made[:1, :, 0], np.float32)
        pixels = to_uint8(frame)[0].astype(np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)
        digest = _digest("shown", key)
        if resampled:
            return self._resampled(pixels, digest, tensor, place)
        return _Value(np.ascontiguousarray(pixels)[None], digest, lasting=False)

    def _noise(self, purpose: int, tensor: Tensor, place: Place) -> _Value:
        seed, shape = self.request.seeds[place.sample], self._shape(tensor, place)
        axis = tensor.shape.index("F") if "F" in tensor.shape else None
        array = noise.shaped(seed, purpose, shape, axis)
        return _Value(array, _digest("noise", seed, purpose, shape, axis), lasting=False)

    def _shape(self, tensor: Tensor, place: Place) -> tuple[int, ...]:
        """The sizes of a tensor's axes for one sample."""
        factor = self._manifest.sizes.factor
        sizes = {"B": 1, "N": 1, "F": place.frames, "Y": self.request.height, "X": self.request.width}
        sizes |= {TOKENS: self._length * self.chunks(place.sample)}
        sizes |= {"H": sizes["Y"] // factor, "W": sizes["X"] // factor, **self._manifest.fixed}
        return tuple(sizes[n] if isinstance(n, str) else n for n in tensor.shape)
