"""Progress bars of a generation: one for each part, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, TypeAlias

from higen.errors import RequestError, quoted

__all__ = ["Progress", "Shown", "in_notebook", "is_watched"]

Shown: TypeAlias = bool | Literal["previews"] | None
"""Whether progress is shown. None: if `is_watched`; "previews": also show the estimate after each step."""


def is_watched() -> bool:
    """Whether a person sees standard error, in a terminal or in a notebook."""
    try:
        return sys.stderr is not None and (sys.stderr.isatty() or in_notebook())
    except ValueError:  # it is closed
        return False


def in_notebook() -> bool:
    """Whether IPython runs in a kernel, so that standard error is shown below the cell."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class _Screen:
    """Standard error for bars. If it cannot be written to, the generation continues without bars."""

    def write(self, text: str) -> None:
        """Write; ignore errors."""
        with suppress(OSError, ValueError, AttributeError):  # full or gone; closed; None
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush; ignore errors."""
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class Progress:
    """Bars for the parts, one at a time: a part's bar appears before its first step and closes after its last one."""

    def __init__(self, parts: Sequence[tuple[str, int]], shown: Shown) -> None:
        """`parts`: name and length of each. Raises RequestError for an unknown text as `shown`."""
        if isinstance(shown, str) and shown != "previews":
            raise RequestError(f"progress={quoted(shown)}: True, False, None or 'previews'")
        self._parts = iter(parts)
        self._shown = is_watched() if shown is None else bool(shown) and sys.stderr is not None
        self._done = self._total = 0
        self._bar: Any = None
        self._next()

    def reached(self, done: int) -> None:
        """Report that `done` steps of the current part are done."""
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done = done
        if done == self._total:
            self.close()
            self._next()

    def close(self) -> None:
        """Close the bar at its current position."""
        if self._bar is not None:
            self._bar.close()

    def _next(self) -> None:
        name, self._total = next(self._parts, ("", 0))
        self._done = 0
        self._bar = _bar(name, self._total) if self._shown and name else None


def _bar(name: str, total: int) -> Any:
    from tqdm import tqdm  # imported late, because most processes show no bar

    return tqdm(desc=f"{name:<8}", total=total, file=_Screen(), dynamic_ncols=True)
