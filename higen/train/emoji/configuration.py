"""The recipe's settings, from recipe.toml and architecture.toml in this folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from higen.families.higen.spec import ModelConfig
from higen.text_files import read_toml
from higen.train.emoji.subjects import vocabulary
from higen.train.networks import read_architecture
from higen.train.sections import at_least
from higen.train.settings import DistilSettings, LoraSettings, OptimiserSettings, Settings, read_settings
from higen.train.words import with_words
from higen.typed_json import from_json

__all__ = ["CODEC", "DECODER", "FEW_STEPS", "KNOWN_FRAMES", "WORDS"]
__all__ += ["CodecSettings", "FewSteps", "Further", "KnownFrames", "architecture", "recipe"]

FILE = Path(__file__).with_name("recipe.toml")
OWN = ("codec", "decoder", "known_frames", "few_steps")
"""Sections of the file that only this recipe uses."""
WORDS = (*vocabulary(), ",")


@dataclass(frozen=True)
class CodecSettings:
    """How a codec, or only its decoder, is trained. Loss weights multiply terms measured on RGB in [-1, 1]."""

    optimiser: OptimiserSettings
    steps: int | None = None
    """None: as many steps as the given time allows."""
    batch: int = 16
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    save_seconds: float = 120.0
    noise: float = 0.15
    """Latents are decoded with noise, because the sampler's are not exact. Its deviation is drawn from 0 to this."""
    mse_weight: float = 0.5
    edge_weight: float = 0.5
    detail_weight: float = 0.0
    """Weight of the amount of fine detail, whatever its place."""
    subject_weight: float = 2.0
    """Extra weight of the subject's pixels. The few backgrounds are learned soon."""
    prior_weight: float = 0.02

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch")
        at_least(self, 0, "seed", "save_seconds", "noise")
        at_least(self, 0, *(f"{name}_weight" for name in ("mse", "edge", "detail", "subject", "prior")))


@dataclass(frozen=True, kw_only=True)
class Further:
    """A run that trains a finished model further. `images` and `videos`: samples of a training step."""

    optimiser: OptimiserSettings
    steps: int
    images: int = 0
    videos: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    save_every: int = 50
    log_every: int = 25
    measure_every: int = 50
    """Steps between two measurements on held-out combinations."""


@dataclass(frozen=True, kw_only=True)
class KnownFrames(Further):
    """How the layers for known frames are trained.

    sets                    fractions of clips, by the frames that are given (objective.known)
    noise                   deviation of the noise on given frames, drawn from 0 to this
    high_part, high_levels  as in the objective
    """

    sets: dict[str, float]
    noise: float = 0.05
    high_part: float = 0.6
    high_levels: float = 0.002


@dataclass(frozen=True, kw_only=True)
class FewSteps(Further):
    """How a model of few steps is distilled from the model."""

    distil: DistilSettings
    lora: LoraSettings


@cache
def _file() -> dict[str, Any]:
    return read_toml(FILE)


@cache
def recipe() -> Settings:
    """How the denoiser is trained. Its paths are placeholders."""
    return read_settings(FILE, without=OWN)


@cache
def architecture() -> ModelConfig:
    """The built-in model's configuration without autoencoder and prompts. Its vocabulary is that of the captions."""
    config = read_architecture(FILE.with_name("architecture.toml"), ModelConfig())
    # TOML has no null. With None, a request without cues leaves both cues out.
    defaults = replace(config.defaults, motion=None, appearance=None)
    return replace(config, text=with_words(config.text, len(WORDS)), defaults=defaults)


CODEC, DECODER = (from_json(CodecSettings, _file()[name], f"{FILE.name}.{name}") for name in ("codec", "decoder"))
KNOWN_FRAMES = from_json(KnownFrames, _file()["known_frames"], f"{FILE.name}.known_frames")
FEW_STEPS = from_json(FewSteps, _file()["few_steps"], f"{FILE.name}.few_steps")
