"""The backend seam, and a fake for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from higen.config import ModelConfig
from higen.stages import STAGES, check_inputs, dimensions

__all__ = ["Backend", "RecordingBackend"]


@runtime_checkable
class Backend(Protocol):
    """Runs stages (higen/stages.py).

    Tensors may be numpy arrays or what an earlier `run` of the same backend returned; results are opaque to the caller
    and may stay on the backend's device. `to_numpy` is the only way out.
    """

    @property
    def name(self) -> str:
        """The backend's name, for reports."""
        ...

    def prepare(self, stage: str) -> None:
        """Load what a stage needs; `run` does it otherwise. Raises BackendUnavailable or IntegrityError."""
        ...

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; raises BackendError for wrong names, dtypes or shapes."""
        ...

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor of this backend as a numpy array on the host."""
        ...

    def close(self) -> None:
        """Free what the backend holds. It cannot be used afterwards."""
        ...


class RecordingBackend:
    """A backend without arithmetic, for tests: records each call and returns zeros in the shapes of the stage table."""

    name = "recording"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.calls: list[tuple[str, dict[str, tuple[int, ...]]]] = []

    def prepare(self, stage: str) -> None:
        """Nothing to load."""

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Check the inputs against the table, record their shapes, return zeros."""
        spec = STAGES[stage]
        sizes = check_inputs(spec, tensors, dimensions(self.config))
        factor = self.config.autoencoder.factor
        for latent, pixel in (("H", "Y"), ("W", "X")):
            if latent in sizes:
                sizes.setdefault(pixel, sizes[latent] * factor)
            elif pixel in sizes:
                sizes[latent] = sizes[pixel] // factor
        self.calls.append((stage, {name: tuple(value.shape) for name, value in tensors.items()}))
        return {
            out.name: np.zeros([n if isinstance(n, int) else sizes[n] for n in out.shape], out.dtype)
            for out in spec.outputs
        }

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """The array itself."""
        return np.asarray(tensor)

    def close(self) -> None:
        """Nothing to free."""
