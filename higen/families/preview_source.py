"""Reads a tiny decoder for previews and adds it to a converted model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from higen.families import Converted
from higen.families.preview_rows import WEIGHTS, TinyDecoder, with_preview_rows
from higen.manifest import Manifest
from higen.models.checkpoint_files import naming
from higen.models.tiny_decoder import read_tiny_decoder
from higen.paths import given_path

__all__ = ["PreviewSource", "read_preview", "with_preview"]


@dataclass(frozen=True)
class PreviewSource:
    """A tiny decoder, its tensors, and notes for the user."""

    path: Path
    decoder: TinyDecoder
    state: dict[str, Tensor]
    notes: tuple[str, ...]

    def tables(self, manifest: Manifest) -> Manifest:
        """The tables of a model with this decoder. Raises CheckpointError if the model has other latents."""
        with naming(self.path):
            return with_preview_rows(manifest, self.decoder)


def read_preview(path: object) -> PreviewSource | None:
    """The tiny decoder of a folder or file; None for None. Raises CheckpointError (`models.tiny_decoder`)."""
    if path is None:
        return None
    given, notes = given_path(path, "preview"), list[str]()
    arguments, scale, state = read_tiny_decoder(given, notes.append)
    return PreviewSource(given, TinyDecoder(arguments, scale), state, (*notes, f"{given} has its own licence"))


def with_preview(made: Converted, source: PreviewSource | None) -> Converted:
    """The model with the tiny decoder. Raises CheckpointError if it does not fit."""
    if source is None:
        return made
    weights, notes = {**made.weights, WEIGHTS: source.state}, (*made.notes, *source.notes)
    return replace(made, manifest=source.tables(made.manifest), weights=weights, notes=notes)
