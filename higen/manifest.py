"""A model directory's tables, version 2 (docs/manifest.md): what every runtime interprets.

A Manifest is data alone: it holds no weights and no code, and it knows no model family. It is checked as a whole when
it is made, whoever makes it: the reader of higen.json, a family, or a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from higen.references import check_references, needs
from higen.rows import Rows
from higen.stages import Stage, source
from higen.tables import Control, Loop, Sizes, TextRules

__all__ = ["Manifest"]


@dataclass(frozen=True)
class Manifest(Rows):
    """Everything about a model but its files. `architecture` is the family's own; nothing else looks into it."""

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
        """The loops that a clip of `frames` frames comes from: the last one that is not left out of it, and those
        whose latents this one or the decoder takes, directly or through others.
        """
        long_enough = [loop.name for loop in self.loops if loop.least_frames <= frames]
        found: dict[str, None] = {}

        def visit(name: str) -> None:
            if name not in found:
                found[name] = None
                for other in needs(self, name):
                    visit(other)

        for name in (*long_enough[-1:], self.sizes.decoder):
            visit(name)
        return tuple(loop for loop in self.loops if loop.name in found and loop.name in long_enough)

    def pictures_of(self, *stages: str) -> tuple[str, ...]:
        """The picture and clip controls that these stages, and those that feed them, cannot run without."""
        sources = [source(t.source) for name in self.feeding(*stages) for t in self.stage(name).inputs]
        return tuple(dict.fromkeys(s.name for s in sources if s.kind in ("picture", "clip")))

    def needed_by(self, loop: Loop) -> tuple[str, ...]:
        """The picture and clip controls that a loop cannot run without."""
        begins = [loop.start.control] if loop.start is not None and loop.start.needed else []
        return tuple(dict.fromkeys([*self.pictures_of(*loop.stages), *begins]))

    @property
    def decoder(self) -> Stage:
        """The stage that turns latents into pixels."""
        return self.stage(self.sizes.decoder)
