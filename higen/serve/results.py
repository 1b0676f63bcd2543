"""Finished videos in a folder: the exact frames, the mp4, and other formats when they are requested.

    FOLDER/results/video_.../frames.npy video.mp4 ...     a result appears complete, by one rename
    FOLDER/parts/...                                      unfinished files; removed at each start

A killed server can leave a result that belongs to no completed job. It is removed at the next start. Files with other
names are not touched.
"""

from __future__ import annotations

import re
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import HigenError, ServeError
from higen.video import Video

__all__ = ["FORMATS", "IDS", "VARIANTS", "Results", "size_of_folder"]

FORMATS = {"mp4": "video/mp4", "webm": "video/webm", "gif": "image/gif", "webp": "image/webp"}
VARIANTS = {"thumbnail": ("thumbnail.webp", "image/webp"), "spritesheet": ("spritesheet.jpg", "image/jpeg")}
IDS = re.compile(r"video_[0-9a-f]{32}")

_PARTS = re.compile(r"(video|upload)_[0-9a-f]{32}(\.[a-z0-9]{1,6})?")
_FRAMES = "frames.npy"
_READING = threading.Lock()


class Results:
    """The folder of finished videos. Any thread may use it."""

    def __init__(self, folder: Path) -> None:
        """The folder is made if it does not exist. Raises ServeError if it cannot be written."""
        self._results, self._parts = folder / "results", folder / "parts"
        try:
            for made in (self._results, self._parts):
                made.mkdir(parents=True, exist_ok=True)
            probe = self._parts / f"video_{secrets.token_hex(16)}"
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise ServeError(f"{folder}: cannot be written: {error.strerror}") from error
        self._making = threading.Semaphore(2)
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def sweep(self, kept: Collection[str]) -> None:
        """Remove what killed servers left: unfinished files, and results that are not in `kept`."""
        for path in self._parts.iterdir():
            if _PARTS.fullmatch(path.name):
                _remove(path)
        for path in self._results.iterdir():
            if IDS.fullmatch(path.name) and path.name not in kept:
                _remove(path)

    def save(self, name: str, video: Video) -> int:
        """Write a job's result and return its size in bytes. After an OutputError or OSError nothing is left of it."""
        part = self._parts / f"video_{secrets.token_hex(16)}"
        part.mkdir()
        try:
            _write_frames(part / _FRAMES, video.frames)
            video.save(part / "video.mp4")
            size = size_of_folder(part)
            target = self._results / name
            _remove(target)  # a run may have been killed before the queue noted it
            part.rename(target)
        finally:
            _remove(part)
        return size

    def file(
        self, name: str, wanted: str, fps: float, metadata: Mapping[str, Any], grown: Callable[[int], None]
    ) -> tuple[Path, str]:
        """Path and media type of a result in a format or variant. The file is made if it does not exist.

        `grown` is called with the size in bytes of a new file. Raises FileNotFoundError if the result has been removed,
        OutputError and OSError if the file cannot be made.
        """
        file, media = VARIANTS.get(wanted) or (f"video.{wanted}", FORMATS[wanted])
        folder = self._results / name
        path = folder / file
        with self._alone(f"{name}/{file}"):
            if not path.exists():
                with self._making:
                    frames = _read_frames(folder / _FRAMES)
                    grown(self._make(path, Video(frames, fps, metadata), wanted))
        return path, media

    def _make(self, path: Path, video: Video, wanted: str) -> int:
        part = self._parts / f"video_{secrets.token_hex(16)}{path.suffix}"
        try:
            if wanted == "thumbnail":
                video.contact_sheet(columns=1, frames=1).save(part, quality=90)
            elif wanted == "spritesheet":
                video.contact_sheet().save(part, quality=90)
            else:
                video.save(part)
            size = part.stat().st_size
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
        return size

    def remove(self, name: str) -> None:
        """Remove a result, if it exists."""
        if IDS.fullmatch(name):
            _remove(self._results / name)

    @contextmanager
    def temporary(self, data: bytes, suffix: str) -> Iterator[Path]:
        """A temporary file with these contents, for readers that need a path."""
        path = self._parts / f"upload_{secrets.token_hex(16)}{suffix}"
        try:
            path.write_bytes(data)
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Held by one thread per key, so that two requests for the same new file make it once."""
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        try:
            with lock:
                yield
        finally:
            with self._guard:
                if not lock.locked():
                    self._locks.pop(key, None)


def _read_frames(path: Path) -> NDArray[np.uint8]:
    """Read one file at a time. Numpy parses the header as Python code, which sometimes fails if two threads do it at
    once (python/cpython#106905, in 3.11 and 3.12)."""
    with _READING:
        frames: NDArray[np.uint8] = np.load(path, allow_pickle=False)
    return frames


def _write_frames(path: Path, frames: NDArray[np.uint8]) -> None:
    """Like np.save, but an error for a full disk says that the disk is full."""
    array = np.ascontiguousarray(frames)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def size_of_folder(folder: Path) -> int:
    """Total size in bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _remove(path: Path) -> None:
    """Remove a folder or file. Raises HigenError if it cannot be removed, so that nothing is left silently."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HigenError(f"{path.name}: cannot be removed: {error.strerror}") from error
