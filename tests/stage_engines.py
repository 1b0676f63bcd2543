"""Builds every stage's own graph with the real TensorRT for RTX. Tests are skipped where it is not installed.

A plan for several architectures builds as quickly as a plan for one, so all plans are for SM80, 86, 89 and 120.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest

from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, graph_file, put_file
from higen.engines.model_engines import build_engines
from higen.engines.shapes import Profile, Range
from higen.engines.targets import parse_targets
from higen.export.graphs import export_stage
from higen.export.interface import graph_inputs
from higen.export.precision import check_opset, lowered, write_weights
from higen.manifest import Manifest

pytest.importorskip("tensorrt_rtx")


def small_profile(manifest: Manifest) -> Profile:
    """A profile of up to two samples and four frames, at one or two times the smallest size."""
    step = manifest.sizes.multiple
    size = Range(step, step, 2 * step)
    return Profile("small", Range(1, 1, 2), Range(2, 4, 4), size, size, Range(1, 2, 2))


def build(model: Path, precision: str, names: Sequence[str]) -> Path:
    """Build a portable plan of these stages; returns the folder of the engines."""
    bundle = Bundle.open(model)
    stages = [bundle.manifest.stage(name) for name in names]
    records = build_engines(bundle, parse_targets("rtx"), [small_profile(bundle.manifest)], names, precision)
    for record, stage in zip(records, stages, strict=True):
        assert (record.stage, record.precision) == (stage.name, precision)
        assert record.architectures == (80, 86, 89, 120)
        names = [(t.name, t.kind) for t in record.tensors]
        assert names == [(t.name, "input") for t in stage.inputs] + [(name, "output") for name in stage.graph_outputs]
        # A stage's tensors are float32 and int64 in every precision.
        assert {t.dtype for t in record.tensors} <= {"float32", "int64"}
    return model / "engines" / "rtx"


def attention(graph: Path) -> dict[str, str]:
    """A graph's attention operators by name (the softmax, if attention consists of several operators).

    The value is "spatial", "temporal" or the name of the first weight that feeds the operator.
    """
    content = onnx.load(str(graph), load_external_data=False).graph
    makers = {name: node for node in content.node for name in node.output}
    weights = {tensor.name for tensor in content.initializer}
    found = {}
    for node in content.node:
        if node.op_type not in ("Attention", "Softmax"):
            continue
        queue, seen = list(node.input), set[str]()
        while queue:
            name = queue.pop(0)
            if name in weights and "attention" in name:
                found[node.name] = next((kind for kind in ("temporal", "spatial") if f".{kind}" in name), name)
                break
            if name in makers and name not in seen:
                seen.add(name)
                queue += makers[name].input
    return found


def fused(log: Path) -> set[str]:
    """Operators that the build log lists as part of a fused attention kernel."""
    lines = re.findall(r"^Name: \S*mha\S*.*$", log.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for line in lines for name in re.findall(r"\[ONNX Layer: ([^\]]+)\]", line)}


def _export(bundle: Bundle, precision: str, stages: Sequence[str]) -> None:
    """Export the missing graphs without their parity gate, which tests/test_export.py tests."""
    names = [name for name in stages if graph_file(name, precision) not in bundle.files]
    for name in names:
        bundle = write_weights(bundle, name, precision)
    traced = TorchBackend(bundle, Options("cpu", precision))
    for name in names:
        aside = bundle.path / f".{name}.part"
        module = lowered(traced.module(name), precision)
        export_stage(bundle, module, name, aside, check_opset(precision, None), precision)
        bundle = put_file(bundle, aside, graph_file(name, precision), graph_inputs(aside))


def check_stages(model: Path, precision: str, stages: Sequence[str] | None = None) -> None:
    """Export the missing graphs and build these stages, or all; in 16 bits, at least one attention of each kind must be
    fused.

    These narrow networks have attentions with one head; TensorRT does not fuse some of those.
    """
    bundle = Bundle.open(model)
    stages = bundle.manifest.stage_names if stages is None else stages
    _export(bundle, precision, stages)
    folder = build(model, precision, stages)
    if precision == "fp32":
        return
    both = {"spatial", "temporal"}
    kinds_of = {
        "spatial_unet": {"spatial"},
        "spatial_unet_plain": {"spatial"},
        "temporal_unet": both,
        "temporal_unet_plain": both,
    }
    for stage, kinds in kinds_of.items():
        if stage not in stages:
            continue
        expected = attention(model / graph_file(stage, precision))
        assert set(expected.values()) == kinds
        found = fused(folder / f"{stage}.log")
        assert {kind for name, kind in expected.items() if name in found} == kinds
        assert len(expected.keys() & found) > len(expected) / 2
