"""Manifests of version 1 described HiGen models alone: their table `model`, and the inputs of their graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from higen.families.higen import spec
from higen.manifest import Manifest
from higen.stages import Stage, Tensor

__all__ = ["graph_inputs", "read", "upgraded"]


def read(model: Mapping[str, Any]) -> Manifest:
    """The tables of a manifest of version 1, whose `model` is given: no plain stages, for it has no graphs of them.

    Raises ManifestError naming the key, its value and what is allowed.
    """
    return spec.manifest(spec.read_config(model, "model"), plain=False)


def upgraded(manifest: Manifest) -> Manifest:
    """The tables that `read` gives, with the plain stages."""
    return spec.manifest(spec.config(manifest))


def graph_inputs(stage: Stage) -> tuple[Tensor, ...]:
    """What a stage's graph took before version 2: t as int64, one guidance a sample."""
    old = {"t": Tensor("t", ("B",), "int64"), "guidance": Tensor("guidance", ("B",))}
    return tuple(old.get(t.name, t) if t.source == "state" else t for t in stage.inputs)
