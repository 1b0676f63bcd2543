"""What works here: python, packages, backends, a model, and what runs each of its stages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from higen.api import default_model
from higen.backends.select import Availability, Choice, Options, availability, select_backend
from higen.bundle import Bundle
from higen.errors import FallbackWarning, HigenError
from higen.stages import STAGES
from higen.version import __version__

__all__ = ["Report", "report"]

PACKAGES = (
    "numpy",
    "av",
    "pillow",
    "tokenizers",
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True)
class Report:
    """What was found. `packages` maps a name to its version, None where it is not installed.

    `stages`: what runs each stage of the model, and why the better ways do not; a stage that nothing can run has the
    backend "". `notes` say what to repair.
    """

    python: str
    system: str
    cpus: int
    packages: dict[str, str | None]
    backends: list[Availability]
    model: str
    intact: bool
    stages: list[Choice]
    notes: list[str]

    @property
    def healthy(self) -> bool:
        """Whether a video can be made here with the model."""
        return self.intact and any(b.works for b in self.backends) and all(choice.backend for choice in self.stages)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        backends = {b.backend: {"works": b.works, "reason": b.reason} for b in self.backends}
        return {
            "higen": __version__,
            "healthy": self.healthy,
            "python": self.python,
            "system": self.system,
            "cpus": self.cpus,
            "packages": self.packages,
            "backends": backends,
            "model": self.model,
            "stages": [asdict(choice) for choice in self.stages],
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """The report for a person."""
        lines = [f"higen {__version__}, Python {self.python}, {self.system}, {self.cpus} CPUs", "", "packages"]
        lines += [f"  {name:<25}{version or '-'}" for name, version in self.packages.items()]
        lines += ["", "backends, the preferred first"]
        lines += [f"  {b.backend:<25}{'works' if b.works else 'no: ' + b.reason}" for b in self.backends]
        if self.stages:
            lines += ["", "stages of the model"]
        for choice in self.stages:
            lines += [f"  {line}" for line in choice.as_lines()]
        lines += ["", *(f"note: {note}" for note in self.notes), f"{self.model}"]
        return "\n".join(lines)


def report(model: Path | None = None) -> Report:
    """Look around, and load every stage of a model (None: the built-in one) to see what runs it."""
    described, intact = _model(default_model() if model is None else model)
    name = "built-in model" if model is None else str(model)
    return Report(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        packages={name: _version(name) for name in PACKAGES},
        backends=availability(),
        model=f"{name}: {described}",
        intact=intact,
        stages=list(_stages(default_model() if model is None else model)) if intact else [],
        notes=_notes(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _notes() -> list[str]:
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        return [
            "onnxruntime and onnxruntime-gpu are both installed and own the same files, so which one runs is chance: "
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install the one you want"
        ]
    return []


def _model(path: Path) -> tuple[str, bool]:
    try:
        bundle = Bundle.open(path)
        for name in bundle.files:
            bundle.file(name)
    except HigenError as error:
        return f"broken: {error}", False
    size = sum(record.size for record in bundle.files.values())
    return f"{bundle.config.name}, {size / 1e6:.1f} MB, intact", True


def _stages(path: Path) -> Iterator[Choice]:
    try:
        router = select_backend(Bundle.open(path), options=Options(verify=False))
    except HigenError:
        return  # the list of backends says why
    for stage in STAGES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)  # the choice says it
                router.prepare(stage)
        except HigenError as error:
            yield Choice(stage, "", {"any": str(error)})
        else:
            yield router.choices[stage]
    router.close()
