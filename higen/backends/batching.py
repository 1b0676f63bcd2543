"""Step-level continuous batching: which requests' stage calls share the next batch.

A request makes one stage call at a time. A denoising step is one call, and the inputs that describe the step are per
sample (higen/stages.py). Requests at different steps, with different solvers and guidance, therefore fit into one
batch. A new request joins at the next step and does not wait for the others to end.

This module has only the rules, without threads, clocks or a server, so that they can be tested directly:

- At most `slots` requests are active. At most `line` others wait, first come, first served.
- The oldest waiting call leads the next batch. Calls of the same stage and the same shapes join it, oldest first, up
  to the stage's limit of rows. Every batch therefore serves the request that has waited longest, and none starves.
- Some stages cannot hold several samples in the first axis (`batch` is false). Each of their calls is a batch by
  itself, and no limit of rows applies: the first axis is an axis like the others.
- When a request leaves (done, failed, cancelled), its call is dropped and its slot goes to the next in line.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import BackendError, RetryLater

__all__ = ["Batch", "Batcher", "Call"]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Call:
    """A stage call of one request. If `joins` is true, the first axis of every tensor has one row per sample."""

    request: Hashable
    stage: str
    tensors: Arrays
    joins: bool = True

    @property
    def rows(self) -> int:
        """Number of samples in this call; 1 if the call does not join others."""
        return int(next(iter(self.tensors.values())).shape[0]) if self.joins else 1

    @property
    def kind(self) -> Hashable:
        """Equal for two calls that fit into one batch: stage, names, dtypes and all axes but the first."""
        return self.stage, *sorted((name, str(t.dtype), t.shape[1:]) for name, t in self.tensors.items())


@dataclass(frozen=True, eq=False)
class Batch:
    """Calls of one kind that run together."""

    calls: tuple[Call, ...]

    @property
    def stage(self) -> str:
        """The stage of every call."""
        return self.calls[0].stage

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The stage's inputs: the rows of all calls, concatenated."""
        if len(self.calls) == 1:
            return dict(self.calls[0].tensors)
        return {name: np.concatenate([call.tensors[name] for call in self.calls]) for name in self.calls[0].tensors}

    def split(self, outputs: Arrays) -> list[dict[str, NDArray[Any]]]:
        """The outputs split into each call's rows. Raises BackendError if outputs and inputs differ in rows."""
        if not self.calls[0].joins:
            return [dict(outputs)]
        ends = np.cumsum([call.rows for call in self.calls])
        for name, tensor in outputs.items():
            if tensor.shape[0] != ends[-1]:
                raise BackendError(f"{self.stage}.{name}: {tensor.shape[0]} output rows, but {ends[-1]} input rows")
        # Copies: a caller that keeps its rows must not keep the rows of others in memory.
        return [
            {name: tensor[end - call.rows : end].copy() for name, tensor in outputs.items()}
            for call, end in zip(self.calls, ends, strict=True)
        ]


class Batcher:
    """Active requests, their waiting calls, and the next batch. Not thread-safe: its owner holds a lock."""

    def __init__(self, slots: int, rows: Mapping[str, int], line: int = 0) -> None:
        """`slots`: requests active at once; `rows`: maximum rows per batch, by stage; `line`: requests that wait."""
        if slots < 1 or line < 0 or any(most < 1 for most in rows.values()):
            raise BackendError(
                f"slots={slots}, line={line}, rows={dict(rows)}: at least one slot, and at least one row per stage"
            )
        self.slots = slots
        self.line = line
        self._rows = dict(rows)
        self._active: dict[Hashable, bool] = {}  # whether the request has a call that waits or runs
        self._queue: dict[Hashable, None] = {}
        self._calls: dict[Hashable, Call] = {}  # waiting calls, oldest first; at most one per request

    def enter(self, request: Hashable) -> None:
        """Take a slot or a place in line. Raises RetryLater if all slots and the line are full."""
        if request in self._active or request in self._queue:
            raise BackendError(f"request {request!r} has already entered")
        if len(self._active) < self.slots:
            self._active[request] = False
        elif len(self._queue) < self.line:
            self._queue[request] = None
        else:
            raise RetryLater(
                f"{len(self._active)} requests are running and {len(self._queue)} are waiting; try again later"
            )

    def leave(self, request: Hashable) -> None:
        """Remove a request that is done, failed or cancelled. Its slot goes to the first in line. May be repeated."""
        self._queue.pop(request, None)
        self._calls.pop(request, None)
        if self._active.pop(request, None) is not None and self._queue:
            first = next(iter(self._queue))
            del self._queue[first]
            self._active[first] = False

    def active(self, request: Hashable) -> bool:
        """Whether the request has a slot."""
        return request in self._active

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are active, and how many wait in line."""
        return len(self._active), len(self._queue)

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a batch."""
        return len(self._calls)

    @property
    def thinking(self) -> int:
        """Number of active requests between two calls. Their next calls come soon: it can pay to wait for them."""
        return sum(not called for called in self._active.values())

    def submit(self, request: Hashable, stage: str, tensors: Arrays, joins: bool = True) -> Call:
        """Queue the next call of an active request. `joins`: the call may share a batch with others.

        Raises BackendError for a call that can never run.
        """
        if self._active.get(request) is not False:
            raise BackendError(f"request {request!r} has no slot, or already has a call")
        call = Call(request, stage, tensors, joins)
        most = self._rows.get(stage)
        if joins and (most is None or not 1 <= call.rows <= most):
            raise BackendError(f"{stage}: {call.rows} rows, at most {most} run at once")
        self._active[request] = True
        self._calls[request] = call
        return call

    def next_batch(self) -> Batch | None:
        """Take the next batch out of the waiting calls; None if no call waits."""
        if not self._calls:
            return None
        leader = next(iter(self._calls.values()))
        chosen: list[Call] = [leader]
        room = self._rows[leader.stage] - leader.rows if leader.joins else 0
        for call in self._calls.values():
            if call is not leader and call.kind == leader.kind and call.rows <= room:
                chosen.append(call)
                room -= call.rows
        for call in chosen:
            del self._calls[call.request]
        return Batch(tuple(chosen))

    def done(self, call: Call) -> None:
        """Record that a call has run: its request is between two calls now."""
        if call.request in self._active:
            self._active[call.request] = False
