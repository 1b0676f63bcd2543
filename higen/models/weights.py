"""Weights from a file into a module, with never a second copy of all of them in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from higen.errors import IntegrityError

__all__ = ["fill"]

CHUNK = 256 * 2**20
"""Bytes read between two openings of a file: what was read of a mapped file stays in memory until it is closed."""


def fill(
    module: nn.Module,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None,
    device: torch.device,
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Give a module on the meta device the tensors of a safetensors file, in `dtype` (None: as stored), frozen.

    `rename` is applied to both sides' names before they are compared. Raises IntegrityError for a file that cannot be
    read, and for missing, extra or wrongly shaped tensors with the first ten of them.
    """
    own = {rename(name): name for name in module.state_dict()}
    wanted = {rename(name): list(tensor.shape) for name, tensor in module.state_dict().items()}
    state: dict[str, Tensor] = {}
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            stored = {rename(name): name for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            _check(path, {name: list(file.get_slice(theirs).get_shape()) for name, theirs in stored.items()}, wanted)
        for name, tensor in _tensors(path, {stored[name]: name for name in wanted}, device):
            state[own[name]] = tensor.to(dtype or tensor.dtype)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{os.fspath(path)}: cannot be read as safetensors: {error}") from error
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)


def _tensors(
    path: str | os.PathLike[str], names: Mapping[str, str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every entry of `names` (name in the file: name)."""
    remaining = list(names.items())
    while remaining:
        read = 0
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            while remaining and read < CHUNK:
                theirs, name = remaining.pop(0)
                tensor = file.get_tensor(theirs)
                read += tensor.nbytes
                yield name, tensor


def _check(path: str | os.PathLike[str], given: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> None:
    problems = [f"missing {name} {wanted[name]}" for name in wanted if name not in given]
    problems += [f"extra {name} {given[name]}" for name in sorted(given) if name not in wanted]
    problems += [f"{name} is {given[name]}, wanted {w}" for name, w in wanted.items() if given.get(name, w) != w]
    if problems:
        listed = "\n  ".join(problems[:10])
        raise IntegrityError(
            f"{os.fspath(path)}: {len(problems)} tensors do not fit the manifest, the first of them:\n  {listed}"
        )
