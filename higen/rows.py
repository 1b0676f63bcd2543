"""Finds rows of a manifest's tables by name; used by the checks (higen/references.py) and by Manifest."""

from __future__ import annotations

from functools import cached_property

from higen.presets import Preset
from higen.stages import FREE, TOKENS, Stage, source
from higen.tables import Control, Loop, Sizes, TextRules

__all__ = ["Rows"]


class Rows:
    """Access to tables with rows that name each other. A subclass holds the tables."""

    sizes: Sizes
    text: TextRules | None
    controls: tuple[Control, ...]
    stages: tuple[Stage, ...]
    loops: tuple[Loop, ...]
    presets: tuple[Preset, ...]

    @property
    def fixed(self) -> dict[str, int]:
        """The symbols that the model fixes, with their sizes."""
        return self.sizes.symbols

    @property
    def free(self) -> tuple[str, ...]:
        """The symbols that a request fixes."""
        return FREE if self.text is None or self.text.chunks == 1 else (*FREE, TOKENS)

    @cached_property
    def all_stages(self) -> tuple[Stage, ...]:
        """The stages, each followed by its variants. These are the stages that can have a graph."""
        return tuple(one for stage in self.stages for one in (stage, *stage.variants))

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the stages' variants, which the table does not list."""
        return tuple(one.name for stage in self.stages for one in stage.variants)

    def listed(self, name: str) -> str:
        """The name in the table for a stage or a variant of it. Raises KeyError."""
        return {one.name: stage.name for stage in self.stages for one in (stage, *stage.variants)}[name]

    def stage(self, name: str) -> Stage:
        """The stage or variant of that name. Raises KeyError."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in self.all_stages}

    def loop(self, name: str) -> Loop:
        """The loop of that name. Raises KeyError."""
        return {loop.name: loop for loop in self.loops}[name]

    def control(self, name: str) -> Control:
        """The control of that name. Raises KeyError."""
        return {control.name: control for control in self.controls}[name]

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the stages, in the table's order."""
        return tuple(stage.name for stage in self.stages)

    def feeding(self, *stages: str) -> tuple[str, ...]:
        """These stages and the stages that feed them, without loops. Each is listed once, before its takers."""
        found: dict[str, None] = {}
        rows = self._by_name

        def visit(name: str) -> None:
            if name in found or name not in rows:
                return
            for tensor in rows[name].inputs:
                origin = source(tensor.source)
                if origin.kind == "made":
                    visit(origin.name)
            found[name] = None

        for stage in stages:
            visit(stage)
        return tuple(found)
