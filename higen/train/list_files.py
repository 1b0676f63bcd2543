"""The rows of a data set's list: a .csv or .jsonl file with `path` and `caption`.

A row is either read unchanged, or reported as a mistake with its line. No row is silently dropped, cut or merged.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from higen.errors import SettingsError, quoted
from higen.request import MAX_PROMPT
from higen.text_files import TextError, check_text, from_json_text, read_text
from higen.train.media import SUFFIXES

__all__ = ["READERS", "check_as_prompt", "read_rows"]

COLUMNS = ("path", "caption")
LARGEST = 10.0
"""Largest magnitude of a row's scale."""
SHOWN = 5
"""Largest number of mistakes that an error lists."""

Mistakes = list[tuple[int, str]]


@dataclass(frozen=True)
class Row:
    """A row of a list. `scale` is the strength of an adapter for it (higen.train.sections.LoraSettings)."""

    path: str
    caption: str
    scale: float = 1.0


def read_rows(file: Path, scales: bool = False) -> list[Row]:
    """The rows of a list, in its order. `scales`: the column `scale` is read; otherwise every scale is 1.

    Raises SettingsError with the line of each malformed row, OSError, and TextError for anything that is not a text.
    """
    text, mistakes = read_text(file, largest=None), Mistakes()
    rows = list(READERS[file.suffix.lower()](text, mistakes, scales))
    if mistakes:
        named = "; ".join(f"line {line}: {what}" for line, what in mistakes[:SHOWN])
        rest = f"; {len(mistakes)} malformed rows in all" if len(mistakes) > SHOWN else ""
        raise SettingsError(f"{file}, {named}{rest}")
    return rows


def check_as_prompt(text: str) -> None:
    """Raise TextError for a text that a request would not accept as a prompt."""
    check_text(text)
    if len(text) > MAX_PROMPT:
        raise TextError(f"{len(text)} characters: at most {MAX_PROMPT}")


def _csv_rows(text: str, mistakes: Mistakes, scales: bool) -> Iterator[Row]:
    header: list[str] | None = None
    for line, row in _csv_lines(text, mistakes):
        if header is None:
            header = row
            if problem := _wrong_header(header):
                mistakes[:] = [(line, problem)]
                return
            continue
        if any(value.strip() for value in row[len(header) :]):
            what = f"{len(row)} values for {len(header)} columns: put a caption with a comma in double quotes"
            mistakes.append((line, what))
        elif problem := "".join(_run_together(value) for value in row):
            mistakes.append((line, problem))
        else:
            yield from _row(dict(zip(header, row, strict=False)), line, mistakes, scales)
    if header is None:
        mistakes[:] = [(1, _wrong_header([]))]


def _csv_lines(text: str, mistakes: Mistakes) -> Iterator[tuple[int, list[str]]]:
    """Each row, with the line on which it begins. Empty rows are skipped."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the beginning of the next row is unknown
            if "field limit" in str(error):
                mistakes.append(
                    (line, f"a value of more than {csv.field_size_limit()} characters: at most {MAX_PROMPT}")
                )
            else:
                mistakes.append((line, f"{error}: a double quote is not closed, or is not doubled in a quoted text"))
            return
        if any(value.strip() for value in row):  # spreadsheets write empty rows as commas
            yield line, row


def _wrong_header(header: list[str]) -> str:
    """What is wrong with a list's first row; empty if it is correct."""
    if twice := sorted({name for name in header if name in COLUMNS and header.count(name) > 1}):
        return f"the column {twice[0]!r} appears twice"
    missing = [name for name in COLUMNS if name not in header]
    if not missing:
        return ""
    found = ", ".join(map(quoted, header[:SHOWN])) or "none"
    found += f" and {len(header) - SHOWN} more" if len(header) > SHOWN else ""
    hint = ""
    if len(header) == 1 and (divided := next((d for d in ";\t|" if d in header[0]), None)):
        hint = f": its columns are separated by {divided!r}, not by commas"
    elif any(Path(value).suffix.lower() in SUFFIXES for value in header):
        hint = ": the first line is already a row, but must be path,caption"
    elif any(name.strip().lower() in COLUMNS for name in header):
        hint = ": write path,caption in lower case and without spaces"
    return f"no column {' and no column '.join(map(repr, missing))}; it has {found}{hint}"


def _run_together(value: str) -> str:
    """What is wrong with a value, or "": it contains the next rows after an unclosed quote, or it kept its quotes."""
    for line in value.split("\n")[1:]:
        if Path(line.partition(",")[0].strip(' "')).suffix.lower() in SUFFIXES:
            return f"a double quote is not closed, and the next rows became part of a text ({line[:40]!r})"
    if value[:1].isspace() and value.lstrip().startswith('"'):
        return f"white space before a double quote ({value[:40]!r}): remove it"
    return ""


def _jsonl_rows(text: str, mistakes: Mistakes, scales: bool) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = from_json_text(line)
            except TextError as error:
                mistakes.append((number, str(error)))
            else:
                yield from _row(row, number, mistakes, scales)


def _row(row: object, line: int, mistakes: Mistakes, scales: bool) -> Iterator[Row]:
    """The row, unless something is wrong with it."""
    if not isinstance(row, Mapping):
        mistakes.append((line, f"{quoted(row)}: an object with the texts 'path' and 'caption' is wanted"))
        return
    there = {name: value for name, value in row.items() if value is not None}
    for name in COLUMNS:
        if name not in there:
            mistakes.append((line, f"no {name!r}; it has {', '.join(map(quoted, [*there][:SHOWN])) or 'nothing'}"))
            return
        if not isinstance(there[name], str):
            mistakes.append((line, f"{name}={quoted(there[name])}: a text is wanted"))
            return
        try:
            check_as_prompt(there[name])
        except TextError as error:
            mistakes.append((line, f"{name}={quoted(there[name])}: {error}"))
            return
    if "\n" in there["path"]:
        mistakes.append((line, f"path={quoted(there['path'])}: a path of one line is wanted"))
        return
    try:
        scale = _scale(there.get("scale", 1.0)) if scales else 1.0
    except ValueError:
        what = f"scale={quoted(there['scale'])}: a number from -{LARGEST:g} to {LARGEST:g}, the adapter's strength"
        mistakes.append((line, what))
        return
    yield Row(there["path"], there["caption"].strip(), scale)


def _scale(value: object) -> float:
    """A row's `scale`; 1 for an empty cell. Raises ValueError."""
    if isinstance(value, str):
        value = float(value) if value.strip() else 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ValueError
    return float(value)


READERS: Mapping[str, Callable[[str, Mistakes, bool], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
}
