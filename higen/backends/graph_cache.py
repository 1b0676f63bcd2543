"""Graphs as ONNX Runtime has optimised them, kept in the user's cache folder so that sessions load without that work.

An optimised graph holds for one graph and its weights, one build of ONNX Runtime, one processor and one set of options.
The digest of these is the first half of an entry's name, the digest of its own content the second half. An entry that
is not whole is removed and made again. The cache fails no load: where it cannot be used, the graph itself is loaded.

HIGEN_CACHE in the environment names another folder, or is "off". The graphs lie in the folder `graphs` inside of it,
which belongs to this user and which nobody else can write.
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
from higen.backends.sessions import EXACT_INT8
from higen.bundle import Bundle, sha256
from higen.errors import IntegrityError, RequestError, is_of_a_handler, quoted
from higen.memory import is_lack_of_memory
from higen.staging import staging

__all__ = ["VARIABLE", "GraphCache", "cache_folder"]

VARIABLE = "HIGEN_CACHE"
OFF = "off"

FORMAT = 1
LIMIT = 1 << 30
"""Bytes of all entries; what was used longest ago is removed."""
LARGEST = 128 << 20
"""Bytes of a graph and the files of its weights. Of a larger model, reading takes longer than optimising."""
LEAST = 100_000
"""Bytes of a graph without its weights. A smaller one has few nodes and is optimised in some milliseconds."""

_ENTRY = re.compile(r"[0-9a-f]{64}-([0-9a-f]{64})\.onnx")


def cache_folder() -> Path | None:
    """The user's cache folder of higen, whether it is there or not; None: switched off, or the user has no home.

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
    """The optimised graphs of this user, for sessions on this processor."""

    def __init__(self, folder: Path) -> None:
        """`folder`: the graphs lie in its `graphs`, which is made when one is first stored."""
        self.folder = folder / "graphs"

    @classmethod
    def of_user(cls) -> GraphCache | None:
        """The cache, None where there is none. Raises RequestError: see `cache_folder`."""
        folder = cache_folder()
        return None if folder is None or not _processor() else cls(folder)

    def session(
        self, bundle: Bundle, files: Sequence[str], options: Callable[[], ort.SessionOptions], providers: Sequence[Any]
    ) -> ort.InferenceSession:
        """A session on the CPU of a graph whose files, the graph's first, have been checked by their sha256.

        `options` makes the session's options. Raises what ONNX Runtime raises for the graph itself.
        """
        path = str(bundle.path / files[0])
        records = [bundle.files[name] for name in files]
        if records[0].size < LEAST or sum(record.size for record in records) > LARGEST:
            return ort.InferenceSession(path, options(), providers=providers)
        key = _key([[name, record.sha256] for name, record in zip(files, records, strict=True)], providers)
        kept = self.find(key)
        if kept is not None:
            chosen = options()
            chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it has been done
            try:
                return ort.InferenceSession(str(kept), chosen, providers=providers)
            except Exception as error:  # ONNX Runtime's errors share no base but Exception
                if is_of_a_handler(error) or is_lack_of_memory(error):
                    raise
                _remove(kept)
        with self._storing(key) as place:
            if place is not None:
                chosen = options()
                chosen.optimized_model_filepath = str(place)
                try:
                    return ort.InferenceSession(path, chosen, providers=providers)
                except Exception as error:  # the disk may be full; or the graph is broken, which is said below
                    if is_of_a_handler(error) or is_lack_of_memory(error):
                        raise
                    _remove(place)
        return ort.InferenceSession(path, options(), providers=providers)

    def find(self, key: str) -> Path | None:
        """A whole entry, marked as used now; those of this key that are not whole are removed."""
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
        """Yields a name to write an entry to, which takes its place on a clean exit; None where that cannot be."""
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
        """Move a written graph to its name, unless it takes tensors from other files, or another process was faster.

        Raises OSError or IntegrityError.
        """
        if written.is_file() and not external_files(written) and self.find(key) is None:
            written.chmod(0o600)
            kept = written.replace(self.folder / f"{key}-{sha256(written)}.onnx")
            self._bound(kept)

    def _bound(self, newest: Path) -> None:
        """Remove the entries that were used longest ago, until the rest fits."""
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
        """Our files of the cache whose name starts so; none where the folder is not ours alone."""
        try:
            if not self._is_private():
                return []
            with os.scandir(self.folder) as entries:
                names = [e.name for e in entries if e.name.startswith(start) and e.is_file(follow_symlinks=False)]
        except OSError:
            return []
        return [self.folder / name for name in sorted(names) if _ENTRY.fullmatch(name)]

    def _is_private(self) -> bool:
        """Whether the folder is this user's, and nobody else can write it. Raises OSError where there is none."""
        found = self.folder.stat()
        if not hasattr(os, "geteuid"):  # Windows: a user's own folders are
            return stat.S_ISDIR(found.st_mode)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _key(files: Sequence[Sequence[str]], providers: Sequence[Any]) -> str:
    """The digest of all that an optimised graph depends on; the names of the files say the precision."""
    build = [ort.__version__, ort.get_build_info()]
    said = json.dumps([FORMAT, files, build, _processor(), EXACT_INT8, [str(provider) for provider in providers]])
    return hashlib.sha256(said.encode()).hexdigest()


def _processor() -> list[str]:
    """What tells processors apart for which ONNX Runtime optimises differently; empty: it cannot be told."""
    flags = cpu.flags()
    told = sorted(flags) if flags else [platform.processor()] if platform.processor() else []
    return [sys.platform, platform.machine(), *told] if told else []


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
