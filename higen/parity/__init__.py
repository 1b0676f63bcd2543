"""Compares higen with the reference: runs every case of a fixture directory and reports the error of each.

A fixture directory contains any number of these files, at any depth:

    fixtures.json        cases of small models: forward, units, sample, train, and the tables (misc)
    salt<N>.json         cases of the full-size model, with weights made by the recipe with salt N
    companions.json      text encoder, autoencoder and tokenizer

A case compares every tensor that is stored for it. A stored entry that is not understood is an error.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from higen.errors import FixtureError
from higen.parity.compare import Difference
from higen.parity.plan import Planned, plan

__all__ = ["Case", "main_table", "run"]


@dataclass(frozen=True)
class Case:
    """The result of a case: `error` and `allowed` of its worst tensor (the largest error relative to the allowed one).

    `tensor` is that tensor's name; `passed` says whether all tensors of the case agree.
    """

    name: str
    error: float
    allowed: float
    passed: bool
    tensor: str = ""

    def as_json(self) -> dict[str, str | float | bool | None]:
        """JSON-ready values. An error that is not finite (a wrong shape, NaN) is null."""
        error = self.error if math.isfinite(self.error) else None
        return {
            "case": self.name,
            "error": error,
            "allowed": self.allowed,
            "passed": self.passed,
            "tensor": self.tensor,
        }


def run(
    directory: str | os.PathLike[str], *, only: str | None = None, progress: Callable[[str], None] | None = None
) -> Iterator[Case]:
    """Run the cases of all fixtures in `directory` and below, one after the other.

    `only` keeps the cases whose name contains it ("forward/p1", "units", ...); `progress` is called with a case's name
    before it runs. All files are checked before the first case runs. Models are made when
    first needed and freed after their last case (the full-size one takes 6 GB).

    Raises FixtureError for a directory without a single case, and for anything in it that is missing, broken or
    unknown.
    """
    root = Path(directory)
    planned = plan(root)
    if not any(item.is_case for item in planned):
        raise FixtureError(f"{root}: no fixtures: no fixtures.json, salt<N>.json or companions.json with a case")
    if only is not None:
        names = [item.name for item in planned]
        planned = [item for item in planned if only in item.name]
        if not planned:
            raise FixtureError(f"only={only!r}: in none of the {len(names)} names, such as {names[0]!r}, {names[-1]!r}")
    return _run(deque(planned), progress)


def _run(planned: deque[Planned], progress: Callable[[str], None] | None) -> Iterator[Case]:
    while planned:
        item = planned.popleft()  # frees what only this case needs
        if progress is not None:
            progress(item.name)
        yield _case(item)


def _case(item: Planned) -> Case:
    try:
        differences = item.differences()
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        # The shapes come from the fixture, so a failure here means that the fixture is wrong.
        raise FixtureError(f"{item.name}: cannot be run: {type(error).__name__}: {error}") from error
    if not differences:
        raise FixtureError(f"{item.name}: there is nothing to compare")
    worst: Difference = max(differences, key=lambda difference: difference.used)
    return Case(item.name, worst.error, worst.allowed, all(d.passed for d in differences), worst.tensor)


def row(name: str, error: str, allowed: str, verdict: str) -> str:
    """A line of the table of cases."""
    return f"{name:<52}  {error:>9}  {allowed:>9}  {verdict}"


HEADER = row("case", "max error", "allowed", "ok")


def line(case: Case) -> str:
    """A case as a line: its name, largest error, allowed error, and "ok", or "OVER" and the worst tensor."""
    return row(case.name, f"{case.error:.2e}", f"{case.allowed:.2e}", "ok" if case.passed else f"OVER {case.tensor}")


def main_table(cases: Iterable[Case]) -> str:
    """The cases as a table."""
    return "\n".join([HEADER, *map(line, cases)])
