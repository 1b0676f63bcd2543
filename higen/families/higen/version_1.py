"""Version 1 manifests, which only described HiGen models: their table `model`, and the inputs of their graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from higen.families.higen import spec
from higen.manifest import Manifest
from higen.stages import Stage, Tensor

__all__ = ["graph_inputs", "read", "upgraded"]


def read(model: Mapping[str, Any]) -> Manifest:
    """The tables of a version 1 manifest, from its table `model`. Without plain stages: it has no graphs of them.

    Raises ManifestError with the key, its value and what is allowed.
    """
    return spec.manifest(spec.read_config(model, "model"), plain=False)


def upgraded(manifest: Manifest) -> Manifest:
    """The tables that `read` gives, with the plain stages."""
    return spec.manifest(spec.config(manifest))


def graph_inputs(stage: Stage) -> tuple[Tensor, ...]:
    """The inputs of a stage's graph before version 2: t was int64, and there was one guidance per sample."""
    old = {"t": Tensor("t", ("B",), "int64"), "guidance": Tensor("guidance", ("B",))}
    return tuple(old.get(t.name, t) if t.source == "state" else t for t in stage.inputs)
