"""Frechet distances of generated clips to draws of real clips (see evaluate.py for what they mean)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from higen.measures.statistics import frechet_distance
from higen.train.emoji.evaluation.figures import AskedDistances, Distances, FrechetFigures
from higen.train.emoji.evaluation.judges import Judges

__all__ = ["Features", "Request", "alike_draws", "frechet"]

JITTER = 3
"""A real clip of a draw may begin earlier or later than the recipe's clip by this many loop frames, of 42 ms each."""
DRAWS = 3
"""Number of pairs of draws. The distances are means over them."""

Request = tuple[int, int, float]
"""Subject, background and speed of a real clip."""
Condition = tuple[int, int, float, int]
"""Subject, background, speed, and the number of loop frames by which the clip begins later."""


@dataclass(frozen=True)
class Features:
    """Features float64 [n, d] of generated clips, and of the real clips for the same requests (`real`), which are also
    encoded and decoded by the codec (`codec`).
    """

    generated: NDArray[np.float64]
    codec: NDArray[np.float64]
    real: NDArray[np.float64]


def frechet(asked: Sequence[Request], features: Features, judges: Judges) -> FrechetFigures:
    """Frechet distances of each set of features to draws of real clips; see evaluate.py."""
    backgrounds = len(judges.real.pictures)
    distinct = _over_floor(features, judges, lambda random: _distinct_draws(asked, backgrounds, random))
    return FrechetFigures(
        **vars(distinct),
        alike=_over_floor(features, judges, lambda random: alike_draws(asked, backgrounds, random)),
        asked=AskedDistances(
            generated=frechet_distance(features.generated, features.real),
            codec=frechet_distance(features.codec, features.real),
        ),
    )


def _over_floor(
    features: Features,
    judges: Judges,
    draw: Callable[[np.random.Generator], tuple[list[Condition], list[Condition]]],
) -> Distances:
    """Mean distances to the first of two draws of real clips, over DRAWS pairs. "floor": that of the second draw."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        first, second = draw(random)
        reals = judges.real_features([*first, *second])
        first_rows, second_rows = reals[: len(first)], reals[len(first) :]
        compared = (features.generated, features.codec, features.real, second_rows)
        found.append([frechet_distance(rows, first_rows) for rows in compared])
    generated, codec, real, floor = np.mean(found, axis=0).tolist()
    return Distances(generated=generated, codec=codec, real=real, floor=floor, ratio=generated / max(floor, 1e-12))


def _distinct_draws(
    asked: Sequence[Request], backgrounds: int, random: np.random.Generator
) -> tuple[list[Condition], list[Condition]]:
    """Two draws, each with one clip per request, of the same subjects and speeds. All clips are different."""
    subjects, speeds = [request[0] for request in asked], [request[2] for request in asked]
    possible = len(set(subjects)) * backgrounds * len(set(speeds)) * (2 * JITTER + 1)
    drawn: dict[Condition, None] = {}  # used as an ordered set
    while len(drawn) < min(2 * len(asked), possible // 2):
        drawn[
            int(random.choice(subjects)),
            int(random.integers(backgrounds)),
            float(random.choice(speeds)),
            int(random.integers(-JITTER, JITTER + 1)),
        ] = None
    half = len(drawn) // 2
    return list(drawn)[:half], list(drawn)[half : 2 * half]


def alike_draws(
    asked: Sequence[Request], backgrounds: int, random: np.random.Generator
) -> tuple[list[Condition], list[Condition]]:
    """Two draws with the same composition as the requests. Each draw has every subject and speed as often as the
    requests, on one random background. The two draws have different backgrounds.
    """
    first: list[Condition] = []
    second: list[Condition] = []
    for (s, _, speed), count in Counter(asked).items():
        pictures = random.choice(backgrounds, 2, replace=False)
        for draw, picture in zip((first, second), pictures, strict=True):
            offsets = np.resize(random.permutation(2 * JITTER + 1) - JITTER, count)
            draw += [(s, int(picture), speed, int(offset)) for offset in offsets]
    return first, second
