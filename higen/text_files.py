"""Reads the text files that people write: captions, lists, settings, profiles, architectures.

Editors and spreadsheets add marks. A mark with only one meaning (a UTF-8 byte order mark, the kind of line ends) is
removed. Any other mark is an error that names the line and the remedy.
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
"""Largest size of a file of settings, in bytes."""

_WRONG = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff\ud800-\udfff]")
"""Characters that no person types: control characters except white space (such as a form feed), a byte order mark, a
lone surrogate.
"""


class TextError(ValueError):
    """A file is not an unambiguous text; the message is the reason, without the file's name."""


def read_text(path: str | os.PathLike[str], largest: int | None = LARGEST) -> str:
    """The text of a UTF-8 file, without a byte order mark; every line ends with a newline alone.

    largest   the largest size that is allowed, in bytes; None: any size

    Raises OSError if the file cannot be opened, and TextError for another encoding, for characters that no person
    types, for a larger file, and for anything but a regular file (a pipe would wait for its writer).
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(21, os.strerror(21), os.fspath(path))
        if not stat.S_ISREG(status.st_mode):
            raise TextError("not a regular file")
        if largest is not None and status.st_size > largest:
            raise TextError(f"{status.st_size} bytes: at most {largest}")
        return plain_text(file.read())


def plain_text(data: bytes) -> str:
    """The text in the bytes of a text file. Raises TextError."""
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
    """Raise TextError for a character that no person types, naming it and its line."""
    if found := _WRONG.search(text):
        line = text.count("\n", 0, found.start()) + 1
        character = found[0]
        named = (
            "a byte order mark within the text" if character == "\ufeff" else f"the character U+{ord(character):04X}"
        )
        raise TextError(f"line {line}: {named} is not allowed: remove it")


def _looks_utf_16(data: bytes) -> bool:
    """Whether every second byte of the beginning is zero, as in UTF-16 with Latin letters and no byte order mark."""
    start = data[: len(data) // 2 * 2][:64]
    return len(start) >= 4 and (not any(start[1::2]) or not any(start[::2])) and any(start)


def read_json(path: str | os.PathLike[str], largest: int | None = LARGEST) -> Any:
    """The value of a JSON file. Raises OSError, and TextError as `read_text` and `from_json_text` do."""
    return from_json_text(read_text(path, largest))


def from_json_text(text: str) -> Any:
    """The value of a JSON text. Raises TextError for a text that is not JSON or has a duplicate key."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if isinstance(error, TextError):
            raise
        raise TextError(f"not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_key(pairs)) is not None:
        raise TextError(f"the key {twice!r} appears twice")
    return dict(pairs)


def repeated_key(pairs: Collection[tuple[str, Any]]) -> str | None:
    """The first duplicate key of a JSON object. Readers differ in which of its values they take."""
    counts = Counter(key for key, _ in pairs)
    return next((key for key, count in counts.items() if count > 1), None) if len(counts) < len(pairs) else None


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of a TOML file. Raises OSError, TextError as `read_text` does, and TextError for invalid TOML."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"not valid TOML: {error}") from error
