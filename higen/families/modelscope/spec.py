"""ModelScope's tables (docs/manifest.md): data alone, no PyTorch.

text_encoder -> temporal_unet x steps -> vae_decoder
vae_encoder (video) -> the loop's tail: a second pass over a video, at a higher size for instance
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from higen.errors import ManifestError
from higen.families.stable_diffusion.spec import Codec, Sampling
from higen.families.stage_rows import (
    KNOWN,
    TEXT_CONDITIONS,
    autoencoder_stages,
    known_frames_controls,
    solver_stages,
    strength_control,
    text_encoder_stage,
)
from higen.manifest import Manifest
from higen.stages import Stage
from higen.tables import Control, Loop, NoiseRule, Sizes, Start, TextRules
from higen.typed_json import from_json, to_json

__all__ = ["AUTOENCODER", "FAMILY", "GUIDANCE", "TEXT_ENCODER", "TOKENIZER", "UNET", "Networks", "manifest", "networks"]

FAMILY = "modelscope"
UNET, TEXT_ENCODER, AUTOENCODER = "unet.safetensors", "text_encoder.safetensors", "vae.safetensors"
TOKENIZER = "tokenizer.json"

FRAMES = (1, 16, 256)
"""16 are what ModelScope's network was trained on. It has no table of positions, so no number of frames is its last."""

GUIDANCE = 9.0
STRENGTH = 0.6
"""The part of the steps that a video is given by default, as diffusers' video-to-video pipeline has it."""


@dataclass(frozen=True)
class Networks:
    """Constructors' arguments of diffusers' UNet3DConditionModel, of transformers' CLIPTextConfig, and the codec."""

    unet: dict[str, Any]
    clip: dict[str, Any]
    codec: Codec


def manifest(
    made_of: Networks, sampling: Sampling, *, name: str, licence: str, size: tuple[int, int], text: TextRules
) -> Manifest:
    """The tables of a model. `size`: width and height by default, in pixels, rounded down to what the networks take.

    Raises ManifestError for networks that do not fit each other.
    """
    unet, factor = made_of.unet, made_of.codec.factor
    multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    width, height = (max(multiple, side // multiple * multiple) for side in size)
    return Manifest(
        name=name,
        licence=licence,
        family=FAMILY,
        architecture=to_json(made_of),
        prompts=("an astronaut riding a horse", "a panda eating bamboo on a rock"),
        sizes=Sizes(
            symbols={"L": text.length, "C": unet["in_channels"], "Dc": made_of.clip["hidden_size"]},
            factor=factor,
            multiple=multiple,
            width=width,
            height=height,
            fps=8,
            frames=FRAMES,
            decoder="vae_decoder",
            chunk=2,
        ),
        text=text,
        controls=(
            Control("video", "clip", "a video to begin from: a second pass over it, at another size if wanted"),
            strength_control("video", STRENGTH),
            *known_frames_controls(),
        ),
        stages=_stages(),
        loops=(_loop(sampling),),
    )


def _stages() -> tuple[Stage, ...]:
    return (
        text_encoder_stage(TEXT_ENCODER, "Dc"),
        *solver_stages("temporal_unet", "temporal_unet_plain", UNET, "F", TEXT_CONDITIONS),
        *autoencoder_stages(AUTOENCODER, "video", "clip"),
    )


def _loop(sampling: Sampling) -> Loop:
    return Loop(
        name="temporal",
        guided="temporal_unet",
        plain="temporal_unet_plain",
        frames="F",
        schedule=sampling.schedule,
        prediction=sampling.prediction,
        solvers=sampling.solvers,
        steps=sampling.steps,
        guidance=sampling.guidance,
        noise=NoiseRule(purpose=0),
        start=Start("video", "vae_encoder.latents", "control:strength"),
        known=KNOWN,
    )


def networks(manifest: Manifest) -> Networks:
    """What a manifest's networks are. Raises ManifestError where it is no model of this family."""
    if manifest.family != FAMILY:
        raise ManifestError(f"family={manifest.family!r}: {FAMILY} is wanted here")
    return from_json(Networks, manifest.architecture, "architecture", whole=True)
