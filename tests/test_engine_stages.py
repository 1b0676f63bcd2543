"""Every stage's own graph, built by the real TensorRT for RTX; skipped where it is not installed.

A plan for several architectures is as quick to build as one for one: here all are built for SM80, 86, 89 and 120.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from conftest import TINY, write_tiny_model
from onnxscript.optimizer import optimize_ir

from higen.api import default_model
from higen.bundle import Bundle, graph_file, put_file
from higen.config import ModelConfig, UNetConfig
from higen.engines.model import build_engines
from higen.engines.shapes import Profile, Range
from higen.engines.targets import parse_targets
from higen.export.graphs import is_bookkeeping
from higen.export.model import export_model
from higen.stages import STAGES

pytest.importorskip("tensorrt_rtx")

TOPOLOGY = replace(
    TINY,
    name="topology",
    unet=UNetConfig(base_channels=32, head_dim=32, first_temporal_heads=2, text_dim=48, context_dim=1024),
    text=replace(TINY.text, clip={**TINY.text.clip, "hidden_size": 48, "intermediate_size": 96, "projection_dim": 48}),
    defaults=replace(TINY.defaults, width=32, height=32),
)
"""The released model's topology at a tenth of its width, as the reference's fixtures p2."""


def small_profile(config: ModelConfig) -> Profile:
    """A batch and a few frames of two sizes."""
    step = config.autoencoder.factor * config.unet.size_multiple
    size = Range(step, step, 2 * step)
    return Profile("small", Range(1, 1, 2), Range(2, 4, 4), size, size, Range(1, 2, 2))


def build(model: Path, precision: str, stages: tuple[str, ...] = tuple(STAGES)) -> Path:
    """Build a portable plan of each stage; returns the folder of the engines."""
    bundle = Bundle.open(model)
    records = build_engines(bundle, parse_targets("rtx"), [small_profile(bundle.config)], stages, precision)
    for record, stage in zip(records, stages, strict=True):
        assert (record.stage, record.precision) == (stage, precision)
        assert record.architectures == (80, 86, 89, 120)
        names = [(t.name, t.kind) for t in record.tensors]
        assert names == [(t.name, "input") for t in STAGES[stage].inputs] + [
            (name, "output") for name in STAGES[stage].graph_outputs
        ]
        # A stage's tensors are float32 and int64 in every precision.
        assert {t.dtype for t in record.tensors} <= {"float32", "int64"}
    return model / "engines" / "rtx"


def attention(graph: Path) -> dict[str, str]:
    """Each attention of a graph by the name of its operator (its softmax where it is written out), and what it is:
    "spatial", "temporal" or the name of the first weight that feeds it.
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
    """Operators that went into a fused attention kernel, by the build log."""
    lines = re.findall(r"^Name: \S*mha\S*.*$", log.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for line in lines for name in re.findall(r"\[ONNX Layer: ([^\]]+)\]", line)}


def test_the_built_in_model_in_float32(tmp_path: Path) -> None:
    model = Path(shutil.copytree(default_model(), tmp_path / "model"))
    for stage in STAGES:  # in graphs exported by higen before 0.2, axes are computed where TensorRT wants constants
        graph = ir.load(model / graph_file(stage))
        optimize_ir(graph, should_fold=is_bookkeeping)
        aside = model / ".graph.part"
        ir.save(graph, aside)
        put_file(Bundle.open(model), aside, graph_file(stage))
    build(model, "fp32")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with float16 graphs of the denoiser."""
    model = write_tiny_model(tmp_path_factory.mktemp("half") / "model").path
    export_model(Bundle.open(model), ["temporal_unet"], precision="fp16")
    return model


def test_attention_is_fused_in_float16(half: Path) -> None:
    folder = build(half, "fp16", ("temporal_unet",))
    expected = attention(half / "temporal_unet.fp16.onnx")
    assert set(expected.values()) == {"spatial", "temporal"}
    assert set(expected) <= fused(folder / "temporal_unet.log")


def test_bfloat16(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model").path
    stages = ("text_encoder", "conditioner", "vae_decoder")
    export_model(Bundle.open(model), stages, precision="bf16")
    build(model, "bf16", stages)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["default", "topology"])
def test_every_stage_in_every_precision(tmp_path: Path, name: str, precision: str) -> None:
    model = tmp_path / "model"
    if name == "default":
        shutil.copytree(default_model(), model)
    else:
        write_tiny_model(model, TOPOLOGY)
    export_model(Bundle.open(model), precision=precision)
    folder = build(model, precision)
    if precision != "fp32":
        for stage in ("spatial_unet", "temporal_unet"):
            assert set(attention(model / graph_file(stage, precision))) <= fused(folder / f"{stage}.log")
