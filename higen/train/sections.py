"""The sections of a training run's settings, each with the checks of its own keys (`higen.train.settings`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from higen.errors import SettingsError

__all__ = [
    "KNOWN_SETS",
    "CodecSettings",
    "CueSettings",
    "DataSettings",
    "LoraSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimiserSettings",
    "RunSettings",
    "key_index",
]

MOST_MIX = 1000.0
"""Largest magnitude of noise_mix."""


def key_index(frames: int, key_frame: float) -> int:
    """Index of the key frame of a clip."""
    return int(frames * key_frame)


def at_least(section: object, least: float, *names: str) -> None:
    """Raise SettingsError for a field of `section` that is below `least` or not a number; None is allowed."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= least:
            raise SettingsError(f"{name}={value}: {least} or more")


def _part(section: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(section, name) <= 1:
            raise SettingsError(f"{name}={getattr(section, name)}: a part, from 0 to 1")


@dataclass(frozen=True)
class ModelSettings:
    """What is trained: an existing model (`init`), or a new model with an architecture and a model's companions."""

    init: str | None = None
    """Model directory to fine-tune."""
    architecture: str | None = None
    """JSON or TOML file with a ModelConfig. If `text` or `autoencoder` is left out, it is the companions'."""
    companions: str | None = None
    """Model directory from which a new architecture takes text encoder, autoencoder and tokenizer."""
    tokenizer: Literal["companions", "captions"] = "companions"
    """captions: one token for each word of the data set. With architecture the text encoder is new too. With init it
    keeps its layers, and the embeddings of the words that it knew."""
    name: str | None = None
    licence: str | None = None
    known_frames: bool = False
    """Give a model inputs for known frames (objective.known). Their weights start at zero, so it draws as before. With
    optimiser.layers = "known", clips with known frames get temporal layers of their own."""

    def __post_init__(self) -> None:
        if self.known_frames and self.init is None:
            raise SettingsError("known_frames: only with init; in an architecture file, set unet.known_frames")
        if (self.init is None) == (self.architecture is None):
            raise SettingsError(
                "init, architecture: give one of the two, a model directory to fine-tune or an architecture file"
            )
        if (self.architecture is None) != (self.companions is None):
            raise SettingsError(
                "companions: give them with architecture, and only with it (a model directory for autoencoder and text)"
            )


@dataclass(frozen=True)
class DataSettings:
    """Where the clips are and how they are cut. A size that is not given is the model's default."""

    path: str
    """Folder (with clip.mp4 and clip.txt), or .jsonl or .csv file with `path` and `caption`."""
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    fps: int | None = None
    held_out: str | None = None
    """Another data set, written like `path`, on which the losses of the averaged weights are measured."""
    held_out_steps: int = 4
    """Batches per measurement. They are always the same, and as large as those of a step."""
    images: int = 4
    """Pictures per step, over all processes."""
    videos: int = 2
    """Clips per step, over all processes."""
    key_frames: bool = True
    """The key frame of each clip counts as a picture too."""
    key_frame: float = 0.5
    """Place of the key frame in a clip, from 0 to below 1. It is the clip's prior, and the picture for key_frames."""
    crop: Literal["centre", "random"] = "centre"
    start: Literal["centre", "random"] = "centre"
    """Which part is taken of a video that is longer than a clip."""
    cache: str | None = None
    """Folder for cached latents; needs crop and start in the centre."""
    workers: int = 2
    """Threads that read the next step's files; 0: none."""

    def __post_init__(self) -> None:
        at_least(self, 0, "images", "videos", "workers")
        at_least(self, 1, "width", "height", "fps", "held_out_steps")
        at_least(self, 2, "frames")
        if not self.images and not self.videos:
            raise SettingsError("images=0, videos=0: at least one of them from 1")
        if not 0 <= self.key_frame < 1:
            raise SettingsError(f"key_frame={self.key_frame}: a place in the clip, from 0 to below 1")
        if self.cache is not None and (self.crop, self.start) != ("centre", "centre"):
            raise SettingsError(
                "cache: needs crop = 'centre' and start = 'centre', because random crops are never read again"
            )


@dataclass(frozen=True)
class CueSettings:
    """How the cues are measured, and how they are given to the network."""

    appearance: Literal["latents", "openclip"] = "latents"
    """Features to compare between frames: the latents, or OpenCLIP's picture embeddings (the reference: ViT-H/14)."""
    openclip: str | None = None
    """Folder of a CLIP picture tower in transformers' format."""
    as_numbers: float = 0.0
    """Fraction of the clips for which each cue is given as a single number, as users give it."""
    dropout: float = 0.0
    """Fraction of the clips with an unspecified cue, drawn separately for each cue; for models with optional_cues."""
    given: tuple[float, ...] = ()
    """Instead of dropout: fractions of clips with neither cue, only motion, only appearance, and both."""

    def __post_init__(self) -> None:
        _part(self, "as_numbers", "dropout")
        if self.given and not (
            len(self.given) == 4 and all(part >= 0 for part in self.given) and math.isclose(sum(self.given), 1)
        ):
            raise SettingsError(f"given={list(self.given)}: four parts that add up to 1")
        if self.given and self.dropout:
            raise SettingsError(
                f"dropout={self.dropout}: 0 together with given, which already sets how often each cue is left out"
            )
        if (self.appearance == "openclip") != (self.openclip is not None):
            raise SettingsError("appearance='openclip' and openclip (the tower's folder) go together")


KNOWN_SETS = ("none", "first", "ends", "second", "prefix", "one", "some")
"""Which frames of a clip are given (`draws.draw_known`)."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """v-prediction; see higen.train.objective."""

    text_dropout: float = 0.1
    """Fraction of the captions that are replaced by the empty prompt, for the unconditional branch of guidance."""
    offset_noise: float = 0.1
    """Deviation of extra noise that is constant over the pixels of a frame."""
    noise_mix: float | None = None
    """How much of a clip's prior is added to its noise (MicroCinema's appearance noise prior). The trained model draws
    its initial noise in the same way. Not given: that of the model that training starts from."""
    gain_weight: float = 0.1
    """Weight of the gain's loss (its likelihood), for models with prior preconditioning."""
    gain_clips: int = 0
    """Whole clips per step, over all processes, that train only the gain: how much a clip moves for its text and cues.
    The U-Net does not run for them. For models with prior preconditioning."""
    high_part: float = 0.0
    """Fraction of the pictures and clips with one of the highest noise levels, where only text, cues and prior say what
    to draw."""
    high_levels: float = 0.12
    """Fraction of the noise levels that count as the highest."""
    clip_levels: Literal["uniform", "high"] = "uniform"
    """Distribution of the other noise levels of clips. high: high levels are more frequent (the square root of a
    uniform number), because they decide the motion."""
    prior_noise: float = 0.0
    """Noise is added to a clip's prior, with a deviation that is drawn from 0 to this."""
    windows: tuple[int, ...] = ()
    """Lengths of the windows that clips are cut to. Each step draws one length. The number of windows is such that they
    have as many frames as data.videos whole clips. Not given: whole clips."""
    late_windows: tuple[int, ...] = ()
    """The same for the second half of the run. Not given: `windows`."""
    known: dict[str, float] = field(default_factory=dict)
    """Fractions of clips, by the frames that are given; they add up to 1. For models with known_frames. none; first;
    ends (first and last); second (every second); prefix (the first few); one (any single frame); some (each with the
    same chance). Not given: no frames are given."""
    known_noise: float = 0.0
    """Noise is added to given frames, with a deviation that is drawn from 0 to this."""

    def __post_init__(self) -> None:
        _part(self, "text_dropout", "high_part", "high_levels")
        at_least(self, 0, "offset_noise", "gain_weight", "gain_clips", "prior_noise", "known_noise")
        if self.noise_mix is not None and not abs(self.noise_mix) <= MOST_MIX:
            raise SettingsError(f"noise_mix={self.noise_mix}: a number from -{MOST_MIX:g} to {MOST_MIX:g}")
        for name in ("windows", "late_windows"):
            if any(length < 2 for length in getattr(self, name)):
                raise SettingsError(f"{name}={list(getattr(self, name))}: at least 2 frames each")
        if self.late_windows and not self.windows:
            raise SettingsError(f"late_windows={list(self.late_windows)}: needs windows")
        if self.known:
            self._check_known()

    def _check_known(self) -> None:
        if unknown := sorted(set(self.known) - set(KNOWN_SETS)):
            raise SettingsError(f"known.{unknown[0]}: one of {', '.join(KNOWN_SETS)}")
        if any(part < 0 for part in self.known.values()) or not math.isclose(sum(self.known.values()), 1):
            raise SettingsError(f"known={self.known}: parts that add up to 1")


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW, linear warm-up, constant, cosine to zero; averaged weights."""

    learning_rate: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warm_up: int = 10
    decay_part: float = 1.0
    """Fraction of the steps, at the end, over which the learning rate falls."""
    last_rate: float = 0.0
    """Final learning rate, as a fraction of learning_rate."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    ema: float = 0.9999
    spatial_gradient: float = 1.0
    """Factor on the gradients of the spatial network (the reference: 0.5)."""
    train_text: bool = False
    layers: Literal["all", "spatial", "temporal", "known"] = "all"
    """Which layers of the denoiser are trained. spatial: those of the still-picture network. temporal: those that only
    clips use. known: the temporal layers that only clips with known frames use. With temporal, key frames are drawn as
    before, and with known, everything without known frames. Then data.images must be 0."""

    def __post_init__(self) -> None:
        at_least(self, 0, "learning_rate", "weight_decay", "warm_up", "clip", "spatial_gradient")
        _part(self, "decay_part", "last_rate", "ema")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SettingsError(f"betas={list(self.betas)}: two numbers from 0 to below 1")


@dataclass(frozen=True)
class RunSettings:
    """Where the run is stored, how long it is, and what it writes on the way. A finished run may get more steps."""

    output: str
    steps: int
    seed: int = 0
    """From 0 to 2^32 - 1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    micro_batches: int = 1
    """Number of parts into which each process divides its samples of a step: the same step in less memory."""
    recompute: bool = False
    """Keep no activations inside the U-Net's blocks, and compute them again for the gradient. Saves more memory."""
    losses_in_turn: bool = False
    """Differentiate the losses of pictures and clips one after another: the same gradients, except for rounding, in
    less memory. Only for a single process."""
    save_every: int = 1000
    keep: int = 3
    log_every: int = 10
    held_out_every: int = 0
    """Steps between two measurements on data.held_out; 0: none."""
    sample_every: int = 0
    """Steps between two contact sheets; 0: none."""
    sample_prompts: tuple[str, ...] = ()
    threads: int | None = None
    """Number of threads for a process's arithmetic on the host. Not given: PyTorch's default."""
    tensorboard: bool | None = None
    """Write TensorBoard scalars. Not given: if TensorBoard is installed."""
    weights: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the trained weights in the model directory."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "micro_batches", "save_every", "keep", "log_every", "threads")
        at_least(self, 0, "sample_every", "held_out_every")
        if not 0 <= self.seed < 2**32:
            raise SettingsError(f"seed={self.seed}: from 0 to {2**32 - 1}")
        if self.sample_every and not self.sample_prompts:
            raise SettingsError(f"sample_every={self.sample_every}: needs sample_prompts")


@dataclass(frozen=True)
class CodecSettings:
    """Training of the autoencoder instead of the denoiser, on pictures and on frames of clips. The resulting model
    directory has its weights and the measured scale of its latents (higen.train.codec).
    """

    layers: Literal["none", "all", "decoder"] = "none"
    """none: the denoiser is trained. decoder: the latents do not change, so a denoiser for them remains usable."""
    frames: int = 4
    """Number of random frames from each clip of a step."""
    noise: float = 0.15
    """Before decoding, noise is added to the latents, which are scaled to a deviation of 1. Its deviation is drawn from
    0 to this. The latents that a denoiser draws are not exact either."""
    mse_weight: float = 0.5
    """Weight of the squared error. The absolute error has weight 1. Pixels are from -1 to 1."""
    edge_weight: float = 0.5
    """Weight of the absolute error of the differences between neighbouring pixels."""
    prior_weight: float = 0.02
    """Weight of each channel's distance from mean 0 and deviation 1."""
    memory: int = 1000
    """Megabytes of decoded clips to keep in memory, if crop and start are in the centre."""

    def __post_init__(self) -> None:
        at_least(self, 0, "noise", "mse_weight", "edge_weight", "prior_weight", "memory")
        at_least(self, 1, "frames")


@dataclass(frozen=True)
class DistilSettings:
    """Distillation: the model learns to draw in a few steps, without guidance, what it draws now
    (higen.train.distil). Pairs are for key frames (the spatial loop) and for clips (the temporal loop).
    """

    steps: tuple[int, ...] = ()
    """Steps of the distilled model; [0, N]: key frames are drawn as before. Not given: no distillation."""
    teacher_steps: tuple[int, ...] = ()
    """Steps of the teacher. Not given: the default steps of model.init."""
    teacher_guidance: tuple[float, ...] = ()
    """Guidance of the teacher. Not given: the default guidance of model.init."""
    target: Literal["teacher", "clip"] = "teacher"
    """What the distilled model learns to draw: what the teacher draws from the same noise, or the real key frame or
    clip. The real clip is right only if caption, cues and key frame say nearly all about it; otherwise clips blur."""

    def __post_init__(self) -> None:
        for name in ("steps", "teacher_steps", "teacher_guidance"):
            values = getattr(self, name)
            if values and len(values) != 2:
                raise SettingsError(f"{name}={list(values)}: two numbers, for key frames and for clips")
            if values and not self.steps:
                raise SettingsError(f"{name}={list(values)}: needs steps, those of the distilled model")
        if self.steps and not (self.steps[0] >= 0 and self.steps[1] >= 1):
            raise SettingsError(
                f"steps={list(self.steps)}: 0 or more for key frames and 1 or more for clips; "
                "key frames are not distilled alone, because the network for clips shares their layers"
            )
        if any(count < 1 for count in self.teacher_steps):
            raise SettingsError(f"teacher_steps={list(self.teacher_steps)}: 1 or more each")
        if any(not (math.isfinite(scale) and scale >= 0) for scale in self.teacher_guidance):
            raise SettingsError(f"teacher_guidance={list(self.teacher_guidance)}: finite, 0 or more each")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters of the denoiser's linear layers and convolutions, which are trained instead of its weights.
    They are also written to <output>/lora.safetensors. optimiser.layers says which layers have adapters.
    """

    rank: int = 0
    """Rank of the adapters; 0: no adapters."""
    alpha: float | None = None
    """An adapter is added with the factor alpha / rank. Not given: the rank."""
    scales: bool = False
    """The column `scale` of the data set's list gives the strength of the adapters for each item (default 1). Then
    `higen convert --lora FILE:SCALE` reproduces what items with that scale showed, for example -1 for the opposite.
    """

    def __post_init__(self) -> None:
        at_least(self, 0, "rank")
        if self.scales and not self.rank:
            raise SettingsError("scales=true: needs rank")
        if self.alpha is not None and not self.alpha > 0:
            raise SettingsError(f"alpha={self.alpha}: more than 0")
        if self.alpha is not None and not self.rank:
            raise SettingsError(f"alpha={self.alpha}: needs rank")
