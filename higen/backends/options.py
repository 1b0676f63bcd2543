"""How stages are run, whatever runs them."""

from __future__ import annotations

from dataclasses import dataclass

from higen.errors import RequestError
from higen.precision import check_precision

__all__ = ["MAX_THREADS", "PLAIN", "Options"]

MAX_THREADS = 1024


@dataclass(frozen=True)
class Options:
    """How stages are run, whatever runs them; a backend takes what concerns it.

    device      "cpu", "cuda", and for torch "cuda:1", ...; None: a GPU if there is one that works
    precision   what the stages compute in (higen/precision.py); a stage without a graph in it is passed on to the next
                backend. None: each backend's choice for its device
    threads     CPU threads of one stage; None: the library's choice
    verify      check the sha256 of each file as it is loaded
    low_memory  one TensorRT engine on the GPU at a time

    Raises RequestError for a precision or a number of threads that no backend takes.
    """

    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    verify: bool = True
    low_memory: bool = False

    def __post_init__(self) -> None:
        if self.precision is not None:
            check_precision(self.precision)
        if self.threads is not None and (type(self.threads) is not int or not 1 <= self.threads <= MAX_THREADS):
            raise RequestError(f"threads={self.threads!r}: a whole number from 1 to {MAX_THREADS}")


PLAIN = Options()
