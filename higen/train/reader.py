"""Reads the samples of a step: turns files into latents, uses the cache, and reads ahead in the background."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from higen.errors import SettingsError
from higen.models.companion_stages import EncoderStage
from higen.train.data import IMAGE, VIDEO, Item, Listing, candidates, explained
from higen.train.latents import Encoded, FrameEncoder, LatentCache, encode
from higen.train.media import Damaged, Placement, Unusable, read_image, read_video
from higen.train.settings import key_index

__all__ = ["Frame", "Reader", "Sample"]


@dataclass(frozen=True)
class Frame:
    """The size of a clip: frames, pixels, frames per second."""

    frames: int
    width: int
    height: int
    fps: int


@dataclass(frozen=True)
class Sample:
    """A caption, its latents, and the strength of an adapter for it."""

    caption: str
    encoded: Encoded
    scale: float = 1.0


@dataclass(frozen=True)
class _Read:
    """An item as read: latents from the cache, or pixels and the place for their latents in the cache."""

    item: Item
    pixels: NDArray[np.uint8] | None
    encoded: Encoded | None
    kept: Path | None


class Reader:
    """Gives sample `index` of a step, for each kind. The sample depends only on the seed, the data set and the step,
    and never on what was read before: `listing.skipped` is only a report.
    """

    def __init__(
        self,
        listing: Listing,
        frame: Frame,
        encoder: EncoderStage,
        features: FrameEncoder | None,
        *,
        seed: int,
        per_step: Mapping[int, int],
        key_frames: bool,
        key_frame: float = 0.5,
        random_crop: bool = False,
        random_start: bool = False,
        cache: LatentCache | None = None,
        workers: int = 0,
        memory: int = 0,
    ) -> None:
        """`per_step`: samples of each kind in a step, over all processes. `memory`: bytes of decoded pixels to keep;
        used only without random crop and start, where a file always gives the same pixels. Raises SettingsError if the
        data set has no item for a kind that is needed."""
        self.listing, self.frame, self.encoder, self.features = listing, frame, encoder, features
        self.seed, self.per_step, self.key = seed, per_step, key_index(frame.frames, key_frame)
        self.random_crop, self.random_start, self.cache = random_crop, random_start, cache
        self.items = {kind: listing.of(kind, key_frames) for kind in (IMAGE, VIDEO)}
        for kind, name in ((IMAGE, "images"), (VIDEO, "videos")):
            if per_step[kind] and not self.items[kind]:
                raise SettingsError(f"data.{name}={per_step[kind]}: the data set has no {name}; set it to 0")
        self._memory = 0 if random_crop or random_start else memory
        self._held: dict[tuple[int, str], _Read] = {}
        # Unusable files as (kind, name, start), so that they are not decoded again. Start None stands for any start.
        self._unusable: set[tuple[int, str, float | None]] = set()
        self._pool = ThreadPoolExecutor(workers, "higen-read") if workers else None
        self._coming: dict[tuple[int, int, int], Future[_Read]] = {}

    def samples(self, kind: int, step: int, indices: range, following: range | None = None) -> list[Sample]:
        """Samples `indices` of a step. `following`: the indices to read ahead for the next step, if they differ.

        Raises SettingsError if no file of the data set can be used.
        """
        read = self._taken(kind, step, indices, following)
        return [Sample(r.item.caption, self._encoded(r), r.item.scale) for r in read]

    def pixels(self, kind: int, step: int, indices: range, following: range | None = None) -> list[NDArray[np.uint8]]:
        """The same samples before encoding, uint8 [F,Y,X,3] each. Only for a reader without a cache."""
        return [r.pixels for r in self._taken(kind, step, indices, following) if r.pixels is not None]

    def _taken(self, kind: int, step: int, indices: range, following: range | None) -> list[_Read]:
        if self._pool is None:
            return [self._read(kind, step, index) for index in indices]
        keys = [(kind, step, i) for i in indices]
        coming = [self._coming.pop(key) if key in self._coming else self._submit(*key) for key in keys]
        read = [future.result() for future in coming]
        ahead = indices if following is None else following
        self._coming |= {(kind, step + 1, i): self._submit(kind, step + 1, i) for i in ahead}
        return read

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, kind: int, step: int, index: int) -> Future[_Read]:
        assert self._pool is not None
        return self._pool.submit(self._read, kind, step, index)

    def _read(self, kind: int, step: int, index: int) -> _Read:
        items = self.items[kind]
        placement = self._placement(kind, step, index)
        for choice in candidates(self.seed, kind, step * self.per_step[kind] + index, len(items)):
            item = items[choice]
            anywhere, here = (kind, item.name, None), (kind, item.name, placement.start)
            if not self._unusable.isdisjoint((anywhere, here)):
                continue
            try:
                return self._read_item(item, kind, placement)
            except Unusable as error:
                self._unusable.add(here if isinstance(error, Damaged) else anywhere)
                self.listing.skipped[item.name] = str(error)
        name = "videos" if kind == VIDEO else "images"
        skipped = {item.name: self.listing.skipped[item.name] for item in items if item.name in self.listing.skipped}
        raise SettingsError(f"data.path: no usable item for data.{name}{explained(skipped)}")

    def _placement(self, kind: int, step: int, index: int) -> Placement:
        start, x, y = np.random.default_rng([self.seed, kind, step, index]).random(3)
        return Placement(
            float(start) if self.random_start else 0.5,
            *((float(x), float(y)) if self.random_crop else (0.5, 0.5)),
        )

    def _read_item(self, item: Item, kind: int, placement: Placement) -> _Read:
        path = None
        if self.cache is not None:
            try:
                path = self.cache.path(item.path, item.name, kind)
            except OSError as error:
                raise Unusable(f"cannot be read: {error.strerror}") from error
            encoded = self.cache.load(path)
            if encoded is not None:
                return _Read(item, None, encoded, None)
        if held := self._held.get((kind, item.name)):
            return held
        size = self.frame
        if item.video:
            wanted = [self.key] if kind == IMAGE else None
            note = partial(self.listing.notes.__setitem__, item.name)
            pixels = read_video(item.path, size.width, size.height, size.fps, size.frames, placement, wanted, note)
        else:
            pixels = read_image(item.path, size.width, size.height, placement)
        read = _Read(item, pixels, None, path)
        if pixels.nbytes <= self._memory:
            self._memory -= pixels.nbytes
            self._held[kind, item.name] = read
        return read

    def _encoded(self, read: _Read) -> Encoded:
        if read.encoded is not None:
            return read.encoded
        assert read.pixels is not None
        encoded = encode(self.encoder, read.pixels, self.features)
        if self.cache is not None and read.kept is not None:
            self.cache.save(read.kept, encoded)
        return encoded
