"""Finds the files of a .png sequence. The numbers may begin at any value and have any number of digits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from higen.media.files import head
from higen.video_frames import frame_mark
from higen.video_record import numbered

__all__ = ["Run", "find_run"]

_NUMBERED = re.compile(r"(.*?)([0-9]+)", re.DOTALL)


@dataclass(frozen=True)
class Run:
    """The files from the first number to the first gap.

    missing    text that names the first missing file; "" if there is none
    length     number of files from the first to the last number, including missing ones
    numbered   False for a single picture without a number
    member     the file name by which the sequence was opened; "" for the name of the whole sequence
    """

    files: tuple[Path, ...]
    missing: str = ""
    length: int = 1
    numbered: bool = True
    member: str = ""


def find_run(path: Path) -> Run:
    """The sequence that a path names: the name given to `save` (out.png for out_0000.png and so on), or the name of any
    of its files.

    If a file out.png exists, too, only that file is read, unless higen saved the sequence. Raises OutputError, OSError.
    """
    named = _run(path.parent, f"{path.stem}_", path.suffix)
    if named is not None and (not path.is_file() or _saved_by_us(named, path)):
        return named
    if not path.is_file():
        head(path)  # its error says what the path is
    match = _NUMBERED.fullmatch(path.stem)
    found = _run(path.parent, match[1], path.suffix, match[2]) if match else None
    return replace(found, member=path.name) if found else Run((path,), numbered=False)


def _run(folder: Path, prefix: str, suffix: str, member: str | None = None) -> Run | None:
    """The files prefix + number + suffix of a folder that have the most frequent number of digits."""
    if not folder.is_dir():
        return None
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)" + re.escape(suffix), re.DOTALL)
    names = [match[1] for file in folder.iterdir() if (match := pattern.fullmatch(file.name)) and file.is_file()]
    runs = [_of_width(names, width) for width in sorted({len(name) for name in names})]
    fitting = [run for run in runs if run and (member is None or member in run.values())]
    if not fitting:
        return None
    run = max(fitting, key=len)
    first, last = min(run), max(run)
    gap = next(number for number in range(first, last + 2) if number not in run)
    missing = f"{prefix}{gap:0{len(run[first])}d}{suffix} is missing" if gap < last else ""
    files = tuple(folder / f"{prefix}{run[number]}{suffix}" for number in range(first, gap))
    return Run(files, missing, last - first + 1)


def _of_width(names: list[str], width: int) -> Mapping[int, str]:
    """The digits in names by number, for names with the format %0{width}d of printf."""
    return {int(name): name for name in names if name == f"{int(name):0{width}d}"}


def _saved_by_us(run: Run, path: Path) -> bool:
    return run.files[0] == numbered(path, 0) and frame_mark(_info(run.files[0])) is not None


def _info(file: Path) -> dict[Any, Any]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return dict(image.info)
    except Exception:  # Pillow may raise anything on corrupt data: reading the frames will report it
        return {}
