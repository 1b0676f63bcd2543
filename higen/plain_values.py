"""Turns arrays, array scalars and tensors of a user into Python's numbers and lists."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

__all__ = ["plain"]


def plain(value: Any, levels: int = 4) -> Any:
    """A value without the arrays, array scalars and tensors of numpy and other libraries: what their `tolist` gives.

    What cannot be read, or is nested deeper than any option is, is left as it is and refused where it is checked.
    """
    if type(value) in (list, tuple) and levels:
        return type(value)(plain(one, levels - 1) for one in value)
    if not isinstance(value, (str, bytes, np.bool_)) and callable(getattr(value, "tolist", None)):
        with suppress(Exception):  # a library's tensor that holds no values, say
            return value.tolist()
    return value
