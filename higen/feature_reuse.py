"""Feature reuse in the denoising loop (Ma et al. 2024, DeepCache).

What the deep part of a U-Net computes changes little from one step to the next. A full step keeps the features that
enter the network's last block from below; the steps behind it, shallow ones, compute the rest of the network alone and
take these features as they are (`Stage.variants`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from higen.stages import DEEP, Stage

__all__ = ["FeatureReuse", "Runner"]


class Runner(Protocol):
    """What the loop needs of a backend (higen/backends/base.py)."""

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage on named tensors."""
        ...

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor as a numpy array on the host."""
        ...


class FeatureReuse:
    """A backend for one loop: it keeps the deep features of full steps, and hands them to the shallow ones.

    A step on windows or tiles is one run for each of them, in the same order in every row: each has its own features.
    """

    def __init__(self, backend: Runner, every: int) -> None:
        """`every` so many rows there is a full step."""
        self._backend = backend
        self._every = every
        self._kind = ""
        self._shallow = False
        self._kept: list[Any] = []
        self._part = 0

    def step(self, stage: Stage, row: int) -> Stage:
        """The variant of a stage that does a row of the loop, counted from the first one that runs; the rows are asked
        for in order. The features of a guided step are not those of a plain one, so the first row behind a change
        between the two is a full step.
        """
        self._shallow = row % self._every != 0 and stage.name == self._kind
        self._kind, self._part = stage.name, 0
        full, shallow = stage.variants
        return shallow if self._shallow else full

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a step on the whole clip, or on its next window or tile; the outputs are without the features."""
        if self._shallow:
            tensors[DEEP] = self._kept[self._part]
        outputs = dict(self._backend.run(stage, **tensors))
        if not self._shallow:
            self._kept[self._part :] = [outputs.pop(DEEP)]
        self._part += 1
        return outputs

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor as a numpy array on the host."""
        return self._backend.to_numpy(tensor)
