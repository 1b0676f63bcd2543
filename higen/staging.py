"""Files and folders that appear whole or not at all, even if their process is killed.

A writer works in a hidden folder beside its target and renames what is finished into place:

    .higen-<12 digits><8 digits>/           the last 8 are a digest of the first 12: higen recognises its own names
        note                                says that higen made the folder
        new/                                the unfinished files
        journal                             only while several files are moved to their places (higen/commit.py)
    .higen-<12 digits><8 digits>.<name>     a file that must be in the targets' own folder while it is written

The writer locks the hidden folder as long as it runs. The next writer in the same place removes what a killed writer
left: a folder with a name of this form, the note and a free lock. If there is a journal, the next writer or reader
finishes the change first. Nothing else is removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from higen import commit
from higen.locks import hold

__all__ = ["Staging", "exclusive", "link_or_copy", "others", "settle", "staging", "sweep", "whole_file"]

PREFIX = ".higen-"
LOCK = f"{PREFIX}lock"
NOTE = "note"
TEXT = "higen writes here. The next run that writes beside this folder removes it if its owner is gone.\n"

_NAME = re.compile(re.escape(PREFIX) + r"([0-9a-f]{12})([0-9a-f]{8})(\..+)?", re.DOTALL)
_TRIES = 1000
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class Staging:
    """A locked folder for unfinished files.

    folder   an empty folder to fill, in the same file system as the targets, which are in `parent`
    """

    def __init__(self, parent: Path) -> None:
        """Make the folder in `parent`. Raises OSError."""
        self.parent = parent
        self.root, self._lock = _make(parent)
        self.folder = self.root / commit.NEW
        self._beside: list[Path] = []

    def beside(self, name: str) -> Path:
        """A name in the targets' own folder, for a file that must be there while it is written."""
        path = self.parent / f"{self.root.name}.{name}"
        self._beside.append(path)
        return path

    def commit(self, pairs: Sequence[tuple[Path, Path]], removals: Sequence[Path] = ()) -> None:
        """Move files from `folder` or from `parent` to names in `parent`, then remove files there: all or nothing.

        The caller holds `exclusive(parent)` and has checked that these targets may be replaced. After an OSError,
        either nothing has changed, or the next writer or reader does the rest.
        """
        commit.begin(self.root, commit.moves(self.parent, pairs, removals))

    def swap(self, target: Path) -> None:
        """Replace the folder `target` by `folder`. A kill never leaves the path empty permanently.

        The caller holds `exclusive(parent)`. After an OSError, nothing was changed.
        """
        if not commit.exchange(self.folder, target):
            commit.begin(self.root, commit.swap(target))

    def close(self) -> None:
        """Remove the folder, unless it holds a change that could not be finished."""
        with suppress(OSError):
            if not commit.committed(self.root):
                _remove(self.root, self._beside)
        if self._lock is not None:
            os.close(self._lock)


@contextmanager
def staging(parent: Path) -> Iterator[Staging]:
    """A folder for unfinished files in `parent`. Remains of killed writers are removed first. Raises OSError."""
    parent = parent.absolute()  # the working directory may change
    sweep(parent)
    stage = Staging(parent)
    try:
        yield stage
    finally:
        stage.close()


@contextmanager
def whole_file(path: Path, suffix: str | None = None) -> Iterator[Path]:
    """Yields a name to write to. On a clean exit, the file is moved to `path`. Raises OSError.

    `suffix`: suffix of the name to write to; None: that of `path`.
    """
    path = path.absolute()
    with staging(path.parent) as stage:
        temporary = stage.folder / f"new{path.suffix if suffix is None else suffix}"
        yield temporary
        temporary.replace(path)


@contextmanager
def exclusive(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only writer that changes several files of `folder`. A killed writer's change is finished first.

    `wait`: wait for the end of another writer; otherwise BlockingIOError is raised. The lock file is removed after use.
    On a system without such locks, nothing is held. Raises OSError if the folder cannot be written.
    """
    path = folder / LOCK
    for _ in range(_TRIES):
        try:
            descriptor = hold(path, os.O_RDONLY | _NOFOLLOW, wait=wait)  # works for another user's lock file, too
        except FileNotFoundError:
            descriptor = hold(path, os.O_RDONLY | os.O_CREAT | _NOFOLLOW, wait=wait)
        if descriptor is None or _still(path, descriptor):
            break
        os.close(descriptor)  # its holder removed the file, and another writer may have made a new one
    else:
        raise OSError(errno.EAGAIN, "cannot be locked", os.fspath(path))
    try:
        _finish_all(folder)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                if os.fstat(descriptor).st_size == 0:  # otherwise it is another program's file with the same name
                    path.unlink()
            os.close(descriptor)


def settle(folder: Path, *, wait: bool = True) -> None:
    """Finish the change that a killed writer began in `folder`. Does nothing in a folder that cannot be written.

    `wait`: wait for another writer there, which finishes the change itself.
    """
    with suppress(OSError, ValueError):  # ValueError: a name that no file system accepts
        if any(commit.committed(root) for root in _roots(folder)):
            with exclusive(folder, wait=wait):
                pass


def others(stage: Staging) -> bool:
    """Whether another writer works in the same folder."""
    for root in _roots(stage.parent):
        if root != stage.root:
            claim = _claim(root)
            if claim is None:
                return True
            os.close(claim)
    return False


def _named(token: str) -> str:
    return f"{PREFIX}{token}{hashlib.sha256(f'{PREFIX}{token}'.encode()).hexdigest()[:8]}"


def _make(parent: Path) -> tuple[Path, int | None]:
    """A new folder with a name of higen's form, and the lock on it."""
    for _ in range(_TRIES):
        root = parent / _named(secrets.token_hex(6))
        try:
            root.mkdir()
            lock = hold(root, os.O_RDONLY, wait=True)
        except (FileExistsError, FileNotFoundError):  # not found: another writer took it for a killed one's
            if not parent.is_dir():
                raise
            continue
        if lock is not None and not _still(root, lock):
            os.close(lock)
            continue
        try:
            (root / NOTE).write_text(TEXT, encoding="utf-8")
            (root / commit.NEW).mkdir()
        except BaseException:
            with suppress(OSError):
                _remove(root, ())
            if lock is not None:
                os.close(lock)
            raise
        return root, lock
    raise OSError(errno.EAGAIN, "no folder can be made", os.fspath(parent))


def _still(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to the locked file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(name: str) -> str | None:
    """The hidden folder's name, if `name` is a hidden folder of higen or a file that belongs to one."""
    found = _NAME.fullmatch(name)
    whole = _named(found[1]) if found else ""
    return whole if found and whole.endswith(found[2]) else None


def _roots(parent: Path) -> list[Path]:
    with os.scandir(parent) as entries:
        found = [e.name for e in entries if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]
    return sorted(parent / name for name in found if _owner(name) == name)


def _claim(root: Path) -> int | None:
    """The lock of a hidden folder if its owner has ended; else None, and always None on systems without locks."""
    try:
        lock = hold(root, os.O_RDONLY | _NOFOLLOW, wait=False)
    except OSError:
        return None
    if lock is None:
        return None
    with suppress(OSError):
        if _still(root, lock) and _is_mine(lock) and _noted(root):
            return lock
    os.close(lock)
    return None


def _is_mine(descriptor: int) -> bool:
    """Whether the same user made the folder. Journals of other users in a shared folder are ignored."""
    return not hasattr(os, "geteuid") or os.fstat(descriptor).st_uid == os.geteuid()


def _noted(root: Path) -> bool:
    """Whether the note is higen's, or is missing because its writer was killed."""
    note = root / NOTE
    if not os.path.lexists(note):
        return not any(root.iterdir())
    return note.is_file() and note.stat().st_size <= len(TEXT) and TEXT.encode().startswith(note.read_bytes())


def sweep(parent: Path) -> None:
    """Remove remains of killed writers in `parent`, as far as possible."""
    with suppress(OSError, ValueError):
        settle(parent, wait=False)  # the caller may hold the lock itself
        with os.scandir(parent) as entries:
            names = sorted(e.name for e in entries if e.name.startswith(PREFIX))
        beside = [parent / name for name in names if _owner(name) not in (None, name)]
        for name in names:
            root = parent / name
            if _owner(name) != name or (lock := _claim(root)) is None:
                continue
            with suppress(OSError):
                if not commit.committed(root):
                    _remove(root, [path for path in beside if _owner(path.name) == name])
            os.close(lock)
        for path in beside:
            if not os.path.lexists(parent / str(_owner(path.name))):
                path.unlink(missing_ok=True)
        if LOCK in names:
            _unlock(parent / LOCK)


def _unlock(path: Path) -> None:
    """Remove the lock file of a killed process."""
    lock = hold(path, os.O_RDONLY | _NOFOLLOW, wait=False)
    if lock is not None:
        if _still(path, lock) and os.fstat(lock).st_size == 0:
            path.unlink()
        os.close(lock)


def _remove(root: Path, beside: Sequence[Path]) -> None:
    """Remove a hidden folder, the note last, so that the folder is still recognised after a kill."""
    for path in beside:
        path.unlink(missing_ok=True)
    for entry in sorted(root.iterdir(), key=lambda path: path.name == NOTE):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    root.rmdir()


def _finish_all(parent: Path) -> None:
    """Finish the changes of killed writers. The caller is the only writer, so every journal is from a killed one."""
    for root in _roots(parent):
        if commit.committed(root) and (lock := _claim(root)) is not None:
            try:
                commit.finish(root)
                _remove(root, ())
            finally:
                os.close(lock)


def link_or_copy(path: Path, to: Path) -> None:
    """Make `to` a hard link of a file, or a copy if the file system has no links or is another. Raises OSError."""
    try:
        to.hardlink_to(path.resolve())
    except OSError:
        shutil.copyfile(path, to)
