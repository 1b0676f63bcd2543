"""The items of a data set and their order, which depends only on (seed, step).

A data set is a folder (clip.mp4 and clip.txt, also in subfolders), or a .jsonl or .csv file with `path` and `caption`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from higen.errors import SettingsError
from higen.request import MAX_PROMPT
from higen.text_files import TextError, read_text
from higen.train.list_files import READERS, Row, check_as_prompt, read_rows
from higen.train.media import SUFFIXES, is_video

__all__ = ["IMAGE", "VIDEO", "Item", "Listing", "candidates", "explained", "list_items", "summary"]

IMAGE, VIDEO = 0, 1
"""Kinds of batches. Each kind has its own order of items."""

CAPTIONS = (".txt", ".caption")
"""Suffixes of caption files, in upper or lower case. The first one that exists is taken."""
HIDDEN = "."
"""Prefix of the names of hidden files."""

RESOURCE = "._"
"""Prefix of the names of files in which macOS keeps another file's attributes."""


@dataclass(frozen=True)
class Item:
    """A file with its caption. `name` is its path as written in the data set; `video` says whether it is a video or a
    picture; `scale` is the strength of an adapter for it.
    """

    path: Path
    name: str
    caption: str
    video: bool
    scale: float = 1.0


@dataclass
class Listing:
    """The items of a data set. `skipped` has the reasons for left-out files, by name. `notes` has remarks for the user
    on files that were used. Both grow as files are read. A file that one sample skips may still serve another.
    """

    items: list[Item] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def of(self, kind: int, key_frames: bool) -> list[Item]:
        """The items for batches of a kind. With `key_frames`, videos serve as pictures too."""
        return [item for item in self.items if item.video == (kind == VIDEO) or (kind == IMAGE and key_frames)]

    def fingerprint(self) -> str:
        """sha256 of names, captions and scales. Data sets with the same fingerprint have the same order."""
        scales = [[item.scale] if item.scale != 1 else [] for item in self.items]
        text = json.dumps([[item.name, item.caption, *scale] for item, scale in zip(self.items, scales, strict=True)])
        return hashlib.sha256(text.encode()).hexdigest()


def list_items(path: str | os.PathLike[str], scales: bool = False) -> Listing:
    """The items of a data set, in the order of the list (for a folder: sorted by name).

    In a folder, hidden files and folders are left out, and the caption of a file is in the .txt file of the same name,
    or else in the .caption file. `scales`: a list's column `scale` gives the strength of an adapter for each item.

    Raises SettingsError for a missing or malformed data set (missing columns, a line that is not a JSON object, a row
    that is truncated or merged with others), for a folder with `scales`, and for a data set without items. Files that
    do not exist are noticed only when they are read.
    """
    source = Path(path)
    listing = Listing()
    try:
        if scales and source.is_dir():
            raise SettingsError(
                f"lora.scales=true: data.path={str(source)!r} is a folder; give a list with a column 'scale'"
            )
        if source.is_dir():
            rows = _folder_rows(source, listing)
        elif source.suffix.lower() in READERS and source.is_file():
            rows = read_rows(source, scales)
        else:
            raise SettingsError(f"data.path={str(source)!r}: a folder, or a .jsonl or .csv file that exists")
    except (OSError, TextError) as error:
        raise SettingsError(f"data.path={str(source)!r}: cannot be read: {error}") from error
    base = source if source.is_dir() else source.parent
    for row in rows:
        name = row.path
        suffix = Path(name).suffix.lower()
        if Path(name).name.startswith(RESOURCE):
            listing.skipped[name] = "macOS keeps a file's attributes in it"
        elif suffix in SUFFIXES:
            listing.items.append(Item(base / name, name, row.caption, is_video(base / name), row.scale))
        else:
            listing.skipped[name] = f"its suffix {suffix!r} is unknown"
    if not listing.items:
        raise SettingsError(f"data.path={str(source)!r}: no usable item{explained(listing.skipped)}")
    return listing


def _folder_rows(folder: Path, listing: Listing) -> list[Row]:
    """The rows of a folder. If a file or a caption is left out, its reason goes to the listing."""
    rows = []
    for place, names, folders in _folders(folder, listing):
        captions = _captions([*names, *folders])
        alone = {stem: name for stem, name in captions.items() if name in names}
        for name in map(Path, names):
            if name.suffix.lower() in CAPTIONS:
                continue
            relative, caption = (place / name).as_posix(), captions.get(name.stem)
            alone.pop(name.stem, None)
            if name.suffix.lower() not in SUFFIXES:
                if caption is not None:
                    listing.skipped[relative] = f"its suffix {name.suffix.lower()!r} is unknown"
            elif caption is None:
                listing.skipped[relative] = "no .txt with its caption beside it"
            else:
                try:
                    text = read_text(folder / place / caption, largest=4 * MAX_PROMPT)
                    check_as_prompt(text)
                    rows.append(Row(relative, text.strip()))
                except TextError as error:
                    listing.skipped[relative] = f"its caption cannot be used: {(place / caption).as_posix()}: {error}"
                except OSError as error:
                    listing.skipped[relative] = f"its caption cannot be read: {error.strerror}"
        for lonely in alone.values():
            listing.skipped[(place / lonely).as_posix()] = "no picture or video of its name beside it"
    return sorted(rows, key=lambda row: row.path.split("/"))


def _captions(names: Iterable[str]) -> dict[str, str]:
    """The caption files by their stem, which is the name without the suffix."""

    def rank(file: Path) -> tuple[int, bool, str]:
        return CAPTIONS.index(file.suffix.lower()), file.suffix.lower() != file.suffix, file.name

    found = sorted((file for file in map(Path, names) if file.suffix.lower() in CAPTIONS), key=rank, reverse=True)
    return {file.stem: file.name for file in found}


def _folders(folder: Path, listing: Listing) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`folder` and each folder inside it: its relative path, its files and its folders. Hidden folders are left out.
    Unreadable folders and links to folders are left out too, and the listing gets the reason.
    """

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        listing.skipped[Path(error.filename).relative_to(folder).as_posix()] = f"cannot be read: {error.strerror}"

    for here, below, names in os.walk(folder, onerror=unreadable):
        place = Path(here).relative_to(folder)
        below[:] = sorted(name for name in below if not name.startswith(HIDDEN))
        for name in below:
            if Path(here, name).is_symlink():
                listing.skipped[(place / name).as_posix()] = "a link to a folder is not followed"
        yield place, sorted(name for name in names if not name.startswith(HIDDEN)), list(below)


@lru_cache(maxsize=4)
def _order(seed: int, kind: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, kind, epoch]).permutation(count)


def candidates(seed: int, kind: int, position: int, count: int) -> Iterator[int]:
    """Indices of the items for the `position`-th sample of a kind with `count` items. The first usable item is taken.

    Each epoch is a permutation of all items. An unusable item is replaced by the next one in the epoch. Therefore the
    samples depend only on the data set, and not on when a file was found to be unusable.
    """
    epoch, place = divmod(position, count)
    order = _order(seed, kind, epoch, count)
    for shift in range(count):
        yield int(order[(place + shift) % count])


def summary(skipped: Mapping[str, str], what: str = "skipped") -> str:
    """A line with the number of left-out files and the reasons: "3 files skipped (2 cannot be read, 1 shorter ...)"."""
    if not skipped:
        return ""
    reasons = Counter(reason.partition(":")[0] for reason in skipped.values())
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"{len(skipped)} file{'s' if len(skipped) > 1 else ''} {what} ({listed})"


def explained(skipped: Mapping[str, str]) -> str:
    """The same line as the end of an error message, with the full reason of the first file."""
    for name, reason in skipped.items():
        return f": {summary(skipped)}; {name}: {reason}"
    return ""
