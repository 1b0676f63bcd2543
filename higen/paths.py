"""Paths that a user gives."""

from __future__ import annotations

import os
from pathlib import Path

from higen.errors import RequestError, quoted

__all__ = ["given_path"]


def given_path(path: object, name: str = "path") -> Path:
    """A path that the user gave; `~` and `~user` are home folders, as in a shell.

    Raises RequestError, beginning with `name`, for anything that is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise RequestError(f"{name}={quoted(path)}: a path, as a text or a pathlib.Path")
    given = Path(os.fsdecode(path))
    try:
        return given.expanduser()
    except RuntimeError:  # there is no such user, so it is a file name
        return given
