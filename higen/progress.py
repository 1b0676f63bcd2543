"""Progress bars of a generation: one for each part, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, TypeAlias

from higen.errors import RequestError, quoted

__all__ = ["Progress", "Shown", "in_notebook", "is_watched"]

Shown: TypeAlias = bool | Literal["previews"] | None
"""Whether progress is shown; None: when a person is watching; "previews": the estimate after each step, too."""


def is_watched() -> bool:
    """Whether a person sees what is written to standard error: in a terminal, or in a notebook."""
    try:
        return sys.stderr is not None and (sys.stderr.isatty() or in_notebook())
    except ValueError:  # it is closed
        return False


def in_notebook() -> bool:
    """Whether IPython runs in a kernel, whose front end shows standard error below the cell."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class _Screen:
    """Standard error for bars: where it cannot be written, a generation goes on without them."""

    def write(self, text: str) -> None:
        """Write, or not."""
        with suppress(OSError, ValueError, AttributeError):  # full or gone; closed; None
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush, or not."""
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class Progress:
    """A bar stands before the first step of its part and is closed after the last one."""

    def __init__(self, parts: Sequence[tuple[str, int]], shown: Shown) -> None:
        """`parts`: name and length of each. Raises RequestError for a `shown` that is another text."""
        if isinstance(shown, str) and shown != "previews":
            raise RequestError(f"progress={quoted(shown)}: True, False, None or 'previews'")
        self._parts = iter(parts)
        self._shown = is_watched() if shown is None else bool(shown) and sys.stderr is not None
        self._done = self._total = 0
        self._bar: Any = None
        self._next()

    def reached(self, done: int) -> None:
        """`done` steps of the present part are made."""
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done = done
        if done == self._total:
            self.close()
            self._next()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _next(self) -> None:
        name, self._total = next(self._parts, ("", 0))
        self._done = 0
        self._bar = _bar(name, self._total) if self._shown and name else None


def _bar(name: str, total: int) -> Any:
    from tqdm import tqdm  # late: most processes show no bar

    return tqdm(desc=f"{name:<8}", total=total, file=_Screen(), dynamic_ncols=True)
