"""The clips that `higen evaluate` makes, and the measures of each (see evaluate.py for the meaning of the names)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from higen.errors import SettingsError
from higen.train.emoji.subjects import BACKGROUNDS, SPEEDS, SUBJECTS, caption, is_held_out

__all__ = [
    "APPEARANCE_SPEEDS",
    "FAST",
    "GROUPS",
    "MOTION_SPEEDS",
    "NORMAL",
    "SLOW",
    "STILL",
    "Row",
    "Shot",
    "plan",
]

SLOW, NORMAL, FAST, STILL = 0, 1, 2, 3
GROUPS = ("held-out", "trained")
MOTION_SPEEDS = (0.0, 0.5, 1.0, 1.5, 2.0)
APPEARANCE_SPEEDS = (0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Shot:
    """One clip to make. `kind`: text, still, motion or appearance. `requested`: the speed of the real clip whose cue is
    requested, or None.
    """

    group: str
    kind: str
    subject: int
    background: int
    speed: int = NORMAL
    seed: int = 0
    requested: float | None = None

    @property
    def prompt(self) -> str:
        """The caption, worded as in training."""
        return caption(SUBJECTS[self.subject], BACKGROUNDS[self.background], SPEEDS[self.speed])

    @property
    def factor(self) -> float:
        """Speed of the requested real clip."""
        return SPEEDS[self.speed].factor if self.requested is None else self.requested


@dataclass(frozen=True)
class Row:
    """The measures of one clip; see evaluate.py for the fields."""

    identity: bool
    template: bool
    correlation: float
    background: bool
    psnr: float
    psnr_copy: float
    psnr_real_copy: float
    beats_copy: bool
    beats_mean: bool
    beats_real_copy: bool
    flicker: float
    speckle: float
    sharpness: float
    difference: float
    motion: float
    appearance: float


def plan(subjects: Sequence[int], seeds: int, quick: bool = False) -> list[Shot]:
    """The clips to make, as evaluate.py says, sorted by background. `quick`: only every fourth subject, and cues only
    for every eighth subject. Raises SettingsError for less than one seed.
    """
    if seeds < 1:
        raise SettingsError(f"seeds={seeds}: a whole number from 1")
    few = max(1, seeds // 4)
    shots = []
    for place, s in enumerate(subjects[:: 4 if quick else 1]):
        held = next(b for b in range(len(BACKGROUNDS)) if is_held_out(s, b))
        trained = (held + 5) % len(BACKGROUNDS)
        for group, b, count in (("held-out", held, seeds), ("trained", trained, few)):
            for seed in range(count):
                shots.append(Shot(group, "text", s, b, NORMAL, seed))
                if seed % 2 == 0:
                    shots.append(Shot(group, "text", s, b, (FAST, SLOW)[(place + seed // 2) % 2], seed))
            shots += [Shot(group, "still", s, b, STILL, seed) for seed in range(few)]
        if place % 2 == 0 or not quick:
            shots += [Shot("held-out", "motion", s, held, requested=speed) for speed in MOTION_SPEEDS]
            shots += [Shot("held-out", "appearance", s, held, requested=speed) for speed in APPEARANCE_SPEEDS]
    return sorted(shots, key=lambda shot: shot.background)
