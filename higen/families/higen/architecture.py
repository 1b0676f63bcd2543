"""The networks' configuration in HiGen's tables: some values are in `sizes.symbols`, the rest in `architecture`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from higen.errors import ManifestError
from higen.families.higen.configuration import AutoencoderConfig, ModelConfig, TextConfig, UNetConfig
from higen.families.preview_rows import TinyDecoder
from higen.manifest import Manifest
from higen.typed_json import LATER, from_json, to_json

__all__ = ["FAMILY", "architecture", "autoencoder_config", "preview", "text_config", "unet_config"]

FAMILY = "higen"

_OF_SYMBOLS = {
    "in_channels": "C",
    "text_dim": "Dt",
    "base_channels": "D",
    "appearance_columns": "R",
    "context_tokens": "K",
    "context_dim": "Dc",
}


@dataclass(frozen=True)
class _Codec:
    kind: str
    arguments: dict[str, Any]
    shift: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True)
class _Architecture:
    unet: dict[str, Any]
    clip: dict[str, Any]
    autoencoder: _Codec
    preview: TinyDecoder | None = field(default=None, metadata=LATER)


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The table `architecture` of a model."""
    unet = {name: value for name, value in to_json(config.unet).items() if name not in _OF_SYMBOLS}
    for name in ("known_frames", "known_layers"):
        if not unet[name]:  # as in manifests written before known frames existed
            del unet[name]
    codec = {f.name: getattr(config.autoencoder, f.name) for f in fields(_Codec)}
    return to_json(_Architecture(unet, config.text.clip, _Codec(**codec)))


def _read_architecture(manifest: Manifest) -> _Architecture:
    if manifest.family != FAMILY:
        raise ManifestError(f"family={manifest.family!r}: {FAMILY} is wanted here")
    return from_json(_Architecture, manifest.architecture, "architecture", whole=True)


def unet_config(manifest: Manifest) -> UNetConfig:
    """The denoiser's configuration. Raises ManifestError if the tables are not those of a HiGen model."""
    given = {"known_frames": False, "known_layers": False, **_read_architecture(manifest).unet}
    missing = [symbol for symbol in (*_OF_SYMBOLS.values(), "E", "L") if symbol not in manifest.fixed]
    if missing:
        raise ManifestError(f"sizes.symbols: has no {', '.join(missing)}")
    symbols = {name: manifest.fixed[symbol] for name, symbol in _OF_SYMBOLS.items()}
    if twice := sorted(set(given) & set(symbols)):
        raise ManifestError(f"architecture.unet.{twice[0]}: is already in sizes.symbols")
    config = from_json(UNetConfig, {**symbols, **given}, "architecture.unet", whole=True)
    if manifest.fixed["E"] != config.embedding_dim:
        raise ManifestError(f"sizes.symbols.E={manifest.fixed['E']}: must be 4 times D, {config.embedding_dim}")
    if manifest.sizes.multiple % (manifest.sizes.factor * config.size_multiple):
        wanted = manifest.sizes.factor * config.size_multiple
        raise ManifestError(f"sizes.multiple={manifest.sizes.multiple}: a multiple of {wanted}")
    return config


def text_config(manifest: Manifest) -> TextConfig:
    """The text encoder's configuration. Raises ManifestError, as `unet_config` does."""
    rules = manifest.text
    if rules is None:
        raise ManifestError("text=null: this family reads a prompt")
    return TextConfig(_read_architecture(manifest).clip, rules.length, rules.pad_id, rules.clean)


def autoencoder_config(manifest: Manifest) -> AutoencoderConfig:
    """The autoencoder's configuration. Raises ManifestError, as `unet_config` does."""
    codec = _read_architecture(manifest).autoencoder
    return AutoencoderConfig(codec.kind, codec.arguments, manifest.sizes.factor, codec.shift, codec.scale)


def preview(manifest: Manifest) -> TinyDecoder | None:
    """The tiny decoder, if there is one. Raises ManifestError, as `unet_config` does."""
    return _read_architecture(manifest).preview
