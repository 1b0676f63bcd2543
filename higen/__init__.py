"""higen: hierarchical, spatio-temporally decoupled text-to-video generation (HiGen, CVPR 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from higen.version import __version__

if TYPE_CHECKING:
    from higen.api import generate, load
    from higen.bundle import Bundle
    from higen.curve_source import CurveFrom
    from higen.errors import HigenError
    from higen.events import Frames, Stream
    from higen.pipeline import Pipeline
    from higen.sampler import Step
    from higen.video import Video

__all__ = ["Bundle", "CurveFrom", "Frames", "HigenError", "Pipeline", "Step", "Stream", "Video", "__version__"]
__all__ += ["generate", "load"]

_HOME = {
    "Bundle": "higen.bundle",
    "CurveFrom": "higen.curve_source",
    "Frames": "higen.events",
    "HigenError": "higen.errors",
    "Pipeline": "higen.pipeline",
    "Step": "higen.sampler",
    "Stream": "higen.events",
    "Video": "higen.video",
    "generate": "higen.api",
    "load": "higen.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import higen` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'higen' has no attribute {name!r}")
    import importlib

    from higen.memory import enough_memory

    with enough_memory("import"):
        value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
