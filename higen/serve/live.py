"""Passes progress and previews of jobs from the threads that run them to event streams.

A job has one short list of events for all its listeners, so memory does not grow with the listeners. A slow listener
misses events, but never the last one. Only the newest preview is kept.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from higen.serve.refusals import Refusal, to_json

__all__ = ["Event", "Live"]

_KEPT = 64


@dataclass(frozen=True)
class Event:
    """An event of a job: its number (from 1), its name, and its data as JSON."""

    number: int
    name: str
    data: bytes

    def encoded(self) -> bytes:
        """The event as a block of an event stream."""
        return f"id: {self.number}\nevent: {self.name}\ndata: ".encode() + self.data + b"\n\n"


@dataclass(eq=False)
class _Channel:
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=_KEPT))
    count: int = 0
    progress: int = 0
    ended: bool = False
    listeners: dict[object, tuple[asyncio.AbstractEventLoop, asyncio.Event, bool]] = field(default_factory=dict)


class Listener:
    """One reader of a job's events, in an event loop."""

    def __init__(self, live: Live, job: str, seen: int) -> None:
        self._live = live
        self._job = job
        self._seen = seen
        self.changed = asyncio.Event()

    async def wait(self, seconds: float) -> list[Event]:
        """Wait up to `seconds` for events. Returns those since the last call; empty if there are none in this time."""
        try:
            async with asyncio.timeout(seconds):
                await self.changed.wait()
        except TimeoutError:
            return []
        self.changed.clear()
        found = self._live.since(self._job, self._seen)
        if found:
            self._seen = found[-1].number
        return found


class Live:
    """The events of all waiting and running jobs. Any thread may publish."""

    def __init__(self, most: int) -> None:
        """`most`: listeners at once."""
        self._most = most
        self._channels: dict[str, _Channel] = {}
        self._lock = threading.Lock()
        self._open = 0
        self.is_closed = False
        """Whether the server is stopping: all listeners must end."""

    def close(self) -> None:
        """Wake all listeners for the last time."""
        self.is_closed = True
        with self._lock:
            waiting = [row for channel in self._channels.values() for row in channel.listeners.values()]
        for loop, changed, _ in waiting:
            _wake(loop, changed)

    @property
    def listeners(self) -> int:
        """Number of listeners."""
        return self._open

    def publish(self, job: str, name: str, data: Mapping[str, Any], progress: int | None = None) -> None:
        """Send an event to all listeners of a job. `progress`: percent, kept for `progress()`."""
        encoded = to_json(dict(data))
        with self._lock:
            channel = self._channels.setdefault(job, _Channel())
            if progress is not None:
                channel.progress = progress
            if name == "preview":
                kept = [event for event in channel.events if event.name != "preview"]
                channel.events.clear()
                channel.events.extend(kept)
            channel.count += 1
            channel.events.append(Event(channel.count, name, encoded))
            waiting = list(channel.listeners.values())
        for loop, changed, _ in waiting:
            _wake(loop, changed)

    def end(self, job: str) -> None:
        """Wake all listeners of a job and forget its events. Its row in the queue must already show its end."""
        with self._lock:
            channel = self._channels.get(job)
            waiting = [] if channel is None else list(channel.listeners.values())
            if channel is not None:
                channel.ended = True
                if not waiting:
                    del self._channels[job]
        for loop, changed, _ in waiting:
            _wake(loop, changed)

    def progress(self, job: str) -> int:
        """Progress of a running job in percent."""
        with self._lock:
            return self._channels[job].progress if job in self._channels else 0

    def is_watched(self, job: str) -> bool:
        """Whether any listener of the job wants previews."""
        with self._lock:
            channel = self._channels.get(job)
            return channel is not None and any(wanted for _, _, wanted in channel.listeners.values())

    def has_ended(self, job: str) -> bool:
        """Whether a job has ended. It must have a listener."""
        with self._lock:
            return job not in self._channels or self._channels[job].ended

    def since(self, job: str, number: int) -> list[Event]:
        """The kept events after the event with this number."""
        with self._lock:
            channel = self._channels.get(job)
            return [] if channel is None else [event for event in channel.events if event.number > number]

    @contextmanager
    def slot(self) -> Iterator[None]:
        """A place for one listener or waiting call. Raises Refusal if all are taken."""
        with self._lock:
            if self._open >= self._most:
                raise Refusal(429, "too_many_streams", f"{self._open} event streams are open: poll instead", retry=5)
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    @contextmanager
    def listen(self, job: str, seen: int = 0, previews: bool = True) -> Iterator[Listener]:
        """Listen to the events after the number `seen`. The caller must hold a `slot`."""
        listener = Listener(self, job, seen)
        with self._lock:
            channel = self._channels.setdefault(job, _Channel())
            channel.listeners[listener] = asyncio.get_running_loop(), listener.changed, previews
        listener.changed.set()
        try:
            yield listener
        finally:
            with self._lock:
                channel.listeners.pop(listener, None)
                if not channel.listeners and (channel.ended or not channel.count):
                    self._channels.pop(job, None)


def _wake(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(changed.set)
    except RuntimeError:  # the loop is closed: the server has ended
        return
