"""Reads PyTorch's pickles without running code: tensors are read, other objects are not created."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from higen.errors import CheckpointError, quoted
from higen.memory import is_lack_of_memory
from higen.models.foreign_files import ZIP, format_of

__all__ = ["plain_reason", "read_pickle"]


class _Inert:
    """Replaces a class or function that a training loop saved with the weights. It does nothing and has no value."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, _: object, __: object) -> None: ...

    def update(self, *_: object) -> None: ...


_DTYPES = (
    *("Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Long", "ULong", "LongLong"),
    *("Float16", "Float32", "Float64", "LongDouble", "Complex64", "Complex128", "Str", "Bytes"),
)
_HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{name}DType" for name in _DTYPES),
    "argparse.Namespace",
    "types.SimpleNamespace",
    "easydict.EasyDict",
    *(f"pathlib.{module}{name}" for module in ("", "_local.") for name in ("PosixPath", "WindowsPath")),
    *(f"pathlib.{module}Pure{name}" for module in ("", "_local.") for name in ("PosixPath", "WindowsPath")),
    "datetime.datetime",
    "datetime.timedelta",
)
"""Names that training loops save with the weights. They are not imported or called; `_Inert` replaces them."""

_INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_Inert, name) for name in _HARMLESS]

CHUNK = 2**20
"""Number of bytes to read at a time."""

_FORBIDDEN = re.compile(
    r"Unsupported (?:global: GLOBAL|class) (?P<name>[\w.]+)"
    r"|Unsupported operand (?P<operand>\d+)"
    r"|unsupported GLOBAL (?P<blocked>[\w.]+) whose module"
    r"|reduce for unrecognized function (?P<function>.{1,80})"
    r"|(?:Can only|Trying to) (?:build|create|call|instantiate).*(?:but got|for) (?P<object>.{1,80})"
)
_SAFELY = (
    "use its .safetensors version; or, if you trust the file, write one with "
    "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
)


def read_pickle(path: Path, checked: bool = True) -> object:
    """The contents of a file that PyTorch saved, on the CPU. Tensors of a zip archive are memory-mapped.

    `checked`: compare the archive's checksums, which reads the whole file once. Raises CheckpointError for a file that
    is damaged or refers to code. An error about a lack of memory is passed on unchanged.
    """
    zipped = format_of(path) == ZIP
    if checked and zipped:
        _check_sums(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
            warnings.simplefilter("ignore")
            if path.suffix.lower() == ".safetensors":  # PyTorch goes by a path's suffix; an open file is not mapped
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        if (found := _FORBIDDEN.search(str(error))) is None:
            raise CheckpointError(f"{path}: cannot be read as a PyTorch checkpoint: it is damaged") from error
        name = (
            f"the operand {found['operand']}" if found["operand"] else next(group for group in found.groups() if group)
        )
        raise CheckpointError(
            f"{path}: refused, because it holds more than tensors and reading it could run code (it names {name}); "
            f"{_SAFELY}"
        ) from error
    except Exception as error:  # a damaged file makes the reader raise almost anything
        if is_lack_of_memory(error):
            raise
        if isinstance(error, EOFError) or "EOF" in str(error):
            raise CheckpointError(f"{path}: cannot be read as a PyTorch checkpoint: cut off; fetch it again") from error
        raise CheckpointError(f"{path}: cannot be read as a PyTorch checkpoint: {plain_reason(error)}") from error


def _check_sums(path: Path) -> None:
    """Raise CheckpointError for a record with a wrong checksum. PyTorch maps the file and does not check them."""
    name = "directory"
    try:
        with zipfile.ZipFile(path) as archive:
            # Without checksums, which is an option of PyTorch, it writes 0.
            for record in (record for record in archive.infolist() if record.CRC):
                name = record.filename
                with archive.open(record) as file:
                    while file.read(CHUNK):
                        pass
    except Exception as error:  # a damaged directory makes the reader raise almost anything
        if is_lack_of_memory(error):
            raise
        raise CheckpointError(f"{path}: {quoted(name)} is damaged ({plain_reason(error)}): fetch it again") from error


def plain_reason(error: BaseException) -> str:
    """The reason in one line, without PyTorch's advice to read the file in a way that runs its code."""
    first = (str(error).splitlines() or [""])[0]
    if any(word in first for word in ("weights_only", "Weights only", "safe_globals")):
        return "it is damaged, or no checkpoint"
    return first or type(error).__name__
