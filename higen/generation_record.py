"""The metadata that records how a video was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from higen.manifest import Manifest
from higen.plain_values import plain
from higen.request import Request
from higen.tables import VISUAL
from higen.version import __version__

__all__ = ["generation_record"]


def generation_record(
    manifest: Manifest, request: Request, index: int, seconds: Mapping[str, float], backend: str
) -> dict[str, Any]:
    """The metadata of the video of prompt `index`, in JSON's types. For known frames, it has only their indices."""
    shown = [control.name for control in manifest.controls if control.kind not in VISUAL]
    frames = [control.name for control in manifest.controls if control.kind == "frames"]
    return {
        "prompt": request.prompts[index],
        "negative_prompt": request.negative_prompt,
        "seed": request.seeds[index],
        "steps": list(request.steps),
        "guidance": list(request.guidance),
        "solver": request.solvers[0] if len(set(request.solvers)) == 1 else list(request.solvers),
        **{name: plain(request.controls[name]) for name in shown},
        **{name: list(request.controls[name][index].places) for name in frames if request.controls[name]},
        **request.settings.as_metadata(),
        "model": manifest.name,
        "licence": manifest.licence,
        "versions": {"higen": __version__, "backend": backend},
        "seconds": dict(seconds),
    }
