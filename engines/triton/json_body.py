"""Checks the JSON of an HTTP request to the model `higen` against the model's inputs, before Triton reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from higen.errors import RequestError, quoted
from higen.tables import MAX_NUMBER
from higen.text_files import repeated_key

__all__ = ["check_body"]

_WANTED = {
    "STRING": "a text",
    "BOOL": "true or false",
    "INT32": "a whole number of 32 bits",
    "UINT64": "a whole number from 0 to 2^64 - 1",
    "UINT8": "a whole number from 0 to 255",
    "FP32": "a number",
    "FP64": "a number",
}
_RANGES = {"INT32": (-(2**31), 2**31 - 1), "UINT64": (0, 2**64 - 1), "UINT8": (0, 255)}
_MOST = 1000
"""A body must have fewer names than this."""


def check_body(body: bytes, inputs: Sequence[tuple[str, str]]) -> None:
    """Raise RequestError for a body that is not a JSON object, and for a value of the wrong type for its input.

    `inputs`: names and data types ("INT32"). The model itself checks the meaning of the values.
    """
    try:
        document = json.loads(body.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not JSON: {reason[:200]}") from error
    if not isinstance(document, dict):
        raise RequestError("the body must be a JSON object: the names of inputs, and their values")
    if not isinstance(document.get("id", ""), str):
        raise RequestError(f"id={quoted(document['id'])}: a text is wanted")
    kinds = dict(inputs)
    for name, value in document.items():
        if name in kinds:
            _check_value(name, kinds[name], value)
        elif name != "parameters" and not isinstance(value, (str, bool, int, float)):
            raise RequestError(f"{quoted(name)}: unknown; a request takes {', '.join(kinds)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) >= _MOST:
        raise RequestError(f"{quoted(pairs[0][0])}: one of {len(pairs)} names; fewer than {_MOST} are wanted")
    if (name := repeated_key(pairs)) is not None:
        raise RequestError(f"{quoted(name)}: appears twice in the body")
    return dict(pairs)


def _check_value(name: str, kind: str, value: Any) -> None:
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, list) for item in items):
        raise RequestError(f"{name}: a flat list is wanted; send pictures as NAME_file, and matrices only by gRPC")
    for item in items:
        if not _fits(kind, item):
            raise RequestError(f"{name}={quoted(item)}: {_WANTED.get(kind, kind)} is wanted")


def _fits(kind: str, item: Any) -> bool:
    if kind == "STRING":
        return isinstance(item, str) and not any("\ud800" <= letter <= "\udfff" for letter in item)
    if kind == "BOOL" or isinstance(item, bool):
        return isinstance(item, bool) and kind == "BOOL"
    if kind in ("FP32", "FP64"):
        return isinstance(item, (int, float)) and (abs(item) <= MAX_NUMBER or not math.isfinite(item))
    low, high = _RANGES.get(kind, (0, -1))
    return isinstance(item, int) and low <= item <= high
