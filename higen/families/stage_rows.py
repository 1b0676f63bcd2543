"""Rows of the stage table that families have in common (docs/manifest.md): data alone, no PyTorch."""

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
"""Chunks of 75 tokens that a prompt may have: engines are built for as many."""

TEXT_CONDITIONS = (
    Tensor("context", ("B", TOKENS, "Dc"), source="text_encoder.hidden"),
    Tensor("empty_context", ("B", TOKENS, "Dc"), source="text_encoder@negative.hidden"),
)
"""CLIP's outputs for both prompts, each in chunks, where `clip_text` are the rules."""


def clip_text(tokenizer: str, length: int, pad_id: int) -> TextRules:
    """Rules of CLIP's texts as the field writes them: weighted words, BREAK, and several chunks of tokens."""
    return TextRules(tokenizer, length, pad_id, clean=True, weights="parentheses", chunks=CHUNKS)


@dataclass(frozen=True)
class Sampling:
    """How a loop is sampled; the default solver stands first."""

    schedule: NoiseSchedule
    prediction: str
    solvers: tuple[Solver, ...]
    steps: int = 50
    guidance: float | tuple[float, ...] = 7.5


def denoising_loop(name: str, stage: str, frames: int | str, sampling: Sampling, purpose: int = 0, **more: Any) -> Loop:
    """A loop of the stages `stage` and `stage`_plain, from noise of the stream `purpose`; `more`: its other fields."""
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
    """Sizes of a U-Net beside CLIP's text model.

    unet, clip  the arguments of their constructors
    factor      pixels per latent cell
    size        width and height by default, in pixels, rounded down to what the networks take
    frames      fewest, default, most
    multiple    of the sides in pixels; None: what the U-Net's levels divide them by
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
    """A solver's step with both branches of guidance, and with one, over the same weights.

    frames      1 or "F"
    conditions  what the network is told; those called `empty_NAME` are the guided step's alone
    deep        channels of the network's deep features, of one branch
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
"""A loop that passes through frames of the request, encoded by `vae_encoder`."""


def known_frames_controls() -> tuple[Control, Control]:
    """What `KNOWN` reads."""
    return (
        Control("keyframes", "frames", "frames that the clip passes through, by index: 0 is the first, -1 the last"),
        Control("mask", "mask", "where the known frames are drawn anew: white, and kept: black"),
    )


CONTROL_SCALE = "control_scale"


def map_controls(edges: bool) -> tuple[Control, Control]:
    """What a control network is told of; `edges`: it is shown the edges of what a request gives."""
    what = "pictures whose edges the result has" if edges else "maps of what the network was trained on, poses say"
    meaning = f"{what}: one, or one for each frame"
    return (
        Control(CONTROL_MAP, "map", meaning, "edges" if edges else None),
        Control(
            CONTROL_SCALE, "curve", "how far the control holds: 0 not at all", "curve", default=1.0, usual=(0.0, 1.0)
        ),
    )


def map_conditions(frames: int | str) -> tuple[Tensor, Tensor]:
    """What a step with a control network takes beside the others. `frames`: 1 or "F"."""
    return (
        Tensor("control", ("B", 3, frames, "Y", "X"), source=f"clip:{CONTROL_MAP}"),
        Tensor("control_scale", ("B", frames), source=f"control:{CONTROL_SCALE}"),
    )


def controlled_stages(stage: str, weights: str, frames: int | str) -> tuple[Stage, Stage]:
    """The steps of `solver_stages` with a control network, whose tensors are in the same file."""
    conditions = (*TEXT_CONDITIONS, *map_conditions(frames))
    return solver_stages(f"{stage}_control", f"{stage}_control_plain", weights, frames, conditions)


def controlled(stage: str) -> Variant:
    """These stages, where a request gives the control."""
    return Variant(CONTROL_MAP, f"{stage}_control", f"{stage}_control_plain")


def strength_control(what: str, default: float) -> Control:
    """`strength`: how much of `what`, "picture" or "video", is drawn anew when a loop begins from it."""
    said = f"how much of the {what} is drawn anew: near 0 little, 1 all of it"
    return Control("strength", "number", said, "number", low=0.0, high=1.0, default=default)


def autoencoder_stages(weights: str, control: str, kind: str = "picture") -> tuple[Stage, Stage]:
    """`vae_decoder`, frame by frame, and `vae_encoder`, which reads `control`, a "picture" or a "clip"."""
    latents, pixels = ("N", "C", "H", "W"), ("N", 3, "Y", "X")
    given = Tensor("pixels", pixels, source=f"{kind}:{control}")
    return (
        Stage("vae_decoder", weights, (Tensor("latents", latents),), (Output("pixels", pixels),)),
        Stage("vae_encoder", weights, (given,), (Output("latents", latents),)),
    )
