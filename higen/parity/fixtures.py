"""Reads fixture directories: JSON records, tensors by case, and weights that are stored or made by the recipe.

Any fault of a directory raises a FixtureError that names the file and the fault.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from higen.errors import FixtureError, HigenError
from higen.families.higen.reference_names import config_from_reference, from_reference, reference_names
from higen.families.higen.spec import UNetConfig
from higen.families.higen.unet import Denoiser
from higen.text_files import TextError
from higen.text_files import read_json as read_any_json

__all__ = [
    "CaseTensors",
    "assemble",
    "entry",
    "mapping",
    "read_json",
    "recipe_salt",
    "recipe_state",
    "recipe_tensor",
    "recorded_config",
    "stored_state",
    "take",
]

T = TypeVar("T")

CHUNK = 1 << 20
"""How many random numbers are drawn at a time. It affects the memory needed, not the numbers."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FixtureError if the file is missing, not JSON or not an object."""
    try:
        value = read_any_json(path)
    except (OSError, TextError) as error:
        raise FixtureError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FixtureError(f"{path}: a JSON object is wanted, not a {type(value).__name__}")
    return value


def entry(record: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """`record[key]` of type `kind`; an int is accepted as a float. Raises FixtureError."""
    value = record.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, kind) or isinstance(value, bool) or not finite:
        raise FixtureError(f"{where}: {key}={value!r}: {kind.__name__} is wanted")
    return value


def mapping(record: Mapping[str, Any], key: str, where: str) -> dict[str, dict[str, Any]]:
    """`record[key]` as a mapping of mappings; empty if the key is absent. Raises FixtureError."""
    value = record.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        raise FixtureError(f"{where}: {key} is not an object of objects")
    return value


class CaseTensors:
    """The tensors of a safetensors file, grouped by the part of their names before the first "/".

    Only the header is read at first. Raises FixtureError for a missing, truncated or otherwise broken file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[str, list[str]] = {}
        with _reading(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                self._names.setdefault(name.partition("/")[0], []).append(name)

    @property
    def cases(self) -> set[str]:
        """The names of all groups."""
        return set(self._names)

    def read(self, case: str) -> dict[str, Tensor]:
        """The tensors of one group, by the part of their names after the first "/" (without a "/", the whole name)."""
        if case not in self._names:
            raise FixtureError(f"{self.path}: no tensors of {case}")
        with _reading(self.path), safe_open(self.path, framework="pt") as file:
            return {name.partition("/")[2] or name: file.get_tensor(name) for name in self._names[case]}

    def read_all(self) -> dict[str, Tensor]:
        """All tensors by their full names."""
        with _reading(self.path):
            return load_file(self.path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any error of reading `path` into a FixtureError."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise FixtureError(f"{path}: not readable as safetensors: {error}") from error


def take(tensors: dict[str, Tensor], where: str, *names: str) -> tuple[Tensor, ...]:
    """The named tensors, which are removed from `tensors`. The case must check the remaining ones."""
    if missing := [name for name in names if name not in tensors]:
        raise FixtureError(f"{where}: no tensor {', '.join(missing)}; there are {', '.join(sorted(tensors))}")
    return tuple(tensors.pop(name) for name in names)


def recipe_salt(recipe: str, where: str) -> int:
    """The salt in the text of a recipe: "oracle.fill_tensor(key, salt=4660)" or "... salt=0x1234 ..."."""
    found = re.search(r"salt\s*=\s*(0[xX][0-9a-fA-F]+|\d+)", recipe)
    if not found or not 0 <= (salt := int(found[1], 16 if found[1][:2] in ("0x", "0X") else 10)) < 2**32:
        raise FixtureError(f"{where}: {recipe!r}: a recipe with salt=N, N from 0 to 2^32 - 1, is wanted")
    return salt


def recipe_tensor(key: str, shape: Iterable[int], salt: int) -> Tensor:
    """The recipe's weights for the reference's parameter `key`, float32 in `shape` (the weight recipe of its fixtures).

    u = RandomState(crc32(key) ^ salt).random_sample(n); z = (2u - 1) sqrt 3; a one-dimensional weight is 1 + z/10, a
    bias z/10, tokens z/2, all others z / sqrt(fan_in). fan_in is the product of all axes but the first; axes of
    length 1 that higen's shapes drop do not change it. Computed in float64, rounded once.
    """
    size = tuple(shape)
    stream = np.random.RandomState(zlib.crc32(key.encode()) ^ salt)
    values = np.empty(math.prod(size), dtype=np.float32)
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        z = (2.0 * stream.random_sample(len(part)) - 1.0) * np.sqrt(3.0)
        if key.endswith("tokens"):
            part[:] = 0.5 * z
        elif len(size) > 1:
            part[:] = z / np.sqrt(math.prod(size[1:]))
        else:
            part[:] = 1.0 + 0.1 * z if key.endswith("weight") else 0.1 * z
    return torch.from_numpy(values).reshape(size)


def recipe_state(config: UNetConfig, salt: int) -> Iterator[tuple[str, Tensor]]:
    """(higen's name, tensor) for every parameter, made by the recipe one after the other."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Denoiser(config).state_dict().items()}
    for ours, theirs in reference_names(config).items():
        yield ours, recipe_tensor(theirs, shapes[ours], salt)


def stored_state(path: Path, config: UNetConfig) -> dict[str, Tensor]:
    """The reference's weights in `path` under higen's names. Raises FixtureError if they do not fit `config`."""
    with _reading(path):
        state = load_file(path)
    try:
        return from_reference(state, config)
    except HigenError as error:
        raise FixtureError(f"{path}: {error}") from error


def recorded_config(kwargs: Mapping[str, object], where: str) -> UNetConfig:
    """The configuration for the reference constructor's recorded arguments. Raises FixtureError."""
    try:
        return config_from_reference(kwargs)
    except (HigenError, KeyError, TypeError, ValueError) as error:
        raise FixtureError(f"{where}: kwargs do not describe a network: {type(error).__name__}: {error}") from error


def assemble(config: UNetConfig, state: Iterable[tuple[str, Tensor]]) -> Denoiser:
    """The denoiser with these tensors (not copies), in evaluation mode, with gradients enabled."""
    with torch.device("meta"):
        denoiser = Denoiser(config)
    denoiser.load_state_dict(dict(state), assign=True)
    return denoiser.eval()
