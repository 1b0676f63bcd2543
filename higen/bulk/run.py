"""One run: checks the file, makes the missing videos and writes the index."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from higen.bulk.index import INDEX, Index, Journal, Record, arrow, video_path
from higen.bulk.maker import Maker, Making, Order
from higen.bulk.places import open_place
from higen.bulk.rows import Row, model_digest, read_rows
from higen.bundle import Bundle, default_model
from higen.errors import BackendError, RequestError, quoted
from higen.noise_schedule import is_whole

__all__ = ["FORMATS", "Settings", "Summary", "run"]

FORMATS = ("mp4", "webm", "gif", "webp", "npy")

Start = Callable[[Order, list[Row]], Generator[Record, None, None]]
"""A function that makes rows and yields their records. Closing the generator stops it."""


@dataclass(frozen=True)
class Settings(Making):
    """A run's settings.

    output     a folder or URL
    model      path of the model, or None for the built-in one
    format     of the videos
    failures   the run gives up after this many failed rows in sequence
    """

    output: str
    model: Path | None = None
    format: str = "mp4"
    failures: int = 100

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise RequestError(f"format={quoted(self.format)}: one of {', '.join(FORMATS)}")
        for name, low, most in (("retries", 0, 100), ("slots", 1, 256), ("failures", 1, 10**9)):
            if not is_whole(getattr(self, name), low, most):
                raise RequestError(f"{name}={quoted(getattr(self, name))}: a whole number from {low} to {most}")

    @property
    def suffix(self) -> str:
        """Suffix of the videos' file names."""
        return f".{self.format}"

    def order(self, token: bytes, digest: str) -> Order:
        """The settings that a worker needs."""
        own = {row.name: getattr(self, row.name) for row in fields(Making)}
        model = None if self.model is None else str(self.model.absolute())
        return Order(self.output, token, digest, model, self.suffix, **own)


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    rows      number of different requests in the file
    made      number of videos made; `kept`: that existed before; `failed`: that could not be made
    seconds   duration of the run
    """

    index: str
    rows: int
    made: int
    kept: int
    failed: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The fields, for `--json`."""
        return asdict(self)


def run(
    path: Path,
    settings: Settings,
    start: Start | None = None,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Summary:
    """Make every row of a file that the output does not have yet. Rows that failed in an earlier run are tried again.

    `start`: makes the rows; None: in this process. `on_progress` is called with the number of rows done and of all
    rows. Raises RequestError, ModelError, OutputError or MissingExtra before anything is made. Raises BackendError if
    too many rows fail in sequence. Finished videos are kept in any case.
    """
    began = time.monotonic()
    arrow()
    bundle = Bundle.open(default_model() if settings.model is None else settings.model)
    rows = read_rows(path, bundle, settings.suffix)
    place = open_place(settings.output)
    place.make()
    with place.held() as token:
        for folder in ("videos", "journal"):
            place.tidy(folder)
        index = Index(place, rows)
        sizes, made = place.sizes("videos"), index.made()
        wanted = {row.key: video_path(row.key, settings.suffix) for row in rows}
        there = {key for key, (video, size) in made.items() if video == wanted.get(key) and sizes.get(video) == size}
        todo = [row for row in rows if row.key not in there]
        failed = done = 0
        on_progress(len(there), len(rows))
        try:
            with closing((start or _here)(settings.order(token, model_digest(bundle)), todo)) as records:
                for record in _watched(records, settings.failures) if todo else ():
                    index.add(record)
                    done += 1
                    failed += record.error is not None
                    on_progress(len(there) + done, len(rows))
        except BaseException:
            with suppress(Exception):  # if this fails, the journal keeps the records
                Journal(place).clear()
                if index.pending:
                    index.write()
            raise
        index.write()
    seconds = round(time.monotonic() - began, 3)
    return Summary(_joined(settings.output, INDEX), len(rows), done - failed, len(there), failed, seconds)


def _here(order: Order, rows: list[Row]) -> Generator[Record, None, None]:
    maker = Maker(order)
    try:
        yield from maker.make((row.key, row.text) for row in rows)
    finally:
        maker.close()


def _watched(records: Iterator[Record], failures: int) -> Iterator[Record]:
    """Pass on the records. Raises BackendError after this many failures in sequence."""
    failing = 0
    for record in records:
        yield record
        failing = failing + 1 if record.error is not None else 0
        if failing >= failures:
            raise BackendError(
                f"{failing} rows failed one after the other, the last with {record.error}; run again to continue"
            )


def _joined(output: str, name: str) -> str:
    return f"{output.rstrip('/')}/{name}" if "://" in output else str(Path(output) / name)
