"""The model directory: manifest, files, hashes. All runtimes (PyTorch, ONNX, TensorRT, C++) read the same directory.

model/higen.json            the tables (higen/manifest.py), and sha256 and size of every file
model/*.safetensors         one copy of the weights per precision; the graphs refer to their tensors
model/tokenizer.json
model/<stage>.onnx          graphs over these weights (higen-export onnx), computing in float32
model/<stage>.fp16.onnx     the same, computing in float16, over <weights>.fp16.safetensors, ...
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from higen.errors import LINE, IntegrityError, ModelError, quoted
from higen.manifest import Manifest
from higen.manifest_file import (
    MANIFEST,
    FileRecord,
    GraphInput,
    Opened,
    changing,
    check_version,
    manifest_text,
    read_manifest,
    rewrite,
    write_manifest,
    write_text,
)
from higen.model_folder import check_free, opened_folder, staged
from higen.precision import PRECISIONS, QUANTIZED, precision_named
from higen.staging import staging

__all__ = [
    "MANIFEST",
    "Bundle",
    "FileRecord",
    "GraphInput",
    "check_free",
    "check_place",
    "create_model",
    "default_model",
    "drop_file",
    "file_record",
    "graph_file",
    "put_file",
    "rewrite",
    "sha256",
    "staged",
    "variant",
]


def default_model() -> Path:
    """The directory of the small model inside the package."""
    return Path(str(files("higen"))) / "assets" / "default"


def graph_file(stage: str, precision: str = "fp32") -> str:
    """The file that holds a stage's graph in a precision."""
    return variant(f"{stage}.onnx", precision)


def variant(name: str, precision: str) -> str:
    """A file's name in a precision: unet.safetensors and fp16 give unet.fp16.safetensors. Raises RequestError."""
    stem, _, suffix = name.rpartition(".")
    return name if precision_named(precision).name == "fp32" else f"{stem}.{precision}.{suffix}"


_TRIES = 20

_Mark = tuple[int, int, int, int]
"""Changes when a file is replaced or written to: device, inode, size, time of change."""


@dataclass(frozen=True)
class Bundle:
    """An opened model directory. Its manifest has been read and checked; other files are checked when they are used.

    graphs   the inputs of each graph, by file; empty for a directory of version 1, which does not record them
    version  the version of the manifest on the disk
    """

    path: Path
    manifest: Manifest
    files: Mapping[str, FileRecord]
    graphs: Mapping[str, tuple[GraphInput, ...]]
    version: int = 2
    _seen: dict[str, _Mark] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest; every file that it lists must exist and have its full size.

        Raises ManifestError (not a model directory, malformed, newer version) or IntegrityError (a file is missing or
        truncated, tables were edited).
        """
        folder = opened_folder(path)
        for _ in range(_TRIES):
            before = _mark(folder / MANIFEST)
            opened = read_manifest(folder)
            bundle = cls(folder, opened.manifest, opened.files, opened.graphs, opened.version)
            try:
                bundle._check_sizes()
            except IntegrityError:
                if _mark(folder / MANIFEST) == before:  # else another process is writing a file of the model
                    raise
            else:
                return bundle
        raise IntegrityError(f"{folder}: another process keeps changing it; try again")

    def __reduce__(self) -> tuple[Any, ...]:
        """A model is sent to another process as its path; the built-in model is that of the other process."""
        return _opened, (None if self.path == default_model() else str(self.path),)

    def file(self, name: str, verify: bool = True) -> Path:
        """Path of a file of the model, after a check of its size and (with `verify`) its sha256.

        A file that has changed since the last call is always checked.
        Raises IntegrityError.
        """
        if name not in self.files:
            raise IntegrityError(f"{self.path}: the manifest lists no {name}; it lists {', '.join(sorted(self.files))}")
        path = self._check_size(name, self.files[name])
        found = _mark(path)
        if verify or found != self._seen.get(name, found):
            try:
                altered = sha256(path) != self.files[name].sha256 or _mark(path) != found
            except OSError as error:
                raise IntegrityError(f"{path}: cannot be read: {error.strerror}") from error
            if altered and found != self._seen.get(name, found):
                raise IntegrityError(f"{path}: was replaced while the model was open; load the model again")
            if altered:
                raise IntegrityError(
                    f"{path}: its content does not match the sha256 in {MANIFEST}; fetch the file again"
                )
        self._seen[name] = found
        return path

    def check_loaded(self, *names: str) -> None:
        """Raise IntegrityError if a file was written to after its check: a backend may have mapped it into memory, so
        its tensors change with it. A replaced file (another inode) is not an error: the old one stays mapped.
        """
        for name in names:
            seen, found = self._seen.get(name), _mark(self.path / name)
            if seen is not None and found is not None and found != seen and found[:2] == seen[:2]:
                self.file(name)

    def weights(self, stage: str, precision: str = "fp32") -> str:
        """Name of the weights file that a stage's graph in `precision` refers to.

        A precision has no separate file if the model's weights are already stored in it.
        """
        name = self.weights_variant(stage, precision)
        return name if name in self.files else self.manifest.stage(stage).weights

    def weights_variant(self, stage: str, precision: str) -> str:
        """The name of the file with a stage's weights in the base of `precision`, whether or not it exists."""
        return variant(self.manifest.stage(stage).weights, precision_named(precision).base)

    def precisions(self, stage: str) -> tuple[str, ...]:
        """The precisions in which a stage has a graph."""
        return tuple(p for p in (*PRECISIONS, *QUANTIZED) if graph_file(stage, p) in self.files)

    def not_quantized(self, precision: str | None) -> str | None:
        """An error message for a quantised precision that no denoising stage has; it says how to make the graphs.

        None for any other precision, and if a denoising stage has it: other stages then use another precision.
        """
        denoising = self.manifest.denoising
        if precision not in QUANTIZED or any(graph_file(stage, precision) in self.files for stage in denoising):
            return None
        return (
            f"{self.path}: no {graph_file(denoising[0], precision)} "
            f"(make it: higen-export quantize {self.path} --precision {precision})"
        )

    def _check_sizes(self) -> None:
        for name, record in self.files.items():
            self._check_size(name, record)

    def _check_size(self, name: str, record: FileRecord) -> Path:
        path = self.path / name
        try:
            found = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a name that no file system accepts
            reason = error.strerror if isinstance(error, OSError) else error
            shown = path if len(name) < LINE else f"{self.path}: {quoted(name)}"
            raise IntegrityError(f"{shown}: listed in {MANIFEST} but not readable: {reason}") from error
        if not stat.S_ISREG(found.st_mode):
            raise IntegrityError(f"{path}: listed in {MANIFEST} but is not a regular file")
        if found.st_size != record.size:
            raise IntegrityError(
                f"{path}: {found.st_size} bytes, but {MANIFEST} says {record.size}; fetch the file again"
            )
        return path


def _mark(path: Path) -> _Mark:
    """Zeros if the file does not exist."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return 0, 0, 0, 0
    # Not st_ctime: making a hard link changes it, and a Triton repository links to the weights.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _opened(path: str | None) -> Bundle:
    return Bundle.open(default_model() if path is None else path)


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: Path) -> FileRecord:
    """Size and sha256 of a file."""
    return FileRecord(path.stat().st_size, sha256(path))


@contextmanager
def create_model(path: str | os.PathLike[str], manifest: Manifest, overwrite: bool = False) -> Iterator[Path]:
    """Make a model directory: yields an empty folder to fill. On a clean exit, adds the manifest and moves the folder.

    Graphs are added later, by `put_file`. Raises what `staged` raises.
    """
    with staged(path, overwrite) as folder:
        yield folder
        names = [p.name for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."]
        write_manifest(folder, manifest, {name: file_record(folder / name) for name in names}, {})
        for file in folder.iterdir():  # safetensors makes files that only the owner can read
            file.chmod(0o644)


def put_file(bundle: Bundle, finished: Path, name: str, inputs: tuple[GraphInput, ...] | None = None) -> Bundle:
    """Move a finished file in the model's folder to `name` and add it to the manifest; returns the new bundle.

    `inputs`: the inputs of a graph; None for any other file. The directory is consistent at every moment: it has the
    old file, no file or the new file. If a kill leaves it with no file, the next run or opening completes the change.
    The same content changes nothing. Raises what `changing` raises, and ModelError if a file of that name exists and
    does not belong to the model.
    """
    if (inputs is None) == name.endswith(".onnx"):
        raise ModelError(f"{name}: inputs must be given for a graph (.onnx), and only for a graph")
    record = file_record(finished)
    with changing(bundle.path) as opened:
        check_version(bundle.path, opened)
        there = opened.files.get(name) == record and opened.graphs.get(name) == inputs
        if there:
            finished.unlink()
        else:
            _enter(bundle.path, opened, finished, name, record, inputs)
    # Only after the lock is released: opening the model waits for the lock if a change is unfinished.
    return bundle if there and bundle.files == opened.files else Bundle.open(bundle.path)


def _enter(
    folder: Path, opened: Opened, finished: Path, name: str, record: FileRecord, inputs: tuple[GraphInput, ...] | None
) -> None:
    """Move a file and the changed manifest to their final names, as one change. The caller is the only writer."""
    check_place(folder, opened.files, name)
    with staging(folder) as stage:
        moved = finished.replace(stage.folder / name)
        before, after = stage.folder / "before", stage.folder / "after"
        write_text(after, manifest_text(_entered(opened, name, record, inputs)))
        pairs = [(moved, folder / name), (after, folder / MANIFEST)]
        if name in opened.files:
            write_text(before, manifest_text(_entered(opened, name, None, None)))
            pairs.insert(0, (before, folder / MANIFEST))
        stage.commit(pairs)


def check_place(folder: Path, files: Mapping[str, FileRecord], name: str) -> None:
    """Raises ModelError if a file has the name of a model's file and does not belong to the model."""
    if name not in files and os.path.lexists(folder / name):
        raise ModelError(f"{folder / name}: {MANIFEST} does not list it, so it is not overwritten: move it away")


def drop_file(bundle: Bundle, name: str) -> Bundle:
    """Take a file out of the manifest, then out of the folder; returns the bundle without it."""
    with changing(bundle.path) as opened:
        check_version(bundle.path, opened)
        with staging(bundle.path) as stage:
            after = stage.folder / "after"
            write_text(after, manifest_text(_entered(opened, name, None, None)))
            stage.commit([(after, bundle.path / MANIFEST)], [bundle.path / name] if name in opened.files else [])
    return Bundle.open(bundle.path)


def _entered(opened: Opened, name: str, record: FileRecord | None, inputs: tuple[GraphInput, ...] | None) -> Opened:
    """The manifest with a file's entry added or replaced; with None, removed."""
    files = {key: value for key, value in opened.files.items() if key != name}
    graphs = {key: value for key, value in opened.graphs.items() if key != name}
    if record is not None:
        files[name] = record
    if record is not None and inputs is not None:
        graphs[name] = inputs
    return replace(opened, files=files, graphs=graphs)
