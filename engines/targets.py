"""Targets of engines. A target is a flavour of TensorRT with GPU architectures.

rtx-sm89     TensorRT for RTX, ahead of time for one architecture; needs no GPU
rtx          TensorRT for RTX, one portable plan for SM80, SM86, SM89 and SM120
tensorrt     classic TensorRT for the GPU of this machine; becomes, for example, tensorrt-sm90
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from higen.errors import RequestError
from higen.precision import precision_named

__all__ = ["PORTABLE", "RTX", "Target", "check_precision", "parse_targets"]

RTX = (75, 80, 86, 89, 120, 121)
"""Architectures that TensorRT for RTX builds for. H100 and H200 (SM90) are not among them."""

PORTABLE = (80, 86, 89, 120)
"""The architectures that a plan of TensorRT for RTX covers by default."""


@dataclass(frozen=True)
class Target:
    """Where engines run. `name` is their folder. Empty `architectures` mean the GPU of this machine."""

    name: str
    flavour: Literal["rtx", "tensorrt"]
    architectures: tuple[int, ...]


def parse_targets(text: str) -> list[Target]:
    """Parse targets separated by commas, without duplicates. Raises RequestError that lists the known ones."""
    targets: dict[str, Target] = {}
    for name in text.split(","):
        target = _parse(name.strip())
        targets[target.name] = target
    return list(targets.values())


def _parse(name: str) -> Target:
    if name == "tensorrt":
        return Target(name, "tensorrt", ())
    if name == "rtx":
        return Target(name, "rtx", PORTABLE)
    known = {f"rtx-sm{a}": a for a in RTX}
    if name in known:
        return Target(name, "rtx", (known[name],))
    hint = ""
    if name.startswith(("rtx-sm", "sm")):
        hint = "; other GPUs (H100 and H200 are SM90) take 'tensorrt', on the machine itself"
    raise RequestError(f"target={name!r}: one of {', '.join(known)}, rtx, tensorrt{hint}")


def check_precision(precision: str, architectures: tuple[int, ...]) -> None:
    """Raises RequestError for an unknown precision, and for one that an architecture cannot compute in."""
    needed = precision_named(precision).architecture
    if lacking := [a for a in architectures if a < needed]:
        names = ", ".join(f"SM{a}" for a in lacking)
        raise RequestError(f"precision={precision!r}: {names} cannot compute in it; the first that can is SM{needed}")
