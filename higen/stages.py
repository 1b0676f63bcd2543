"""The contract: each stage is a pure function on named tensors, and this table is the only list of their names.

The torch backend, the ONNX export, the engine profiles, Triton and C++ (through the manifest) all read it.

Symbols: B samples, N images of a chunk, L text positions, F frames, H x W latent size, Y x X pixel size,
C latent channels, Dt text width, D sinusoid width, R appearance columns, K context tokens, Dc context width,
E embedding width.

A denoising stage is one whole solver step: with v-prediction (design, section 3)

    v  = v_empty + guidance * (v_context - v_empty)
    x0 = alpha * latents - sigma * v
    latents' = A * latents + B * v + C * previous          previous' = x0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from higen.config import ModelConfig
from higen.errors import BackendError

__all__ = ["STAGES", "STEP_COLUMNS", "Stage", "Tensor", "check_inputs", "dimensions"]


@dataclass(frozen=True)
class Tensor:
    """A named tensor of a stage: `shape` has symbols and fixed sizes, `dtype` is numpy's name."""

    name: str
    shape: tuple[str | int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Stage:
    """A pure function on named tensors."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        """Names of the outputs in a graph, where an output cannot have an input's name: `next_` is put before it."""
        inputs = {tensor.name for tensor in self.inputs}
        return tuple(f"next_{t.name}" if t.name in inputs else t.name for t in self.outputs)


STEP_COLUMNS = ("t", "A", "B", "C", "alpha", "sigma", "guidance")
"""Per-sample inputs of a denoising step, in order: a row of a solver's table, then the guidance scale."""

_COLUMNS = (Tensor("t", ("B",), "int64"), *(Tensor(name, ("B",)) for name in STEP_COLUMNS[1:]))
_CONTEXT = (Tensor("context", ("B", "K", "Dc")), Tensor("empty_context", ("B", "K", "Dc")))


def _denoising_stage(name: str, frames: str | int, *extra: Tensor) -> Stage:
    state = (Tensor("latents", ("B", "C", frames, "H", "W")), Tensor("previous", ("B", "C", frames, "H", "W")))
    embedding = Tensor("frame_embedding", ("B", frames, "E"))
    return Stage(name, (*state, *_COLUMNS, *_CONTEXT, embedding, *extra), state)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("text_encoder", (Tensor("tokens", ("B", "L"), "int64"),), (Tensor("hidden", ("B", "L", "Dt")),)),
        Stage(
            "conditioner",
            (
                Tensor("hidden", ("B", "L", "Dt")),
                Tensor("motion", ("B", "F", "D")),
                Tensor("appearance", ("B", "F", "R")),
            ),
            (Tensor("context", ("B", "K", "Dc")), Tensor("frame_embedding", ("B", "F", "E"))),
        ),
        _denoising_stage("spatial_unet", 1),
        _denoising_stage("temporal_unet", "F", Tensor("prior", ("B", "C", "H", "W"))),
        Stage("vae_decoder", (Tensor("latents", ("N", "C", "H", "W")),), (Tensor("pixels", ("N", 3, "Y", "X")),)),
        Stage("vae_encoder", (Tensor("pixels", ("N", 3, "Y", "X")),), (Tensor("latents", ("N", "C", "H", "W")),)),
    )
}


def dimensions(config: ModelConfig) -> dict[str, int]:
    """The symbols that a model's configuration fixes."""
    unet = config.unet
    return {
        "L": config.text.context_length,
        "C": unet.in_channels,
        "Dt": unet.text_dim,
        "D": unet.base_channels,
        "R": unet.appearance_columns,
        "K": unet.context_tokens,
        "Dc": unet.context_dim,
        "E": unet.embedding_dim,
    }


def check_inputs(stage: Stage, tensors: Mapping[str, Any], fixed: Mapping[str, int]) -> dict[str, int]:
    """Check names, dtypes and shapes of a stage's inputs; returns the value of every symbol.

    `tensors` are arrays with `.shape` and `.dtype` (numpy or torch); `fixed` comes from `dimensions`.
    Raises BackendError naming the tensor, what it is and what is wanted.
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
