"""The reader of the text files that people make: captions, lists, settings, profiles, architectures.

Editors and spreadsheets leave marks that change what a file says. What can be read in one way only is read so (a
UTF-8 byte order mark, the ends of lines); all else is refused with its line and with what to do.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Collection
from typing import Any

__all__ = ["TextError", "check_text", "from_json_text", "plain_text", "read_json", "read_text", "read_toml"]
__all__ += ["repeated_key"]

LARGEST = 16 * 2**20
"""Bytes of a file of settings at most."""

_WRONG = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff\ud800-\udfff]")
"""Characters that no person writes: controls (a form feed counts as space), a byte order mark, half a pair."""


class TextError(ValueError):
    """A file is no text that can be read in one way; the message is the reason, without the file's name."""


def read_text(path: str | os.PathLike[str], largest: int | None = LARGEST) -> str:
    """A UTF-8 text file, without a byte order mark, its lines ended by newlines alone.

    largest   bytes that are allowed; None: any number

    Raises OSError where it cannot be opened, and TextError for another encoding, characters that no text has, more
    bytes, or what is no regular file (a pipe would wait for its writer).
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(21, os.strerror(21), os.fspath(path))
        if not stat.S_ISREG(status.st_mode):
            raise TextError("no regular file")
        if largest is not None and status.st_size > largest:
            raise TextError(f"{status.st_size} bytes: at most {largest}")
        return plain_text(file.read())


def plain_text(data: bytes) -> str:
    """Bytes of a text file as its text. Raises TextError."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or _looks_utf_16(data):
        raise TextError("UTF-16: save it as UTF-8")
    while data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(f"line {line}: not UTF-8 (byte 0x{data[error.start]:02x}): save it as UTF-8") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    check_text(text)
    return text


def check_text(text: str) -> None:
    """Raise TextError for a character that no person writes, naming it and its line."""
    if found := _WRONG.search(text):
        line = text.count("\n", 0, found.start()) + 1
        character = found[0]
        named = (
            "a byte order mark within the text" if character == "\ufeff" else f"the character U+{ord(character):04X}"
        )
        raise TextError(f"line {line}: {named}, which no text has: take it out")


def _looks_utf_16(data: bytes) -> bool:
    """Whether every other byte of the beginning is zero, as Latin letters have it in UTF-16 without a mark."""
    start = data[: len(data) // 2 * 2][:64]
    return len(start) >= 4 and (not any(start[1::2]) or not any(start[::2])) and any(start)


def read_json(path: str | os.PathLike[str], largest: int | None = LARGEST) -> Any:
    """The value of a JSON file. Raises OSError, and TextError as `read_text` and `from_json_text` do."""
    return from_json_text(read_text(path, largest))


def from_json_text(text: str) -> Any:
    """The value of a JSON text. Raises TextError for what is no JSON, or has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if isinstance(error, TextError):
            raise
        raise TextError(f"not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_key(pairs)) is not None:
        raise TextError(f"the key {twice!r} stands there twice")
    return dict(pairs)


def repeated_key(pairs: Collection[tuple[str, Any]]) -> str | None:
    """The first key of a JSON object that stands there again: one reader would take one value, another the other."""
    counts = Counter(key for key, _ in pairs)
    return next((key for key, count in counts.items() if count > 1), None) if len(counts) < len(pairs) else None


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of a TOML file. Raises OSError, and TextError as `read_text` does and for what is no TOML."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"not valid TOML: {error}") from error
