"""The file of requests: JSON Lines or CSV with one request per row. Every row is checked before any work starts.

A row has options of a request (prompt, seed, steps, ...) and the model's controls, by name. Equal requests to the same
model have the same key, and so the same result, however they are written in the file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from higen.bundle import Bundle
from higen.errors import OutputError, RequestError, quoted
from higen.images import load_picture
from higen.manifest import Manifest
from higen.paths import given_path
from higen.request import Picture, Request, make_request
from higen.tables import COMMON, VISUAL, Control
from higen.text_files import TextError, from_json_text, read_text, repeated_key
from higen.typed_json import to_json
from higen.video import check_output

__all__ = ["Row", "key_of", "model_digest", "read_rows"]

_SHOWN = 5
"""Maximum number of wrong rows that an error message names."""

_RANDOM = ("random", -1)


@dataclass(frozen=True, slots=True)
class Row:
    """A request. `text`: the request as JSON, with a fixed seed and absolute paths. `lines`: its line numbers."""

    key: str
    text: str
    lines: tuple[int, ...]


def model_digest(bundle: Bundle) -> str:
    """A digest that identifies a model: its manifest, weights and tokenizer, but not its graphs and engines."""
    manifest = bundle.manifest
    names = [*manifest.weights, *(() if manifest.text is None else (manifest.text.tokenizer,))]
    facts = [to_json(manifest), {name: bundle.files[name].sha256 for name in names if name in bundle.files}]
    return _digest(facts)


def key_of(request: Request, model: str, suffix: str) -> str:
    """A request's key of 32 hexadecimal digits: the same for equal requests to the same model in the same format."""
    facts = {field.name: getattr(request, field.name) for field in fields(request) if field.name != "warn"}
    facts["settings"] = request.settings.as_metadata()
    facts["controls"] = {name: _fact(value) for name, value in request.controls.items()}
    return _digest([1, model, suffix, facts])[:32]


def _fact(value: Any) -> Any:
    if isinstance(value, tuple):
        return [picture.digest.hex() for picture in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_rows(path: Path, bundle: Bundle, suffix: str) -> list[Row]:
    """The requests of the file, without duplicates. Pictures are read too. Paths are relative to the file's folder.

    A row with the seed -1 or "random" gets a seed computed from its content and its number among equal rows. Each
    reading of the file therefore gives the same seed. Raises RequestError that names the first wrong lines.
    """
    manifest, model = bundle.manifest, model_digest(bundle)
    kinds = {control.name: control.kind for control in manifest.controls}
    check = _Check(manifest, Path(os.path.realpath(path)).parent, suffix)
    found: dict[str, tuple[str, list[int]]] = {}
    wrong: list[str] = []
    lines = 0
    try:
        text = read_text(path, None)
        for line, parse in _csv(text, kinds) if path.suffix.lower() == ".csv" else _json_lines(text):
            lines += 1
            try:
                options = check.options(parse())
                key = key_of(check.request(options), model, suffix)
            except (RequestError, OutputError, TextError) as error:
                wrong.append(f"line {line}: {error}")
                continue
            found.setdefault(key, (json.dumps(options, ensure_ascii=False), []))[1].append(line)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except TextError as error:
        raise RequestError(f"{path}: {error}") from error
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise RequestError(f"{path}: {len(wrong)} of {lines} rows are wrong: {'; '.join(wrong[:_SHOWN])}{more}")
    if not found:
        raise RequestError(f"{path}: has no rows; write one JSON object per line, or a CSV file with a header row")
    return [Row(key, text, tuple(numbers)) for key, (text, numbers) in found.items()]


_Parsed = Iterator[tuple[int, Callable[[], Any]]]
"""For each row, its line number and a function that parses it."""


def _json_lines(text: str) -> _Parsed:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, lambda line=line: from_json_text(line)  # type: ignore[misc]


def _csv(text: str, kinds: Mapping[str, str]) -> _Parsed:
    """Rows of a CSV file. Its first row has the names; an empty cell means no value."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise TextError(f"line {line}: not CSV: {error}") from error
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            if (twice := repeated_key([(name, None) for name in names])) is not None:
                raise TextError(f"line {line}: the column {twice!r} appears twice")
            if unknown := [name for name in names if name not in (*COMMON, *kinds)]:
                known = ", ".join((*COMMON, *kinds))
                raise TextError(f"line {line}: the column {quoted(unknown[0])} is unknown; known are {known}")
            continue
        yield line, lambda names=names, cells=cells: _from_cells(names, cells, kinds)  # type: ignore[misc]


def _from_cells(names: list[str], cells: list[str], kinds: Mapping[str, str]) -> dict[str, Any]:
    if len(cells) > len(names):
        raise TextError(f"{len(cells)} cells for {len(names)} columns")
    return {name: _cell(name, cell, kinds) for name, cell in zip(names, cells, strict=False) if cell.strip()}


def _cell(name: str, cell: str, kinds: Mapping[str, str]) -> Any:
    """The value of a cell. For an option that takes text: the text. Else JSON, numbers with commas, or a word."""
    if name in ("prompt", "negative_prompt") or kinds.get(name) in ("text", "choice", "picture", "clip", "mask", "map"):
        return cell
    for attempt in (cell, f"[{cell}]"):
        try:
            return from_json_text(attempt)
        except TextError:
            continue
    return cell.strip()


class _Check:
    """Checks rows against one model."""

    def __init__(self, manifest: Manifest, folder: Path, suffix: str) -> None:
        self._manifest = manifest
        self._folder = folder
        self._suffix = suffix
        self._pictures: dict[Any, bytes] = {}
        self._kinds = {control.name: control.kind for control in manifest.controls if control.kind in VISUAL}
        self._drawn: Counter[str] = Counter()
        self._rates: set[int] = set()

    def options(self, row: Any) -> dict[str, Any]:
        """A row's options, with absolute paths and a fixed seed. Raises RequestError."""
        if not isinstance(row, dict):
            raise RequestError(f"{quoted(row)}: a JSON object")
        options = dict(row)
        if not isinstance(options.setdefault("prompt", ""), str):
            raise RequestError(f"prompt={quoted(options['prompt'])}: a string; a row is one request")
        for name, kind in self._kinds.items():
            value = options.get(name)
            if kind == "frames" and isinstance(value, dict):
                options[name] = {index: self._path(f"{name}[{index}]", path) for index, path in value.items()}
            elif value is not None and kind != "frames":
                options[name] = self._path(name, value)
        if options.get("seed") in _RANDOM and not isinstance(options["seed"], bool):
            content = json.dumps({**options, "seed": "random"}, sort_keys=True)
            self._drawn[content] += 1
            drawn = hashlib.sha256(f"{self._drawn[content]} {content}".encode()).digest()
            options["seed"] = int.from_bytes(drawn[:4], "big")
        return options

    def _path(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise RequestError(f"{name}={quoted(value)}: the path of a file")
        return str(self._folder / given_path(value, name))

    def request(self, options: Mapping[str, Any]) -> Request:
        """The checked request. Raises RequestError, and OutputError for a frame rate that the format cannot have."""
        common = {name: value for name, value in options.items() if name in COMMON}
        controls = {name: value for name, value in options.items() if name not in COMMON}
        made = make_request(self._manifest, controls=controls, load=self._picture, **common)
        if made.fps not in self._rates:
            check_output(Path(tempfile.gettempdir(), f"higen{self._suffix}"), made.frames, made.fps)
            self._rates.add(made.fps)
        return made

    def _picture(self, control: Control, value: Any, frames: int, width: int, height: int) -> Picture:
        """A Picture with the digest but without pixels. Digests are kept: many rows may have the same file."""
        place = (control.name, str(value), frames, width, height)
        if place not in self._pictures:
            self._pictures[place] = load_picture(control, value, frames, width, height).digest
        return Picture(np.empty((3, 0, 0), np.float32), self._pictures[place])
