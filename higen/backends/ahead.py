"""Does the work of several names in a background thread, before each result is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Ahead"]

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls `make(name)` for each name in turn, in one background thread, which ends with the last of them.

    Each result is taken once. An error of `make` is raised where the result is taken; one that nobody takes is dropped.
    """

    def __init__(self, make: Callable[[str], T], names: Sequence[str]) -> None:
        self._make = make
        self._waiting = list(names)
        self._running: str | None = None
        self._made: dict[str, T] = {}
        self._failed: dict[str, BaseException] = {}
        self._changed = threading.Condition()
        # No daemon: ONNX Runtime must not be at work when the interpreter ends.
        self._thread = threading.Thread(target=self._work, name="higen-ahead", daemon=False)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def take(self, name: str) -> T | None:
        """The result for a name; waits if it is being made. None if it was not begun: the thread then leaves it out.

        Raises what `make` raised.
        """
        with self._changed:
            if name in self._waiting:
                self._waiting.remove(name)
                return None
            self._changed.wait_for(lambda: self._running != name)
            if name in self._failed:
                raise self._failed.pop(name)
            return self._made.pop(name, None)

    def stop(self) -> None:
        """Begin nothing more, wait for the thread, and drop the results."""
        with self._changed:
            self._waiting.clear()
        self._thread.join()
        self._made.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    return
                name = self._running = self._waiting.pop(0)
            try:
                made = self._make(name)
            except BaseException as error:  # raised in the thread that takes the result
                with self._changed:
                    self._failed[name] = error
            else:
                with self._changed:
                    self._made[name] = made
                del made  # the taker alone holds it
            finally:
                with self._changed:
                    self._running = None
                    self._changed.notify_all()
