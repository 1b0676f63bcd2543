"""A cache of graphs that ONNX Runtime has optimised, in the user's cache folder: sessions load faster from it.

An optimised graph is valid for one graph with its weights, one build of ONNX Runtime, one processor and one set of
options. An entry's name has two parts: the digest of all these, and the digest of the entry's content. A damaged entry
is removed and made again. The cache never makes a load fail: if it cannot be used, the original graph is loaded.

The environment variable HIGEN_CACHE names another folder, or is "off". The graphs are in its subfolder `graphs`, which
must belong to this user and be writable by nobody else.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import onnxruntime as ort

from higen import cpu
from higen.backends.external_data import external_files
from higen.backends.sessions import exact_int8
from higen.bundle import Bundle, sha256
from higen.errors import IntegrityError, RequestError, is_of_a_handler, quoted
from higen.memory import is_lack_of_memory
from higen.staging import staging

__all__ = ["VARIABLE", "GraphCache", "cache_folder"]

VARIABLE = "HIGEN_CACHE"
OFF = "off"

FORMAT = 1
LIMIT = 1 << 30
"""Maximum size of all entries in bytes. The least recently used ones are removed."""
LARGEST = 128 << 20
"""Maximum size in bytes of a cached graph with its weights. Reading a larger one takes longer than optimising it."""
LEAST = 100_000
"""Minimum size in bytes of a cached graph without its weights. A smaller one is optimised in some milliseconds."""

_ENTRY = re.compile(r"[0-9a-f]{64}-([0-9a-f]{64})\.onnx")


def cache_folder() -> Path | None:
    """higen's cache folder of the user, which need not exist. None: the cache is off, or the user has no home folder.

    Raises RequestError for a HIGEN_CACHE that is neither an absolute path nor "off".
    """
    given = os.environ.get(VARIABLE, "")
    if given == OFF:
        return None
    if given:
        if not Path(given).is_absolute():
            raise RequestError(f"{VARIABLE}={quoted(given)}: an absolute path of a folder, or {OFF}")
        return Path(given)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "higen"
    name, usual = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    named = Path(os.environ.get(name, ""))
    return (named if named.is_absolute() else home / usual) / "higen"


class GraphCache:
    """The user's cache of optimised graphs, for sessions on this processor."""

    def __init__(self, folder: Path) -> None:
        """`folder`: its subfolder `graphs` holds the graphs and is made when the first one is stored."""
        self.folder = folder / "graphs"

    @classmethod
    def of_user(cls) -> GraphCache | None:
        """The user's cache; None if there is none. Raises RequestError: see `cache_folder`."""
        folder = cache_folder()
        return None if folder is None or not _processor() else cls(folder)

    def session(
        self, bundle: Bundle, files: Sequence[str], options: Callable[[], ort.SessionOptions], providers: Sequence[Any]
    ) -> ort.InferenceSession:
        """A CPU session of a graph.

        `files`: the graph's file, then its weights; their sha256 must have been checked. `options` makes the session's
        options. Raises what ONNX Runtime raises for the original graph.
        """
        path = str(bundle.path / files[0])
        records = [bundle.files[name] for name in files]
        if records[0].size < LEAST or sum(record.size for record in records) > LARGEST:
            return ort.InferenceSession(path, options(), providers=providers)
        key = _key([[name, record.sha256] for name, record in zip(files, records, strict=True)], providers)
        kept = self.find(key)
        if kept is not None:
            chosen = options()
            chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimised already
            try:
                return ort.InferenceSession(str(kept), chosen, providers=providers)
            except Exception as error:  # ONNX Runtime's errors have no other common base
                if is_of_a_handler(error) or is_lack_of_memory(error):
                    raise
                _remove(kept)
        with self._storing(key) as place:
            if place is not None:
                chosen = options()
                chosen.optimized_model_filepath = str(place)
                try:
                    return ort.InferenceSession(path, chosen, providers=providers)
                except Exception as error:  # the disk may be full, or the graph is broken: the load below then raises
                    if is_of_a_handler(error) or is_lack_of_memory(error):
                        raise
                    _remove(place)
        return ort.InferenceSession(path, options(), providers=providers)

    def find(self, key: str) -> Path | None:
        """An intact entry with this key, marked as used now; None if there is none. Damaged ones are removed."""
        for path in self._entries(f"{key}-"):
            try:
                if sha256(path) == path.stem.partition("-")[2]:
                    with suppress(OSError):
                        os.utime(path)
                    return path
            except OSError:
                continue
            _remove(path)
        return None

    @contextmanager
    def _storing(self, key: str) -> Iterator[Path | None]:
        """Yields a path to write an entry to, or None if the folder cannot be used.

        On a clean exit the entry is moved to its final name.
        """
        with ExitStack() as stack:
            place = None
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                if self._is_private():
                    place = stack.enter_context(staging(self.folder)).folder / "optimised.onnx"
            yield place
            if place is not None:
                with suppress(OSError, IntegrityError):
                    self._store(key, place)

    def _store(self, key: str, written: Path) -> None:
        """Move a written graph to its final name, unless it has external data or another process stored it first.

        Raises OSError or IntegrityError.
        """
        if written.is_file() and not external_files(written) and self.find(key) is None:
            written.chmod(0o600)
            kept = written.replace(self.folder / f"{key}-{sha256(written)}.onnx")
            self._bound(kept)

    def _bound(self, newest: Path) -> None:
        """Remove the least recently used entries until the rest fits into LIMIT."""
        found = []
        for path in self._entries():
            with suppress(OSError):
                status = path.stat()
                found.append((path != newest, -status.st_mtime_ns, status.st_size, path))
        total = 0
        for _, _, size, path in sorted(found):
            total += size
            if total > LIMIT and path != newest:
                _remove(path)

    def _entries(self, start: str = "") -> list[Path]:
        """The cache's entries with names that begin with `start`; none if the folder is not private."""
        try:
            if not self._is_private():
                return []
            with os.scandir(self.folder) as entries:
                names = [e.name for e in entries if e.name.startswith(start) and e.is_file(follow_symlinks=False)]
        except OSError:
            return []
        return [self.folder / name for name in sorted(names) if _ENTRY.fullmatch(name)]

    def _is_private(self) -> bool:
        """Whether the folder belongs to this user and nobody else can write to it. Raises OSError if it is missing."""
        found = self.folder.stat()
        if not hasattr(os, "geteuid"):  # Windows: folders in the user's profile are private
            return stat.S_ISDIR(found.st_mode)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _key(files: Sequence[Sequence[str]], providers: Sequence[Any]) -> str:
    """The digest of everything an optimised graph depends on. The precision is part of the file names."""
    build = [ort.__version__, ort.get_build_info()]
    said = json.dumps([FORMAT, files, build, _processor(), exact_int8(), [str(provider) for provider in providers]])
    return hashlib.sha256(said.encode()).hexdigest()


def _processor() -> list[str]:
    """Identifies the processor, because ONNX Runtime optimises differently for each; empty if it is not known."""
    flags = cpu.flags()
    told = sorted(flags) if flags else [platform.processor()] if platform.processor() else []
    return [sys.platform, platform.machine(), *told] if told else []


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
