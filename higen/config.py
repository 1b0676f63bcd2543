"""Architecture and recipe of a model, as frozen dataclasses: what the manifest stores and every module reads."""

from __future__ import annotations

import dataclasses
import reprlib
import sys
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from higen.errors import ManifestError

__all__ = [
    "AutoencoderConfig",
    "Defaults",
    "ModelConfig",
    "ScheduleConfig",
    "TextConfig",
    "UNetConfig",
    "from_json",
    "to_json",
]


def _check_positive(config: object) -> None:
    """Raise ManifestError for a whole number below 1, alone or in a tuple."""
    for name, value in vars(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and number < 1:
                raise ManifestError(f"{name}={value}: whole numbers from 1")


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. The default values are the released model's (1,483,201,924 parameters with its conditioner)."""

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
    """The temporal network learns the residual against the prior (design: prior preconditioning)."""
    pooled_context: bool = False
    """The mean context token is added to the time embedding."""

    def __post_init__(self) -> None:
        _check_positive(self)
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
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def embedding_dim(self) -> int:
        """Width E of the time, motion and appearance embeddings."""
        return 4 * self.base_channels

    @property
    def size_multiple(self) -> int:
        """Latent height and width must be multiples of this (one halving between two levels)."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule: SD's scaled-linear betas, rescaled to zero terminal SNR."""

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = True

    def __post_init__(self) -> None:
        if self.timesteps < 2 or not 0 < self.beta_start < self.beta_end < 1:
            raise ManifestError(f"{self}: at least 2 timesteps and 0 < beta_start < beta_end < 1")


@dataclass(frozen=True)
class TextConfig:
    """Text encoder: transformers' CLIPTextModel with `clip` as its keyword arguments, and the tokenizer's rules."""

    clip: dict[str, Any] = field(default_factory=dict)
    context_length: int = 77
    pad_id: int = 0
    clean: bool = True
    """Repair and normalise the prompt as CLIP does (ftfy, html unescape, white space, lower case)."""

    def __post_init__(self) -> None:
        if self.context_length < 3 or self.pad_id < 0:
            raise ManifestError(
                f"context_length={self.context_length}, pad_id={self.pad_id}: room for start, text and end, and an id"
            )


@dataclass(frozen=True)
class AutoencoderConfig:
    """Video frames to latents and back: one of diffusers' autoencoder classes.

    latents = (encoded - shift) * scale, per channel (one entry: for every channel).
    """

    kind: str = "AutoencoderKL"
    arguments: dict[str, Any] = field(default_factory=dict)
    factor: int = 8
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (0.18215,)

    def __post_init__(self) -> None:
        _check_positive(self)
        if not self.shift or not self.scale or 0 in self.scale:
            raise ManifestError(f"shift={self.shift}, scale={self.scale}: one number or one per channel, no scale 0")


@dataclass(frozen=True)
class Defaults:
    """What a request that does not say otherwise gets. Two numbers: spatial stage, temporal stage."""

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


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its weights."""

    name: str = "higen"
    licence: str = "Apache-2.0"
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    text: TextConfig = field(default_factory=TextConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    defaults: Defaults = field(default_factory=Defaults)
    max_frames: int = 256
    optional_cues: bool = False
    """The model was trained with cue dropout: motion and appearance may be left unspecified (None)."""
    prompts: tuple[str, ...] = ()
    """Prompts the model is known to draw well (for a small model: what it knows)."""


T = TypeVar("T")


def to_json(config: object) -> dict[str, Any]:
    """A dataclass of this module as JSON-ready dictionaries and lists."""
    return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))  # type: ignore[call-overload]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def from_json(kind: type[T], data: object, where: str = "") -> T:
    """Build the dataclass `kind` from JSON data, checking every key and every type.

    Raises ManifestError naming the key, its value and what is allowed.
    """
    where = where or kind.__name__
    if not isinstance(data, dict):
        raise ManifestError(f"{where}: an object is wanted, not {reprlib.repr(data)}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise ManifestError(f"{where}.{reprlib.repr(key)[1:-1]}: unknown key; known are {', '.join(names)}")
    values = {key: _typed(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError:  # no default
        raise ManifestError(f"{where}: has {', '.join(values) or 'nothing'}, but needs {', '.join(names)}") from None


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast("type[Any]", hint), value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, where)
    if origin is typing.Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise ManifestError(f"{where}={reprlib.repr(value)}: one of {', '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(value, list):
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) == len(value):
            return tuple(_typed(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return value
    elif hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise ManifestError(f"{where}={reprlib.repr(value)}: {hint if origin else hint.__name__} is wanted")
