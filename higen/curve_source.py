"""Curves that are measured from a clip or a sound file: the file is given instead of a control's numbers."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higen.errors import RequestError, quoted
from higen.paths import given_path
from higen.plain_values import plain

__all__ = ["CurveAsked", "CurveFrom", "curve_from"]

FEATURES = ("energy", "onsets")

_OPTION = re.compile(r":(feature|low|high|start)=([^:]*)\Z")


@dataclass(frozen=True)
class CurveAsked:
    """The control and the request for which a curve is measured.

    name      of the control, for messages
    encoding  of the control; None: it has none
    span      the range that a sound is mapped into; None: the model gives none
    frames    the number of frames of the request, at `fps` frames per second
    """

    name: str
    encoding: str | None
    span: tuple[float, float] | None
    frames: int
    fps: float


@dataclass(frozen=True)
class CurveFrom:
    """A curve measured from a file.

    source    a path of a video or of a sound, or a Video
    feature   what is measured of a sound: "energy" (loudness) or "onsets" (how strongly sounds begin); None: "energy".
              If a feature is given for a video, its sound is measured
    low, high the values for silence and for the loudest frame; None: the control's range
    start     the second of the file at which the clip begins

    Raises RequestError.
    """

    source: Any
    feature: str | None = None
    low: float | None = None
    high: float | None = None
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.feature is not None and self.feature not in FEATURES:
            raise RequestError(f"feature={quoted(self.feature)}: one of {', '.join(map(repr, FEATURES))}")
        for name in ("low", "high", "start"):
            value = plain(getattr(self, name))
            if value is None and name != "start":
                continue
            if type(value) not in (int, float) or not abs(value) <= 1e30 or (name == "start" and value < 0):
                raise RequestError(f"{name}={quoted(value)}: a finite number" + ", 0 or more" * (name == "start"))
            object.__setattr__(self, name, float(value))

    @property
    def path(self) -> Path | None:
        """The path of the file, or None for a clip in memory."""
        return given_path(self.source) if isinstance(self.source, (str, os.PathLike)) else None


def curve_from(name: str, value: object) -> CurveFrom | None:
    """The file or clip that a value names; None for numbers, and for a value that means "no curve".

    A text has the form FILE or FILE:feature=onsets:low=0:high=300:start=1.5, with the options in any order.
    The message of a RequestError begins with `name`.
    """
    if isinstance(value, CurveFrom):
        return value
    if hasattr(value, "frames") and hasattr(value, "fps"):
        return CurveFrom(value)
    if not isinstance(value, (str, os.PathLike)):
        return None
    text = os.fsdecode(value)
    options: dict[str, Any] = {}
    while found := _OPTION.search(text):
        key, given = found.groups()
        if key in options:
            raise RequestError(f"{name}={quoted(os.fsdecode(value))}: {key} is given twice")
        options[key] = given if key == "feature" else _number(name, key, given)
        text = text[: found.start()]
    try:
        return CurveFrom(text, **options)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error


def _number(name: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{name}: {key}={quoted(text)}: a finite number")
    return value
