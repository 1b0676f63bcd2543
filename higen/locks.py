"""A lock between processes, held on a file. The system releases it when its holder ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from higen.errors import TrainingError

__all__ = ["claim", "claimed", "hold", "locked"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF)
"""Error codes of file systems without such locks (some network file systems)."""


def hold(path: Path, flags: int, *, wait: bool) -> int | None:
    """Lock a file or folder, opened with `flags`. Closing the returned descriptor releases the lock.

    Returns None on a system, or a file system, without such locks. Raises BlockingIOError if another process has the
    lock and `wait` is False, OSError if the file cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            return None
        raise
    return descriptor


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path`, which is made if missing. If another process has it, call `on_wait`, then wait.

    On a system without such locks, nothing is held. Raises OSError if the file cannot be made.
    """
    try:
        descriptor = hold(path, os.O_RDWR | os.O_CREAT, wait=False)
    except BlockingIOError:
        on_wait()
        descriptor = hold(path, os.O_RDWR | os.O_CREAT, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def claim(folder: Path, doing: str = "training") -> int | None:
    """Claim a run's folder until the descriptor is closed or the process ends; None on a system without locks.

    Raises TrainingError if another process has it. `doing` is the message's word for the work in that folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return hold(folder, os.O_RDONLY, wait=False)
    except BlockingIOError as error:
        raise TrainingError(f"{folder}: another process is {doing} there") from error


@contextmanager
def claimed(folder: Path, doing: str = "training") -> Iterator[None]:
    """`claim` a run's folder inside the block; a process cannot claim it twice. Raises what `claim` raises."""
    descriptor = claim(folder, doing)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
