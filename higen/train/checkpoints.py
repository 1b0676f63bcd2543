"""Checkpoints of a run. Each is written to a temporary file and moved into place; the last few are kept.

    <run>/checkpoints/step-00001000.pt     weights, their averages, optimiser, step, settings

If a save fails, or the process is killed during a save, the earlier checkpoints stay unchanged.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from higen.errors import TrainingError
from higen.models.pickles import plain_reason
from higen.staging import whole_file

__all__ = ["Checkpoints", "reason"]

VERSION = 1
_NAME = re.compile(r"step-(\d{8,})\.pt")
_PART = re.compile(r"step-\d{8,}\.part")


class Checkpoints:
    """The checkpoints in a folder, which is made when the first one is saved."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Every checkpoint, the oldest first."""
        found = self.folder.glob("step-*.pt") if self.folder.is_dir() else ()
        return sorted((p for p in found if _NAME.fullmatch(p.name)), key=_step)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint and remove all but the last `keep`.

        Raises TrainingError if the checkpoint cannot be written completely (a full disk). The error names the last good
        checkpoint.
        """
        path = self.folder / f"step-{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary, temporary.open("wb") as file:
                torch.save({"version": VERSION, **state}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer
            last = next(iter(reversed(self.paths())), None)
            kept = f"the last good checkpoint is {last}" if last else "there is no earlier one"
            raise TrainingError(f"{path} cannot be written: {reason(error)}; {kept}") from error
        for old in self.paths()[: -self.keep]:
            old.unlink()
        self._sweep()
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint with its tensors on the host; None if there is none.

        Raises TrainingError if the checkpoint cannot be read.
        """
        paths = self.paths()
        if not paths:
            return None
        try:
            state: dict[str, Any] = torch.load(paths[-1], map_location="cpu", weights_only=True)
            version = state["version"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            before = f"remove it to continue from {paths[-2].name}" if len(paths) > 1 else "it is the only one"
            raise TrainingError(f"{paths[-1]} cannot be read: {reason(error)}; {before}") from error
        if version != VERSION:
            raise TrainingError(f"{paths[-1]}: version {version}; this higen reads version {VERSION}")
        return state

    def clear(self) -> None:
        """Remove every checkpoint."""
        for path in self.paths():
            path.unlink()
        self._sweep()

    def _sweep(self) -> None:
        """Remove partial files of earlier versions of higen that were killed while writing."""
        for path in self.folder.glob("step-*.part"):
            if _PART.fullmatch(path.name):
                path.unlink()


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def reason(error: BaseException) -> str:
    """The operating system's reason for an error of torch's reader or writer."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return plain_reason(error)
