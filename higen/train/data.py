"""The items of a data set and their order, which is a function of (seed, step) alone.

A data set is a folder (clip.mp4 beside clip.txt, subfolders too) or a .jsonl or .csv file with `path` and `caption`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from higen.errors import SettingsError
from higen.train.media import IMAGES, VIDEOS

__all__ = ["IMAGE", "VIDEO", "Item", "Listing", "candidates", "explained", "list_items", "summary"]

IMAGE, VIDEO = 0, 1
"""Kinds of a batch; each has an order of its own."""


@dataclass(frozen=True)
class Item:
    """A file with its caption. `name` is its path as the data set writes it; `video` says how it is to be read."""

    path: Path
    name: str
    caption: str
    video: bool


@dataclass
class Listing:
    """The items of a data set, and why files were left out (reason by name). The latter is a report that grows as files
    are read: a file that is left out of one sample may serve another.
    """

    items: list[Item] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def of(self, kind: int, key_frames: bool) -> list[Item]:
        """What a batch of a kind is made from; with `key_frames`, videos serve as pictures too."""
        return [item for item in self.items if item.video == (kind == VIDEO) or (kind == IMAGE and key_frames)]

    def fingerprint(self) -> str:
        """sha256 of names and captions: the same data set has the same order."""
        text = json.dumps([[item.name, item.caption] for item in self.items])
        return hashlib.sha256(text.encode()).hexdigest()


def list_items(path: str | os.PathLike[str]) -> Listing:
    """The items of a data set, in the order of the file (a folder: of the names).

    Raises SettingsError for a missing or malformed data set (missing columns, a line that is no JSON object) or one
    without a single item; files that do not exist are found out when they are read.
    """
    source = Path(path)
    listing = Listing()
    try:
        if source.is_dir():
            rows = _folder_rows(source, listing)
        elif source.suffix.lower() in _READERS and source.is_file():
            rows = _READERS[source.suffix.lower()](source)
        else:
            raise SettingsError(f"data.path={str(source)!r}: a folder, or a .jsonl or .csv file that exists")
        base = source if source.is_dir() else source.parent
        for name, caption in rows:
            suffix = Path(name).suffix.lower()
            if suffix in (*VIDEOS, *IMAGES):
                listing.items.append(Item(base / name, name, caption, suffix in VIDEOS))
            else:
                listing.skipped[name] = f"its suffix {suffix!r} is unknown"
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"data.path={str(source)!r}: cannot be read: {error}") from error
    if not listing.items:
        raise SettingsError(f"data.path={str(source)!r}: no usable item{explained(listing.skipped)}")
    return listing


def _folder_rows(folder: Path, listing: Listing) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in (*VIDEOS, *IMAGES) and file.is_file():
            name, text = str(file.relative_to(folder)), file.with_suffix(".txt")
            try:
                yield name, text.read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                listing.skipped[name] = "no .txt with its caption beside it"
            except UnicodeDecodeError:
                listing.skipped[name] = "its caption is not UTF-8"
            except OSError as error:
                listing.skipped[name] = f"its caption cannot be read: {error.strerror}"


def _csv_rows(file: Path) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text)
        missing = [name for name in ("path", "caption") if name not in (reader.fieldnames or ())]
        if missing:
            found = ", ".join(map(repr, reader.fieldnames or ())) or "none"
            raise SettingsError(f"{file}: no column {' and no column '.join(map(repr, missing))}; it has {found}")
        for row in reader:
            yield _row(row, f"{file}, line {reader.line_num}")


def _jsonl_rows(file: Path) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8-sig") as text:
        for number, line in enumerate(text, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise SettingsError(f"{file}, line {number}: not JSON: {error}") from error
                yield _row(row, f"{file}, line {number}")


def _row(row: object, where: str) -> tuple[str, str]:
    if not isinstance(row, Mapping):
        raise SettingsError(f"{where}: {row!r}: an object with the texts 'path' and 'caption' is wanted")
    there = {name: value for name, value in row.items() if isinstance(name, str) and value is not None}
    for name in ("path", "caption"):
        if name not in there:
            raise SettingsError(f"{where}: no {name!r}; it has {', '.join(map(repr, there)) or 'nothing'}")
        if not isinstance(there[name], str):
            raise SettingsError(f"{where}: {name}={there[name]!r}: a text is wanted")
    return there["path"], there["caption"].strip()


_READERS = {".csv": _csv_rows, ".jsonl": _jsonl_rows}


@lru_cache(maxsize=4)
def _order(seed: int, kind: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, kind, epoch]).permutation(count)


def candidates(seed: int, kind: int, position: int, count: int) -> Iterator[int]:
    """Items for the `position`-th sample of a kind, of `count` items: the first is the one, the others stand in.

    Each epoch is a permutation of all items. What stands in for an unusable item is whatever follows it in the epoch,
    so that the samples depend on the data set alone and not on when a file was found to be unusable.
    """
    epoch, place = divmod(position, count)
    order = _order(seed, kind, epoch, count)
    for shift in range(count):
        yield int(order[(place + shift) % count])


def summary(skipped: Mapping[str, str]) -> str:
    """How many files were left out and why, as one line: "3 files skipped (2 cannot be read, 1 shorter than ...)"."""
    if not skipped:
        return ""
    reasons = Counter(reason.partition(":")[0] for reason in skipped.values())
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"{len(skipped)} file{'s' if len(skipped) > 1 else ''} skipped ({listed})"


def explained(skipped: Mapping[str, str]) -> str:
    """The same as the end of an error, with the whole reason of the first file."""
    for name, reason in skipped.items():
        return f": {summary(skipped)}; {name}: {reason}"
    return ""
