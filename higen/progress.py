"""Progress bars of a generation: one for each part, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A bar stands before the first step of its part and is closed after the last one."""

    def __init__(self, parts: Sequence[tuple[str, int]], shown: bool | None) -> None:
        """`parts`: name and length of each; `shown`: None is "when a person is watching"."""
        watching = sys.stderr is not None and sys.stderr.isatty()
        self._parts = iter(parts)
        self._shown = sys.stderr is not None and (watching if shown is None else shown)
        self._done = 0
        self._bar: Any = None
        self._next()

    def reached(self, done: int) -> None:
        """`done` steps of the present part are made."""
        self._bar.update(done - self._done)
        self._done = done
        if done == self._bar.total:
            self.close()
            self._next()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def _next(self) -> None:
        from tqdm import tqdm

        name, total = next(self._parts, ("", 0))
        self._done = 0
        self._bar = tqdm(desc=f"{name:<8}", total=total, disable=not (self._shown and name))
