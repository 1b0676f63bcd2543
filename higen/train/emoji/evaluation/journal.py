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
    """Equal for equal keys only."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def meaning() -> dict[str, Any]:
    """What the numbers of a row mean; part of the key of all that is kept of them."""
    return {"measures": MEASURES_VERSION, **{kind.__name__: [f.name for f in fields(kind)] for kind in (Shot, Row)}}


class Journal:
    """Lines of JSON: the key of what is measured (its digest), then a clip's shot, row and features on each line."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Read the file `path` if it was kept under the same `key`, of the same measures; otherwise begin it anew.

        A line that was cut off in writing is forgotten. Raises OSError where the file can't be read or written.
        """
        self._path = path
        self._found: dict[Shot, Measured] = {}
        mark = digest({**key, **meaning()})
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        whole = lines[:-1]  # what ends in a line feed; "" or half a line comes after the last
        if not whole or whole[0] != mark:
            whole = [mark]
        for line in whole[1:]:
            shot, row, features = json.loads(line)
            self._found[Shot(**shot)] = Row(**row), np.array(features, np.float64)
        with whole_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def find(self, shot: Shot) -> Measured | None:
        """What was measured of this clip before, or None."""
        return self._found.get(shot)

    def add(self, shot: Shot, row: Row, features: NDArray[np.float64]) -> None:
        """Keep what was measured of a clip."""
        self._found[shot] = row, features
        with self._path.open("a", encoding="utf-8") as file:
            line = json.dumps([asdict(shot), asdict(row), features.tolist()], default=np.generic.item)
            file.write(line + "\n")
