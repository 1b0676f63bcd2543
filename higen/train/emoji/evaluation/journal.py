"""A journal of the measures of each clip, so that a stopped `higen evaluate` continues where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.measures import MEASURES_VERSION
from higen.staging import whole_file
from higen.train.emoji.evaluation.plan import Row, Shot

__all__ = ["Journal", "digest", "meaning"]

Measured = tuple[Row, NDArray[np.float64]]


def digest(key: Mapping[str, Any]) -> str:
    """A hash that is equal only for equal keys."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def meaning() -> dict[str, Any]:
    """The meaning of the numbers in a row. It is part of the key of all stored rows."""
    return {"measures": MEASURES_VERSION, **{kind.__name__: [f.name for f in fields(kind)] for kind in (Shot, Row)}}


class Journal:
    """A file of lines: first the digest of a key for the measurement, then a clip's shot, row and features as JSON."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Read the file `path` if it has the same `key` and the same measures. Otherwise start a new file.

        A truncated last line is dropped. Raises OSError if the file cannot be read or written.
        """
        self._path = path
        self._found: dict[Shot, Measured] = {}
        mark = digest({**key, **meaning()})
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        whole = lines[:-1]  # lines that end in a line feed; the last part is "" or a truncated line
        if not whole or whole[0] != mark:
            whole = [mark]
        for line in whole[1:]:
            shot, row, features = json.loads(line)
            self._found[Shot(**shot)] = Row(**row), np.array(features, np.float64)
        with whole_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def find(self, shot: Shot) -> Measured | None:
        """The stored measures of this clip, or None."""
        return self._found.get(shot)

    def add(self, shot: Shot, row: Row, features: NDArray[np.float64]) -> None:
        """Store the measures of a clip."""
        self._found[shot] = row, features
        with self._path.open("a", encoding="utf-8") as file:
            line = json.dumps([asdict(shot), asdict(row), features.tolist()], default=np.generic.item)
            file.write(line + "\n")
