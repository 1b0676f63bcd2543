"""`higen compose` makes a composed model from two model directories. It is never read from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from higen.errors import CheckpointError
from higen.families import Converted

__all__ = ["convert", "recognise"]


def recognise(path: Path) -> bool:
    """Always false: this family has no sources."""
    return False


def convert(sources: Sequence[Path], **options: Any) -> Converted:
    """Always raises CheckpointError."""
    raise CheckpointError("composed: made of two model directories: higen compose FIRST SECOND OUTPUT")
