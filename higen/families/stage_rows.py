"""Rows of the tables that several families share (docs/manifest.md). Only data, no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from higen.noise_schedule import NoiseSchedule, Solver
from higen.stages import EMPTY, TOKENS, Output, Stage, Tensor
from higen.tables import Control, Known, Loop, NoiseRule, Sizes, TextRules, Variant

__all__ = ["CHUNKS", "KNOWN", "TEXT_CONDITIONS", "Sampling", "autoencoder_stages", "clip_text", "denoising_loop"]
__all__ += ["controlled", "controlled_stages", "map_controls"]
__all__ += ["known_frames_controls", "solver_stages", "strength_control", "text_encoder_stage", "unet_sizes"]

CONTROL_MAP = "control"

CHUNKS = 8
"""The most chunks of 75 tokens that a prompt may have. Engines are built for this number."""

TEXT_CONDITIONS = (
    Tensor("context", ("B", TOKENS, "Dc"), source="text_encoder.hidden"),
    Tensor("empty_context", ("B", TOKENS, "Dc"), source="text_encoder@negative.hidden"),
)
"""CLIP's outputs for the prompt and the negative prompt, which are read in chunks by the rules of `clip_text`."""


def clip_text(tokenizer: str, length: int, pad_id: int) -> TextRules:
    """The rules for CLIP's texts in the customary syntax: weighted words, BREAK, and several chunks of tokens."""
    return TextRules(tokenizer, length, pad_id, clean=True, weights="parentheses", chunks=CHUNKS)


@dataclass(frozen=True)
class Sampling:
    """How a loop is sampled. The default solver is the first one."""

    schedule: NoiseSchedule
    prediction: str
    solvers: tuple[Solver, ...]
    steps: int = 50
    guidance: float | tuple[float, ...] = 7.5


def denoising_loop(name: str, stage: str, frames: int | str, sampling: Sampling, purpose: int = 0, **more: Any) -> Loop:
    """A loop of the stages `stage` and `stage`_plain, from noise of the stream `purpose`. `more`: its other fields."""
    return Loop(
        name=name,
        guided=stage,
        plain=f"{stage}_plain",
        frames=frames,
        schedule=sampling.schedule,
        prediction=sampling.prediction,
        solvers=sampling.solvers,
        steps=sampling.steps,
        guidance=sampling.guidance,
        noise=NoiseRule(purpose=purpose),
        **more,
    )


def unet_sizes(
    unet: Mapping[str, Any],
    clip: Mapping[str, Any],
    factor: int,
    size: tuple[int, int],
    frames: tuple[int, int, int],
    multiple: int | None = None,
) -> Sizes:
    """The sizes of a model with a U-Net and CLIP's text model.

    unet, clip  the networks' constructor arguments
    factor      pixels per latent cell
    size        default width and height in pixels, rounded down to a size that the networks accept
    frames      fewest, default, most
    multiple    the sides in pixels are multiples of it; None: `factor` times the U-Net's downsampling
    """
    multiple = multiple or factor * 2 ** (len(unet["block_out_channels"]) - 1)
    width, height = (max(multiple, side // multiple * multiple) for side in size)
    return Sizes(
        symbols={"L": clip["max_position_embeddings"], "C": unet["in_channels"], "Dc": clip["hidden_size"]},
        factor=factor,
        multiple=multiple,
        width=width,
        height=height,
        fps=8,
        frames=frames,
        decoder="vae_decoder",
        chunk=min(2, frames[2]),
    )


def solver_stages(
    guided: str, plain: str, weights: str, frames: int | str, conditions: tuple[Tensor, ...], deep: int | None = None
) -> tuple[Stage, Stage]:
    """A solver step with both branches of guidance, and one with a single branch, with the same weights.

    frames      1 or "F"
    conditions  the network's condition inputs; those named `empty_NAME` are only for the guided step
    deep        channels of the network's deep features, for one branch
    """
    state = ("B", "C", frames, "H", "W")
    columns = ("t", "A", "B", "C", "alpha", "sigma")
    step = (Tensor("latents", state), Tensor("previous", state), *(Tensor(column, ("B",)) for column in columns))
    made = (Output("latents", state), Output("previous", state))
    given = tuple(tensor for tensor in conditions if not tensor.name.startswith(EMPTY))
    return (
        Stage(guided, weights, (*step, Tensor("guidance", ("B", frames)), *conditions), made, deep=deep),
        Stage(plain, weights, (*step, *given), made, deep=deep),
    )


def text_encoder_stage(weights: str, width: str) -> Stage:
    """`text_encoder`: tokens [B,L] -> hidden [B,L,`width`]; `width` is a symbol."""
    tokens = Tensor("tokens", ("B", "L"), "int64", "text:prompt")
    return Stage("text_encoder", weights, (tokens,), (Output("hidden", ("B", "L", width)),))


KNOWN = Known("keyframes", "vae_encoder@keyframes.latents", "mask")
"""A loop's row for known frames: the request gives them, and `vae_encoder` encodes them."""


def known_frames_controls() -> tuple[Control, Control]:
    """The controls that `KNOWN` refers to."""
    return (
        Control("keyframes", "frames", "frames that the clip passes through, by index: 0 is the first, -1 the last"),
        Control("mask", "mask", "white where the known frames are redrawn, black where they are kept"),
    )


CONTROL_SCALE = "control_scale"


def map_controls(edges: bool) -> tuple[Control, Control]:
    """The controls of a control network. `edges`: its map is the edges of a given picture."""
    what = (
        "pictures, whose edges the result follows"
        if edges
        else "maps of the kind that the network was trained on, such as poses"
    )
    meaning = f"{what}: one, or one for each frame"
    return (
        Control(CONTROL_MAP, "map", meaning, "edges" if edges else None),
        Control(
            CONTROL_SCALE, "curve", "strength of the control: 0 is no control", "curve", default=1.0, usual=(0.0, 1.0)
        ),
    )


def map_conditions(frames: int | str) -> tuple[Tensor, Tensor]:
    """The additional inputs of a step with a control network. `frames`: 1 or "F"."""
    return (
        Tensor("control", ("B", 3, frames, "Y", "X"), source=f"clip:{CONTROL_MAP}"),
        Tensor("control_scale", ("B", frames), source=f"control:{CONTROL_SCALE}"),
    )


def controlled_stages(stage: str, weights: str, frames: int | str) -> tuple[Stage, Stage]:
    """The steps of `solver_stages` with a control network. Its tensors are in the U-Net's file."""
    conditions = (*TEXT_CONDITIONS, *map_conditions(frames))
    return solver_stages(f"{stage}_control", f"{stage}_control_plain", weights, frames, conditions)


def controlled(stage: str) -> Variant:
    """The row that selects the stages of `controlled_stages` if a request gives the control map."""
    return Variant(CONTROL_MAP, f"{stage}_control", f"{stage}_control_plain")


def strength_control(what: str, default: float) -> Control:
    """The control `strength`: how much of `what` ("picture" or "video") is drawn anew when a loop starts from it."""
    said = f"how much of the {what} is redrawn, from near 0 (a little) to 1 (all of it)"
    return Control("strength", "number", said, "number", low=0.0, high=1.0, default=default)


def autoencoder_stages(weights: str, control: str, kind: str = "picture") -> tuple[Stage, Stage]:
    """`vae_decoder` and `vae_encoder`, both frame by frame. `vae_encoder` reads `control`, a "picture" or a "clip"."""
    latents, pixels = ("N", "C", "H", "W"), ("N", 3, "Y", "X")
    given = Tensor("pixels", pixels, source=f"{kind}:{control}")
    return (
        Stage("vae_decoder", weights, (Tensor("latents", latents),), (Output("pixels", pixels),)),
        Stage("vae_encoder", weights, (given,), (Output("latents", latents),)),
    )
