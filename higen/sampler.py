"""The denoising loop: feed a solver's rows to a denoising stage, feed its outputs back. That is all there is to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from higen.schedule import SolverTable

__all__ = ["Runner", "Step", "denoise"]

COEFFICIENTS = ("A", "B", "C", "alpha", "sigma")


class Runner(Protocol):
    """What the loop needs of a backend (higen/backends/base.py)."""

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage on named tensors."""
        ...


@dataclass(frozen=True)
class Step:
    """State after step `index` (from 0) of `total`: `latents` x_t' and `previous`, the estimate of the clean latents.

    Both are [B, C, F, H, W] tensors of the backend's own kind.
    """

    stage: str
    index: int
    total: int
    t: int
    latents: Any
    previous: Any


def denoise(
    backend: Runner,
    stage: str,
    latents: NDArray[np.float32],
    table: SolverTable,
    guidance: float,
    **conditions: Any,
) -> Iterator[Step]:
    """Run every row of `table` on `latents` [B,C,F,H,W] (noise to begin with); yields the state after each step.

    `conditions` are the stage's other inputs: context, empty_context, frame_embedding and, for video, prior.
    """
    batch = latents.shape[0]
    x, previous = latents, np.zeros_like(latents)
    scale = np.full(batch, guidance, dtype=np.float32)
    for i in range(len(table)):
        t = np.full(batch, table.t[i], np.int64)
        row = {name: np.full(batch, getattr(table, name)[i], np.float32) for name in COEFFICIENTS}
        out = backend.run(stage, latents=x, previous=previous, t=t, **row, guidance=scale, **conditions)
        x, previous = out["latents"], out["previous"]
        yield Step(stage, i, len(table), int(table.t[i]), x, previous)
