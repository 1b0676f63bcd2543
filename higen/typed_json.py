"""Turns frozen dataclasses into JSON and back, with a check of every key and type. Used for the manifest's tables."""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import sys
import types
import typing
from typing import Any, TypeVar

from higen.errors import ManifestError

__all__ = ["LATER", "check_positive", "from_json", "to_json"]

T = TypeVar("T")

LATER = {"later": True}
"""Metadata of a field that was added after the first release: it may be missing in a file, and its default value is not
written, so that older readers accept the file.
"""


def check_positive(config: object) -> None:
    """Raise ManifestError for an integer below 1 among a dataclass's values, also inside tuples."""
    for name, value in vars(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and number < 1:
                raise ManifestError(f"{name}={value}: whole numbers from 1")


def to_json(config: object) -> dict[str, Any]:
    """A dataclass as JSON-ready dictionaries and lists."""
    return typing.cast("dict[str, Any]", _plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        found = {field.name: (getattr(value, field.name), field) for field in dataclasses.fields(value)}
        later = [name for name, (own, field) in found.items() if field.metadata == LATER and own == field.default]
        return {name: _plain(own) for name, (own, _) in found.items() if name not in later}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def from_json(kind: type[T], data: object, where: str = "", whole: bool = False) -> T:
    """Build the dataclass `kind` from JSON data; check every key and every type.

    `whole`: every field except those marked LATER must be present, at every depth; otherwise, fields with a default may
    be left out.
    Raises ManifestError naming the key, its value and what is allowed.
    """
    where = where or kind.__name__
    if not isinstance(data, dict):
        raise ManifestError(f"{where}: an object is wanted, not {reprlib.repr(data)}")
    hints = _hints(kind)  # type: ignore[arg-type]
    names = list(hints)
    for key in data:
        if key not in names:
            raise ManifestError(f"{where}.{reprlib.repr(key)[1:-1]}: unknown key; known are {', '.join(names)}")
    later = [field.name for field in dataclasses.fields(kind) if field.metadata == LATER]  # type: ignore[arg-type]
    if whole and (missing := [name for name in names if name not in data and name not in later]):
        raise ManifestError(f"{where}: has no {', '.join(missing)}")
    values = {key: _typed(hints[key], value, f"{where}.{key}", whole) for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError:  # a field without a default is missing
        raise ManifestError(f"{where}: has {', '.join(values) or 'nothing'}, but needs {', '.join(names)}") from None
    except ManifestError as error:  # the dataclass's own check
        message = str(error)
        raise ManifestError(message if message.startswith(where) else f"{where}: {message}") from None


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """The type of each field of a dataclass, in order. They are cached, because evaluating them is slow."""
    found = typing.get_type_hints(kind)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def _typed(hint: Any, value: Any, where: str, whole: bool) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast("type[Any]", hint), value, where, whole)
    if origin in (types.UnionType, typing.Union):
        return _one_of(arguments, value, where, whole)
    if origin is typing.Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise ManifestError(f"{where}={reprlib.repr(value)}: one of {', '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(value, list):
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) == len(value):
            return tuple(
                _typed(item, v, f"{where}[{i}]", whole) for i, (item, v) in enumerate(zip(items, value, strict=True))
            )
    elif origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{where}.{key}", whole) for key, item in value.items()}
    elif hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise ManifestError(f"{where}={reprlib.repr(value)}: {_wanted(hint)} is wanted")


def _one_of(arguments: tuple[Any, ...], value: Any, where: str, whole: bool) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [a for a in arguments if a is not type(None)]
    if len(kinds) == 1:
        return _typed(kinds[0], value, where, whole)
    for kind in kinds:
        try:
            return _typed(kind, value, where, whole)
        except ManifestError:
            continue
    raise ManifestError(f"{where}={reprlib.repr(value)}: {' or '.join(map(_wanted, kinds))} is wanted")


def _wanted(hint: Any) -> str:
    words = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    return words.get(hint) or str(getattr(hint, "__name__", hint) if not typing.get_origin(hint) else hint)
