"""Stable Diffusion's tables (docs/manifest.md). Only data, no PyTorch.

text_encoder -> spatial_unet x steps -> vae_decoder
vae_encoder (image) -> the loop's last steps: image to image
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from higen.errors import ManifestError
from higen.families.preview_rows import TinyDecoder
from higen.families.stage_rows import (
    KNOWN,
    TEXT_CONDITIONS,
    Sampling,
    autoencoder_stages,
    clip_text,
    controlled,
    controlled_stages,
    denoising_loop,
    known_frames_controls,
    map_controls,
    solver_stages,
    strength_control,
    text_encoder_stage,
    unet_sizes,
)
from higen.manifest import Manifest
from higen.stages import Stage
from higen.tables import Control, Start
from higen.typed_json import LATER, from_json, to_json

__all__ = ["AUTOENCODER", "FAMILY", "TEXT_ENCODER", "TOKENIZER", "UNET", "Codec", "Networks"]
__all__ += ["manifest", "networks"]

FAMILY = "stable_diffusion"
UNET, TEXT_ENCODER, AUTOENCODER = "unet.safetensors", "text_encoder.safetensors", "vae.safetensors"
TOKENIZER = "tokenizer.json"

STRENGTH = 0.8
"""The fraction of the steps that run on a given picture by default, as in diffusers' image-to-image pipeline."""


@dataclass(frozen=True)
class Codec:
    """diffusers' AutoencoderKL by its constructor arguments; latents = (encoded - shift) * scale."""

    arguments: dict[str, Any]
    shift: float = 0.0
    scale: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent cell."""
        return int(2 ** (len(self.arguments["block_out_channels"]) - 1))  # as `kl_numbers`, without PyTorch


@dataclass(frozen=True)
class Networks:
    """Constructor arguments of diffusers' UNet2DConditionModel and of transformers' CLIPTextConfig, and the codec.

    control  arguments of diffusers' ControlNetModel, if there is one
    preview  the tiny decoder, if there is one
    """

    unet: dict[str, Any]
    clip: dict[str, Any]
    codec: Codec
    control: dict[str, Any] | None = field(default=None, metadata=LATER)
    preview: TinyDecoder | None = field(default=None, metadata=LATER)


_START = Start("image", "vae_encoder.latents", "control:strength")


def manifest(
    made_of: Networks, sampling: Sampling, *, name: str, licence: str, size: int, pad_id: int, edges: bool = False
) -> Manifest:
    """The tables of a model.

    size     default width and height in pixels
    pad_id   the padding token after a prompt
    edges    the control map is the edges of a given picture

    Raises ManifestError for networks that do not fit each other.
    """
    return Manifest(
        name=name,
        licence=licence,
        family=FAMILY,
        architecture=to_json(made_of),
        prompts=("a photograph of an astronaut riding a horse", "a red apple on a wooden table"),
        sizes=unet_sizes(made_of.unet, made_of.clip, made_of.codec.factor, (size, size), (1, 1, 1)),
        text=clip_text(TOKENIZER, made_of.clip["max_position_embeddings"], pad_id),
        controls=(
            Control("image", "picture", "a picture to start from"),
            strength_control("picture", STRENGTH),
            *known_frames_controls(),
            *(() if made_of.control is None else map_controls(edges)),
        ),
        stages=_stages(made_of.unet["block_out_channels"][0], made_of.control is not None),
        loops=(
            denoising_loop(
                "spatial",
                "spatial_unet",
                1,
                sampling,
                start=_START,
                known=KNOWN,
                variant=None if made_of.control is None else controlled("spatial_unet"),
            ),
        ),
    )


def _stages(deep: int, control: bool) -> tuple[Stage, ...]:
    return (
        text_encoder_stage(TEXT_ENCODER, "Dc"),
        *solver_stages("spatial_unet", "spatial_unet_plain", UNET, 1, TEXT_CONDITIONS, deep),
        *(controlled_stages("spatial_unet", UNET, 1, deep) if control else ()),
        *autoencoder_stages(AUTOENCODER, "image"),
    )


def networks(manifest: Manifest) -> Networks:
    """The networks in a manifest. Raises ManifestError if it is a model of another family."""
    if manifest.family != FAMILY:
        raise ManifestError(f"family={manifest.family!r}: {FAMILY} is wanted here")
    return from_json(Networks, manifest.architecture, "architecture", whole=True)
