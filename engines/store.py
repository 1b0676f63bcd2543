"""The engines of one target in a model's folder. Each is written completely or not at all, by one builder at a time."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from higen.backends.plans import (
    ENGINES,
    PlanRecord,
    engine_file,
    fitting_record,
    log_file,
    pending_file,
    pending_record,
    record_file,
)
from higen.bundle import sha256
from higen.errors import EngineError, OutputError
from higen.locks import locked

__all__ = ["EngineStore", "difference"]

LOCK = ".lock"

_PART = re.compile(r"\..+\.(engine|json|log|cache\.\d+(\.\d+)?)\.part")
"""Files that a killed builder leaves behind, or a killed C++ program that was saving compiled kernels."""

INGREDIENTS = (
    "precision",
    "flavour",
    "library",
    "architectures",
    "graph_sha256",
    "weights_sha256",
    "profiles",
    "options",
)
"""A plan is built again if one of these fields has changed."""


def difference(stored: PlanRecord, wanted: PlanRecord) -> str | None:
    """Why a stored plan is not the wanted one, in a few words; None if it is the wanted one."""
    for name in INGREDIENTS:
        old, new = getattr(stored, name), getattr(wanted, name)
        if old != new:
            values = f" ({old}, now {new})" if name in ("precision", "library", "architectures", "options") else ""
            what = name.removesuffix("_sha256")
            return f"{'other' if what.endswith('s') else 'another'} {what}{values}"
    return None


class EngineStore:
    """The folder model/engines/<target>."""

    def __init__(self, model: Path, target: str) -> None:
        self.folder = model / ENGINES / target

    @contextmanager
    def building(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Be the only builder of this target. If another one is running, call `on_wait` and wait until it ends. Then
        finish or undo the work of a killed builder.

        Raises OutputError if the folder cannot be made.
        """
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder / LOCK, on_wait))
                self._recover()
            except OSError as error:
                raise OutputError(f"{self.folder}: {error.strerror or error}") from error
            yield

    def stored(self, stage: str, verify: bool = True) -> PlanRecord | None:
        """The record of a stage's plan; None if there is none or it does not match the plan file.

        `verify`: compare size and sha256; otherwise only the size.
        """
        path, plan = self.folder / record_file(stage), self.folder / engine_file(stage)
        try:
            record = PlanRecord.from_text(path.read_text(encoding="utf-8"), str(path))
            whole = plan.stat().st_size == record.size and not (verify and sha256(plan) != record.sha256)
        except (OSError, UnicodeDecodeError, EngineError):
            return None  # unusable: the plan is built again
        return record if whole else None

    def holds(self, stage: str) -> bool:
        """Whether a plan or record of a stage exists, usable or not."""
        return any((self.folder / name(stage)).exists() for name in (engine_file, record_file))

    def plan_size(self, stage: str) -> int:
        """Bytes of a stage's plan; 0 if there is none."""
        plan = self.folder / engine_file(stage)
        return plan.stat().st_size if plan.is_file() else 0

    def check_space(self, needed: int) -> None:
        """Raises OutputError if the disk has less than `needed` bytes free."""
        folder = next(parent for parent in (self.folder, *self.folder.parents) if parent.exists())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OutputError(f"{folder}: {free / 1e6:.0f} MB free, the engines need about {needed / 1e6:.0f} MB")

    def write(self, plan: Any, record: PlanRecord, log: str) -> None:
        """Put a plan (a buffer), its record and its log in place. The old ones stay if the new ones cannot be written.

        Two renames, one right after the other, switch plan and record. If the second one fails or the process is
        killed, the new record stays beside the new plan: `read_plans` and the C++ library read it there, and the next
        builder moves it into place.

        Raises OutputError for a full disk and the like.
        """
        stage = record.stage
        contents = {
            log_file(stage): log.encode(),
            engine_file(stage): plan,
            record_file(stage): record.to_text().encode(),
        }
        try:
            for name, content in contents.items():
                with self._part(name).open("wb") as file:
                    file.write(content)
            for name in contents:
                self._part(name).replace(self.folder / name)
        except OSError as error:
            if self._part(engine_file(stage)).exists() or not self._part(record_file(stage)).exists():
                for name in contents:
                    self._part(name).unlink(missing_ok=True)
            what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise OutputError(f"{self.folder / engine_file(stage)}: cannot be written: {what}") from error

    def _part(self, name: str) -> Path:
        return self.folder / pending_file(name)

    def _recover(self) -> None:
        for part in sorted(self.folder.glob(pending_file(record_file("*")))):
            record = self.folder / part.name.removeprefix(".").removesuffix(".part")
            self._finish_plan(record.stem, part)
            if pending_record(record) is not None:
                part.replace(record)
        for part in self.folder.glob(".*.part"):
            if _PART.fullmatch(part.name):
                part.unlink()

    def _finish_plan(self, stage: str, pending: Path) -> None:
        """Move a plan into place if its log is there already: all three files were complete before that."""
        if self._part(log_file(stage)).exists():
            return
        plan = self._part(engine_file(stage))
        record = fitting_record(pending, plan)
        if record is not None and record.stage == stage:
            plan.replace(self.folder / engine_file(stage))
