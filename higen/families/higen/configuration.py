"""A HiGen model's configuration: networks, schedule and defaults. Training writes it, and the tables are made from it.

No PyTorch: this module needs only the standard library and the types of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from higen.errors import ManifestError
from higen.schedule import NoiseSchedule
from higen.tables import TextRules
from higen.typed_json import LATER, check_positive, from_json, to_json

__all__ = [
    "TOKENIZER",
    "AutoencoderConfig",
    "Defaults",
    "FewStepPreset",
    "ModelConfig",
    "TextConfig",
    "UNetConfig",
    "read_config",
    "write_config",
]

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. The defaults are the released model's values (1,483,201,924 parameters with its conditioner)."""

    in_channels: int = 4
    out_channels: int = 4
    base_channels: int = 320
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    head_dim: int = 64
    first_temporal_heads: int = 8
    text_dim: int = 1024
    context_dim: int = 1024
    context_tokens: int = 16
    context_depth: int = 2
    context_heads: int = 8
    appearance_columns: int = 32
    dropout: float = 0.1
    prior_preconditioning: bool = False
    """The temporal network learns the residual against the prior (`preconditioning.velocity`)."""
    pooled_context: bool = False
    """The mean context token is added to the time embedding."""
    known_frames: bool = False
    """The temporal network takes known frames of the clip as inputs (`preconditioning.velocity`)."""
    known_layers: bool = False
    """A clip with known frames is drawn with temporal layers of its own, which take them as inputs. Clips without known
    frames do not use these layers, so `known_frames` is false."""

    def __post_init__(self) -> None:
        check_positive(self)
        if self.known_frames and self.known_layers:
            raise ManifestError("known_frames, known_layers: at most one of them")
        if not 0 <= self.dropout < 1:
            raise ManifestError(f"dropout={self.dropout}: from 0 to below 1")
        if self.embedding_dim % self.context_heads:
            raise ManifestError(f"context_heads={self.context_heads} does not divide the {self.embedding_dim} channels")
        if len(self.attention_levels) != len(self.channel_multipliers):
            raise ManifestError(
                f"attention_levels has {len(self.attention_levels)} entries: "
                f"one per level, here {len(self.channel_multipliers)}"
            )
        for width in (self.base_channels, *self.level_channels):
            if width % 32:
                raise ManifestError(f"a level of {width} channels: every width is a multiple of the 32 norm groups")
        for attends, width in zip(self.attention_levels, self.level_channels, strict=True):
            if attends and width % self.head_dim:
                raise ManifestError(f"head_dim={self.head_dim} does not divide the {width} channels of a level")

    @property
    def takes_known(self) -> bool:
        """Whether the model was made for known frames, in one of the two ways."""
        return self.known_frames or self.known_layers

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def embedding_dim(self) -> int:
        """Width E of the time, motion and appearance embeddings."""
        return 4 * self.base_channels

    @property
    def size_multiple(self) -> int:
        """Latent height and width must be multiples of this, because the size is halved between two levels."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class TextConfig:
    """The text encoder (transformers' CLIPTextModel, whose configuration is `clip`) and the tokenizer's rules."""

    clip: dict[str, Any] = field(default_factory=dict)
    context_length: int = 77
    pad_id: int = 0
    clean: bool = True
    """Repair and normalise the prompt as CLIP does (ftfy, html unescape, white space, lower case)."""

    def __post_init__(self) -> None:
        if self.context_length < 3 or self.pad_id < 0:
            raise ManifestError(
                f"context_length={self.context_length}, pad_id={self.pad_id}: context_length with room for start, "
                "text and end; pad_id from 0"
            )

    @property
    def rules(self) -> TextRules:
        """The text rules for the manifest."""
        return TextRules(TOKENIZER, self.context_length, self.pad_id, self.clean)


@dataclass(frozen=True)
class AutoencoderConfig:
    """The autoencoder between video frames and latents: one of diffusers' classes.

    latents = (encoded - shift) * scale, per channel; a single entry is for all channels.
    """

    kind: str = "AutoencoderKL"
    arguments: dict[str, Any] = field(default_factory=dict)
    factor: int = 8
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (0.18215,)

    def __post_init__(self) -> None:
        check_positive(self)
        if not self.shift or not self.scale or 0 in self.scale:
            raise ManifestError(f"shift={self.shift}, scale={self.scale}: one number or one per channel, no scale 0")


@dataclass(frozen=True)
class FewStepPreset:
    """A preset, mostly of few steps. Pairs are for the spatial loop and the temporal loop; None: the loop's own value.

    usual    used by a request that does not choose how to draw (higen/presets.py)
    stretch  factor for the difference of the clip's latents from the key frame's, because one step moves too little
    """

    name: str
    steps: tuple[int | None, int | None]
    guidance: tuple[float | None, float | None] = (1.0, 1.0)
    stretch: float | None = None
    usual: bool = field(default=False, metadata=LATER)


@dataclass(frozen=True)
class Defaults:
    """Default values of a request. Pairs are for the spatial loop and the temporal loop."""

    frames: int = 32
    width: int = 448
    height: int = 256
    fps: int = 8
    steps: tuple[int, int] = (50, 50)
    guidance: tuple[float, float] = (12.0, 12.0)
    solver: str = "ddim"
    motion: float | None = 500.0
    appearance: float | None = 1.0
    offset_noise: float = 0.1
    usual_motion: tuple[float, float] | None = field(default=None, metadata=LATER)
    """The motion of still clips and of fast clips. Sounds and words are mapped into this range."""
    noise_mix: float = 0.0
    """How much of the key frame's latents is added to the initial noise of a clip (MicroCinema's appearance noise
    prior). This is the value used in training."""
    stretch: float = 1.0
    """As in FewStepPreset, for requests without a preset."""
    presets: tuple[FewStepPreset, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model except its weights."""

    name: str = "higen"
    licence: str = "Apache-2.0"
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: NoiseSchedule = field(default_factory=lambda: NoiseSchedule(zero_terminal_snr=True))
    text: TextConfig = field(default_factory=TextConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    defaults: Defaults = field(default_factory=Defaults)
    max_frames: int = 256
    optional_cues: bool = False
    """The model was trained with cue dropout, so motion and appearance may be unspecified (None)."""
    prompts: tuple[str, ...] = ()
    """Prompts that the model is known to draw well. For a small model: all that it knows."""
    guided: tuple[bool, bool] = field(default=(True, True), metadata=LATER)
    """Whether the spatial loop and the temporal loop have steps with both branches of guidance. A loop that was
    distilled has only plain steps."""


@dataclass(frozen=True)
class _Betas:
    """The noise schedule in a configuration file: scaled-linear betas, rescaled to zero terminal SNR."""

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = True

    def __post_init__(self) -> None:
        if self.timesteps < 2 or not 0 < self.beta_start < self.beta_end < 1:
            raise ManifestError(f"{self}: at least 2 timesteps and 0 < beta_start < beta_end < 1")


def read_config(data: Mapping[str, Any], where: str = "") -> ModelConfig:
    """A configuration from JSON data, as in version 1 manifests and in training's configuration files.

    Missing keys get their defaults. Raises ManifestError with the key, its value and what is allowed.
    """
    betas = from_json(_Betas, data.get("schedule", {}), f"{where or 'ModelConfig'}.schedule")
    rest = from_json(ModelConfig, {key: value for key, value in data.items() if key != "schedule"}, where)
    return replace(rest, schedule=NoiseSchedule("scaled_linear", **vars(betas)))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The JSON data that `read_config` reads."""
    betas = {field.name: getattr(config.schedule, field.name) for field in fields(_Betas)}
    return {**to_json(config), "schedule": betas}
