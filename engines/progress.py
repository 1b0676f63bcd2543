"""The progress of a build: TensorRT's nested phases as one number."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Progress", "cancelled_by_ctrl_c", "make_monitor"]


@dataclass
class _Phase:
    name: str
    steps: int
    start: float
    width: float
    done: int = 0

    @property
    def step_width(self) -> float:
        return self.width / max(self.steps, 1)


class Progress:
    """Turns phases and steps into the fraction of the build that is done, from 0 to 1; it never decreases. Also tells
    TensorRT when to stop.
    """

    def __init__(self, on_part: Callable[[str, float], None] | None = None) -> None:
        """`on_part(phase, part)` is called each time `part` has grown by at least 0.001."""
        self.part = 0.0
        self.cancelled = False
        self._phases: list[_Phase] = []
        self._on_part = on_part

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside the current step of its parent."""
        while self._phases and parent is not None and self._phases[-1].name != parent:
            self._phases.pop()
        if parent is None:
            self._phases.clear()
        if self._phases:
            above = self._phases[-1]
            start, width = above.start + min(above.done, above.steps) * above.step_width, above.step_width
        else:
            start, width = 0.0, 1.0
        self._phases.append(_Phase(name, steps, start, width))
        self._reached(name, start)

    def step_complete(self, name: str, step: int) -> bool:
        """A step of a phase is done; False asks TensorRT to stop."""
        for phase in self._phases:
            if phase.name == name:
                phase.done = step + 1
                self._reached(name, phase.start + phase.done * phase.step_width)
        return not self.cancelled

    def phase_finish(self, name: str) -> None:
        """A phase and every phase inside it are done."""
        for i, phase in enumerate(self._phases):
            if phase.name == name:
                self._reached(name, phase.start + phase.width)
                del self._phases[i:]
                return

    def _reached(self, name: str, part: float) -> None:
        part = min(part, 1.0)
        if part >= self.part + 0.001 or (part == 1.0 and self.part < 1.0):
            self.part = part
            if self._on_part is not None:
                self._on_part(name, part)


def make_monitor(trt: Any, progress: Progress) -> Any:
    """A TensorRT progress monitor over a `Progress`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step_complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.phase_finish(phase_name)

    return Monitor()


@contextmanager
def cancelled_by_ctrl_c(progress: Progress) -> Iterator[None]:
    """Ctrl-C stops the build at its next step instead of raising through TensorRT, which would end the process.

    Outside the main thread this has no effect. Raises KeyboardInterrupt at the end if Ctrl-C was pressed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(*_: object) -> None:
        progress.cancelled = True

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if progress.cancelled:
        raise KeyboardInterrupt
