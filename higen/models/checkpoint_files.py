"""Released checkpoints as tensors by name, whatever the model family.

Tensors are mapped from disk where the format allows. Pickles are read with PyTorch's restricted unpickler or not at
all.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from higen.errors import CheckpointError, ManifestError

__all__ = ["PICKLES", "folder_state", "naming", "read_json", "read_names", "read_state"]

PICKLES = (".pth", ".pt", ".ckpt", ".bin")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, mapped from disk where its format allows; a nesting `state_dict` is opened.

    Raises CheckpointError. A pickle is never allowed to run code: what the restricted unpickler refuses is refused.
    """
    suffix = path.suffix.lower()
    if suffix != ".safetensors" and suffix not in PICKLES:
        raise CheckpointError(f"{path}: a {', '.join(PICKLES)} or .safetensors file is wanted")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    loaded = _read_safetensors(path) if suffix == ".safetensors" else _read_pickle(path)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    entries = loaded.items() if isinstance(loaded, Mapping) else ()
    state = {name: tensor.detach() for name, tensor in entries if isinstance(tensor, Tensor) and isinstance(name, str)}
    if not state:
        raise CheckpointError(f"{path}: holds no tensors by name, not even under 'state_dict'")
    return state


def read_names(path: Path) -> frozenset[str]:
    """The names of a checkpoint file's tensors; none where it cannot be read. No weights are loaded."""
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return frozenset(file.keys())
        return frozenset(read_state(path))
    except (CheckpointError, SafetensorError, OSError):
        return frozenset()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


class _Inert:
    """Stands for the harmless classes that Stable Diffusion's training left in its checkpoints; does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Inert, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
    )
]


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported[^\n]*", str(error))
        raise CheckpointError(
            f"{path}: refused, because it holds more than tensors and reading it could run code"
            f" ({reason[0] if reason else str(error).splitlines()[0]}); use its .safetensors version if there is one"
        ) from error
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise CheckpointError(f"{path}: cannot be read as a PyTorch checkpoint: {error}") from error


@contextmanager
def naming(source: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with a source is a CheckpointError that begins with its path."""
    try:
        yield
    except (CheckpointError, ManifestError) as error:
        message = str(error)
        named = message if message.startswith(os.fspath(source)) else f"{os.fspath(source)}: {message}"
        raise CheckpointError(named) from error


def folder_state(folder: Path, stems: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of the first of a diffusers folder's files that is there, safetensors before pickles."""
    candidates = [folder / f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in stems]
    for path in candidates:
        if path.is_file():
            return read_state(path)
    raise CheckpointError(f"{folder}: holds none of {', '.join(path.name for path in candidates)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a diffusers folder. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read, and a diffusers folder has it: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is wanted")
    return value
