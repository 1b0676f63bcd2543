"""Decides whether two tensors agree."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from higen.errors import FixtureError

__all__ = ["RELATIVE", "Difference", "compare", "largest", "refuse_unknown"]

RELATIVE = 2e-5
"""Allowed error of a float32 tensor, relative to its largest value."""


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference between higen's tensor and the stored one, and the largest allowed difference."""

    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the tensor agrees. A NaN error counts as a disagreement."""
        return self.error <= self.allowed

    @property
    def used(self) -> float:
        """The error divided by the allowed error; a value above 1 is a failure."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.allowed if self.allowed and not math.isnan(self.error) else math.inf


def compare(
    tensor: str, ours: Tensor, stored: Tensor, noise: float = 0.0, *, allowed: float | None = None
) -> Difference:
    """Compare two tensors in float64. `noise`: the distance between the reference's results in float32 and in float64.

    Unless given, the allowed error is max(10 noise, 2e-5 of the largest stored value). The error is infinite if the
    shapes differ, or if a number is not finite and differs between the two.
    """
    if allowed is None:
        allowed = max(10.0 * noise, RELATIVE * largest(stored))
    if ours.shape != stored.shape:
        return Difference(tensor, math.inf, allowed)
    a, b = ours.detach().double(), stored.double()
    finite = a.isfinite() & b.isfinite()
    if not bool((finite | (a == b)).all()):
        return Difference(tensor, math.inf, allowed)
    return Difference(tensor, largest(torch.where(finite, a - b, 0.0)), allowed)


def largest(x: Tensor) -> float:
    """The largest magnitude among the finite values; 0 if there are none."""
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises FixtureError for a name that is stored but not known, because nothing would check it."""
    known = set(known)
    if unknown := sorted(set(names) - known):
        listed = ", ".join(sorted(known)[:60])
        raise FixtureError(f"{where}: unknown {', '.join(unknown[:10])}; known are {listed}")
