"""The model directory: manifest, files, hashes. The only artefact; torch, graphs, engines and C++ share it.

model/higen.json            architecture, schedule, defaults, licence, and sha256 and size of every file
model/unet.safetensors      conditioner and U-Net, one copy for the spatial and the temporal network
model/text_encoder.safetensors   model/vae.safetensors   model/tokenizer.json
model/<stage>.onnx          graphs over these weights (higen-export onnx), computing in float32
model/<stage>.fp16.onnx     the same, computing in float16, over unet.fp16.safetensors, ...
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from higen.config import ModelConfig, from_json, to_json
from higen.errors import IntegrityError, ManifestError, ModelError, RequestError

__all__ = [
    "ENGINES_ONLY",
    "MANIFEST",
    "PRECISIONS",
    "QUANTIZABLE",
    "QUANTIZED",
    "VERSION",
    "Bundle",
    "FileRecord",
    "add_files",
    "check_precision",
    "create",
    "drop_file",
    "file_record",
    "graph_file",
    "put_file",
    "sha256",
    "staged",
    "stand_ins",
    "weights_file",
]

MANIFEST = "higen.json"
VERSION = 1
"""Version of the manifest's layout. A reader refuses a newer one."""

UNET, TEXT_ENCODER, AUTOENCODER, TOKENIZER = (
    "unet.safetensors",
    "text_encoder.safetensors",
    "vae.safetensors",
    "tokenizer.json",
)


PRECISIONS = ("fp32", "fp16", "bf16")
"""What a stage's graph computes in. fp32 is the unnamed one; its weights may be stored in fewer bits."""


QUANTIZED = ("int8", "int8.fp16", "fp8.fp16", "nvfp4.fp16")
"""Most multiplications in 8 or 4 bits, the rest in fp32 or fp16, over the weights of that precision."""


QUANTIZABLE = ("spatial_unet", "temporal_unet")
"""The stages that `higen-export quantize` writes; the others run as they are in a quantised model."""


ENGINES_ONLY = ("nvfp4.fp16",)
"""Of these, what TensorRT alone computes in."""


def check_precision(precision: str) -> str:
    """One of PRECISIONS or QUANTIZED. Raises RequestError for any other."""
    if precision not in PRECISIONS + QUANTIZED:
        raise RequestError(f"precision={precision!r}: one of {', '.join(map(repr, PRECISIONS + QUANTIZED))}")
    return precision


def stand_ins(precision: str) -> tuple[str, ...]:
    """The precisions that serve a request for one, the best first: a quantised model has stages that are not."""
    return (precision,) if precision not in QUANTIZED else (precision, precision.partition(".")[2] or "fp32")


def weights_file(stage: str, precision: str = "fp32") -> str:
    """The file that holds a stage's weights for a precision; see also `Bundle.weights`."""
    if precision in QUANTIZED:
        precision = precision.partition(".")[2] or "fp32"
    if stage == "text_encoder":
        return _variant(TEXT_ENCODER, precision)
    return _variant(AUTOENCODER if stage.startswith("vae") else UNET, precision)


def graph_file(stage: str, precision: str = "fp32") -> str:
    """The file that holds a stage's graph in a precision."""
    return _variant(f"{stage}.onnx", precision)


def _variant(name: str, precision: str) -> str:
    stem, _, suffix = name.partition(".")
    return name if check_precision(precision) == "fp32" else f"{stem}.{precision}.{suffix}"


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file: its size in bytes and sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """An opened model directory: its manifest has been read and checked, no other file yet."""

    path: Path
    config: ModelConfig
    files: Mapping[str, FileRecord]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest; every file it lists must be there in its full size.

        Raises ManifestError (not a model directory, malformed, newer version) or IntegrityError (file missing or cut).
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        records = {
            _plain_name(name): from_json(FileRecord, record, f"files.{name}")
            for name, record in _object(manifest, "files").items()
        }
        bundle = cls(folder, from_json(ModelConfig, _object(manifest, "model"), "model"), records)
        for name, record in records.items():
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
        name = weights_file(stage, precision)
        return name if name in self.files else weights_file(stage)

    def precisions(self, stage: str) -> tuple[str, ...]:
        """The precisions in which a stage has a graph."""
        return tuple(p for p in PRECISIONS + QUANTIZED if graph_file(stage, p) in self.files)

    def not_quantized(self, precision: str | None) -> str | None:
        """What is wrong with asking for a quantised precision that no stage was ever written in, and how to make it.

        None for any other precision, and where a denoising stage has it: the stages that have not then stand in.
        """
        if precision not in QUANTIZED or any(graph_file(stage, precision) in self.files for stage in QUANTIZABLE):
            return None
        return (
            f"{self.path}: no {graph_file(QUANTIZABLE[0], precision)} "
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


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file system takes
        raise ManifestError(f"{folder}: not a model directory, {MANIFEST} cannot be read: {error}") from error
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "higen":
        raise ManifestError(f'{path}: not a higen manifest ("format" is not "higen")')
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise ManifestError(f"{path}: version={reprlib.repr(version)}: a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise ManifestError(
            f"{path}: version={version}, but this higen reads up to {VERSION}: pip install --upgrade higen"
        )
    return manifest


def _object(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = manifest.get(key)
    if not isinstance(value, dict):
        raise ManifestError(f"{MANIFEST}: {key}={reprlib.repr(value)}: an object is wanted")
    return value


def _plain_name(name: str) -> str:
    """A file of a model lies in its directory or below: no absolute path, no way out."""
    parts = name.replace("\\", "/").split("/")
    if not name or name == MANIFEST or "" in parts or "." in parts or ".." in parts or ":" in name or "\0" in name:
        raise ManifestError(f"{MANIFEST}: files has the entry {name!r}: a path inside the model directory is wanted")
    return name


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: Path) -> FileRecord:
    """Size and sha256 of a file."""
    return FileRecord(path.stat().st_size, sha256(path))


@contextmanager
def create(path: str | os.PathLike[str], config: ModelConfig, overwrite: bool = False) -> Iterator[Path]:
    """Make a model directory: yields an empty folder to fill; on a clean exit the manifest is added and it is moved.

    Raises what `staged` raises.
    """
    with staged(path, overwrite) as staging:
        yield staging
        write_manifest(staging, config)
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


def write_manifest(folder: Path, config: ModelConfig) -> None:
    """Write higen.json for what lies in `folder` (hidden files left out), atomically."""
    names = [p.name for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST and p.name[0] != "."]
    _write(folder, config, {name: file_record(folder / name) for name in names})


def add_files(bundle: Bundle, names: Sequence[str]) -> Bundle:
    """Enter files that now lie in the model's folder into its manifest, atomically; returns the bundle with them."""
    _write(bundle.path, bundle.config, {**bundle.files, **{name: file_record(bundle.path / name) for name in names}})
    return Bundle.open(bundle.path)


def put_file(bundle: Bundle, aside: Path, name: str) -> Bundle:
    """Move a finished file of the model's folder to `name` and enter it in the manifest; returns the bundle with it.

    At every moment the directory is whole: it has the old file, none or the new one. The same content changes nothing.
    """
    record = file_record(aside)
    if bundle.files.get(name) == record:
        aside.unlink()
        return bundle
    bundle = _without(bundle, name)
    aside.replace(bundle.path / name)
    return add_files(bundle, [name])


def drop_file(bundle: Bundle, name: str) -> Bundle:
    """Take a file out of the manifest, then out of the folder; returns the bundle without it."""
    bundle = _without(bundle, name)
    (bundle.path / name).unlink(missing_ok=True)
    return bundle


def _without(bundle: Bundle, name: str) -> Bundle:
    if name not in bundle.files:
        return bundle
    kept = {other: record for other, record in bundle.files.items() if other != name}
    _write(bundle.path, bundle.config, kept)
    return replace(bundle, files=kept)


def _write(folder: Path, config: ModelConfig, files: Mapping[str, FileRecord]) -> None:
    records = {name: to_json(files[name]) for name in sorted(files)}
    manifest = {"format": "higen", "version": VERSION, "model": to_json(config), "files": records}
    temporary = folder / f".{MANIFEST}.part"
    try:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
