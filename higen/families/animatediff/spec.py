"""AnimateDiff's tables (docs/manifest.md). Only data, no PyTorch.

text_encoder -> temporal_unet x steps -> vae_decoder       a clip
text_encoder -> spatial_unet x steps -> vae_decoder        one frame, with the same weights without the motion modules
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from higen.errors import ManifestError
from higen.families.preview_rows import TinyDecoder
from higen.families.stable_diffusion.spec import Codec
from higen.families.stage_rows import (
    CONTROL_MAP,
    KNOWN,
    TEXT_CONDITIONS,
    Sampling,
    autoencoder_stages,
    controlled,
    controlled_stages,
    denoising_loop,
    known_frames_controls,
    map_controls,
    scale_condition,
    scale_control,
    solver_stages,
    strength_control,
    text_encoder_stage,
    unet_sizes,
)
from higen.manifest import Manifest
from higen.stages import Stage, Tensor
from higen.tables import Control, Loop, Start, TextRules, Variant, Windows
from higen.typed_json import LATER, from_json, to_json

__all__ = ["AUTOENCODER", "CLIP", "FAMILY", "FRAME", "GROUP_NORMS", "TEXT_ENCODER", "TOKENIZER", "UNET"]
__all__ += ["STEPS", "Networks", "manifest", "networks", "takes_latents"]

FAMILY = "animatediff"
UNET, TEXT_ENCODER, AUTOENCODER = "unet.safetensors", "text_encoder.safetensors", "vae.safetensors"
TOKENIZER = "tokenizer.json"

FRAME, CLIP = "frame", "clip"
GROUP_NORMS = (FRAME, CLIP)
"""The range of a motion module's group norm statistics: each frame separately, as in the authors' code, or all frames
of a clip, as in diffusers.
"""

STRENGTH = 0.6
"""Default of the control `strength`: how much of a given video is redrawn."""

FRAMES = 16
"""The clip length in the training of the published motion modules. Longer clips are made in windows of this length."""

LONGEST = 512
"""The most frames of a clip that is made in windows."""


STEPS = 25


@dataclass(frozen=True)
class Networks:
    """Constructor arguments of diffusers' UNetMotionModel and of transformers' CLIPTextConfig, and the codec.

    group_norm   one of `GROUP_NORMS`
    control      arguments of diffusers' ControlNetModel, if there is one
    sparse_control   arguments of diffusers' SparseControlNetModel, if there is one
    preview      the tiny decoder, if there is one
    """

    unet: dict[str, Any]
    clip: dict[str, Any]
    codec: Codec
    group_norm: str
    control: dict[str, Any] | None = field(default=None, metadata=LATER)
    sparse_control: dict[str, Any] | None = field(default=None, metadata=LATER)
    preview: TinyDecoder | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        if self.control is not None and self.sparse_control is not None:
            raise ManifestError("control, sparse_control: one of them")
        if self.group_norm not in GROUP_NORMS:
            raise ManifestError(f"group_norm={self.group_norm!r}: one of {', '.join(map(repr, GROUP_NORMS))}")

    @property
    def most_frames(self) -> int:
        """The length of the motion modules' table of positions; of two tables, the shorter one."""
        own = int(self.unet["motion_max_seq_length"])
        return own if self.sparse_control is None else min(own, int(self.sparse_control["motion_max_seq_length"]))


def manifest(
    made_of: Networks,
    image: Sampling,
    clip: Sampling,
    *,
    name: str,
    licence: str,
    size: int,
    text: TextRules,
    edges: bool = False,
) -> Manifest:
    """The tables of a model.

    image, clip   how one frame and a clip are sampled
    size          default width and height in pixels
    edges         the control map is the edges of a given picture

    Raises ManifestError for networks that do not fit each other.
    """
    length, control, sparse = min(FRAMES, made_of.most_frames), made_of.control is not None, made_of.sparse_control
    windows = Windows(length, max(1, length // 2), made_of.most_frames, "shuffled")
    return Manifest(
        name=name,
        licence=licence,
        family=FAMILY,
        architecture=to_json(made_of),
        prompts=("a photograph of an astronaut riding a horse", "waves breaking on a beach at sunset"),
        sizes=unet_sizes(
            made_of.unet,
            made_of.clip,
            made_of.codec.factor,
            (size, size),
            (1, min(FRAMES, made_of.most_frames), LONGEST),
        ),
        text=text,
        controls=(
            Control("video", "clip", "a video to start from"),
            strength_control("video", STRENGTH),
            *known_frames_controls(),
            *(map_controls(edges) if control else ()),
            *(() if sparse is None else _frames_controls()),
        ),
        stages=_stages(made_of.unet["block_out_channels"][0], control, sparse),
        # Neither loop takes latents from the other, so only the last loop is run.
        loops=(
            denoising_loop("spatial", "spatial_unet", 1, image, variant=_variant("spatial_unet", control)),
            _temporal(clip, windows, control or sparse is not None),
        ),
    )


def _variant(stage: str, control: bool) -> Variant | None:
    return controlled(stage) if control else None


def _temporal(sampling: Sampling, windows: Windows, control: bool) -> Loop:
    start = Start("video", "vae_encoder.latents", "control:strength")
    more = {"least_frames": 2, "start": start, "known": KNOWN, "windows": windows}
    variant = _variant("temporal_unet", control)
    return denoising_loop("temporal", "temporal_unet", "F", sampling, purpose=1, variant=variant, **more)


def takes_latents(sparse: Mapping[str, Any]) -> bool:
    """Whether a SparseControlNetModel with these arguments is shown the latents of pictures, not the pictures."""
    return bool(sparse.get("use_simplified_condition_embedding", True))


def _frames_controls() -> tuple[Control, Control]:
    """The controls of a SparseCtrl network."""
    meaning = "pictures that single frames of the clip follow, by index: 0 is the first, -1 the last"
    return Control(CONTROL_MAP, "frames", meaning), scale_control()


def _frames_conditions(sparse: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The additional inputs of a step with a SparseCtrl network."""
    pixels = Tensor("control", ("B", 3, "F", "Y", "X"), source=f"frames:{CONTROL_MAP}")
    latents = Tensor("control", ("B", "C", "F", "H", "W"), source=f"vae_encoder@{CONTROL_MAP}.latents")
    places = Tensor("control_places", ("B", "F"), source=f"places:{CONTROL_MAP}")
    masked = (places,) if sparse.get("concat_conditioning_mask", True) else ()
    return (latents if takes_latents(sparse) else pixels, *masked, scale_condition("F"))


def _stages(deep: int, control: bool, sparse: Mapping[str, Any] | None) -> tuple[Stage, ...]:
    return (
        text_encoder_stage(TEXT_ENCODER, "Dc"),
        *solver_stages("spatial_unet", "spatial_unet_plain", UNET, 1, TEXT_CONDITIONS, deep),
        *(controlled_stages("spatial_unet", UNET, 1, deep) if control else ()),
        *solver_stages("temporal_unet", "temporal_unet_plain", UNET, "F", TEXT_CONDITIONS, deep),
        *(controlled_stages("temporal_unet", UNET, "F", deep) if control else ()),
        *(() if sparse is None else controlled_stages("temporal_unet", UNET, "F", deep, _frames_conditions(sparse))),
        *autoencoder_stages(AUTOENCODER, "video", "clip"),
    )


def networks(manifest: Manifest) -> Networks:
    """The networks in a manifest. Raises ManifestError if it is a model of another family."""
    if manifest.family != FAMILY:
        raise ManifestError(f"family={manifest.family!r}: {FAMILY} is wanted here")
    made_of = from_json(Networks, manifest.architecture, "architecture", whole=True)
    for loop in manifest.loops:
        windows, known = loop.windows, f"the motion modules know the positions of {made_of.most_frames} frames"
        if windows is not None and (windows.most or windows.length) > made_of.most_frames:
            raise ManifestError(f"loops.{loop.name}.windows: {windows.most or windows.length} frames at once: {known}")
        if windows is None and loop.frames != 1 and manifest.sizes.frames[2] > made_of.most_frames:
            raise ManifestError(f"sizes.frames={list(manifest.sizes.frames)}: {known}; or give it windows")
    return made_of
