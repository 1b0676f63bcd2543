"""Writes files of tensors completely or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from higen.errors import TrainingError
from higen.staging import whole_file
from higen.train.checkpoints import reason

__all__ = ["aside"]


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yields a temporary file name to write to. On a clean exit the file is moved to `path`.

    Raises TrainingError if the file cannot be written (a full disk). Then an earlier file at `path` stays.
    """
    try:
        with whole_file(path) as temporary:
            yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's writer
        raise TrainingError(f"{path} cannot be written: {reason(error)}") from error
