"""Records in a graph what it was made from, so that a resumed export can skip the graphs that are finished.

A graph enters the model's folder only after it has passed the parity gate. So a graph is finished if it is intact and
was made from the same weights and tables, with the same options, by the same versions of the programs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import onnxscript
import torch

from higen.bundle import Bundle, graph_file
from higen.errors import IntegrityError
from higen.typed_json import to_json
from higen.version import __version__

__all__ = ["enter", "is_finished", "origin"]

KEY = "higen.origin"
"""The entry of a graph's metadata that holds the digest."""


def origin(bundle: Bundle, stage: str, precision: str, opset: int, static: Mapping[str, int] | None) -> str:
    """The digest of everything that a stage's graph depends on. Its weights file must exist."""
    programs = [__version__, torch.__version__, onnxscript.__version__, ir.__version__]
    weights = bundle.files[bundle.weights(stage, precision)].sha256
    options = [stage, precision, opset, sorted((static or {}).items())]
    said = json.dumps([programs, to_json(bundle.manifest), weights, options], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def enter(graph: Path, digest: str) -> None:
    """Write a digest into a graph file."""
    model = ir.load(graph)
    model.metadata_props[KEY] = digest
    ir.save(model, graph)


def is_finished(bundle: Bundle, stage: str, precision: str, digest: str) -> bool:
    """Whether the model has an intact graph of the stage with this digest in it."""
    name = graph_file(stage, precision)
    if name not in bundle.files:
        return False
    try:
        found = ir.load(bundle.file(name)).metadata_props.get(KEY)
    except IntegrityError:
        return False
    return found == digest
