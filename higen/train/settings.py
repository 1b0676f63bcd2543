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

A relative path starts at the folder of the file. A key that is not given has the default in higen/train/sections.py.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from higen.errors import ManifestError, SettingsError, quoted
from higen.paths import given_path
from higen.text_files import TextError, read_toml
from higen.train.list_files import check_as_prompt
from higen.train.sections import (
    CodecSettings,
    CueSettings,
    DataSettings,
    DistilSettings,
    LoraSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimiserSettings,
    RunSettings,
    key_index,
)
from higen.typed_json import from_json, to_json

__all__ = [
    "CodecSettings",
    "CueSettings",
    "DataSettings",
    "DistilSettings",
    "LoraSettings",
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
    "refuse_other_run",
]


@dataclass(frozen=True)
class Settings:
    """A whole training run."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    cues: CueSettings = field(default_factory=CueSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    codec: CodecSettings = field(default_factory=CodecSettings)
    distil: DistilSettings = field(default_factory=DistilSettings)

    def __post_init__(self) -> None:
        if self.codec.layers != "none":
            self._check_codec()
        if self.distil.steps:
            self._check_distil()
        self._check_layers()
        if bool(self.run.held_out_every) != (self.data.held_out is not None):
            raise SettingsError("run.held_out_every and data.held_out go together")
        if self.model.tokenizer == "captions" and not self.optimiser.train_text:
            raise SettingsError("model.tokenizer='captions': needs optimiser.train_text = true; its encoder is new")

    def _check_codec(self) -> None:
        """Raise SettingsError for settings that only the training of a denoiser supports."""
        if self.codec.layers == "decoder" and self.model.init is None:
            raise SettingsError("codec.layers='decoder': needs model.init, the model with the encoder to keep")
        others = {
            "optimiser.layers": (self.optimiser.layers, "all"),
            "optimiser.spatial_gradient": (self.optimiser.spatial_gradient, 1),
            "optimiser.train_text": (self.optimiser.train_text, False),
            "lora.rank": (self.lora.rank, 0),
            "distil.steps": (self.distil.steps, ()),
            "model.tokenizer": (self.model.tokenizer, "companions"),
            "data.cache": (self.data.cache, None),
            "run.sample_every": (self.run.sample_every, 0),
            "run.recompute": (self.run.recompute, False),
            "run.losses_in_turn": (self.run.losses_in_turn, False),
        }
        for name, (value, wanted) in others.items():
            if value != wanted:
                raise SettingsError(
                    f"{name}={value!r}: codec.layers={self.codec.layers!r} trains only the autoencoder; leave it out, "
                    "and train the denoiser in a separate run"
                )

    def _check_distil(self) -> None:
        """Raise SettingsError for settings that distillation does not support."""
        steps, layers = list(self.distil.steps), self.optimiser.layers
        if self.model.init is None:
            raise SettingsError(f"distil.steps={steps}: needs model.init, the model to distil")
        others = {
            "model.known_frames": (self.model.known_frames, False),
            "objective.known": (self.objective.known, {}),
            "objective.gain_clips": (self.objective.gain_clips, 0),
            "optimiser.train_text": (self.optimiser.train_text, False),
            "lora.scales": (self.lora.scales, False),
        }
        for name, (value, wanted) in others.items():
            if value != wanted:
                raise SettingsError(f"{name}={value!r}: not for a distillation; leave it out")
        if not self.data.videos:
            raise SettingsError(f"distil.steps={steps}: needs data.videos from 1")
        if steps[0] and (layers != "all" or not self.data.images):
            raise SettingsError(
                f"distil.steps={steps}: needs data.images from 1 and optimiser.layers='all', because key frames and "
                f"clips share layers; with [0, {steps[1]}], key frames are drawn as before"
            )
        if not steps[0] and layers != "temporal":
            raise SettingsError(
                f"distil.steps={steps}: needs optimiser.layers='temporal', so that key frames are drawn as before"
            )

    def _check_layers(self) -> None:
        layers, rank = self.optimiser.layers, self.lora.rank
        if layers in ("temporal", "known") and self.data.images:
            raise SettingsError(
                f"optimiser.layers={layers!r}: needs data.images = 0; these layers are not used for pictures"
            )
        if layers == "known" and (not self.objective.known or rank):
            raise SettingsError(
                "optimiser.layers='known': needs objective.known, and no lora; only clips with known frames use these "
                "layers"
            )
        if self.optimiser.spatial_gradient != 1 and (layers != "all" or rank):
            raise SettingsError("optimiser.spatial_gradient: only where all layers are trained, and without lora")
        if rank and self.model.init is None:
            raise SettingsError(f"lora.rank={rank}: needs model.init, because an adapter needs a trained model")
        if self.lora.scales and self.objective.gain_clips:
            raise SettingsError(f"lora.scales=true: needs objective.gain_clips = 0, not {self.objective.gain_clips}")
        if self.optimiser.train_text and (layers != "all" or rank):
            raise SettingsError("optimiser.train_text: only where all layers are trained, and without lora")


PATHS = (
    "model.init",
    "model.architecture",
    "model.companions",
    "data.path",
    "data.held_out",
    "data.cache",
    "cues.openclip",
    "run.output",
)
FREE = (
    *PATHS,
    "data.workers",
    "codec.memory",
    "data.held_out_steps",
    "run.held_out_every",
    "run.threads",
    *(f"run.{name}" for name in ("save_every", "keep", "log_every", "sample_every", "sample_prompts")),
    *(f"run.{name}" for name in ("tensorboard", "weights", "micro_batches", "recompute", "losses_in_turn")),
)
"""Keys that may change when a run is resumed, because they do not change what is learned. (Dropout draws other numbers
if micro_batches changes. The contents at the paths are compared separately.)"""


def read_settings(path: str | os.PathLike[str], without: Collection[str] = ()) -> Settings:
    """Read and check a TOML file. Relative paths become absolute. `without`: sections to ignore, which others read.

    Raises SettingsError that names the key, its value and the allowed values.
    """
    file = Path(path)
    try:
        table = read_toml(file)
    except (OSError, TextError) as error:
        raise SettingsError(f"{file}: cannot be read as TOML: {error}") from error
    table = {name: section for name, section in table.items() if name not in without}
    try:
        _check_texts(table)
        # One section at a time, so that range errors name their section too.
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
    """Raise SettingsError for a text that is not allowed in a path or a prompt."""
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
    "lora": LoraSettings,
    "codec": CodecSettings,
    "distil": DistilSettings,
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
    """The first key in which a run differs from `stored` (`flat`), with both values; None if there is none. Only keys
    that change what is learned count. A key that an earlier version did not store had its default.
    """
    defaults = {
        f"{section}.{key.name}": list(default) if isinstance(default, tuple) else default
        for section, kind in _SECTIONS.items()
        for key in fields(kind)
        if (default := key.default if key.default_factory is MISSING else key.default_factory()) is not MISSING
    }
    return first_difference({**defaults, **stored}, flat(settings), FREE)


def first_difference(stored: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> str | None:
    """The first key with different values, and both values; None if there is none. `free` keys do not count."""
    for key in sorted({*stored, *now} - {*free}):
        if stored.get(key) != now.get(key):
            return f"{key} was {stored.get(key)!r} and is now {now.get(key)!r}"
    return None


def refuse_other_run(
    folder: str | Path, found: str | None, remedy: str = "put it back, or remove the folder to start over"
) -> None:
    """Raise SettingsError if a folder's run differs from this one in `found`, and say what helps; None: it does not."""
    if found is not None:
        raise SettingsError(f"{folder} holds a run of another configuration: {found}; {remedy}")
