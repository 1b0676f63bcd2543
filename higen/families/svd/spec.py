r"""Stable Video Diffusion's tables (docs/manifest.md). Only data, no PyTorch.

image -> image_encoder                    -> context          \
image, noise, augmentation -> vae_encoder -> prior             > temporal_unet x steps -> vae_decoder, 14 frames at once
fps, motion, augmentation -> conditioner  -> frame_embedding  /
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from higen.errors import ManifestError
from higen.families.stage_rows import Sampling, denoising_loop, solver_stages
from higen.manifest import Manifest
from higen.stages import Output, Stage, Tensor
from higen.tables import Control, Sizes
from higen.typed_json import from_json, to_json

__all__ = [
    "AUTOENCODER",
    "CHUNK",
    "FAMILY",
    "GUIDANCE",
    "IMAGE_ENCODER",
    "STEPS",
    "UNET",
    "Networks",
    "Vision",
    "controls",
]
__all__ += ["manifest", "networks"]

FAMILY = "svd"
UNET, IMAGE_ENCODER, AUTOENCODER = "unet.safetensors", "image_encoder.safetensors", "vae.safetensors"

STEPS, GUIDANCE = 25, (1.0, 3.0)
"""GUIDANCE: the values at the first and at the last frame."""

CHUNK = 14
"""The number of frames that are decoded at a time, as in the authors' script. The result depends on it."""

NOISE, AUGMENTATION = 4, 5
"""Purposes of noise streams: the initial latents, and the picture's pixels. The other families use 0 to 3."""

IMAGE = "image"


@dataclass(frozen=True)
class Vision:
    """The arguments of transformers' CLIPVisionConfig, and the mean and deviation for normalising pixels in 0 to 1."""

    arguments: dict[str, Any]
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    deviation: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Networks:
    """The networks: constructor arguments of diffusers' UNetSpatioTemporalConditionModel and
    AutoencoderKLTemporalDecoder, and the image encoder.

    scale  denoised latents = encoded latents * scale; the picture's latents are not scaled
    """

    unet: dict[str, Any]
    vision: Vision
    codec: dict[str, Any]
    scale: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent cell."""
        return int(2 ** (len(self.codec["block_out_channels"]) - 1))


def manifest(
    made_of: Networks, sampling: Sampling, *, name: str, licence: str, size: int, chunk: int, lowest: str
) -> Manifest:
    """The tables of a model.

    size    side in pixels of a square with as many pixels as a default frame, which is 16:9
    chunk   number of frames that are decoded at a time
    lowest  precision of the autoencoder's stages: "fp32", or "fp16" for one that does not overflow

    Raises ManifestError for networks that do not fit each other.
    """
    unet, factor = made_of.unet, made_of.factor
    multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    frames = unet["num_frames"]
    return Manifest(
        name=name,
        licence=licence,
        family=FAMILY,
        architecture=to_json(made_of),
        prompts=(),
        sizes=Sizes(
            symbols={
                "C": unet["out_channels"],
                "K": 1,
                "Dc": made_of.vision.arguments["projection_dim"],
                "E": 4 * unet["block_out_channels"][0],
            },
            factor=factor,
            multiple=multiple,
            width=_side(size * 4 / 3, multiple),
            height=_side(size * 3 / 4, multiple),
            fps=7,
            frames=(1, frames, 4 * frames),
            decoder="vae_decoder",
            chunk=chunk,
        ),
        text=None,
        controls=controls(),
        stages=_stages(made_of, "fp16" if lowest == "fp16" else "fp32"),
        loops=(denoising_loop("temporal", "temporal_unet", "F", sampling, purpose=NOISE),),
    )


def _side(pixels: float, multiple: int) -> int:
    return max(multiple, math.floor(pixels / multiple + 0.5) * multiple)


def controls() -> tuple[Control, ...]:
    """The controls of a request."""
    return (
        Control(IMAGE, "picture", "the picture that the clip starts with"),
        Control(
            "motion",
            "curve",
            "the motion bucket, one number or one per frame: a high value gives more motion",
            "curve",
            low=0.0,
            high=255.0,
            default=127.0,
        ),
        Control(
            "augmentation",
            "curve",
            "noise added to the picture, one number or one per frame (the picture takes the first): with more noise, "
            "the clip follows the picture less closely",
            "curve",
            low=0.0,
            high=10.0,
            default=0.02,
        ),
    )


def _stages(made_of: Networks, codec: Literal["fp32", "fp16"]) -> tuple[Stage, ...]:
    side = made_of.vision.arguments["image_size"]
    latents, pixels = ("B", "C", "F", "H", "W"), ("B", 3, "Y", "X")
    curve = Tensor("augmentation", ("B", "F"), source="control:augmentation")
    return (
        Stage(
            "image_encoder",
            IMAGE_ENCODER,
            (Tensor("pixels", ("B", 3, side, side), source=f"picture:{IMAGE}:clip"),),
            (Output("embedding", ("B", "K", "Dc")),),
        ),
        Stage(
            "vae_encoder",
            AUTOENCODER,
            (
                Tensor("pixels", pixels, source=f"picture:{IMAGE}"),
                Tensor("noise", pixels, source=f"noise:{AUGMENTATION}"),
                curve,
            ),
            (Output("prior", ("B", "C", "H", "W")),),
            lowest=codec,
        ),
        Stage(
            "conditioner",
            UNET,
            (
                Tensor("fps", ("B",), source="control:fps"),
                Tensor("motion", ("B", "F"), source="control:motion"),
                curve,
            ),
            (Output("frame_embedding", ("B", "F", "E")),),
        ),
        *solver_stages(
            "temporal_unet",
            "temporal_unet_plain",
            UNET,
            "F",
            (
                Tensor("context", ("B", "K", "Dc"), source="image_encoder.embedding"),
                Tensor("prior", ("B", "C", "H", "W"), source="vae_encoder.prior"),
                Tensor("frame_embedding", ("B", "F", "E"), source="conditioner.frame_embedding"),
            ),
            deep=made_of.unet["block_out_channels"][0],
        ),
        Stage(
            "vae_decoder",
            AUTOENCODER,
            (Tensor("latents", latents),),
            (Output("pixels", ("B", 3, "F", "Y", "X")),),
            lowest=codec,
            batch=False,  # its first axis is one clip
        ),
    )


def networks(manifest: Manifest) -> Networks:
    """The networks in a manifest. Raises ManifestError if it is a model of another family."""
    if manifest.family != FAMILY:
        raise ManifestError(f"family={manifest.family!r}: {FAMILY} is wanted here")
    return from_json(Networks, manifest.architecture, "architecture", whole=True)
