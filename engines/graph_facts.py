"""What a graph's file says without its weights: the shapes it takes, and about how large a plan of it will be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from higen.backends.plans import EXTRAS, PlanProfile
from higen.errors import EngineError, MissingExtra, RequestError
from higen.precision import precision_named

__all__ = ["GraphFacts", "check_fixed", "read_graph"]

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
"""The types whose values a plan holds in the precision that it computes in, however they are stored."""

OTHERS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT32": 32, "INT64": 64}
"""Bits of the other types that graphs have; 8 for the rest."""


@dataclass(frozen=True)
class GraphFacts:
    """`inputs`: each input's sizes, None on an axis that is free; `size`: bytes of its weights as a plan holds them."""

    inputs: Mapping[str, tuple[int | None, ...]]
    size: int


def read_graph(path: Path, precision: str, flavour: str) -> GraphFacts:
    """Read a graph that computes in a precision; its external weights stay where they are.

    Raises MissingExtra (the flavour's own, which has onnx), EngineError for a file that is not a graph.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx", EXTRAS[flavour][1], "higen-export build-engines") from error
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's errors share no base but Exception
        raise EngineError(f"{path}: is no ONNX graph: {error}") from error
    inputs = {
        value.name: tuple(d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim)
        for value in graph.input
    }
    computed = 32 if precision_named(precision).base == "fp32" else 16
    bits = 0
    for tensor in graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        bits += math.prod(tensor.dims) * (computed if kind in FLOATS else OTHERS.get(kind, 8))
    return GraphFacts(inputs, bits // 8)


def check_fixed(stage: str, graph: str, facts: GraphFacts, profiles: Sequence[PlanProfile]) -> None:
    """Whether profiles keep to the sizes that a graph fixes. Raises RequestError naming what does not."""
    for profile in profiles:
        for span in profile.spans:
            shape = facts.inputs.get(span.name, ())
            for size, low, high in zip(shape, span.smallest, span.largest, strict=False):
                if size is not None and not low == size == high:
                    raise RequestError(
                        f"profile {profile.name}: {stage}.{span.name} from {list(span.smallest)} to "
                        f"{list(span.largest)}, but {graph} has a fixed shape there, {[n or 'any' for n in shape]}: "
                        "take a profile of that shape, or export the graph again without --static"
                    )
