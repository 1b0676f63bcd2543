"""Progress lines of the recipe."""

from __future__ import annotations

import time

__all__ = ["say"]


def say(line: str) -> None:
    """Print a line with the time of day, because a run takes hours."""
    print(time.strftime("%H:%M:%S"), line, flush=True)
