"""The records of finished videos: a Parquet index, and a journal of records that are not in the index yet.

    OUTPUT/index.parquet          one row per request: path, seed, metadata, seconds, error, ...
    OUTPUT/journal/KEY.json       a record that is not in the index yet, written after its video
    OUTPUT/journal/KEY.begun      how many processes have begun an unfinished row; all but a running one died in it
    OUTPUT/videos/ab/KEY.mp4      a video, in a folder named by the first two digits of its key

Workers write to the journal. One process moves the records into the index. Every record is in at least one of the two.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from higen.bulk.places import Place
from higen.bulk.rows import Row
from higen.errors import MissingExtra, OutputError

__all__ = ["INDEX", "Index", "Journal", "Record", "arrow", "video_path"]

INDEX = "index.parquet"
_MARK = (b"higen.batch", b"1")
_ENTRY = re.compile(r"journal/([0-9a-f]{32})\.(json|begun)")
_LEAST, _SHARE = 60.0, 20.0
"""Least time between two writes of the index: seconds, and a multiple of the duration of the last write."""


@dataclass(frozen=True)
class Record:
    """The result of a row.

    path      of the video, relative to the output; None if there is no video
    seconds   of the attempt that succeeded, or of the last attempt
    attempts  how often the row was begun, in this run and earlier ones
    """

    key: str
    request: str
    path: str | None = None
    seed: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    file_bytes: int = 0
    attempts: int = 1
    error: str | None = None

    def as_json(self) -> str:
        """The record as JSON, for the journal and for other processes."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """The record from the text of `as_json`. Raises ValueError or TypeError for anything else."""
        return cls(**json.loads(text))


def arrow() -> Any:
    """The package pyarrow, with pyarrow.parquet imported. Raises MissingExtra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtra("pyarrow", "batch", "higen batch") from error
    return pyarrow


def video_path(key: str, suffix: str) -> str:
    """Path of a row's video, relative to the output."""
    return f"videos/{key[:2]}/{key}{suffix}"


class Journal:
    """The records of finished rows. Any process may write the records of its own rows."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def get(self, key: str) -> Record | None:
        """A row's record; None if there is none or it cannot be read."""
        content = self._place.read(f"journal/{key}.json")
        with suppress(ValueError, TypeError):
            return None if content is None else Record.from_json(content)
        return None

    def begin(self, key: str) -> int:
        """Record that a row is begun. Returns how often this was recorded before."""
        name = f"journal/{key}.begun"
        text = (self._place.read(name) or b"0").decode("ascii", "replace")
        before = int(text) if text.isascii() and text.isdigit() else 0
        self._place.put(name, lambda path: path.write_text(str(before + 1), encoding="ascii"))
        return before

    def end(self, record: Record) -> None:
        """Store the record of a row that is done or has finally failed."""
        text = record.as_json()
        self._place.put(f"journal/{record.key}.json", lambda path: path.write_text(text, encoding="utf-8"))
        self.leave(record.key)

    def leave(self, key: str) -> None:
        """Forget that a row was begun: it stopped for a reason that is not the row's fault."""
        self._place.remove([f"journal/{key}.begun"])

    def begun(self) -> set[str]:
        """Keys of the rows that are begun and not ended."""
        return self._keys("begun")

    def keys(self) -> set[str]:
        """Keys of the rows that have a record in the journal."""
        return self._keys("json")

    def clear(self) -> None:
        """Forget which rows were begun: the run was stopped, and no row caused it."""
        for key in self.begun():
            self.leave(key)

    def forget(self, keys: Sequence[str]) -> None:
        """Remove records that are in the index now, and their .begun files if a killed writer left some."""
        names = {f"journal/{key}.{kind}" for key in keys for kind in ("json", "begun")}
        self._place.remove(sorted(names.intersection(self._place.sizes("journal"))))

    def _keys(self, kind: str) -> set[str]:
        entries = map(_ENTRY.fullmatch, self._place.sizes("journal"))
        return {entry[1] for entry in entries if entry and entry[2] == kind}


class Index:
    """The index of a place. Only one process at a time may use it."""

    def __init__(self, place: Place, rows: Sequence[Row]) -> None:
        """Read the index and the journal. Raises OutputError if the index file is not higen's.

        `rows`: of the current file of requests; the index stores their line numbers with the records.
        """
        self._arrow = arrow()
        self._place = place
        self._journal = Journal(place)
        self._lines = {row.key: row.lines for row in rows}
        self._new: dict[str, Record] = {}
        self._table = self._read()
        self._written, self._took = time.monotonic(), 0.0
        for key in sorted(self._journal.keys()):
            if (record := self._journal.get(key)) is not None:
                self._new[key] = record

    def made(self) -> dict[str, tuple[str, int]]:
        """Path and size in bytes of each recorded video, by key."""
        names = ("key", "path", "file_bytes")
        old = zip(*(self._table[name].to_pylist() for name in names), strict=True)
        found = {key: (path, size) for key, path, size in old if path is not None}
        for record in self._new.values():
            found.pop(record.key, None)
            if record.path is not None:
                found[record.key] = record.path, record.file_bytes
        return found

    @property
    def pending(self) -> int:
        """Number of records that are only in the journal."""
        return len(self._new)

    def add(self, record: Record) -> None:
        """Add a record of the journal. The index is written from time to time."""
        self._new[record.key] = record
        if time.monotonic() - self._written > max(_LEAST, _SHARE * self._took):
            self.write()

    def write(self) -> None:
        """Write the index with all records, in the order of the file, then remove them from the journal."""
        began = time.monotonic()
        table = self._joined()
        parquet = self._arrow.parquet
        self._place.put(INDEX, lambda path: parquet.write_table(table, path, compression="zstd"))
        self._journal.forget(list(self._new))
        self._table, self._new = table, {}
        self._written = time.monotonic()
        self._took = self._written - began

    def _joined(self) -> Any:
        arrow = self._arrow
        keys = self._table["key"].to_pylist()
        kept = self._table.filter(arrow.array([key not in self._new for key in keys], arrow.bool_()))
        rows = [_columns(record) for record in self._new.values()]
        table = arrow.concat_tables([kept, arrow.Table.from_pylist(rows, self._schema())])
        lines = [self._lines.get(key, ()) for key in table["key"].to_pylist()]
        place = table.schema.get_field_index("lines")
        table = table.set_column(place, self._schema().field("lines"), [arrow.array(lines, arrow.list_(arrow.int64()))])
        last = 2**62  # records of other files come last
        order = sorted(range(len(lines)), key=lambda i: lines[i][0] if lines[i] else last)
        return table.take(order).replace_schema_metadata(dict([_MARK]))

    def _schema(self) -> Any:
        arrow = self._arrow
        columns = [
            ("key", arrow.string()),
            ("lines", arrow.list_(arrow.int64())),
            ("request", arrow.string()),
            ("path", arrow.string()),
            ("seed", arrow.uint64()),
            ("metadata", arrow.string()),
            ("seconds", arrow.float64()),
            ("file_bytes", arrow.int64()),
            ("attempts", arrow.int64()),
            ("error", arrow.string()),
        ]
        return arrow.schema(columns, metadata=dict([_MARK]))

    def _read(self) -> Any:
        content = self._place.read(INDEX)
        if content is None:
            return self._schema().empty_table()
        try:
            table = self._arrow.parquet.read_table(self._arrow.BufferReader(content))
        except Exception as error:  # pyarrow raises many kinds
            raise OutputError(f"{INDEX} of the output cannot be read: move it away ({error})") from error
        if (table.schema.metadata or {}).get(_MARK[0]) != _MARK[1] or table.schema.names != self._schema().names:
            raise OutputError(
                f"{INDEX} of the output was not written by an earlier run: move it away, or choose another output"
            )
        return table


def _columns(record: Record) -> dict[str, Any]:
    metadata = json.dumps(record.metadata, ensure_ascii=False)
    return {**asdict(replace(record, metadata={})), "metadata": metadata, "lines": []}
