"""Model families: how a checkpoint becomes tables and weights, and how a stage becomes a PyTorch network.

A family is a package with two modules, found through the entry point group `higen.families` (the entry's name is the
family's, its value the package):

    network      open(manifest, weights) -> Networks      stage name -> torch.nn.Module
    checkpoint   recognise(path) -> bool                  whether a file or folder is one of this family's sources
                 convert(sources) -> Converted            tables and weights of a model directory

No runtime needs a family: graphs and engines run from the manifest's tables only. PyTorch is imported only with these
two modules. docs/families.md explains how to add a family.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from higen.errors import UnknownFamily
from higen.manifest import Manifest
from higen.stages import Stage, Tensor

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "FIRST",
    "Checkpoint",
    "Converted",
    "Network",
    "Networks",
    "Weights",
    "checkpoint",
    "installed",
    "network",
    "read_version_1",
    "upgraded_version_1",
    "version_1_inputs",
]

GROUP = "higen.families"

FIRST = "higen"
"""The only family of version 1 manifests, and the family of the files that `convert.convert` takes."""


@dataclass(frozen=True)
class Converted:
    """A model that a family has read from checkpoints.

    weights    {file of the model directory: {name: tensor}}; the tensors are cast and written one at a time
    texts      {file: its text}, such as tokenizer.json
    notes      lines for the user, such as licence terms and what was left out
    """

    manifest: Manifest
    weights: Mapping[str, Mapping[str, torch.Tensor]]
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Weights(Protocol):
    """The weights of a model directory, from which a family fills its networks."""

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which the networks compute; None: as stored."""
        ...

    def fill(
        self,
        module: nn.Module,
        file: str,
        dtype: torch.dtype | None = None,
        strip: str = "",
        part: str = "",
        beside: tuple[str, ...] = (),
    ) -> None:
        """Fill a module on the meta device with the equally named tensors of `file`, frozen, each in memory once.

        `dtype` overrides `self.dtype`. The prefix `strip` is removed from the names in the file and in the module. If
        the file holds several networks, the names of this one begin with `part` in the file, and the names of the
        others begin with one of `beside`. Raises IntegrityError for missing, extra or wrongly shaped tensors.
        """
        ...


class Networks(Protocol):
    """The networks of one opened model. Networks that several stages share are loaded once."""

    def module(self, stage: str) -> nn.Module:
        """A stage as a module that takes its inputs and returns its outputs in the table's order.

        Its parameters are named as in the weights file. If the module has the attribute `prefix` (a string), it stands
        before the file's names. Raises IntegrityError.
        """
        ...


class Network(Protocol):
    """A family's module `network`."""

    def open(self, manifest: Manifest, weights: Weights) -> Networks:
        """The networks of a model; nothing is loaded yet. Raises ManifestError for an architecture it cannot build."""
        ...


class Checkpoint(Protocol):
    """A family's module `checkpoint`."""

    def recognise(self, path: Path) -> bool:
        """Whether `path` is a source of this family. Reads names and headers only, no weights."""
        ...

    def convert(self, sources: Sequence[Path], **options: Any) -> Converted:
        """Tables and weights from checkpoints. Raises CheckpointError."""
        ...


@lru_cache(maxsize=1)
def _packages() -> dict[str, str]:
    # Listed here too, for higen in a folder that was never installed.
    names = (FIRST, "animatediff", "composed", "modelscope", "stable_diffusion", "svd")
    own = {name: f"{__name__}.{name}" for name in names}
    return own | {entry.name: entry.value for entry in importlib.metadata.entry_points(group=GROUP)}


def installed() -> tuple[str, ...]:
    """The names of the families that are installed here, sorted."""
    return tuple(sorted(_packages()))


def network(family: str) -> Network:
    """A family's networks. Raises UnknownFamily, MissingExtra."""
    return cast("Network", _module(family, "network"))


def checkpoint(family: str) -> Checkpoint:
    """A family's reader of checkpoints. Raises UnknownFamily, MissingExtra."""
    return cast("Checkpoint", _module(family, "checkpoint"))


def _module(family: str, name: str) -> object:
    package = _packages().get(family)
    if package is None:
        raise UnknownFamily(
            f"family={family!r}: not installed here; installed are {', '.join(installed())}. Graphs and engines of the "
            "model run without it"
        )
    return importlib.import_module(f"{package}.{name}")


def read_version_1(model: Mapping[str, Any]) -> Manifest:
    """The tables of a version 1 manifest, from its table `model`. Raises ManifestError."""
    from higen.families.higen.version_1 import read

    return read(model)


def upgraded_version_1(manifest: Manifest) -> Manifest:
    """The result of `read_version_1`, with the stages that version 1 did not have."""
    from higen.families.higen.version_1 import upgraded

    return upgraded(manifest)


def version_1_inputs(stage: Stage) -> tuple[Tensor, ...]:
    """The inputs of a stage's graph before version 2."""
    from higen.families.higen.version_1 import graph_inputs

    return graph_inputs(stage)
