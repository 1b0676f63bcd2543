"""Finds the external-data files of an ONNX graph from the graph's bytes, without the package onnx.

A runtime would load any file that a graph names. Only files in the manifest have been checked by their sha256.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from higen.bundle import MANIFEST, Bundle
from higen.errors import IntegrityError, quoted

__all__ = ["external_files", "graph_files"]

_Fields = Mapping[int, "_Fields | None"]

_TENSOR: _Fields = {13: None}  # TensorProto.external_data
_SPARSE: _Fields = {1: _TENSOR, 2: _TENSOR}  # SparseTensorProto.values, indices
_ATTRIBUTE: dict[int, _Fields | None] = {5: _TENSOR, 10: _TENSOR, 22: _SPARSE, 23: _SPARSE}
_NODE: _Fields = {5: _ATTRIBUTE}
_GRAPH: _Fields = {1: _NODE, 5: _TENSOR, 15: _SPARSE}
_ATTRIBUTE |= {6: _GRAPH, 11: _GRAPH}  # AttributeProto.g, graphs
_TRAINING: _Fields = {1: _GRAPH, 2: _GRAPH}
_MODEL: _Fields = {7: _GRAPH, 20: _TRAINING, 25: {7: _NODE}}  # ModelProto.graph, training_info, functions
"""The fields of onnx.proto on the path to every tensor; None marks an entry of `external_data`."""

_DEEPEST = 200

_LOCATION = b"location"
"""The key of an `external_data` entry. A part of a graph without these bytes has no such entry and is not parsed."""


def graph_files(bundle: Bundle, graph: str) -> tuple[str, ...]:
    """A graph's file and its external-data files. Raises IntegrityError for one that the manifest does not list."""
    names = sorted(external_files(bundle.path / graph))
    if unlisted := [name for name in names if name not in bundle.files]:
        raise IntegrityError(
            f"{bundle.path / graph}: takes tensors from {quoted(unlisted[0])}, which {MANIFEST} does not list, so that "
            "nobody has checked it; export the graph again"
        )
    return graph, *names


def external_files(graph: Path) -> frozenset[str]:
    """The files that a graph's tensors lie in, relative to its folder. Raises IntegrityError if it is not ONNX."""
    try:
        return frozenset(_locations(memoryview(graph.read_bytes()), _MODEL, 0))
    except (IndexError, ValueError) as error:
        raise IntegrityError(f"{graph}: ONNX Runtime cannot load it: not an ONNX graph: {error}") from error


def _locations(message: memoryview, fields: _Fields, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ValueError("its graphs are nested too deeply")
    for number, content in _read(message):
        if number not in fields:
            continue
        inner = fields[number]
        if inner is not None:
            if _LOCATION in bytes(content):
                yield from _locations(content, inner, depth + 1)
            continue
        entry = dict(_read(content))  # StringStringEntryProto: 1 is the key, 2 the value
        if bytes(entry.get(1, b"")) == _LOCATION:
            yield bytes(entry.get(2, b"")).decode("utf-8")


def _read(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a protobuf message: field number and content of each."""
    place = 0
    while place < len(message):
        tag, place = _number(message, place)
        kind = tag & 7
        if kind == 0:
            _, place = _number(message, place)
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            length, place = _number(message, place)
            if place + length > len(message):
                raise ValueError("it is cut short")
            yield tag >> 3, message[place : place + length]
            place += length
        else:
            raise ValueError(f"a field has the type {kind}")
    if place > len(message):
        raise ValueError("it is cut short")


def _number(message: memoryview, place: int) -> tuple[int, int]:
    """A varint at `place`, and the position after it."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
