"""What a graph was made from, written into it: an export that is taken up again knows the graphs that it need not make.

A graph gets into the model's folder by passing the parity gate only. So one that is whole and was made from the same
weights and tables, with the same options by the same programs, is finished.
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
    """The digest of all that a stage's graph depends on; its weights file is there."""
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
    """Whether the model has the stage's graph, whole, with this digest in it."""
    name = graph_file(stage, precision)
    if name not in bundle.files:
        return False
    try:
        found = ir.load(bundle.file(name)).metadata_props.get(KEY)
    except IntegrityError:
        return False
    return found == digest
