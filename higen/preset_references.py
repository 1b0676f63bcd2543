"""Checks the presets of a manifest against its loops (docs/manifest.md, "presets")."""

from __future__ import annotations

from higen.noise_schedule import max_steps
from higen.rows import Rows
from higen.tables import MAX_NUMBER, check

__all__ = ["check_presets"]

MOST_PRESETS = 100


def check_presets(manifest: Rows) -> None:
    """Raise ManifestError for a name that is used twice, two usual presets, and values that a loop does not take."""
    names = [preset.name for preset in manifest.presets]
    check(len(names) <= MOST_PRESETS, f"presets: at most {MOST_PRESETS} rows, not {len(names)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, f"presets: {', '.join(twice)} appears twice")
    usual = [preset.name for preset in manifest.presets if preset.usual]
    check(len(usual) < 2, f"presets: {', '.join(usual)} are usual; at most one is")
    loops = manifest.loops
    for preset in manifest.presets:
        where = f"presets.{preset.name}"
        for key in ("steps", "guidance", "stretch"):
            count = len(getattr(preset, key))
            check(count == len(loops), f"{where}.{key}: {len(loops)} entries, one per loop, not {count}")
        for loop, steps, scale, by in zip(loops, preset.steps, preset.guidance, preset.stretch, strict=True):
            most = max_steps(loop.schedule, loop.solvers[0])
            good = steps is None or 1 <= steps <= most
            check(good, f"{where}.steps has {steps} for the loop {loop.name}: null, or from 1 to {most}")
            good = scale is None or (0 <= scale <= MAX_NUMBER if loop.guided is not None else scale == 1)
            allowed = "a number from 0" if loop.guided is not None else "1, because the loop has no guidance"
            check(good, f"{where}.guidance has {scale} for the loop {loop.name}: null, or {allowed}")
            good = by is None or loop.stretch is not None
            check(good, f"{where}.stretch has {by} for the loop {loop.name}, but loops.{loop.name}.stretch is null")
