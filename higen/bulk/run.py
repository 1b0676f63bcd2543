"""One run: checks the file, makes the videos that are missing, and writes the index."""

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
"""Makes rows somewhere and yields their records; stopped by closing it."""


@dataclass(frozen=True)
class Settings(Making):
    """A run's settings.

    output     a folder or URL
    model      its path, or None for the built-in one
    format     of the videos
    failures   rows that may fail one after the other before the run gives up
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
        """Suffix of the videos' files."""
        return f".{self.format}"

    def order(self, token: bytes, digest: str) -> Order:
        """The settings that a worker needs."""
        own = {row.name: getattr(self, row.name) for row in fields(Making)}
        model = None if self.model is None else str(self.model.absolute())
        return Order(self.output, token, digest, model, self.suffix, **own)


@dataclass(frozen=True)
class Summary:
    """The result of a run: numbers of different requests in the file, of videos made, of videos that existed, and of
    failures; seconds of the run.
    """

    index: str
    rows: int
    made: int
    kept: int
    failed: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def run(
    path: Path,
    settings: Settings,
    start: Start | None = None,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Summary:
    """Make every row of a file that the output does not have yet; a row that failed before is tried again.

    `start`: where rows are made; None: in this process. `on_progress` is called with the rows done and all rows.
    Raises RequestError, ModelError, OutputError or MissingExtra before anything is made; BackendError where too many
    rows fail one after the other. Finished videos are kept, whatever ends the run.
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
            with suppress(Exception):  # the journal has what the index has not
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
    """The records, as long as fewer than this many in a row are failures. Raises BackendError."""
    failing = 0
    for record in records:
        yield record
        failing = failing + 1 if record.error is not None else 0
        if failing >= failures:
            raise BackendError(
                f"{failing} rows failed one after the other, the last with {record.error}; run again to go on"
            )


def _joined(output: str, name: str) -> str:
    return f"{output.rstrip('/')}/{name}" if "://" in output else str(Path(output) / name)
