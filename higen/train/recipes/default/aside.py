"""Files that are there as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from higen.errors import TrainingError
from higen.train.checkpoints import reason

__all__ = ["aside"]


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yields a file name beside `path` to write to; it is moved to `path` on a clean exit.

    Raises TrainingError where it cannot be written (a full disk): what was at `path` stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's writer
        raise TrainingError(f"{path} cannot be written: {reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
