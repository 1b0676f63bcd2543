"""The interface of backends, and a fake backend for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from higen.manifest import Manifest
from higen.stages import check_inputs

__all__ = ["CLOSED", "Backend", "Choice", "RecordingBackend"]

CLOSED = "the pipeline was closed: load the model again"
"""What a BackendError says of a stage that is asked for after `close`."""


@dataclass
class Choice:
    """What runs a stage, and the reason why each better backend was passed over. `details`: device and precision.

    `outside`: what ran it for shapes that its engine was not built for, once there were any.
    """

    stage: str
    backend: str
    passed_over: dict[str, str] = field(default_factory=dict)
    details: str = ""
    outside: Choice | None = None

    def as_lines(self) -> list[str]:
        """For a person: what runs the stage, then a line for each way passed over; the same for shapes outside."""
        lines = [
            f"{self.stage:<19} {self._runs()}",
            *(f"{'':<20}not {name}: {reason}" for name, reason in self.passed_over.items()),
        ]
        if self.outside is not None:
            reason = self.outside.passed_over.get(self.backend, "")
            lines.append(f"{'':<20}{self.outside._runs()} for other shapes: {reason}")
        return lines

    def _runs(self) -> str:
        return f"{self.backend} ({self.details})" if self.details else self.backend or "nothing"


@runtime_checkable
class Backend(Protocol):
    """Runs the stages of a model directory.

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

    def choose(self, *stages: str) -> str:
        """Load one of several stages that serve the same purpose, the preferred one first, and return its name: the
        first that the best backend can run. Raises what `prepare` raises where none can be run.
        """
        ...

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; raises BackendError for wrong names, dtypes or shapes."""
        ...

    def describe(self, stage: str) -> str:
        """Where and in what precision a prepared stage runs: "cpu, fp32"."""
        ...

    @property
    def choices(self) -> Mapping[str, Choice]:
        """What runs each stage that was prepared so far: a snapshot."""
        ...

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor of this backend as a numpy array on the host."""
        ...

    def close(self) -> None:
        """Free what the backend holds. It cannot be used afterwards; results that are there can still be read."""
        ...


class RecordingBackend:
    """A backend without arithmetic, for tests: records each call and returns zeros in the shapes of the stage table."""

    name = "recording"

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.calls: list[tuple[str, dict[str, tuple[int, ...]]]] = []

    def prepare(self, stage: str) -> None:
        """Nothing to load."""

    def choose(self, *stages: str) -> str:
        """The first one."""
        return stages[0]

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Check the inputs against the table, record their shapes, return zeros."""
        spec = self.manifest.stage(stage)
        sizes = check_inputs(spec, tensors, self.manifest.fixed)
        factor = self.manifest.sizes.factor
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

    def describe(self, stage: str) -> str:
        """Nowhere."""
        return ""

    @property
    def choices(self) -> Mapping[str, Choice]:
        """Every stage that was called."""
        return {stage: Choice(stage, self.name) for stage, _ in self.calls}

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """The array itself."""
        return np.asarray(tensor)

    def close(self) -> None:
        """Nothing to free."""
