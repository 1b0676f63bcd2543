"""ModelScope's tables (docs/manifest.md). Only data, no PyTorch.

text_encoder -> temporal_unet x steps -> vae_decoder
vae_encoder (video) -> the loop's last steps: a second pass over a video, for example at a larger size
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from higen.errors import ManifestError
from higen.families.preview_rows import TinyDecoder
from higen.families.stable_diffusion.spec import Codec
from higen.families.stage_rows import (
    KNOWN,
    TEXT_CONDITIONS,
    Sampling,
    autoencoder_stages,
    denoising_loop,
    known_frames_controls,
    solver_stages,
    strength_control,
    text_encoder_stage,
    unet_sizes,
)
from higen.manifest import Manifest
from higen.tables import Control, Loop, Start, TextRules, Tiles
from higen.typed_json import LATER, from_json, to_json

__all__ = ["AUTOENCODER", "FAMILY", "GUIDANCE", "LATENT_CHANNELS", "TEXT_ENCODER", "TOKENIZER", "UNET", "Networks"]
__all__ += ["manifest", "networks"]

FAMILY = "modelscope"
UNET, TEXT_ENCODER, AUTOENCODER = "unet.safetensors", "text_encoder.safetensors", "vae.safetensors"
TOKENIZER = "tokenizer.json"

FRAMES = (1, 16, 256)
"""ModelScope's network was trained on 16 frames. It has no table of positions, so it sets no limit."""

GUIDANCE = 9.0
LATENT_CHANNELS = 4

STRENGTH = 0.6
"""The fraction of the steps that run on a given video by default, as in diffusers' video-to-video pipeline."""


NOISE_LEVEL = 0.7
"""SR600 starts from the noise level 700 of 1000 (`total_noise_levels` in VGen's sr600_infer.yaml)."""

TILES = Tiles(height=90, width=160, stride=64)
"""In latent cells: 1280 x 720 pixels, the size that SR600 was made for. A larger video is processed in such tiles."""

_CONTROLS = (
    Control("video", "clip", "a video to start from, for a second pass at the same or another size"),
    strength_control("video", STRENGTH),
    *known_frames_controls(),
)
_UPSCALER_CONTROLS = (
    Control("video", "clip", "the video that is enlarged"),
    strength_control("video", NOISE_LEVEL),
)


@dataclass(frozen=True)
class Networks:
    """Constructor arguments of diffusers' UNet3DConditionModel and of transformers' CLIPTextConfig, and the codec.

    upscales   the U-Net is SR600's (higen/families/modelscope/predictors.py)
    preview    the tiny decoder, if there is one
    """

    unet: dict[str, Any]
    clip: dict[str, Any]
    codec: Codec
    upscales: bool = field(default=False, metadata=LATER)
    preview: TinyDecoder | None = field(default=None, metadata=LATER)


def manifest(
    made_of: Networks, sampling: Sampling, *, name: str, licence: str, size: tuple[int, int], text: TextRules
) -> Manifest:
    """The tables of a model. `size`: default width and height in pixels, rounded down as the networks need.

    Raises ManifestError for networks that do not fit each other.
    """
    factor, widths = made_of.codec.factor, made_of.unet["block_out_channels"]
    # The lowest block on SR600's way up is special. If it is the only one, there are no deep features.
    deep = None if made_of.upscales and len(widths) == 1 else widths[0]
    return Manifest(
        name=name,
        licence=licence,
        family=FAMILY,
        architecture=to_json(made_of),
        prompts=("an astronaut riding a horse", "a panda eating bamboo on a rock"),
        sizes=unet_sizes(
            made_of.unet, made_of.clip, factor, size, FRAMES, multiple=factor if made_of.upscales else None
        ),
        text=text,
        controls=_UPSCALER_CONTROLS if made_of.upscales else _CONTROLS,
        stages=(
            text_encoder_stage(TEXT_ENCODER, "Dc"),
            *solver_stages("temporal_unet", "temporal_unet_plain", UNET, "F", TEXT_CONDITIONS, deep),
            *autoencoder_stages(AUTOENCODER, "video", "clip"),
        ),
        loops=(_upscaling(sampling) if made_of.upscales else _loop(sampling),),
    )


def _loop(sampling: Sampling) -> Loop:
    start = Start("video", "vae_encoder.latents", "control:strength")
    return denoising_loop("temporal", "temporal_unet", "F", sampling, start=start, known=KNOWN)


def _upscaling(sampling: Sampling) -> Loop:
    start = Start("video", "vae_encoder.latents", "control:strength", needed=True)
    return denoising_loop("temporal", "temporal_unet", "F", sampling, start=start, tiles=TILES)


def networks(manifest: Manifest) -> Networks:
    """The networks in a manifest. Raises ManifestError if it is a model of another family."""
    if manifest.family != FAMILY:
        raise ManifestError(f"family={manifest.family!r}: {FAMILY} is wanted here")
    return from_json(Networks, manifest.architecture, "architecture", whole=True)
