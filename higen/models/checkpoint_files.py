"""Reads released checkpoints of any family as tensors by name.

Tensors are memory-mapped if the format allows it. Pickles are read only with PyTorch's restricted unpickler. A
checkpoint may be one file, or several with an index (model.safetensors.index.json).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from higen.errors import CheckpointError, HigenError, ManifestError
from higen.memory import enough_memory, is_lack_of_memory
from higen.models.foreign_files import SAFETENSORS, format_of, not_a_checkpoint
from higen.models.nestings import unwrapped, weights_of
from higen.models.pickles import read_pickle
from higen.text_files import TextError
from higen.text_files import read_json as read_any_json

__all__ = ["PICKLES", "Note", "folder_state", "naming", "read_json", "read_names", "read_state", "seen_names"]

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
WEIGHTS = (".safetensors", *PICKLES)
INDEX = re.compile(r"\.index\.(?:[\w-]+\.)?json$")
"""The end of an index file's name. The index of a sharded checkpoint lists its files."""

PART = re.compile(r"-\d{5}-of-(\d{5})\.")
"""A part of the name of each of these files: its number, and the number of files."""

VARIANTS = ("fp32", "fp16", "bf16")
"""Variants of the same weights in a diffusers folder, best first."""

Note = Callable[[str], None]


def read_state(path: Path, on_note: Note = lambda _: None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, memory-mapped if its format allows it, without the wrappers' parts of their names.

    path      a .pth, .pt, .ckpt, .bin or .safetensors file, whose format is found from its content, not its name; or
              the .index.json of several files
    on_note   called with a note of which weights are used, if there are several sets (see `nestings.weights_of`)

    Raises CheckpointError, also for a pickle that PyTorch's restricted unpickler refuses. A pickle never runs code.
    """
    if INDEX.search(path.name.lower()):
        return _read_sharded(path, on_note)
    if (part := PART.search(path.name)) and int(part[1]) > 1:
        raise CheckpointError(f"{path}: one of {int(part[1])} files of a checkpoint: give its .index.json file")
    return _read_whole(path, on_note)


def _read_whole(path: Path, on_note: Note) -> dict[str, Tensor]:
    loaded = _read_file(path)
    with naming(path):
        state, note = weights_of(loaded)
        _check_dense(state)
    if note:
        on_note(f"{path}: {note}")
    return state


def _read_file(path: Path, checked: bool = True) -> object:
    if path.is_dir():
        held = ", ".join(sorted(p.name for p in path.iterdir() if _is_weights(p))[:5])
        raise CheckpointError(f"{path}: a folder; name the checkpoint in it{f': {held}' if held else ''}")
    if path.suffix.lower() not in WEIGHTS:
        raise CheckpointError(f"{path}: a {', '.join(PICKLES)} or .safetensors file is wanted")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if what := not_a_checkpoint(path):
            raise CheckpointError(f"{path}: {what}")
        kind = format_of(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    with enough_memory(os.fspath(path)):
        return _read_safetensors(path) if kind == SAFETENSORS else read_pickle(path, checked)


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in WEIGHTS or INDEX.search(path.name) is not None


def _check_dense(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            what = "has no values" if tensor.is_meta else "is sparse or quantised"
            raise CheckpointError(f"{name} {what}: plain tensors are wanted")


def read_names(path: Path) -> frozenset[str]:
    """The names of a checkpoint's tensors; empty if it cannot be read. No weights are loaded."""
    try:
        return frozenset(seen_names(path))
    except (HigenError, OSError):
        return frozenset()


def seen_names(path: Path) -> list[str]:
    """The names of a checkpoint's tensors, in their order. No weights are loaded. Raises as `read_state` does."""
    if INDEX.search(path.name.lower()):
        return [unwrapped(name) for name in _weight_map(path)]
    if path.suffix.lower() in WEIGHTS and path.is_file() and format_of(path) == SAFETENSORS:
        try:
            with safe_open(path, framework="pt") as file:
                return [unwrapped(name) for name in file.keys()]  # noqa: SIM118 (it is no mapping)
        except SafetensorError:
            pass  # the reader below reports what is wrong with it
    with naming(path):
        state, _ = weights_of(_read_file(path, checked=False))
    return list(state)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        if is_lack_of_memory(error):
            raise
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def _read_sharded(index: Path, on_note: Note) -> dict[str, Tensor]:
    """The tensors of all files of an index. Raises CheckpointError naming a file or a tensor that is missing."""
    files: dict[str, list[str]] = {}
    for name, file in _weight_map(index).items():
        files.setdefault(file, []).append(name)
    state: dict[str, Tensor] = {}
    for file, names in files.items():
        part = _read_whole(index.parent / file, on_note)
        if missing := [name for name in names if unwrapped(name) not in part]:
            raise CheckpointError(f"{index.parent / file}: has no {missing[0]}, which {index.name} says is there")
        state |= {unwrapped(name): part[unwrapped(name)] for name in names}
    return state


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index}: has no 'weight_map' of tensors and their files")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise CheckpointError(f"{index}: weight_map.{name}={file!r}: the name of a file beside it is wanted")
    return found


@contextmanager
def naming(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors about a source into a CheckpointError that begins with the source's path."""
    try:
        yield
    except (CheckpointError, ManifestError) as error:
        message = str(error)
        named = message if message.startswith(os.fspath(source)) else f"{os.fspath(source)}: {message}"
        raise CheckpointError(named) from error


def folder_state(folder: Path, stems: tuple[str, ...], on_note: Note = lambda _: None) -> dict[str, Tensor]:
    """The tensors of a diffusers folder, in one file or in several, as the Hugging Face libraries write them.

    A plain file is preferred to a variant (*.fp16.safetensors), then safetensors to a pickle, then the variants in the
    order fp32, fp16, bf16. `on_note` is called if a variant is used. Raises CheckpointError.
    """
    for suffix in (".safetensors", ".bin"):
        for stem in stems:
            for path in (folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"):
                if path.is_file():
                    return read_state(path, on_note)
    for suffix in (".safetensors", ".bin"):
        for stem in stems:
            if (variant := _variant(folder, stem, suffix)) is not None:
                on_note(f"{variant}: these weights are used, because there are none without a variant")
                return read_state(variant, on_note)
    plain = ", ".join(f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in stems)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""
    raise CheckpointError(
        f"{folder}: has none of {plain}, and no variant or index of them; it has {found or 'nothing'}"
    )


def _variant(folder: Path, stem: str, suffix: str) -> Path | None:
    """The file or index of the best variant, in any naming scheme that the libraries have used."""
    pattern = re.compile(
        rf"{re.escape(stem)}(?:\.(?P<a>[\w-]+){re.escape(suffix)}(?:\.index\.json)?"
        rf"|{re.escape(suffix)}\.index\.(?P<b>[\w-]+)\.json)"
    )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            found.setdefault(match["a"] or match["b"], path)
    known = [name for name in VARIANTS if name in found]
    if not known and len(found) > 1:
        named = ", ".join(sorted(path.name for path in found.values()))
        raise CheckpointError(f"{folder}: several variants, {named}, and it is unclear which one to use: keep only one")
    return found[known[0]] if known else next(iter(found.values()), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a diffusers folder. Raises CheckpointError."""
    try:
        value = read_any_json(path)
    except (OSError, TextError) as error:
        raise CheckpointError(f"{path}: cannot be read, but a diffusers folder needs it: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is wanted")
    return value
