"""AnimateDiff's tables (docs/manifest.md): data alone, no PyTorch.

text_encoder -> temporal_unet x steps -> vae_decoder       a clip
text_encoder -> spatial_unet x steps -> vae_decoder        one frame: the same weights without the motion modules
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from higen.errors import ManifestError
from higen.families.stable_diffusion.spec import Codec
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
from higen.schedule import NoiseSchedule, Solver
from higen.stages import Stage
from higen.tables import Control, Loop, NoiseRule, Sizes, Start, TextRules
from higen.typed_json import from_json, to_json

__all__ = ["AUTOENCODER", "CLIP", "FAMILY", "FRAME", "GROUP_NORMS", "TEXT_ENCODER", "TOKENIZER", "UNET"]
__all__ += ["Networks", "Sampling", "manifest", "networks"]

FAMILY = "animatediff"
UNET, TEXT_ENCODER, AUTOENCODER = "unet.safetensors", "text_encoder.safetensors", "vae.safetensors"
TOKENIZER = "tokenizer.json"

FRAME, CLIP = "frame", "clip"
GROUP_NORMS = (FRAME, CLIP)
"""What a motion module's group norm takes its statistics over: each frame alone, as in the authors' code, or all frames
of a clip, as in diffusers.
"""

STRENGTH = 0.6
"""Of a video to begin from."""

FRAMES = 16
"""The length that the published motion modules were trained at."""


@dataclass(frozen=True)
class Networks:
    """Constructors' arguments of diffusers' UNetMotionModel, of transformers' CLIPTextConfig, and the codec.

    group_norm   one of `GROUP_NORMS`
    """

    unet: dict[str, Any]
    clip: dict[str, Any]
    codec: Codec
    group_norm: str

    def __post_init__(self) -> None:
        if self.group_norm not in GROUP_NORMS:
            raise ManifestError(f"group_norm={self.group_norm!r}: one of {', '.join(map(repr, GROUP_NORMS))}")

    @property
    def most_frames(self) -> int:
        """The length of the motion modules' table of positions."""
        return int(self.unet["motion_max_seq_length"])


@dataclass(frozen=True)
class Sampling:
    """How a loop is sampled; the default solver stands first."""

    schedule: NoiseSchedule
    prediction: str
    solvers: tuple[Solver, ...]
    steps: int = 25
    guidance: float = 7.5


def manifest(
    made_of: Networks, image: Sampling, clip: Sampling, *, name: str, licence: str, size: int, text: TextRules
) -> Manifest:
    """The tables of a model. `image`, `clip`: how one frame and a clip are sampled; `size`: width and height by
    default, in pixels.

    Raises ManifestError for networks that do not fit each other.
    """
    unet, factor = made_of.unet, made_of.codec.factor
    multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    side = max(multiple, size // multiple * multiple)
    return Manifest(
        name=name,
        licence=licence,
        family=FAMILY,
        architecture=to_json(made_of),
        prompts=("a photograph of an astronaut riding a horse", "waves breaking on a beach at sunset"),
        sizes=Sizes(
            symbols={"L": text.length, "C": unet["in_channels"], "Dc": made_of.clip["hidden_size"]},
            factor=factor,
            multiple=multiple,
            width=side,
            height=side,
            fps=8,
            frames=(1, min(FRAMES, made_of.most_frames), made_of.most_frames),
            decoder="vae_decoder",
            chunk=2,
        ),
        text=text,
        controls=(
            Control("video", "clip", "a video to begin from"),
            strength_control("video", STRENGTH),
            *known_frames_controls(),
        ),
        stages=_stages(),
        loops=_loops(image, clip),
    )


def _stages() -> tuple[Stage, ...]:
    return (
        text_encoder_stage(TEXT_ENCODER, "Dc"),
        *solver_stages("spatial_unet", "spatial_unet_plain", UNET, 1, TEXT_CONDITIONS),
        *solver_stages("temporal_unet", "temporal_unet_plain", UNET, "F", TEXT_CONDITIONS),
        *autoencoder_stages(AUTOENCODER, "video", "clip"),
    )


def _loops(image: Sampling, clip: Sampling) -> tuple[Loop, Loop]:
    """One frame, or a clip: no loop takes the latents of the other, so the last one alone is run."""
    spatial = Loop(
        name="spatial",
        guided="spatial_unet",
        plain="spatial_unet_plain",
        frames=1,
        schedule=image.schedule,
        prediction=image.prediction,
        solvers=image.solvers,
        steps=image.steps,
        guidance=image.guidance,
        noise=NoiseRule(purpose=0),
    )
    temporal = replace(
        spatial,
        name="temporal",
        guided="temporal_unet",
        plain="temporal_unet_plain",
        frames="F",
        least_frames=2,
        schedule=clip.schedule,
        prediction=clip.prediction,
        solvers=clip.solvers,
        steps=clip.steps,
        guidance=clip.guidance,
        noise=NoiseRule(purpose=1),
        start=Start("video", "vae_encoder.latents", "control:strength"),
        known=KNOWN,
    )
    return spatial, temporal


def networks(manifest: Manifest) -> Networks:
    """What a manifest's networks are. Raises ManifestError where it is no model of this family."""
    if manifest.family != FAMILY:
        raise ManifestError(f"family={manifest.family!r}: {FAMILY} is wanted here")
    made_of = from_json(Networks, manifest.architecture, "architecture", whole=True)
    if manifest.sizes.frames[2] > made_of.most_frames:
        raise ManifestError(
            f"sizes.frames={list(manifest.sizes.frames)}: the motion modules know the positions of "
            f"{made_of.most_frames} frames"
        )
    return made_of
