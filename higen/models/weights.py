"""Reads weights from a file into a module, and writes weights to a file, without a second copy of all in memory."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from higen.errors import CheckpointError, IntegrityError

__all__ = ["DTYPES", "Made", "Maker", "fill", "joined", "let_go", "unmade", "write_safetensors"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""The names of the dtypes in safetensors files."""

Maker = Callable[[Tensor], Tensor]

CHUNK = 256 * 2**20
"""A mapped file is reopened after this many bytes, because what was read stays in memory until the file is closed."""


class Made(Mapping[str, Tensor]):
    """Tensors, some of which are computed at each access, so that there is never a second copy of all in memory.

    source  tensors with the same names, shapes and dtypes
    makers  {name: function that computes the tensor from that of `source`}
    """

    def __init__(self, source: Mapping[str, Tensor], makers: Mapping[str, Maker]) -> None:
        self.source = source
        self.makers = makers

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.source[name]
        return self.makers[name](tensor) if name in self.makers else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def joined(state: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of both mappings, which have different names. Computed tensors are still computed at each access."""
    if isinstance(state, Made):
        return Made(joined(state.source, more), state.makers)
    return {**state, **more}


def let_go(tensor: Tensor) -> None:
    """Tell Linux that a tensor's memory is not needed soon. Pages mapped from a file leave memory until they are read
    again; other memory keeps its values. Without this, a file that is read from end to end stays in memory.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < mmap.PAGESIZE:
        return
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (storage.data_ptr() + storage.nbytes() - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _PAGEOUT)


_PAGEOUT = 21
"""MADV_PAGEOUT, available since Linux 5.4. Older versions return an error, and nothing changes."""


def unmade(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The source tensors, with the same names, shapes and dtypes. Nothing is computed."""
    return unmade(state.source) if isinstance(state, Made) else state


def fill(
    module: nn.Module,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None,
    device: torch.device,
    rename: Callable[[str], str] = lambda name: name,
    part: str = "",
    beside: tuple[str, ...] = (),
) -> None:
    """Give a module on the meta device the tensors of a safetensors file, in `dtype` (None: as stored), frozen.

    `rename` is applied to the names in the file and in the module before they are compared. A file may hold several
    networks: only names that begin with `part` and not with one of `beside` are used, without `part`. Raises
    IntegrityError for a file that cannot be read, and for missing, extra or wrongly shaped tensors, listing the first
    ten.
    """
    own = {rename(name): name for name in module.state_dict()}
    wanted = {rename(name): list(tensor.shape) for name, tensor in module.state_dict().items()}
    state: dict[str, Tensor] = {}
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(part)]  # noqa: SIM118 (it is no mapping)
            stored = {rename(name.removeprefix(part)): name for name in names if not name.startswith(beside)}
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
    """(name, tensor) for every entry of `names`, which is {name in the file: name}."""
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


def write_safetensors(
    path: Path, state: Mapping[str, Tensor], dtype: str, on_bytes: Callable[[int], None] = lambda size: None
) -> None:
    """Write tensors from any device as safetensors in `dtype`, one at a time. The library's own writer needs all of
    them at once, and raises its own type of error on a full disk.

    Raises CheckpointError for a tensor that is not floating-point or not finite, OSError.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in unmade(state).items():
        start, end = end, end + tensor.numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in state.items():
            on_bytes(_write_tensor(file, name, tensor, dtype))
            let_go(unmade(state)[name])


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor, dtype: str) -> int:
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} has the type {tensor.dtype}: weights are floating-point numbers")
    stored = tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
    if not stored.isfinite().all():
        if tensor.isfinite().all():
            raise CheckpointError(f"{name} has values too great for {dtype}: choose 'bf16' or 'fp32'")
        raise CheckpointError(f"{name} has values that are infinite or not a number: the checkpoint is damaged")
    return file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
