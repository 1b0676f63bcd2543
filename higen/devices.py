"""Names of devices, checked in the same way for every backend."""

from __future__ import annotations

import re

from higen.errors import BackendUnavailable, UnknownDevice, quoted

__all__ = ["PLUGIN_DEVICES", "check_no_plugin", "check_present", "device_index", "device_named"]

PLUGIN_DEVICES = ("openvino", "webgpu")
"""Devices that only ONNX Runtime reaches, through a plugin (higen/backends/plugins.py)."""

ALLOWED = (
    "'auto', 'cpu', 'cuda', or a GPU by its number from 0: 'cuda:0', 'cuda:1', ...; "
    "through a plugin of ONNX Runtime 'openvino' or 'webgpu'"
)


def device_named(device: object) -> str | None:
    """A device in the form that backends take: "cpu", "cuda", "cuda:N", "openvino", "webgpu", or None for "auto" (a GPU
    if there is one, without the plugins).

    `device`: a text, or a torch.device; None is "auto". Raises UnknownDevice for anything else.
    """
    text = device
    if type(device).__module__ == "torch" and type(device).__name__ == "device":  # does not import torch
        text = str(device)
    if text is None or (isinstance(text, str) and text == "auto"):
        return None
    if not isinstance(text, str) or not re.fullmatch(
        f"cpu(:0)?|cuda(:(0|[1-9][0-9]{{0,2}}))?|{'|'.join(PLUGIN_DEVICES)}", text
    ):
        raise UnknownDevice(f"device={quoted(device)}: {ALLOWED}")
    return "cpu" if text == "cpu:0" else str(text)


def device_index(device: str | None) -> int:
    """The GPU number in "cuda" or "cuda:N"; None: the first GPU."""
    return int((device or "").partition(":")[2] or 0)


def check_present(device: str, count: int) -> None:
    """Raise BackendUnavailable if "cuda:N" names none of the `count` GPUs of this machine."""
    if device_index(device) >= count:
        here = (
            "is no GPU" if not count else "is 1 GPU, 'cuda:0'" if count == 1 else f"are {count} GPUs, from 'cuda:0' on"
        )
        raise BackendUnavailable(f"device={device!r}: there {here}")


def check_no_plugin(device: str | None, backend: str) -> None:
    """Raise BackendUnavailable if a device is one that the backend cannot reach."""
    if device in PLUGIN_DEVICES:
        raise BackendUnavailable(f"device={device!r}: {backend} does not run there; ONNX Runtime does (backend='onnx')")
