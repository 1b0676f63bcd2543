"""Turns the user's arrays, array scalars and tensors into Python numbers and lists."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

__all__ = ["plain"]


def plain(value: Any, levels: int = 4) -> Any:
    """A value with arrays, array scalars and tensors of any library replaced by the result of their `tolist`.

    Values that cannot be read, or are nested too deeply for any option, stay unchanged; later checks refuse them.
    """
    if type(value) in (list, tuple) and levels:
        return type(value)(plain(one, levels - 1) for one in value)
    if not isinstance(value, (str, bytes, np.bool_)) and callable(getattr(value, "tolist", None)):
        with suppress(Exception):  # for example a tensor without values
            return value.tolist()
    return value
