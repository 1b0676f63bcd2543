"""The precisions in which a stage's graph computes. One row has all facts about a precision."""

from __future__ import annotations

from dataclasses import dataclass

from higen.errors import RequestError, quoted

__all__ = ["PRECISIONS", "QUANTIZED", "Precision", "check_precision", "precision_named"]


@dataclass(frozen=True)
class Precision:
    """One precision.

    base            the precision of the weights file and of everything that is not quantised: fp32, bf16 or fp16
    dtype           the base's name in numpy and PyTorch
    stored          the base's name in safetensors
    quantized       most multiplications are in 8 or 4 bits, or by weights that are stored so
    engines_only    only TensorRT computes in it
    graphs_only     only ONNX Runtime computes in it
    architecture    the first GPU architecture that computes in it
    smallest_opset, default_opset    ONNX opsets for graphs in it
    step            the largest error of one run of a stage that the parity gate allows, relative to the largest output:
                    in float32 it covers the order of summation, in the others the rounding of each activation
    latents         the largest allowed absolute difference of the final latents after a whole loop
    pixels          the allowed difference of the pixels after a whole loop, of 255: in float32 the largest difference,
                    in the others the mean
    compared        the largest allowed difference of an engine's output, relative to the largest output
    """

    name: str
    base: str
    dtype: str
    stored: str
    architecture: int
    step: float
    latents: float
    pixels: float
    compared: float
    quantized: bool = False
    engines_only: bool = False
    graphs_only: bool = False
    smallest_opset: int = 21
    default_opset: int = 21

    @property
    def stand_ins(self) -> tuple[str, ...]:
        """The precisions that can serve a request for this one, the best first: not every stage is quantised."""
        return (self.name, self.base) if self.quantized else (self.name,)


def _quantized(name: str, base: str, architecture: int, engines_only: bool = False) -> Precision:
    graphs_only = base == "fp32"  # an engine stores its other weights in 16 bits
    dtype, stored = ("float32", "F32") if base == "fp32" else ("float16", "F16")
    inf = float("inf")  # checked when the graph is made, by another measure (higen/export/quantize.py)
    return Precision(
        name,
        base,
        dtype,
        stored,
        architecture,
        inf,
        inf,
        inf,
        0.3,
        quantized=True,
        engines_only=engines_only,
        graphs_only=graphs_only,
    )


# Opset 21: ONNX Runtime 1.20 can read it, and it is the first with a native GroupNormalization.
# Opset 22: the first in which Conv takes bfloat16. Opset 23: the newest that TensorRT for RTX takes.
_ROWS = (
    Precision("fp32", "fp32", "float32", "F32", 75, step=2e-5, latents=1e-3, pixels=1.0, compared=1e-3),
    Precision("fp16", "fp16", "float16", "F16", 75, step=1e-2, latents=5e-2, pixels=0.5, compared=2e-2),
    Precision(
        "bf16",
        "bf16",
        "bfloat16",
        "BF16",
        80,
        step=8e-2,
        latents=0.5,
        pixels=4.0,
        compared=1e-1,
        smallest_opset=22,
        default_opset=23,
    ),
    _quantized("int8", "fp32", 80),
    _quantized("int8.fp16", "fp16", 80),
    _quantized("fp8.fp16", "fp16", 89),
    _quantized("nvfp4.fp16", "fp16", 100, engines_only=True),
    _quantized("w8", "fp32", 75),
)

PRECISIONS: dict[str, Precision] = {row.name: row for row in _ROWS if not row.quantized}
"""The precisions that `higen-export onnx` writes. fp32 graphs have no suffix; their weights may have fewer bits."""

QUANTIZED: dict[str, Precision] = {row.name: row for row in _ROWS if row.quantized}
"""The precisions that `higen-export quantize` writes: 8 or 4 bits, from the weights of their base."""

NEWEST_OPSET = 23


def precision_named(name: str) -> Precision:
    """The precision of that name. Raises RequestError for any other."""
    found = {**PRECISIONS, **QUANTIZED}.get(name) if isinstance(name, str) else None
    if found is None:
        raise RequestError(f"precision={quoted(name)}: one of {', '.join(map(repr, (*PRECISIONS, *QUANTIZED)))}")
    return found


def check_precision(name: str) -> str:
    """The name itself. Raises RequestError for a name that is not in PRECISIONS or QUANTIZED."""
    return precision_named(name).name
