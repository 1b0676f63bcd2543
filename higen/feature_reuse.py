"""Feature reuse in the denoising loop (Ma et al. 2024, DeepCache).

The output of a U-Net's deep part changes little from one step to the next. A full step keeps the features that enter
the network's last block from below. The shallow steps after it reuse these features and compute only the rest of the
network (`Stage.variants`).
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
    """A backend for one loop: it keeps the deep features of full steps and gives them to the shallow steps.

    A step on windows or tiles is one run per window or tile, always in the same order. Each has its own features.
    """

    def __init__(self, backend: Runner, every: int) -> None:
        """`every`: one row in this many is a full step."""
        self._backend = backend
        self._every = every
        self._kind = ""
        self._shallow = False
        self._kept: list[Any] = []
        self._part = 0

    def step(self, stage: Stage, row: int) -> Stage:
        """The variant of a stage, full or shallow, for a row of the loop. Row 0 is the first row that runs. Call this
        for the rows in order. Guided and plain steps have different features, so the first row after a change between
        them is a full step.
        """
        self._shallow = row % self._every != 0 and stage.name == self._kind
        self._kind, self._part = stage.name, 0
        full, shallow = stage.variants
        return shallow if self._shallow else full

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a step on the whole clip, or on its next window or tile. The result does not include the features."""
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
