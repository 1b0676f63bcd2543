"""The interface of backends, and a fake backend for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from higen.manifest import Manifest
from higen.stages import check_inputs

__all__ = ["CLOSED", "Backend", "Choice", "LoadsAhead", "RecordingBackend", "load_ahead", "stage_width"]

CLOSED = "the pipeline was closed: load the model again"
"""The message of the BackendError for a stage that is used after `close`."""


def stage_width(choices: Iterable[Choice]) -> int:
    """Characters of the column of stages in a list of choices."""
    return max((19, *(len(choice.stage) for choice in choices)))


@dataclass
class Choice:
    """The backend that runs a stage, and why each better backend was passed over.

    `details`: device and precision. `outside`: the choice for shapes that the stage's engine was not built for; None
    until such shapes occur.
    """

    stage: str
    backend: str
    passed_over: dict[str, str] = field(default_factory=dict)
    details: str = ""
    outside: Choice | None = None

    def as_lines(self, width: int, known: Sequence[str] = ()) -> list[str]:
        """Text for users: what runs the stage, a line for each backend passed over, then what runs other shapes.

        width  characters of the column of stages
        known  backends about which the reader knows already that they do not work here: they get no line
        """
        lines = [
            f"{self.stage:<{width}} {self._runs()}",
            *(f"{'':<{width}} not {name}: {why}" for name, why in self.passed_over.items() if name not in known),
        ]
        if self.outside is not None:
            reason = self.outside.passed_over.get(self.backend, "")
            lines.append(f"{'':<{width}} {self.outside._runs()} for other shapes: {reason}")
        return lines

    def _runs(self) -> str:
        return f"{self.backend} ({self.details})" if self.details else self.backend or "nothing"


@runtime_checkable
class Backend(Protocol):
    """Runs the stages of a model directory.

    Inputs are numpy arrays or results of an earlier `run` of the same backend. Results are opaque to the caller and may
    stay on the backend's device. Only `to_numpy` makes them readable.
    """

    @property
    def name(self) -> str:
        """The backend's name, for reports."""
        ...

    def prepare(self, stage: str) -> None:
        """Load what a stage needs. Without this call `run` does it. Raises BackendUnavailable or IntegrityError."""
        ...

    def choose(self, *stages: str) -> str:
        """Load one of several stages that serve the same purpose, and return its name.

        The preferred stage is given first. The first one that the best backend can run is taken. If none can be run,
        this raises what `prepare` raises.
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
        """A snapshot: the choice for each stage that was prepared so far."""
        ...

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor of this backend as a numpy array on the host."""
        ...

    def close(self) -> None:
        """Free what the backend holds. It cannot be used afterwards. Results on the host can still be read."""
        ...


@runtime_checkable
class LoadsAhead(Protocol):
    """A backend that can load stages in the background."""

    def load_ahead(self, ways: Sequence[tuple[str, ...]]) -> None:
        """Begin to load what `choose` will be called for, each entry being its arguments, and return at once.

        It is only a hint: nothing is raised, and an error of loading is raised by `choose`. `close` ends the loading.
        """
        ...


def load_ahead(backend: Backend, ways: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Call `load_ahead` of a backend that has it; returns `ways`."""
    if isinstance(backend, LoadsAhead):
        backend.load_ahead(ways)
    return ways


class RecordingBackend:
    """A backend without arithmetic, for tests: records each call and returns zeros in the shapes of the stage table."""

    name = "recording"

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.calls: list[tuple[str, dict[str, tuple[int, ...]]]] = []

    def prepare(self, stage: str) -> None:
        """Do nothing: there is nothing to load."""

    def choose(self, *stages: str) -> str:
        """The first of the stages."""
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
        """Empty: no device is used."""
        return ""

    @property
    def choices(self) -> Mapping[str, Choice]:
        """Every stage that was called."""
        return {stage: Choice(stage, self.name) for stage, _ in self.calls}

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """The array itself."""
        return np.asarray(tensor)

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
