"""Where results go: a local folder, or any URL that fsspec opens. Files appear there complete or not at all.

Names are relative and use `/`.
"""

from __future__ import annotations

import os
import posixpath
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from higen.errors import MissingExtra, OutputError, quoted
from higen.locks import hold
from higen.output_file import check_names
from higen.paths import given_path
from higen.staging import sweep, whole_file

__all__ = ["RUN", "Place", "open_place"]

RUN = "run"
"""The file that a run locks and writes its token to."""

WHOLE = frozenset(("abfs", "abfss", "az", "gcs", "gs", "memory", "oci", "oss", "r2", "s3", "s3a"))
"""Protocols with atomic uploads. On others a file is uploaded under a temporary name and then moved."""

_ASIDE = ".before"
_PART = re.compile(r"\.higen-[0-9a-f]{32}")


class Place(Protocol):
    """Files by name. Raises OutputError if the place cannot be used, OSError if one file cannot."""

    def make(self) -> None:
        """Make the folder if it does not exist."""
        ...

    def put(self, name: str, write: Callable[[Path], object]) -> int:
        """Store a file and return its size in bytes. `write` is called with a local path to write it to."""
        ...

    def read(self, name: str) -> bytes | None:
        """A file's content; None if it does not exist."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of all files below a folder, by name; empty if the folder does not exist."""
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Remove files, if they exist."""
        ...

    def tidy(self, folder: str) -> None:
        """Remove unfinished files that killed writers left below a folder."""
        ...

    def held(self) -> Any:
        """A context in which no other run uses this place, if the place has locks. Yields the token written to RUN."""
        ...


def open_place(output: str) -> Place:
    """The place of a path or URL; nothing is made yet. Raises OutputError, and MissingExtra if fsspec is missing."""
    protocol, separator, rest = output.partition("://")
    if not separator:
        return _Folder(given_path(output, "output"))
    if protocol in ("file", "local"):
        return _Folder(given_path(rest, "output"))
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError as error:
        raise MissingExtra("fsspec", "batch", f"output={quoted(output)}") from error
    try:
        files, root = url_to_fs(output)
    except ImportError as error:
        raise OutputError(f"output={quoted(output)}: a package is missing for {protocol}://: {error}") from error
    except Exception as error:  # each file system raises its own errors
        raise OutputError(f"output={quoted(output)}: cannot be opened: {error}") from error
    return _Url(output, files, root.rstrip("/"), protocol.rpartition("::")[2] in WHOLE)


def _token() -> bytes:
    return secrets.token_hex(16).encode()


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def make(self) -> None:
        with check_names(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            if not os.access(self._root, os.W_OK | os.X_OK):
                raise OutputError(f"{self._root}: no permission to write in this folder")

    def put(self, name: str, write: Callable[[Path], object]) -> int:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            write(temporary)
            return temporary.stat().st_size

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            return None

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        for here, _, names in os.walk(self._root / folder):
            for name in names:
                with suppress(FileNotFoundError):
                    path = Path(here, name)
                    found[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return found

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            (self._root / name).unlink(missing_ok=True)

    def tidy(self, folder: str) -> None:
        for here, _, _ in os.walk(self._root / folder):
            sweep(Path(here))

    @contextmanager
    def held(self) -> Iterator[bytes]:
        path = self._root / RUN
        try:
            lock = hold(path, os.O_RDWR | os.O_CREAT, wait=False)
        except BlockingIOError:
            raise OutputError(f"{self._root}: another run of `higen batch` works in this folder") from None
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            token = _token()
            path.write_bytes(token)
            yield token
        finally:
            if lock is not None:
                os.close(lock)


class _Url:
    def __init__(self, url: str, files: Any, root: str, whole: bool) -> None:
        self._url = url
        self._files = files
        self._root = root
        self._whole = whole

    def make(self) -> None:
        with self._reported("cannot be written"):
            self._files.makedirs(self._root, exist_ok=True)

    def put(self, name: str, write: Callable[[Path], object]) -> int:
        with tempfile.TemporaryDirectory(prefix="higen-") as folder:
            local = Path(folder, posixpath.basename(name))
            write(local)
            target = self._path(name)
            if self._whole:
                self._files.put_file(str(local), target)
            else:
                self._move_in(local, target)
            return local.stat().st_size

    def _move_in(self, local: Path, target: str) -> None:
        self._files.makedirs(posixpath.dirname(target), exist_ok=True)
        part = f"{posixpath.dirname(target)}/.higen-{secrets.token_hex(16)}"
        try:
            self._files.put_file(str(local), part)
            if self._files.exists(target):  # not every file system can overwrite by a move
                self._files.mv(target, target + _ASIDE)
            self._files.mv(part, target)
        except BaseException:
            with suppress(Exception):
                self._files.rm_file(part)
            raise
        with suppress(FileNotFoundError):
            self._files.rm_file(target + _ASIDE)

    def read(self, name: str) -> bytes | None:
        for path in (self._path(name), self._path(name) + _ASIDE):  # the second: if a run was killed between moves
            with suppress(FileNotFoundError):
                return bytes(self._files.cat_file(path))
        return None

    def sizes(self, folder: str) -> dict[str, int]:
        self._files.invalidate_cache()
        try:
            found = self._files.find(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._root) + 1
        return {path[start:]: int(facts["size"]) for path, facts in found.items()}

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._files.rm_file(self._path(name))

    def tidy(self, folder: str) -> None:
        self.remove([name for name in self.sizes(folder) if _PART.fullmatch(posixpath.basename(name))])

    @contextmanager
    def held(self) -> Iterator[bytes]:
        token = _token()
        with self._reported("cannot be written"):
            self.put(RUN, lambda path: path.write_bytes(token))
        yield token

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system raises its own errors
            raise OutputError(f"output={quoted(self._url)}: {what}: {error}") from error
