"""The settings of a training run: a TOML file as frozen dataclasses (`higen train CONFIG.toml`).

    [model]                                  [objective]
    init = "models/higen"                    text_dropout = 0.1
    [data]                                   [optimiser]
    path = "clips.jsonl"                     learning_rate = 3e-5
    frames = 16                              spatial_gradient = 0.5
    images = 8                               [run]
    videos = 4                               output = "runs/first"
    [cues]                                   steps = 100_000
    appearance = "openclip"                  precision = "bf16"
    openclip = "CLIP-ViT-H-14"               sample_prompts = ["a whale"]

A relative path counts from the folder of the file. What is not given has the default below.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from higen.errors import ManifestError, SettingsError, quoted
from higen.paths import given_path
from higen.text_files import TextError, read_toml
from higen.train.list_files import check_as_prompt
from higen.typed_json import from_json, to_json

__all__ = [
    "CueSettings",
    "DataSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimiserSettings",
    "RunSettings",
    "Settings",
    "difference",
    "first_difference",
    "flat",
    "key_index",
    "read_settings",
]


def _at_least(section: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            raise SettingsError(f"{name}={value}: {least} or more")


def _part(section: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(section, name) <= 1:
            raise SettingsError(f"{name}={getattr(section, name)}: a part, from 0 to 1")


@dataclass(frozen=True)
class ModelSettings:
    """What is trained: a model directory goes on (`init`), or an architecture starts anew with a model's companions."""

    init: str | None = None
    """Model directory to fine-tune."""
    architecture: str | None = None
    """JSON or TOML file with a ModelConfig; `text` and `autoencoder`, left out, are the companions'."""
    companions: str | None = None
    """Model directory whose text encoder, autoencoder and tokenizer a new architecture takes."""
    tokenizer: Literal["companions", "captions"] = "companions"
    """captions: one token for each word of the data set; the text encoder then starts anew too."""
    name: str | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        if (self.init is None) == (self.architecture is None):
            raise SettingsError("init, architecture: one of the two, a model directory to fine-tune or a file")
        if (self.architecture is None) != (self.companions is None):
            raise SettingsError("companions: goes with architecture (a model directory for autoencoder and text)")
        if self.init is not None and self.tokenizer == "captions":
            raise SettingsError("tokenizer='captions': only with architecture; a fine-tuned model keeps its own words")


@dataclass(frozen=True)
class DataSettings:
    """Where the clips are and how they are cut. Sizes that are not given are the model's defaults."""

    path: str
    """Folder (clip.mp4 beside clip.txt), or .jsonl or .csv with `path` and `caption`."""
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    fps: int | None = None
    images: int = 4
    """Pictures per step, over all processes."""
    videos: int = 2
    """Clips per step, over all processes."""
    key_frames: bool = True
    """The key frame of each clip counts as a picture too."""
    key_frame: float = 0.5
    """Where in a clip its key frame is, from 0 to below 1: what a clip is made from, and the picture it counts as."""
    crop: Literal["centre", "random"] = "centre"
    start: Literal["centre", "random"] = "centre"
    """Which part of a video that is longer than a clip."""
    cache: str | None = None
    """Folder that keeps the latents; needs crop and start in the centre."""
    workers: int = 2
    """Threads that read the next step's files; 0: none."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "images", "videos", "workers")
        _at_least(self, 1, "width", "height", "fps")
        _at_least(self, 2, "frames")
        if not self.images and not self.videos:
            raise SettingsError("images=0, videos=0: at least one of them from 1")
        if not 0 <= self.key_frame < 1:
            raise SettingsError(f"key_frame={self.key_frame}: a place in the clip, from 0 to below 1")
        if self.cache is not None and (self.crop, self.start) != ("centre", "centre"):
            raise SettingsError("cache: needs crop = 'centre' and start = 'centre', or no file is ever read twice")


@dataclass(frozen=True)
class CueSettings:
    """How the cues are measured and told."""

    appearance: Literal["latents", "openclip"] = "latents"
    """What is compared between frames: the latents, or OpenCLIP's picture embeddings (the reference: ViT-H/14)."""
    openclip: str | None = None
    """Folder of a CLIP picture tower in transformers' format."""
    as_numbers: float = 0.0
    """Part of the clips whose cues are told as one number each, as a person gives them."""
    dropout: float = 0.0
    """Part of the clips of which a cue is left unspecified, each cue by itself; for models with optional_cues."""
    given: tuple[float, ...] = ()
    """In the place of dropout: how often a clip comes with neither cue, with motion, with appearance, and with both."""

    def __post_init__(self) -> None:
        _part(self, "as_numbers", "dropout")
        if self.given and not (
            len(self.given) == 4 and all(part >= 0 for part in self.given) and math.isclose(sum(self.given), 1)
        ):
            raise SettingsError(f"given={list(self.given)}: four parts that add up to 1")
        if self.given and self.dropout:
            raise SettingsError(f"dropout={self.dropout}: 0 beside given, which says how often each cue is left out")
        if (self.appearance == "openclip") != (self.openclip is not None):
            raise SettingsError("appearance='openclip' and openclip (the tower's folder) go together")


@dataclass(frozen=True)
class ObjectiveSettings:
    """v-prediction; see higen.train.objective."""

    text_dropout: float = 0.1
    """Part of the captions replaced by the empty prompt, which guidance starts from."""
    offset_noise: float = 0.1
    """Noise that is constant over each frame's pixels, added to the noise."""
    gain_weight: float = 0.1
    """Weight of the gain's likelihood, for models with prior preconditioning."""
    gain_clips: int = 0
    """Whole clips per step, over all processes, that teach the gain alone how much text and cues make a clip move. The
    U-Net does not run for them. For models with prior preconditioning."""
    high_part: float = 0.0
    """Part of the pictures and clips that have one of the highest noise levels, where text, cues and prior alone say
    what to draw."""
    high_levels: float = 0.12
    """How much of the noise levels, from the top, are the highest."""
    clip_levels: Literal["uniform", "high"] = "uniform"
    """The other noise levels of clips; high: more often high ones (the root of a uniform number), where motion is
    decided."""
    prior_noise: float = 0.0
    """Deviation of the noise that is added to a clip's prior is drawn from 0 to this."""
    windows: tuple[int, ...] = ()
    """Lengths of the windows that clips are cut to, one of them for each step; their number makes up the frames of
    data.videos whole clips. Not given: whole clips."""
    late_windows: tuple[int, ...] = ()
    """The same for the second half of the run. Not given: as before."""

    def __post_init__(self) -> None:
        _part(self, "text_dropout", "high_part", "high_levels")
        _at_least(self, 0, "offset_noise", "gain_weight", "gain_clips", "prior_noise")
        for name in ("windows", "late_windows"):
            if any(length < 2 for length in getattr(self, name)):
                raise SettingsError(f"{name}={list(getattr(self, name))}: each 2 frames or more")
        if self.late_windows and not self.windows:
            raise SettingsError(f"late_windows={list(self.late_windows)}: needs windows")


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW, linear warm-up, constant, cosine to zero; averaged weights."""

    learning_rate: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warm_up: int = 10
    decay_part: float = 1.0
    """Last part of the steps over which the rate falls."""
    last_rate: float = 0.0
    """What the rate falls to, as a part of learning_rate."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: any."""
    ema: float = 0.9999
    spatial_gradient: float = 1.0
    """Factor on the gradients of the spatial network (the reference: 0.5)."""
    train_text: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 0, "learning_rate", "weight_decay", "warm_up", "clip", "spatial_gradient")
        _part(self, "decay_part", "last_rate", "ema")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SettingsError(f"betas={list(self.betas)}: two numbers from 0 to below 1")


@dataclass(frozen=True)
class RunSettings:
    """Where the run lives, how long it is, and what it writes on the way."""

    output: str
    steps: int
    seed: int = 0
    """From 0 to 2^32 - 1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    micro_batches: int = 1
    """Parts in which each process takes its samples of a step, one after another: the same step in less memory."""
    recompute: bool = False
    """Keep no activations inside the U-Net's blocks and compute them again for the gradient: less memory still."""
    losses_in_turn: bool = False
    """Differentiate the losses of pictures and clips one after another: the same gradients, but for rounding, in less
    memory. For one process."""
    save_every: int = 1000
    keep: int = 3
    log_every: int = 10
    sample_every: int = 0
    """Steps between two contact sheets; 0: none."""
    sample_prompts: tuple[str, ...] = ()
    tensorboard: bool | None = None
    """Not given: where TensorBoard is installed."""
    weights: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the model directory's trained weights."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "micro_batches", "save_every", "keep", "log_every")
        _at_least(self, 0, "sample_every")
        if not 0 <= self.seed < 2**32:
            raise SettingsError(f"seed={self.seed}: from 0 to {2**32 - 1}")
        if self.sample_every and not self.sample_prompts:
            raise SettingsError(f"sample_every={self.sample_every}: needs sample_prompts")


@dataclass(frozen=True)
class Settings:
    """A whole training run."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    cues: CueSettings = field(default_factory=CueSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)

    def __post_init__(self) -> None:
        if self.model.tokenizer == "captions" and not self.optimiser.train_text:
            raise SettingsError("model.tokenizer='captions': needs optimiser.train_text = true; its encoder is new")


PATHS = (
    "model.init",
    "model.architecture",
    "model.companions",
    "data.path",
    "data.cache",
    "cues.openclip",
    "run.output",
)
FREE = (
    *PATHS,
    "data.workers",
    *(f"run.{name}" for name in ("save_every", "keep", "log_every", "sample_every", "sample_prompts")),
    *(f"run.{name}" for name in ("tensorboard", "weights", "micro_batches", "recompute", "losses_in_turn")),
)
"""Keys that a run may change when it goes on: they do not change what is learned. (Dropout draws other numbers when
micro_batches changes; what lies at the paths is compared by its content.)"""


def read_settings(path: str | os.PathLike[str], without: Collection[str] = ()) -> Settings:
    """Read and check a TOML file; relative paths come out absolute. `without`: sections that others read.

    Raises SettingsError naming the key, its value and what is allowed.
    """
    file = Path(path)
    try:
        table = read_toml(file)
    except (OSError, TextError) as error:
        raise SettingsError(f"{file}: cannot be read as TOML: {error}") from error
    table = {name: section for name, section in table.items() if name not in without}
    try:
        _check_texts(table)
        # One section at a time, so that a range error too names its section.
        for name, kind in _SECTIONS.items():
            if name in table:
                try:
                    from_json(kind, table[name], name)
                except SettingsError as error:
                    raise SettingsError(f"{name}.{error}") from error
        for name in ("model", "data", "run"):
            if name not in table:
                raise SettingsError(f"section [{name}] is missing; known are {', '.join(_SECTIONS)}")
        settings = from_json(Settings, table, "settings")
    except (ManifestError, SettingsError) as error:
        raise SettingsError(f"{file}: {str(error).removeprefix('settings.')}") from error
    return _absolute(settings, file.absolute().parent)


def _check_texts(table: Mapping[str, Any]) -> None:
    """Raise SettingsError for a text with a character that no path and no prompt has."""
    for section, keys in table.items():
        for name, value in keys.items() if isinstance(keys, dict) else ():
            for text in value if isinstance(value, list) else (value,):
                try:
                    if isinstance(text, str):
                        check_as_prompt(text)
                except TextError as error:
                    raise SettingsError(f"{section}.{name}={quoted(text)}: {error}") from error


_SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "cues": CueSettings,
    "objective": ObjectiveSettings,
    "optimiser": OptimiserSettings,
    "run": RunSettings,
}


def _absolute(settings: Settings, folder: Path) -> Settings:
    for key in PATHS:
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        if value is not None:
            if not value.strip():
                raise SettingsError(f"{key}={value!r}: a path is wanted")
            changed = replace(getattr(settings, section), **{name: str(folder / given_path(value, key))})
            settings = replace(settings, **{section: changed})
    return settings


def flat(settings: Settings) -> dict[str, Any]:
    """Every key as "section.name" with its JSON value."""
    return {f"{section}.{name}": value for section, keys in to_json(settings).items() for name, value in keys.items()}


def difference(stored: Mapping[str, Any], settings: Settings) -> str | None:
    """The first key, of those that change what is learned, in which a run differs from `stored` (`flat`), with both
    values; None if there is none. A key that `stored`, of an earlier version, does not know had its default.
    """
    defaults = {
        f"{section}.{key.name}": list(key.default) if isinstance(key.default, tuple) else key.default
        for section, kind in _SECTIONS.items()
        for key in fields(kind)
        if key.default is not MISSING
    }
    return first_difference({**defaults, **stored}, flat(settings), FREE)


def key_index(frames: int, key_frame: float) -> int:
    """Index of the key frame of a clip."""
    return int(frames * key_frame)


def first_difference(stored: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> str | None:
    """The first key, but for those that are `free`, whose values differ, with both values; None if there is none."""
    for key in sorted({*stored, *now} - {*free}):
        if stored.get(key) != now.get(key):
            return f"{key} was {stored.get(key)!r} and is now {now.get(key)!r}"
    return None
