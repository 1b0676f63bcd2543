"""A model that belongs to no family. Its tables and graphs are written here, to test runtimes that know no family.

It has two loops (a draft of one frame, then the film around it), a picture, a curve, a matrix of similarities, a whole
number, a choice, per-frame guidance with an `empty_` pair, a stochastic solver, epsilon prediction, a video decoder.
The decoder's output depends on neighbouring frames, so neither samples nor chunks may be mixed. Needs the package onnx.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto

from higen import bundle
from higen.bundle import Bundle, GraphInput, graph_file
from higen.manifest import Manifest
from higen.schedule import NoiseSchedule, Solver
from higen.stages import Output, Stage, Tensor
from higen.tables import Control, Loop, NoiseRule, Offset, Replaced, Sizes, TextRules
from higen.tokenizer import build_word_tokenizer, write_tokenizer

__all__ = ["GRAPHS", "MANIFEST", "WORDS", "write_made_up_model"]

WORDS = ("a", "red", "kite", "climbs", "green", "boat", "sinks")

STATE = ("B", "C", "F", "H", "W")
_COLUMNS = tuple(Tensor(name, ("B",)) for name in ("t", "A", "B", "C", "alpha", "sigma"))


def _steps(name: str, frames: int | str, *extra: Tensor) -> tuple[Stage, Stage]:
    """A guided and a plain step."""
    state = tuple(frames if n == "F" else n for n in STATE)
    step = (Tensor("latents", state), Tensor("previous", state), *_COLUMNS)
    hints = Tensor("hints", ("B", frames, "K"), source="mixer.hints")
    empty = Tensor("empty_hints", ("B", frames, "K"), source="mixer@negative.hints")
    made = (Output("latents", state), Output("previous", state))
    guided = Stage(
        f"{name}_two", "all.safetensors", (*step, Tensor("guidance", ("B", frames)), hints, empty, *extra), made
    )
    return guided, Stage(f"{name}_one", "all.safetensors", (*step, hints, *extra), made)


def _loop(name: str, stage: str, frames: int | str, purpose: int, **given: object) -> Loop:
    values: dict[str, object] = {
        "schedule": NoiseSchedule("linear", timesteps=100, beta_start=0.0001, beta_end=0.02),
        "prediction": "epsilon",
        "solvers": (Solver("euler_ancestral", "linspace"), Solver("ddim", "leading", offset=1)),
        "steps": 4,
        "guidance": 3.0,
        "noise": NoiseRule(purpose),
    }
    return Loop(name=name, guided=f"{stage}_two", plain=f"{stage}_one", frames=frames, **(values | given))


MANIFEST = Manifest(
    name="made-up",
    licence="none",
    family="made-up",
    architecture={},
    prompts=("a red kite climbs",),
    sizes=Sizes(
        symbols={"L": 6, "C": 3, "K": 5, "R": 8},
        factor=2,
        multiple=4,
        width=16,
        height=8,
        fps=5,
        frames=(1, 6, 12),
        decoder="unpack",
        chunk=2,
        overlap=1,
    ),
    text=TextRules("words.json", 6, clean=False),
    controls=(
        Control("wobble", "curve", "how much it shakes", "curve", low=-2.0, high=2.0, default=0.5),
        Control("drift", "curve", "how the appearance changes", "similarity", optional=True),
        Control("grain", "whole", "how coarse", "number", low=0, high=9, default=3),
        Control("mood", "choice", "bright or dark", "number", choices=("bright", "dark"), default="bright"),
        Control("sketch", "picture", "a drawing, in place of the draft"),
    ),
    stages=(
        Stage(
            "reader",
            "all.safetensors",
            (Tensor("tokens", ("B", "L"), "int64", "text:prompt"),),
            (Output("words", ("B", "K")),),
        ),
        Stage(
            "mixer",
            "all.safetensors",
            (
                Tensor("words", ("B", "K"), source="reader.words"),
                Tensor("wobble", ("B", "F"), source="control:wobble"),
                Tensor("drift", ("B", "F", "R"), source="control:drift"),
                Tensor("grain", ("B",), source="control:grain"),
                Tensor("mood", ("B",), source="control:mood"),
            ),
            (Output("hints", ("B", "F", "K")),),
        ),
        Stage(
            "look",
            "all.safetensors",
            (Tensor("pixels", ("B", 3, "Y", "X"), source="picture:sketch"),),
            (Output("latents", ("B", "C", "H", "W")),),
            batch=False,
        ),
        *_steps("draft", 1),
        *_steps("film", "F", Tensor("first", ("B", "C", "H", "W"), source="draft.latents")),
        Stage(
            "unpack",
            "unpack.safetensors",
            (Tensor("latents", STATE),),
            (Output("pixels", ("B", 3, "F", "Y", "X")),),
            batch=False,
        ),
    ),
    loops=(
        _loop(
            "draft", "draft", 1, 11, controls={"wobble": 0.0, "drift": 0.0}, replaced=Replaced("sketch", "look.latents")
        ),
        _loop("film", "film", "F", 12, least_frames=2, guidance=(1.0, 4.0), noise=NoiseRule(12, Offset(13, 0.2))),
    ),
)

_ONE_BRANCH = """
   {m}_hinted = Unsqueeze({hints}, axes)
   {m}_mean = ReduceMean<keepdims=0>({m}_hinted, last)
   {m}_frames = Unsqueeze({m}_mean, spread)
   {m}_sin = Sin({m}_frames)
   {m}_a = Mul(latents, own)
   {m}_b = Add({m}_a, {m}_sin)
   {m} = Add({m}_b, common)
"""
"""Computes m [B,C,F,H,W] from the latents and hints [B,F,K]."""

_STEP = """
<ir_version: 10, opset_import: ["" : 21]>
step (float[B,3,{f},H,W] latents, float[B,3,{f},H,W] previous, float[B] t, float[B] A, float[B] B, float[B] C,
      float[B] alpha, float[B] sigma{inputs})
     => (float[B,3,{f},H,W] next_latents, float[B,3,{f},H,W] next_previous)
     <float[1] own = {{0.6}}, int64[1] axes = {{1}}, int64[1] last = {{-1}}, int64[2] spread = {{3, 4}},
      int64[4] each = {{1, 2, 3, 4}}, float[1] slow = {{0.001}}, int64[1] two = {{2}}, int64[2] planes = {{3, 4}}>
{{
   slowed = Mul(t, slow)
   wave = Sin(slowed)
   waves = Unsqueeze(wave, each)
{common}
{branches}
   alphas = Unsqueeze(alpha, each)
   sigmas = Unsqueeze(sigma, each)
   as = Unsqueeze(A, each)
   bs = Unsqueeze(B, each)
   cs = Unsqueeze(C, each)
   kept = Mul(alphas, latents)
   noisy = Mul(sigmas, m)
   next_previous = Sub(kept, noisy)
   from_latents = Mul(as, latents)
   from_m = Mul(bs, m)
   from_previous = Mul(cs, previous)
   partly = Add(from_latents, from_m)
   next_latents = Add(partly, from_previous)
}}
"""

_GUIDED = (
    _ONE_BRANCH.format(m="given", hints="hints")
    + _ONE_BRANCH.format(m="empty", hints="empty_hints")
    + """
   scale = Unsqueeze(guidance, each_frame)
   apart = Sub(given, empty)
   scaled = Mul(scale, apart)
   m = Add(empty, scaled)
"""
)


_KEEPS = """
   {m}_deep = Slice({m}_a, zero, two, one)
"""
"""Deep features of a branch: the first two of the three channels that it computes from the latents."""

_TAKES = """
   {m}_all = Mul(latents, own)
   {m}_rest = Slice({m}_all, two, three, one)
   {m}_deep = Slice(deep, {begin}, {end}, one)
   {m}_a = Concat<axis=1>({m}_deep, {m}_rest)
"""
"""Takes these two channels from the deep features of one branch or both branches."""


def _variant(text: str, name: str, frames: int | str, guided: bool) -> str:
    """Turn an ordinary step into one that returns its deep features ("deep") or takes them as an input ("shallow")."""
    branches = [("given", "zero", "two"), ("empty", "two", "four")] if guided else [("m", "zero", "two")]
    state = f"float[B,{2 * len(branches)},{frames},H,W] deep"
    more = "int64[1] zero = {0}, int64[1] one = {1}, int64[1] three = {3}, int64[1] four = {4}, int64[1] two"
    text = text.replace("int64[1] two", more)
    for m, begin, end in branches:
        made = f"{m}_a = Mul(latents, own)"
        lines = made + _KEEPS if name == "deep" else _TAKES
        text = text.replace(made, lines.format(m=m, begin=begin, end=end))
    if name == "shallow":
        return text.replace(")\n     => (", f", {state})\n     => (")
    kept = [f"{m}_deep" for m, *_ in branches]
    together = f"deep = Concat<axis=1>({', '.join(kept)})" if guided else f"deep = Identity({kept[0]})"
    return text.replace("next_previous)\n", f"next_previous, {state})\n").replace(
        "   kept =", f"   {together}\n   kept ="
    )


def _step(frames: int | str, guided: bool, first: bool) -> str:
    inputs = f", float[B,{frames}] guidance" if guided else ""
    inputs += f", float[B,{frames},5] hints" + (f", float[B,{frames},5] empty_hints" if guided else "")
    inputs += ", float[B,3,H,W] first" if first else ""
    common = (
        "   firsts = Unsqueeze(first, two)\n   common = Mul(firsts, waves)" if first else "   common = Identity(waves)"
    )
    branches = _GUIDED if guided else _ONE_BRANCH.format(m="m", hints="hints")
    text = _STEP.format(f=frames, inputs=inputs, common=common, branches=branches)
    return text.replace("int64[2] planes = {3, 4}", "int64[3] each_frame = {1, 3, 4}")


GRAPHS = {
    "reader": """
<ir_version: 10, opset_import: ["" : 21]>
reader (int64[B,6] tokens) => (float[B,5] words) <float[11,5] table, int64[1] axis = {1}>
{
   each = Gather(table, tokens)
   words = ReduceMean<keepdims=0>(each, axis)
}
""",
    "mixer": """
<ir_version: 10, opset_import: ["" : 21]>
mixer (float[B,5] words, float[B,F] wobble, float[B,F,8] drift, float[B] grain, float[B] mood)
      => (float[B,F,5] hints) <float[8,5] table, int64[1] one = {1}, int64[1] two = {2}, int64[2] both = {1, 2}>
{
   drifting = MatMul(drift, table)
   shaking = Unsqueeze(wobble, two)
   coarse = Unsqueeze(grain, both)
   mooded = Unsqueeze(mood, both)
   wording = Unsqueeze(words, one)
   a = Add(drifting, shaking)
   b = Mul(wording, coarse)
   c = Add(a, b)
   hints = Sub(c, mooded)
}
""",
    "look": """
<ir_version: 10, opset_import: ["" : 21]>
look (float[B,3,Y,X] pixels) => (float[B,3,H,W] latents) <float[1] scale = {1.5}>
{
   small = AveragePool<kernel_shape=[2,2], strides=[2,2]>(pixels)
   latents = Mul(small, scale)
}
""",
    "draft_two": _step(1, guided=True, first=False),
    "draft_one": _step(1, guided=False, first=False),
    "film_two": _step("F", guided=True, first=True),
    "film_one": _step("F", guided=False, first=True),
    # A convolution over three frames, with zeros before the first and after the last given frame; then 2x2 upsampling.
    "unpack": """
<ir_version: 10, opset_import: ["" : 21]>
unpack (float[B,3,F,H,W] latents) => (float[B,3,F,Y,X] pixels)
       <float[3,3,3,1,1] kernel, float[5] sizes = {1.0, 1.0, 1.0, 2.0, 2.0}>
{
   mixed = Conv<pads=[1,0,0,1,0,0]>(latents, kernel)
   pixels = Resize<mode="nearest">(mixed, , sizes)
}
""",
}
"""Each stage's graph as text. A tensor declared without a value is a weight."""


def _reusing() -> tuple[Manifest, dict[str, str]]:
    """The tables with deep features for the film's steps, and the graphs of these steps' variants."""
    deep = {"film_two": True, "film_one": False}
    rows = tuple(replace(stage, deep=2) if stage.name in deep else stage for stage in MANIFEST.stages)
    kinds = [(name, kind) for name in deep for kind in ("deep", "shallow")]
    graphs = {f"{name}_{kind}": _variant(GRAPHS[name], kind, "F", deep[name]) for name, kind in kinds}
    return replace(MANIFEST, stages=rows), graphs


def write_made_up_model(path: Path, without: tuple[str, ...] = (), reuse: bool = False) -> Bundle:
    """A complete model directory; the stages `without` have no graph. The weights lie in safetensors files.

    reuse  the film's steps have deep features
    """
    manifest, more = _reusing() if reuse else (MANIFEST, {})
    texts = GRAPHS | more
    models = {stage: onnx.parser.parse_model(text) for stage, text in texts.items() if stage not in without}
    with bundle.create_model(path, manifest) as folder:
        for file in manifest.weights:
            graphs = [models[s.name] for s in manifest.all_stages if s.weights == file and s.name in models]
            _write_weights(folder / file, graphs)
        write_tokenizer(build_word_tokenizer(WORDS), folder / "words.json")
    made = Bundle.open(path)
    for stage, model in models.items():
        finished = path / ".graph"
        finished.write_bytes(model.SerializeToString())
        made = bundle.put_file(made, finished, graph_file(stage), graph_inputs(model))
    return made


def graph_inputs(model: onnx.ModelProto) -> tuple[GraphInput, ...]:
    """A graph's inputs as a manifest lists them."""
    return tuple(
        GraphInput(
            value.name,
            "int64" if value.type.tensor_type.elem_type == TensorProto.INT64 else "float32",
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in model.graph.input
    )


def _write_weights(path: Path, models: list[onnx.ModelProto]) -> None:
    """Draw every weight of some graphs, write them all into one safetensors file, and make the graphs refer to it."""
    random, header, data = np.random.default_rng(0), {}, b""
    placed = []
    for graph in (model.graph for model in models):
        for value in graph.value_info:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            raw = random.normal(scale=0.2, size=shape).astype(np.float32).tobytes()
            span = [len(data), len(data) + len(raw)]
            header[f"{graph.name}.{value.name}"] = {"dtype": "F32", "shape": shape, "data_offsets": span}
            tensor = graph.initializer.add(name=value.name, dims=shape, data_type=TensorProto.FLOAT)
            placed.append((tensor, *span))
            data += raw
        del graph.value_info[:]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    for tensor, begin, end in placed:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": path.name, "offset": 8 + len(text) + begin, "length": end - begin}.items():
            tensor.external_data.add(key=key, value=str(value))
