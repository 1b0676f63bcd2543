"""Reads higen.json, with a check of every key and of the seal. Rewrites it atomically, with one writer at a time."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from higen.errors import HigenError, IntegrityError, ManifestError, ModelError
from higen.manifest import Manifest
from higen.staging import exclusive, whole_file
from higen.tables import MAX_SIZE
from higen.text_files import repeated_key
from higen.typed_json import LATER, from_json, to_json

__all__ = [
    "MANIFEST",
    "VERSION",
    "FileRecord",
    "GraphInput",
    "Opened",
    "changing",
    "check_version",
    "manifest_text",
    "read_manifest",
    "rewrite",
    "write_manifest",
    "write_text",
]

MANIFEST = "higen.json"
VERSION = 2
"""Version of the manifest's layout. A reader refuses a newer one."""

LARGEST = 64 * 2**20
"""Largest size of a manifest in bytes; real ones are far smaller."""

DEEPEST = 100
"""The most levels of nested lists and objects in a manifest."""

_NO_SEAL = "0" * 64


@dataclass(frozen=True)
class FileRecord:
    """A file's entry in the manifest: its size in bytes and sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph, as the graph itself declares it. Numbers in `shape` are fixed sizes."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        for n in self.shape:
            if n == "" or (not isinstance(n, str) and not 1 <= n <= MAX_SIZE):
                raise ManifestError(f"{self.name}.shape has {n!r}: a symbol or a size from 1")


@dataclass(frozen=True)
class _Graph:
    inputs: tuple[GraphInput, ...]


@dataclass(frozen=True)
class Opened:
    """The contents of a manifest file."""

    manifest: Manifest
    files: Mapping[str, FileRecord]
    graphs: Mapping[str, tuple[GraphInput, ...]]
    version: int = VERSION


def read_manifest(folder: Path, sealed: bool = True) -> Opened:
    """Read and check `folder`/higen.json. `sealed`: refuse tables that were edited after they were written.

    If the file has not changed since it was last read, the same tables are returned: do not change them.

    Raises ManifestError (not a model directory, malformed, newer version), IntegrityError (tables that were edited).
    """
    data = _read(folder)
    opened, seal = _understood(folder / MANIFEST, data)
    if sealed and opened.version > 1:
        _check_seal(folder / MANIFEST, data, seal)
    return Opened(opened.manifest, dict(opened.files), dict(opened.graphs), opened.version)


@lru_cache(maxsize=1)  # a process often opens the same model twice
def _understood(path: Path, data: bytes) -> tuple[Opened, Any]:
    """The contents of a manifest, and its seal, which version 1 does not have."""
    document = _parse(path, data)
    if document["version"] == 1:
        from higen.families import read_version_1

        manifest = read_version_1(_object(document, "model"))
        return Opened(manifest, _records(document), {}, version=1), None
    tables = fields(Manifest)
    names = [field.name for field in tables if field.metadata != LATER or field.name in document]
    known = ["format", "version", "seal", *(field.name for field in tables), "graphs", "files"]
    if wrong := [key for key in document if key not in known]:
        raise ManifestError(f"{MANIFEST}: {reprlib.repr(wrong[0])}: unknown key; known are {', '.join(known)}")
    if missing := [key for key in ("format", "version", "seal", *names, "graphs", "files") if key not in document]:
        raise ManifestError(f"{MANIFEST}: has no {', '.join(missing)}")
    manifest = from_json(Manifest, {name: document[name] for name in names}, MANIFEST, whole=True)
    files = _records(document)
    graphs = {name: _graph(name, row) for name, row in _object(document, "graphs").items()}
    _check_graphs(files, graphs)
    return Opened(manifest, files, graphs), document["seal"]


def manifest_text(opened: Opened) -> str:
    """The text of a manifest of version 2, with its seal.

    Raises ManifestError if a graph has no row in `graphs` or a row has no graph.
    """
    _check_graphs(opened.files, opened.graphs)
    document = {
        "format": "higen",
        "version": VERSION,
        "seal": _NO_SEAL,
        **to_json(opened.manifest),
        "graphs": {name: to_json(_Graph(opened.graphs[name])) for name in sorted(opened.graphs)},
        "files": {name: to_json(opened.files[name]) for name in sorted(opened.files)},
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    return text.replace(_NO_SEAL, hashlib.sha256(text.encode()).hexdigest(), 1)


def write_manifest(
    folder: Path,
    manifest: Manifest,
    files: Mapping[str, FileRecord],
    graphs: Mapping[str, tuple[GraphInput, ...]],
) -> None:
    """Write and seal `folder`/higen.json atomically. A link there is replaced; the file it points to is not changed.

    Raises OSError, and ManifestError if a graph has no row in `graphs` or a row has no graph.
    """
    text = manifest_text(Opened(manifest, files, graphs))
    with whole_file(folder / MANIFEST) as temporary:
        write_text(temporary, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file of a model, readable for all users. Raises OSError."""
    path.write_text(text, encoding="utf-8", newline="\n")
    path.chmod(0o644)


@contextmanager
def changing(folder: Path, sealed: bool = True) -> Iterator[Opened]:
    """Yields the manifest from the disk. Inside the block, no other process changes the folder.

    Raises ModelError if the folder cannot be written or for an OSError inside the block, and what `read_manifest`
    raises.
    """
    try:
        with exclusive(folder):
            yield read_manifest(folder, sealed)
    except HigenError:
        raise
    except OSError as error:
        raise ModelError(f"{folder / MANIFEST}: cannot be written: {error}") from error


def check_version(folder: Path, opened: Opened) -> None:
    """Raises ManifestError for a manifest of version 1: only an upgrade can find out the inputs of its graphs."""
    if opened.version < VERSION:
        raise ManifestError(
            f"{folder / MANIFEST}: version={opened.version} cannot be changed; first: higen upgrade {folder}"
        )


def rewrite(folder: Path, change: Callable[[Opened], Opened], sealed: bool = True) -> None:
    """Read, change and write the manifest, while no other process changes it.

    A manifest of version 1 is refused unless `change` turns it into version 2. Raises what `changing` raises.
    """
    with changing(folder, sealed) as before:
        opened = change(before)
        check_version(folder, opened)
        write_manifest(folder, opened.manifest, opened.files, opened.graphs)


def _read(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():  # a pipe would wait forever
            raise ManifestError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that no file system accepts
        raise ManifestError(f"{folder}: not a model directory, {MANIFEST} cannot be read: {error}") from error
    if len(data) > LARGEST:
        raise ManifestError(f"{path}: a manifest has at most {LARGEST} bytes")
    return data


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_pairs)
        _check_values(document)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != "higen":
        raise ManifestError(f'{path}: not a higen manifest ("format" is not "higen")')
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise ManifestError(f"{path}: version={reprlib.repr(version)}: a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise ManifestError(
            f"{path}: version={version}, but this higen reads up to {VERSION}: pip install --upgrade higen"
        )
    return document


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_key(pairs)) is not None:
        raise ValueError(f"{twice!r} appears twice")
    return dict(pairs)


def _check_values(document: object) -> None:
    """Raise ValueError for values that JSON or other readers refuse: NaN, a lone surrogate, deep nesting."""
    level = [document]
    for _ in range(DEEPEST):
        values: list[object] = []
        for value in level:
            if isinstance(value, dict):
                values += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                values += value
            elif isinstance(value, str):
                value.encode("utf-8")
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{value} is not a JSON number")
        if not values:
            return
        level = values
    raise ValueError(f"nested deeper than {DEEPEST} levels")


def _object(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    if not isinstance(value, dict):
        raise ManifestError(f"{MANIFEST}: {key}={reprlib.repr(value)}: an object is wanted")
    return value


def _records(document: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {
        _plain_name(name): from_json(FileRecord, record, f"files.{name}", whole=True)
        for name, record in _object(document, "files").items()
    }


def _graph(name: str, row: object) -> tuple[GraphInput, ...]:
    return from_json(_Graph, row, f"graphs.{name}", whole=True).inputs


def _check_graphs(files: Mapping[str, FileRecord], graphs: Mapping[str, tuple[GraphInput, ...]]) -> None:
    listed = {name for name in files if name.endswith(".onnx")}
    if wrong := sorted(listed ^ set(graphs)):
        raise ManifestError(
            f"{MANIFEST}: graphs: {wrong[0]}: graphs must have one row for each .onnx file in files, and no other rows"
        )


def _check_seal(path: Path, data: bytes, seal: object) -> None:
    if not isinstance(seal, str) or not re.fullmatch("[0-9a-f]{64}", seal):
        raise ManifestError(f"{path}: seal={reprlib.repr(seal)}: 64 hexadecimal digits (higen upgrade --reseal)")
    if hashlib.sha256(data.replace(seal.encode(), _NO_SEAL.encode())).hexdigest() != seal:
        raise IntegrityError(
            f"{path}: was edited after it was written: its tables do not fit its seal. Fetch the file again, or accept "
            f"the edit: higen upgrade --reseal {path.parent}"
        )


def _plain_name(name: str) -> str:
    """Check that a model's file lies inside its directory: absolute paths and ".." are refused."""
    parts = name.replace("\\", "/").split("/")
    if not name or name == MANIFEST or "" in parts or "." in parts or ".." in parts or ":" in name or "\0" in name:
        raise ManifestError(f"{MANIFEST}: files has the entry {name!r}: a path inside the model directory is wanted")
    return name
