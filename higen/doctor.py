"""What works here: python, packages, backends, the built-in model."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

from higen.api import default_model
from higen.backends.select import Availability, availability
from higen.bundle import Bundle
from higen.errors import HigenError
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
    "tensorrt",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True)
class Report:
    """What was found. `packages` maps a name to its version, None where it is not installed."""

    python: str
    system: str
    cpus: int
    packages: dict[str, str | None]
    backends: list[Availability]
    model: str

    @property
    def healthy(self) -> bool:
        """Whether a video can be made here with the built-in model."""
        return any(backend.works for backend in self.backends) and not self.model.startswith("broken")

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
        }

    def as_text(self) -> str:
        """The report for a person."""
        lines = [f"higen {__version__}, Python {self.python}, {self.system}, {self.cpus} CPUs", "", "packages"]
        lines += [f"  {name:<18}{version or '-'}" for name, version in self.packages.items()]
        lines += ["", "backends, the preferred first"]
        lines += [f"  {b.backend:<18}{'works' if b.works else 'no: ' + b.reason}" for b in self.backends]
        lines += ["", f"built-in model: {self.model}"]
        return "\n".join(lines)


def report() -> Report:
    """Look around; nothing heavy is imported."""
    return Report(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        packages={name: _version(name) for name in PACKAGES},
        backends=availability(),
        model=_model(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _model() -> str:
    try:
        bundle = Bundle.open(default_model())
        for name in bundle.files:
            bundle.file(name)
    except HigenError as error:
        return f"broken: {error}"
    size = sum(record.size for record in bundle.files.values())
    return f"{bundle.config.name}, {size / 1e6:.1f} MB, intact"
