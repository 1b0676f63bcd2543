"""Facts about a graph, read without its weights: its input shapes, and the likely size of its plan."""

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
"""Types whose values a plan stores in its compute precision, whatever type the graph uses."""

OTHERS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT32": 32, "INT64": 64}
"""Bits per value of other types; types that are not listed have 8."""


@dataclass(frozen=True)
class GraphFacts:
    """`inputs`: the shape of each input, with None for a free axis; `size`: bytes of the weights in a plan."""

    inputs: Mapping[str, tuple[int | None, ...]]
    size: int


def read_graph(path: Path, precision: str, flavour: str) -> GraphFacts:
    """Read a graph that computes in a precision. Its external weights are not read.

    Raises MissingExtra if onnx is not installed (the message names the flavour's extra, which installs it), and
    EngineError for a file that is not a graph.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx", EXTRAS[flavour][1], "higen-export build-engines") from error
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's errors share no base but Exception
        raise EngineError(f"{path}: is not an ONNX graph: {error}") from error
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
    """Raise RequestError if a profile's sizes differ from sizes that the graph fixes; the message names both."""
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
