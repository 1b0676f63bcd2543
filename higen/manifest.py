"""The tables of a model directory, version 2 (docs/manifest.md). Every runtime interprets them.

A Manifest is only data: it has no weights and no code, and it knows no model family. It is always checked as a whole
when it is made, by the reader of higen.json, by a family or by a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from higen.presets import Preset
from higen.references import check_references, needs
from higen.rows import Rows
from higen.stages import Stage, source
from higen.tables import Control, Loop, Sizes, TextRules
from higen.typed_json import LATER

__all__ = ["Manifest"]


@dataclass(frozen=True)
class Manifest(Rows):
    """Everything about a model except its files. Only the family reads `architecture`."""

    name: str
    licence: str
    family: str
    architecture: dict[str, Any]
    prompts: tuple[str, ...]
    sizes: Sizes
    text: TextRules | None
    controls: tuple[Control, ...]
    stages: tuple[Stage, ...]
    loops: tuple[Loop, ...]
    presets: tuple[Preset, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        check_references(self)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights files, each once."""
        return tuple(dict.fromkeys(stage.weights for stage in self.stages))

    @property
    def denoising(self) -> tuple[str, ...]:
        """The stages of the loops, each once."""
        return tuple(dict.fromkeys(name for loop in self.loops for name in loop.stages))

    def wanted(self, frames: int) -> tuple[Loop, ...]:
        """The loops that a clip of `frames` frames needs: the last loop that runs at this length, and the loops with
        latents that this loop or the decoder takes, directly or through other stages.
        """
        long_enough = [loop.name for loop in self.loops if loop.least_frames <= frames]
        found: dict[str, None] = {}

        def visit(name: str) -> None:
            if name not in found:
                found[name] = None
                for other in needs(self, name):
                    visit(other)

        for name in (*long_enough[-1:], *self.decoders):
            visit(name)
        return tuple(loop for loop in self.loops if loop.name in found and loop.name in long_enough)

    def pictures_of(self, *stages: str) -> tuple[str, ...]:
        """The controls with pixels that these stages, or the stages that feed them, need."""
        found: dict[str, None] = {}
        seen: set[tuple[str, str]] = set()

        def visit(name: str, given: str) -> None:
            if (name, given) in seen or name not in self.stage_names:
                return
            seen.add((name, given))
            for tensor in self.stage(name).inputs:
                origin = source(tensor.source)
                if origin.kind in ("picture", "clip") or (origin.shown and given):
                    found[given or origin.name] = None
                elif origin.kind in ("frames", "places"):
                    found[origin.name] = None
                elif origin.kind == "made":
                    visit(origin.name, origin.given or given)

        for stage in stages:
            visit(stage, "")
        return tuple(found)

    def needed_by(self, loop: Loop, pair: tuple[str | None, str | None] | None = None) -> tuple[str, ...]:
        """The controls with pixels that a loop needs. `pair`: the stages that do its steps; None: its own stages, not
        those of its variant.
        """
        begins = [loop.start.control] if loop.start is not None and loop.start.needed else []
        stages = [name for name in pair or loop.pairs[0] if name is not None]
        return tuple(dict.fromkeys([*self.pictures_of(*stages), *begins]))

    @property
    def decoder(self) -> Stage:
        """The stage that turns latents into pixels."""
        return self.stage(self.sizes.decoder)

    @property
    def decoders(self) -> tuple[str, ...]:
        """The stages that turn latents into pixels: the decoder, then the one for previews, if there is one."""
        return (self.sizes.decoder, *([] if self.sizes.preview is None else [self.sizes.preview.decoder]))

    def chosen_decoder(self, controls: Mapping[str, Any]) -> str:
        """The stage that turns latents into pixels in a request with these controls."""
        row = self.sizes.preview
        return row.decoder if row is not None and controls[row.control] == row.choice else self.sizes.decoder
