"""The sides of a benchmark: processes that each answer a line of input with a line of JSON, and take turns.

A benchmark's script starts itself once per side. In the side's process, `serve` makes the answers. A row is a mapping
from the names of measures to numbers. `{"error": ...}` ends a side, and the others go on.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Side", "run", "serve", "start"]


@dataclass
class Side:
    """A side's process, and its answers. `failed`: why it cannot run, or ""."""

    name: str
    process: subprocess.Popen[str]
    rows: list[dict[str, float]] = field(default_factory=list)
    failed: str = ""

    def ask(self) -> dict[str, Any]:
        """Run one request. After a failure the process is not used again."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer of the process."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        row: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
        self.failed = row.get("error", "")
        return row

    def median(self, what: str) -> float:
        """The median of a measure over the rounds; 0 for a measure that a row does not have."""
        return statistics.median(row.get(what, 0.0) for row in self.rows)


def start(name: str, *arguments: str) -> Side:
    """Start this script with `arguments`, and wait until the side is ready or says why it cannot run."""
    command = [sys.executable, sys.argv[0], *arguments]
    side = Side(name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    side.answer()
    return side


def run(sides: Sequence[Side], rounds: int, warm_up: int = 0) -> None:
    """Ask every side once in each round, in reverse order in every second round; then end the processes. The rows of
    the first `warm_up` rounds are not kept.
    """
    for turn in range(warm_up + rounds):
        for side in sides if turn % 2 else reversed(sides):
            if not side.failed:
                row = side.ask()
                if turn >= warm_up and not side.failed:
                    side.rows.append(row)
    for side in sides:
        side.process.communicate()


def serve(prepare: Callable[[], Callable[[], dict[str, float]]]) -> None:
    """A side's process: prepare, say that it is ready, and answer each line of standard input with a row."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers

    def answer(row: dict[str, Any]) -> None:
        print(json.dumps(row), file=answers, flush=True)

    try:
        request = prepare()
        answer({"ready": True})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        return
    for _ in sys.stdin:
        answer(request())
