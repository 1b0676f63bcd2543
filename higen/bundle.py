"""The model directory: manifest, files, hashes. The only artefact; torch, graphs, engines and C++ share it.

model/higen.json            the tables (higen/manifest.py), and sha256 and size of every file
model/*.safetensors         one copy of the weights per precision; every graph points into it
model/tokenizer.json
model/<stage>.onnx          graphs over these weights (higen-export onnx), computing in float32
model/<stage>.fp16.onnx     the same, computing in float16, over <weights>.fp16.safetensors, ...
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from higen.errors import IntegrityError, ModelError
from higen.manifest import Manifest
from higen.manifest_file import MANIFEST, FileRecord, GraphInput, Opened, read_manifest, rewrite, write_manifest
from higen.precision import PRECISIONS, QUANTIZED, precision_named

__all__ = [
    "MANIFEST",
    "Bundle",
    "FileRecord",
    "GraphInput",
    "create",
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


@dataclass(frozen=True)
class Bundle:
    """An opened model directory: its manifest has been read and checked, no other file yet.

    graphs   what each graph itself takes, by file; a directory of version 1 does not say
    version  of the manifest as it stands on the disk
    """

    path: Path
    manifest: Manifest
    files: Mapping[str, FileRecord]
    graphs: Mapping[str, tuple[GraphInput, ...]]
    version: int = 2

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest; every file it lists must be there in its full size.

        Raises ManifestError (not a model directory, malformed, newer version) or IntegrityError (file missing or cut,
        tables that were edited).
        """
        folder = Path(path).absolute()  # the working directory may change while the model is open
        opened = read_manifest(folder)
        bundle = cls(folder, opened.manifest, opened.files, opened.graphs, opened.version)
        for name, record in bundle.files.items():
            bundle._check_size(name, record)
        return bundle

    def file(self, name: str, verify: bool = True) -> Path:
        """Path of a file of the model, after its size and (with `verify`) its sha256 were checked.

        Raises IntegrityError.
        """
        if name not in self.files:
            raise IntegrityError(f"{self.path}: the manifest lists no {name}; it lists {', '.join(sorted(self.files))}")
        path = self._check_size(name, self.files[name])
        try:
            altered = verify and sha256(path) != self.files[name].sha256
        except OSError as error:
            raise IntegrityError(f"{path}: cannot be read: {error.strerror}") from error
        if altered:
            raise IntegrityError(f"{path}: its content does not match the sha256 in {MANIFEST}; fetch the file again")
        return path

    def weights(self, stage: str, precision: str = "fp32") -> str:
        """Name of the file that a stage's graph in `precision` points into.

        A precision has no file of its own where the model's weights are stored in it already.
        """
        name = self.weights_variant(stage, precision)
        return name if name in self.files else self.manifest.stage(stage).weights

    def weights_variant(self, stage: str, precision: str) -> str:
        """The name that a file of a stage's weights in the base of `precision` has, there or not."""
        return variant(self.manifest.stage(stage).weights, precision_named(precision).base)

    def precisions(self, stage: str) -> tuple[str, ...]:
        """The precisions in which a stage has a graph."""
        return tuple(p for p in (*PRECISIONS, *QUANTIZED) if graph_file(stage, p) in self.files)

    def not_quantized(self, precision: str | None) -> str | None:
        """What is wrong with asking for a quantised precision that no stage was ever written in, and how to make it.

        None for any other precision, and where a denoising stage has it: the stages that have not then stand in.
        """
        denoising = self.manifest.denoising
        if precision not in QUANTIZED or any(graph_file(stage, precision) in self.files for stage in denoising):
            return None
        return (
            f"{self.path}: no {graph_file(denoising[0], precision)} "
            f"(make it: higen-export quantize {self.path} --precision {precision})"
        )

    def _check_size(self, name: str, record: FileRecord) -> Path:
        path = self.path / name
        try:
            found = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
            raise IntegrityError(f"{path}: listed in {MANIFEST} but not readable: {error}") from error
        if not stat.S_ISREG(found.st_mode):
            raise IntegrityError(f"{path}: listed in {MANIFEST} but no plain file")
        if found.st_size != record.size:
            raise IntegrityError(
                f"{path}: {found.st_size} bytes, but {MANIFEST} says {record.size}; fetch the file again"
            )
        return path


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: Path) -> FileRecord:
    """Size and sha256 of a file."""
    return FileRecord(path.stat().st_size, sha256(path))


@contextmanager
def create(path: str | os.PathLike[str], manifest: Manifest, overwrite: bool = False) -> Iterator[Path]:
    """Make a model directory: yields an empty folder to fill; on a clean exit the manifest is added and it is moved.

    Graphs are entered by `put_file`, once the directory is there. Raises what `staged` raises.
    """
    with staged(path, overwrite) as staging:
        yield staging
        names = [p.name for p in sorted(staging.iterdir()) if p.is_file() and p.name[0] != "."]
        write_manifest(staging, manifest, {name: file_record(staging / name) for name in names}, {})
        for file in staging.iterdir():  # safetensors makes files that only their owner can read
            file.chmod(0o644)


@contextmanager
def staged(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Make a folder as a whole: yields an empty one beside `path`, which is moved there on a clean exit.

    Nothing appears at `path` before everything is written, and nothing stays behind when writing fails.
    Raises ModelError if `path` exists (with `overwrite`: exists and is no model directory), its parent does not, or it
    cannot be written: an OSError inside the block is taken for that.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ModelError(f"{target}: the folder {target.parent} does not exist")
    _check_free(target, overwrite)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ModelError(f"{target}: cannot write in {target.parent}: {error.strerror}") from error
    try:
        yield staging
        staging.chmod(0o755)
        _check_free(target, overwrite)
        _move(staging, target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_free(target: Path, overwrite: bool) -> None:
    if os.path.lexists(target) and not (overwrite and (target / MANIFEST).is_file()):
        raise ModelError(f"{target}: exists already" + (" and is no model directory" if overwrite else ""))


def _move(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; what was there is put back if that fails."""
    if not os.path.lexists(target):
        staging.replace(target)
        return
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as attic:
        old = Path(attic, "old")
        target.replace(old)
        try:
            staging.replace(target)
        except BaseException:
            old.replace(target)
            raise


def put_file(bundle: Bundle, finished: Path, name: str, inputs: tuple[GraphInput, ...] | None = None) -> Bundle:
    """Move a finished file of the model's folder to `name` and enter it in the manifest; returns the bundle with it.

    `inputs`: what a graph takes; None for any other file. At every moment the directory is whole: it has the old file,
    none or the new one. The same content changes nothing. Raises what `rewrite` raises.
    """
    if (inputs is None) == name.endswith(".onnx"):
        raise ModelError(f"{name}: graphs (.onnx), and no other files, are entered with their inputs")
    record = file_record(finished)
    if bundle.files.get(name) == record and bundle.graphs.get(name) == inputs:
        finished.unlink()
        return bundle
    _change(bundle.path, name, None, None)
    finished.replace(bundle.path / name)
    return _change(bundle.path, name, record, inputs)


def drop_file(bundle: Bundle, name: str) -> Bundle:
    """Take a file out of the manifest, then out of the folder; returns the bundle without it."""
    changed = _change(bundle.path, name, None, None)
    (bundle.path / name).unlink(missing_ok=True)
    return changed


def _change(folder: Path, name: str, record: FileRecord | None, inputs: tuple[GraphInput, ...] | None) -> Bundle:
    """Enter a file in the manifest as it now stands on the disk, or take it out."""

    def changed(opened: Opened) -> Opened:
        files = {key: value for key, value in opened.files.items() if key != name}
        graphs = {key: value for key, value in opened.graphs.items() if key != name}
        if record is not None:
            files[name] = record
        if record is not None and inputs is not None:
            graphs[name] = inputs
        return replace(opened, files=files, graphs=graphs)

    rewrite(folder, changed)
    return Bundle.open(folder)
