"""Lines that the recipe prints about its progress."""

from __future__ import annotations

import time

__all__ = ["say"]


def say(line: str) -> None:
    """Print a line behind the time of day: a run takes hours."""
    print(time.strftime("%H:%M:%S"), line, flush=True)
