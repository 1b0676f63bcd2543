"""Lines that the recipe prints about its progress."""

from __future__ import annotations

import time

__all__ = ["say"]


def say(line: str) -> None:
    """Print the time of day and a line, because a run takes hours."""
    print(time.strftime("%H:%M:%S"), line, flush=True)
