"""Files that a run writes while it runs: losses.jsonl, TensorBoard scalars, skipped.jsonl.

losses.jsonl has one line for each logged step and nothing that depends on the clock. A run that was killed and resumed
leaves the same file as a run without interruption.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from higen.errors import MissingExtra, TrainingError
from higen.staging import whole_file

__all__ = ["Record", "read_losses"]


def read_losses(path: Path) -> list[dict[str, float]]:
    """The complete lines of a losses.jsonl. A last line that a kill truncated is left out. Raises TrainingError for a
    file with other lines.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    try:
        found = [json.loads(line) for line in lines]
        if all(type(row["step"]) is int for row in found):
            return found
    except (ValueError, TypeError, KeyError):
        pass
    raise TrainingError(f"{path}: is not the log of a run: move it away, or choose another run.output")


class Record:
    """The logs of a run in its folder. Raises OSError if they cannot be written."""

    def __init__(self, folder: Path, step: int, tensorboard: bool | None) -> None:
        """Continue at `step` (0: a new run). Lines that were logged after that step, before a kill, are removed.

        tensorboard: True (raises MissingExtra if it is not installed), False, or None (used if it is installed).
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, path = folder, folder / "losses.jsonl"
        kept = [line for line in read_losses(path) if line["step"] <= step]
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._skipped = self._skipped_before(step)
        self._board = _summary_writer(folder / "tensorboard", step, tensorboard)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def skipped(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """Write to skipped.jsonl which files were left out, and why. Returns all entries, including earlier ones."""
        self._skipped |= reasons
        if self._skipped:
            rows = ({"file": name, "reason": why} for name, why in sorted(self._skipped.items()))
            with whole_file(self.folder / "skipped.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return dict(self._skipped)

    def _skipped_before(self, step: int) -> dict[str, str]:
        """The earlier entries of skipped.jsonl, because a resumed run does not read every file again."""
        file = self.folder / "skipped.jsonl"
        if not file.exists():
            return {}
        try:
            rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            found = {row["file"]: row["reason"] for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise TrainingError(
                f"{file}: does not belong to a run: move it away, or choose another run.output"
            ) from error
        if not step:
            file.unlink()
            return {}
        return found

    def close(self) -> None:
        """Close the files."""
        with suppress(OSError):  # every line was flushed, or its error was raised
            self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path, step: int, wanted: bool | None) -> Any:
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if wanted:
            raise MissingExtra("tensorboard", "train", "run.tensorboard = true") from error
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
