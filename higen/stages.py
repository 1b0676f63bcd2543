"""The contract: a stage is a pure function on named tensors. A table in the model directory lists the stages.

Every backend, the ONNX export, the engine profiles, Triton and C++ read that table (docs/manifest.md). This module
has the types of its rows; it knows no particular model.

Free symbols of a shape: B samples, N images or frames of a chunk, F frames, H x W latent size, Y x X pixel size, and T
tokens of all chunks if texts are read in chunks. Any other symbol belongs to the model and has one size.

A denoising stage is one whole solver step (docs/manifest.md, "loops"):

    m  = m_empty + guidance * (m_given - m_empty)
    x0 = alpha * latents - sigma * m
    latents' = A * latents + B * m + C * previous          previous' = x0
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from higen.errors import BackendError, ManifestError
from higen.typed_json import LATER

__all__ = ["DEEP", "EMPTY", "FREE", "STATE", "STEP_COLUMNS", "TOKENS", "Output", "Source", "Stage", "Tensor"]
__all__ += ["check_inputs", "source"]

FREE = ("B", "F", "N", "H", "W", "Y", "X")
"""Symbols that a request fixes."""

TOKENS = "T"
"""The tokens of all chunks of a text: free if there can be several chunks (`text.chunks`), else the model's symbol."""

STATE = ("latents", "previous")
"""The state of a denoising loop: inputs and outputs of its stages."""

STEP_COLUMNS = ("t", "A", "B", "C", "alpha", "sigma", "guidance")
"""The other `state` inputs of a denoising step: a row of a solver's table [B], then the guidance scale [B, f]."""

EMPTY = "empty_"
"""`empty_NAME` is the input that replaces NAME in the branch without the prompt."""

DEEP = "deep"
"""The features that enter a network's last block from below. They are an output of a full step and an input of a
shallow step, which computes only the rest of the network (`Stage.variants`).
"""

NEGATIVE = "negative"
"""`STAGE@negative.OUTPUT` is made of the negative prompt; no control has this name."""

_SOURCE = re.compile(
    r"(?P<state>state)"
    r"|control:(?P<control>\w+)"
    r"|text:(?P<text>prompt|negative)"
    r"|picture:(?:(?P<picture>\w+)|(?P<maker>\w+)\.(?P<pixels>\w+))(?P<resampled>:clip)?"
    r"|clip:(?P<clip>\w+)"
    r"|noise:(?P<noise>\d{1,9})"
    r"|known:(?P<known>latents|mask)"
    r"|frames:(?P<frames>\w+)"
    r"|places:(?P<places>\w+)"
    r"|(?P<owner>\w+)(?:@(?P<given>\w+))?\.(?P<output>\w+)"
)

_KINDS = ("state", "control", "text", "picture", "clip", "noise", "known", "frames", "places")


@dataclass(frozen=True)
class Source:
    """Where an input comes from: `kind` (state, control, text, picture, clip, noise, known, frames, places, made) and
    `name`.

    `output`: an output of a stage or loop (`made`). `negative`: made from the negative prompt. `given`: made from the
    frames of this control, instead of a picture or clip. `resampled`: a picture, resized to the input's size. `shown`:
    pixels that a stage made, used as a picture.
    """

    kind: str
    name: str = ""
    output: str = ""
    negative: bool = False
    resampled: bool = False
    shown: bool = False
    given: str = ""


@lru_cache(maxsize=4096)
def source(text: str) -> Source:
    """Read a source (docs/manifest.md, "Sources"). Raises ManifestError."""
    found = _SOURCE.fullmatch(text)
    if found is None:
        raise ManifestError(
            f"source={text!r}: state, control:NAME, text:prompt, text:negative, picture:NAME, picture:NAME:clip, "
            "picture:STAGE.OUTPUT, picture:STAGE.OUTPUT:clip, clip:NAME, noise:P, known:latents, known:mask, "
            "frames:NAME, places:NAME, STAGE.OUTPUT, STAGE@negative.OUTPUT, STAGE@CONTROL.OUTPUT or LOOP.latents"
        )
    if maker := found["maker"]:
        return Source("made", maker, found["pixels"], resampled=found["resampled"] is not None, shown=True)
    if owner := found["owner"]:
        negative, given = found["given"] == NEGATIVE, found["given"] or ""
        return Source("made", owner, found["output"], negative=negative, given="" if negative else given)
    kind = next(kind for kind in _KINDS if found[kind] is not None)
    return Source(kind, found[kind], resampled=found["resampled"] is not None)


@dataclass(frozen=True)
class Tensor:
    """A named input of a stage: `shape` has symbols and fixed sizes, `source` says where it comes from."""

    name: str
    shape: tuple[int | str, ...]
    dtype: Literal["float32", "int64"] = "float32"
    source: str = "state"


@dataclass(frozen=True)
class Output:
    """A named output of a stage, float32."""

    name: str
    shape: tuple[int | str, ...]

    @property
    def dtype(self) -> str:
        """The outputs of every stage are float32."""
        return "float32"


@dataclass(frozen=True)
class Stage:
    """A pure function on named tensors.

    weights  the weights file that its graph refers to
    lowest   the lowest precision that it may compute in
    batch    whether the first axis may hold several samples, so that calls may be joined along it
    deep     for a denoising stage, the channels of its deep features; None: it has no `variants`
    """

    name: str
    weights: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Output, ...]
    lowest: Literal["fp32", "bf16", "fp16"] = "fp16"
    batch: bool = True
    deep: int | None = field(default=None, metadata=LATER)

    @property
    def variants(self) -> tuple[Stage, ...]:
        """Two variants of the step: the full one also gives its deep features; the shallow one takes them.

        The features are [B, K, f, H, W]. K counts the channels of one branch of guidance, or of both, with the branch
        that has the prompt first. Empty for a stage without `deep`, and for a stage that is not a solver step.
        """
        state = [t.shape for t in self.inputs if t.name == "latents" and len(t.shape) == 5]
        if self.deep is None or not self.denoises or not state:
            return ()
        batch, _, *rest = state[0]
        shape = (batch, self.deep * (2 if self.guided else 1), *rest)
        return (
            replace(self, name=f"{self.name}_deep", outputs=(*self.outputs, Output(DEEP, shape)), deep=None),
            replace(self, name=f"{self.name}_shallow", inputs=(*self.inputs, Tensor(DEEP, shape)), deep=None),
        )

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        """Names of the outputs in a graph. An output with the name of an input gets the prefix `next_`."""
        inputs = {tensor.name for tensor in self.inputs}
        return tuple(f"next_{t.name}" if t.name in inputs else t.name for t in self.outputs)

    @property
    def denoises(self) -> bool:
        """Whether the stage is a solver step."""
        return {t.name for t in self.outputs} - {DEEP} == set(STATE)

    @property
    def guided(self) -> bool:
        """Whether the stage is a solver step with both branches of guidance."""
        return self.denoises and any(t.name == "guidance" for t in self.inputs)

    @property
    def conditions(self) -> tuple[Tensor, ...]:
        """The inputs other than the state."""
        return tuple(t for t in self.inputs if t.source != "state")

    def input(self, name: str) -> Tensor:
        """The input of that name. Raises KeyError."""
        return next((t for t in self.inputs if t.name == name), None) or _missing(self.name, name)

    def free(self, fixed: Mapping[str, int]) -> tuple[str, ...]:
        """The symbols of its inputs that `fixed` leaves open, in order."""
        symbols = dict.fromkeys(n for t in self.inputs for n in t.shape if isinstance(n, str) and n not in fixed)
        return tuple(symbols)


def _missing(stage: str, name: str) -> Tensor:
    raise KeyError(f"{stage} has no input {name}")


def check_inputs(stage: Stage, tensors: Mapping[str, Any], fixed: Mapping[str, int]) -> dict[str, int]:
    """Check names, dtypes and shapes of a stage's inputs; returns the value of every symbol.

    `tensors` are arrays with `.shape` and `.dtype` (numpy or torch); `fixed` are the model's own symbols.
    Raises BackendError naming the tensor, its type and shape, and the expected ones.
    """
    wanted = {tensor.name for tensor in stage.inputs}
    if wrong := sorted(wanted ^ set(tensors)):
        raise BackendError(f"{stage.name}: missing or unknown inputs {wrong}; it takes {sorted(wanted)}")
    sizes = dict(fixed)
    for tensor in stage.inputs:
        value = tensors[tensor.name]
        shape = tuple(int(n) for n in value.shape)
        dtype = str(value.dtype).rpartition(".")[2]
        fits = len(shape) == len(tensor.shape) and all(
            size == (symbol if isinstance(symbol, int) else sizes.setdefault(symbol, size))
            for size, symbol in zip(shape, tensor.shape, strict=True)
        )
        # A precision variant takes float16 or bfloat16 where the table says float32.
        if not fits or (dtype != tensor.dtype and not (tensor.dtype == "float32" and "float" in dtype)):
            known = {s: sizes[s] for s in tensor.shape if isinstance(s, str) and s in sizes}
            raise BackendError(
                f"{stage.name}.{tensor.name}: {dtype} {list(shape)} given, {tensor.dtype} {list(tensor.shape)} "
                f"wanted with {known}"
            )
    return sizes
