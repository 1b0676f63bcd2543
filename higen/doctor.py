"""Checks an installation: Python, packages, backends, a model, and which backend runs each of its stages."""

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
from higen.backends.base import Choice, stage_width
from higen.backends.options import Options
from higen.backends.select import Availability, availability, select_backend
from higen.bundle import Bundle
from higen.cpu import has_bf16, int8_products
from higen.errors import FallbackWarning, HigenError
from higen.tables import Loop
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
    "onnxruntime-ep-webgpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True)
class LoopGraphs:
    """The precisions in which a loop's steps have a graph.

    guided  steps with both branches of guidance; None: the loop has no such stage
    plain   steps with one branch; None: the loop has no such stage
    """

    loop: str
    guided: tuple[str, ...] | None
    plain: tuple[str, ...] | None

    def as_line(self) -> str:
        """One line of the text report."""
        words = [
            f"{name}: {', '.join(found) or 'no graph'}"
            for name, found in (("guided", self.guided), ("plain", self.plain))
            if found is not None
        ]
        return f"{self.loop:<20}{'; '.join(words)}"


@dataclass(frozen=True)
class Report:
    """The result of the check. `packages` maps a name to its version, None if it is not installed.

    `int8`: how this processor multiplies 8-bit integers; `bf16`: whether it can multiply bfloat16, if known.
    `devices`: whether each device that ONNX Runtime reaches through a plugin was found, and if not, why.

    `stages`: the backend that runs each stage of the model, and why no better backend does; "" if no backend can run
    it. A step with one branch of guidance is left out if it has no graph, because the step with both branches replaces
    it. `loops`: the graphs of each loop. `notes`: what to repair.
    """

    python: str
    system: str
    cpus: int
    int8: str
    bf16: bool | None
    packages: dict[str, str | None]
    backends: list[Availability]
    devices: list[Availability]
    model: str
    intact: bool
    stages: list[Choice]
    loops: list[LoopGraphs]
    notes: list[str]

    @property
    def healthy(self) -> bool:
        """Whether the model can make a video on this machine."""
        return self.intact and any(b.works for b in self.backends) and all(choice.backend for choice in self.stages)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        backends = {b.backend: {"works": b.works, "reason": b.reason} for b in self.backends}
        devices = {d.backend: {"found": d.works, "reason": d.reason} for d in self.devices}
        return {
            "higen": __version__,
            "healthy": self.healthy,
            "python": self.python,
            "system": self.system,
            "cpus": self.cpus,
            "int8": self.int8,
            "bf16": self.bf16,
            "packages": self.packages,
            "backends": backends,
            "devices": devices,
            "model": self.model,
            "stages": [asdict(choice) for choice in self.stages],
            "loops": [asdict(loop) for loop in self.loops],
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """The report as text."""
        lines = [f"higen {__version__}, Python {self.python}, {self.system}, {self.cpus} CPUs"]
        lines += [f"8-bit integers: {self.int8} products"]
        lines += ["bfloat16 is computed in float32, many times slower"] if self.bf16 is False else []
        lines += ["", "packages"]
        lines += [f"  {name:<25}{version or '-'}" for name, version in self.packages.items()]
        lines += ["", "backends, in order of preference"]
        lines += [f"  {b.backend:<25}{'works' if b.works else 'no: ' + b.reason}" for b in self.backends]
        lines += ["", "devices through plugins of ONNX Runtime"] if self.devices else []
        lines += [f"  {d.backend:<25}{'found' if d.works else 'no: ' + d.reason}" for d in self.devices]
        if self.stages:
            lines += ["", "stages of the model"]
        width = stage_width(self.stages)
        broken = [b.backend for b in self.backends if not b.works]  # listed above, with the reason
        for choice in self.stages:
            lines += [f"  {line}" for line in choice.as_lines(width, broken if choice.backend else ())]
        if self.loops:
            lines += ["", "graphs of the loops' steps"]
        lines += [f"  {loop.as_line()}" for loop in self.loops]
        lines += ["", *(f"note: {note}" for note in self.notes), f"{self.model}"]
        return "\n".join(lines)


def report(model: Path | None = None) -> Report:
    """Check the installation, and load every stage of a model (None: the built-in one) to see which backend runs it."""
    path = default_model() if model is None else model
    described, bundle = _model(path)
    name = "built-in model" if model is None else str(model)
    return Report(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        int8=int8_products(),
        bf16=has_bf16(),
        packages={name: _version(name) for name in PACKAGES},
        backends=availability(),
        devices=list(_devices()),
        model=f"{name}: {described}",
        intact=bundle is not None,
        stages=list(_stages(bundle)) if bundle is not None else [],
        loops=[_graphs(bundle, loop) for loop in bundle.manifest.loops] if bundle is not None else [],
        notes=[*_notes(), *(_missing(bundle) if bundle is not None else [])],
    )


def _devices() -> Iterator[Availability]:
    try:
        from higen.backends.plugins import PLUGINS
    except ImportError:
        return  # without ONNX Runtime; the list of backends says so
    for plugin in PLUGINS.values():
        try:
            plugin.ep_device()
        except HigenError as error:
            yield Availability(plugin.device, False, str(error))
        else:
            yield Availability(plugin.device, True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _notes() -> list[str]:
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        return [
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install the one you want"
        ]
    return []


def _model(path: Path) -> tuple[str, Bundle | None]:
    """A line about a model for the report, and the model itself if it is intact."""
    try:
        bundle = Bundle.open(path)
        for name in bundle.files:
            bundle.file(name)
    except HigenError as error:
        return f"broken: {error}", None
    size = sum(record.size for record in bundle.files.values())
    return f"{bundle.manifest.name}, {size / 1e6:.1f} MB, intact", bundle


def _graphs(bundle: Bundle, loop: Loop) -> LoopGraphs:
    found = {name: bundle.precisions(name) for name in loop.stages}
    return LoopGraphs(
        loop.name,
        None if loop.guided is None else found[loop.guided],
        None if loop.plain is None else found[loop.plain],
    )


def _idle(bundle: Bundle) -> list[str]:
    """The steps with one branch of guidance that have no graph and are replaced by the graph of the step with both
    branches.
    """
    return [
        plain
        for loop in bundle.manifest.loops
        for guided, plain in loop.pairs
        if plain is not None and guided is not None and bundle.precisions(guided) and not bundle.precisions(plain)
    ]


def _missing(bundle: Bundle) -> list[str]:
    """Notes on missing graphs that would halve the work at guidance 1."""
    if bundle.version == 1:
        return [
            f"the manifest is of version 1; version 2 describes the model in more detail: higen upgrade {bundle.path}"
        ]
    if not (idle := _idle(bundle)):
        return []
    options = " ".join(f"--stage {name}" for name in idle)
    return [
        f"no graph of {', '.join(idle)}, so a step costs as much at guidance 1 as at any other: "
        f"higen-export onnx {bundle.path} {options}"
    ]


def _stages(bundle: Bundle) -> Iterator[Choice]:
    try:
        router = select_backend(bundle, options=Options(verify=False))
    except HigenError:
        return  # the report's list of backends says why
    idle = _idle(bundle)
    for stage in (name for name in bundle.manifest.stage_names if name not in idle):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)  # the choice contains the reason
                router.prepare(stage)
        except HigenError as error:
            yield Choice(stage, "", {"any": str(error)})
        else:
            yield router.choices[stage]
    router.close()
