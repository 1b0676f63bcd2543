"""Inputs of graphs and engines made before manifest version 2: integer timesteps, and one guidance per sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.stages import Tensor

__all__ = ["as_before", "is_older"]


def is_older(tensor: Tensor, dtype: str, axes: int) -> bool:
    """Whether an input of a denoising stage, with this dtype and number of axes, has the form before version 2."""
    if tensor.source != "state":
        return False
    return (tensor.name == "t" and dtype == "int64") or (tensor.name == "guidance" and axes == 1)


def as_before(value: NDArray[Any]) -> NDArray[Any] | None:
    """`t` [B] as int64, or `guidance` [B, f] as [B].

    None if a timestep is not an integer, or if guidance differs between frames.
    """
    if value.ndim == 2 and np.all(value == value[:, :1]):
        return np.ascontiguousarray(value[:, 0])
    if value.ndim == 1 and np.all(value == np.floor(value)):
        return value.astype(np.int64)
    return None
