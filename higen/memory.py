"""Too little memory: one error for the different reports of all libraries."""

from __future__ import annotations

import ctypes
import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from higen.errors import HigenError, OutOfMemory

__all__ = ["enough_memory", "is_lack_of_memory", "return_freed"]

_WORDS = re.compile(
    r"bad_?alloc|bad allocation|not enough memory|(can't|cannot|could not|failed to|unable to) allocate|out of memory|"
    r"failed to map segment",
    re.IGNORECASE,
)
"""How C++, ONNX Runtime, PyTorch, safetensors, CUDA and the dynamic loader report it."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error, or an error that it was raised from, reports too little memory."""
    seen: BaseException | None = error
    while seen is not None:
        short = isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM)
        # Our own messages may quote the user's text, so only look at the cause, which is the library's error.
        if short or (not isinstance(seen, HigenError) and _WORDS.search(str(seen))):
            return True
        seen = seen.__cause__
    return False


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Use around library calls: errors that report too little memory become OutOfMemory, beginning with `what`."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
        hint = "a lower precision, fewer frames, a smaller size and fewer prompts need less"
        raise OutOfMemory(f"{what}: there is too little memory here ({hint}): {reason}") from error


def return_freed() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc's `malloc_trim`).

    Loading a graph with rounded weights first computes them in float32. Without this call the process keeps that space.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library, or Windows
        ctypes.CDLL(None).malloc_trim(0)
