"""A composed model's stages as PyTorch modules, built by the families of its two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from higen import families
from higen.errors import ManifestError
from higen.families import Networks, Weights
from higen.families.composed import spec
from higen.manifest import Manifest

__all__ = ["ComposedNetworks", "open"]


def open(manifest: Manifest, weights: Weights) -> ComposedNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of both models; nothing is loaded yet. Raises ManifestError, UnknownFamily."""
    return ComposedNetworks(manifest, weights)


class ComposedNetworks:
    """Builds each stage with the family of the model that it comes from, under its name in that model."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._stages: dict[str, tuple[Networks, str]] = {}
        made_of = spec.architecture(manifest)
        for part in (made_of.first, made_of.second):
            own = _as_here(manifest, spec.part_manifest(part), part.stages)
            networks = families.network(own.family).open(own, _PartWeights(weights, part.weights))
            for name, here in part.stages.items():  # a stage, then its variants
                same = zip(_named(manifest, here), _named(own, name), strict=True)
                self._stages |= {one: (networks, theirs) for one, theirs in same}

    def module(self, stage: str) -> nn.Module:
        """A stage as a module. Raises ManifestError, IntegrityError."""
        if stage not in self._stages:
            raise ManifestError(f"stages.{stage}: {spec.FAMILY} has {', '.join(self._stages)}")
        networks, name = self._stages[stage]
        return networks.module(name)


def _as_here(manifest: Manifest, own: Manifest, names: Mapping[str, str]) -> Manifest:
    """One of the two models, with the variants of its stages that the composed model has."""
    rows = (replace(row, deep=manifest.stage(names[row.name]).deep) if row.name in names else row for row in own.stages)
    return replace(own, stages=tuple(rows))


def _named(manifest: Manifest, name: str) -> list[str]:
    """The names of a stage and its variants."""
    stage = manifest.stage(name)
    return [one.name for one in (stage, *stage.variants)]


class _PartWeights:
    """The weights of one of the two models, under its own file names (`families.Weights`)."""

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights = weights
        self._names = names

    @property
    def device(self) -> torch.device:
        return self._weights.device

    @property
    def dtype(self) -> torch.dtype | None:
        return self._weights.dtype

    def fill(
        self,
        module: nn.Module,
        file: str,
        dtype: torch.dtype | None = None,
        strip: str = "",
        part: str = "",
        beside: tuple[str, ...] = (),
    ) -> None:
        """See `families.Weights`."""
        self._weights.fill(module, self._names.get(file, file), dtype, strip, part, beside)
