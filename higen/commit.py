"""A change of several files of a folder: it happens completely or not at all, even if its process is killed.

The change is first written to the file `journal` of a hidden folder (higen/staging.py). From then on the change counts
as made, and any process that finds the journal finishes it. The files themselves show which steps are done. If somebody
else has changed a target meanwhile, that target and all later steps are left alone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["begin", "committed", "exchange", "finish", "moves", "swap"]

NEW, OLD, JOURNAL = "new", "old", "journal"
_NOTHING: dict[str, Any] = {"moves": [], "removals": []}

_Mark = tuple[int, int, int]
"""Identifies a file: inode, size and modification time. A rename keeps all three."""


def moves(parent: Path, pairs: Sequence[tuple[Path, Path]], removals: Sequence[Path]) -> dict[str, Any]:
    """The journal of a change that moves files to names in `parent`, in this order, and then removes files there."""
    marks = {target: _mark(target) for _, target in pairs} | {path: _mark(path) for path in removals}
    steps = []
    for source, target in pairs:
        new = _mark(source)
        steps.append([os.path.relpath(source, parent), target.name, new, marks[target]])
        marks[target] = new
    return {"moves": steps, "removals": [[path.name, marks[path]] for path in removals]}


def swap(target: Path) -> dict[str, Any]:
    """The journal of a change that replaces the folder `target` by the folder NEW; `target` becomes OLD."""
    return {"swap": target.name, "inode": target.stat().st_ino}


def committed(root: Path) -> bool:
    """Whether a hidden folder has a journal."""
    return os.path.lexists(root / JOURNAL)


def begin(root: Path, journal: Mapping[str, Any]) -> None:
    """Make a change. After an OSError, either nothing was changed, or the journal stays and `finish` does the rest."""
    part = root / f"{JOURNAL}.part"
    part.write_text(json.dumps(journal), encoding="utf-8")
    part.replace(root / JOURNAL)
    try:
        done = finish(root)
    except BaseException:
        if not _forgotten(root, journal):  # most likely an interrupt: finish a change that has begun
            finish(root)
        raise
    if not done:
        raise OSError(errno.EBUSY, "another program has changed it meanwhile", os.fspath(root.parent))


def finish(root: Path) -> bool:
    """Do the remaining steps of a journal, then remove it. Returns whether all steps could be done. Raises OSError."""
    try:
        journal = _checked(root, json.loads((root / JOURNAL).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return True
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        journal = _NOTHING
    done = _finish_swap(root, journal) if "swap" in journal else _finish_moves(root.parent, journal)
    (root / JOURNAL).unlink(missing_ok=True)
    return done


def exchange(a: Path, b: Path) -> bool:
    """Exchange two paths atomically. Returns False if the system cannot. Raises OSError for any other failure."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    sys.audit("os.rename", os.fspath(a), os.fspath(b), -1, -1)
    if call(here, os.fsencode(a), here, os.fsencode(b), both) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(a), None, os.fspath(b))


def _checked(root: Path, journal: dict[str, Any]) -> dict[str, Any]:
    """Check that a journal only moves files from `root` or its parent folder to names in the parent folder.

    A folder from somebody else may contain any journal; one with other paths is rejected. Raises ValueError, TypeError,
    KeyError, IndexError, AttributeError.
    """
    for place in [place for place, *_ in journal.get("moves", [])]:
        inside, outer = Path(place).parts, (root.name, NEW)
        staged = len(inside) == 3 and inside[:2] == outer and inside[2] not in ("", ".", "..")
        beside = len(inside) == 1 and place.startswith(f"{root.name}.")
        if not staged and not beside:
            raise ValueError(f"{place!r}: is not an unfinished file of {root.name}")
    marks = [mark for _, _, new, old in journal.get("moves", []) for mark in (new, old)]
    for mark in [*marks, *(old for _, old in journal.get("removals", []))]:
        _as_mark(mark)
    if "swap" in journal:
        int(journal["inode"])
    names = [journal["swap"]] if "swap" in journal else [name for _, name, _, _ in journal["moves"]]
    names += [name for name, _ in journal.get("removals", [])]
    if wrong := [name for name in names if name != Path(name).name or name in ("", ".", "..")]:
        raise ValueError(f"{wrong[0]!r}: is not a file of the folder")
    return journal


def _finish_moves(parent: Path, journal: Mapping[str, Any]) -> bool:
    made: dict[str, list[_Mark | None]] = {}
    for _, name, new, _ in journal["moves"]:
        made.setdefault(name, []).append(_as_mark(new))
    for place, name, new, old in journal["moves"]:
        source, target = parent / place, parent / name
        there, found = _mark(target), _mark(source)
        if found is None and there in made[name]:
            continue
        if found is None or found != _as_mark(new) or there not in (None, _as_mark(old)):
            return False
        source.replace(target)
    for name, old in journal["removals"]:
        if _mark(parent / name) == _as_mark(old):
            (parent / name).unlink(missing_ok=True)
    return True


def _finish_swap(root: Path, journal: Mapping[str, Any]) -> bool:
    new, old, target = root / NEW, root / OLD, root.parent / journal["swap"]
    if new.is_dir() and not old.exists() and target.is_dir() and target.stat().st_ino == journal["inode"]:
        target.replace(old)
    if new.is_dir() and old.exists() and not os.path.lexists(target):
        try:
            new.replace(target)
        except BaseException:
            old.replace(target)
            raise
    return not new.is_dir()


def _forgotten(root: Path, journal: Mapping[str, Any]) -> bool:
    """Remove a journal if none of its steps were done yet. Returns whether that was so."""
    if not committed(root):
        return True
    if "swap" in journal:
        begun = (root / OLD).exists() or not (root / NEW).is_dir()
    else:
        begun = any(_mark(root.parent / place) is None for place, *_ in journal["moves"])
    if not begun:
        (root / JOURNAL).unlink(missing_ok=True)
    return not begun


def _mark(path: Path) -> _Mark | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _as_mark(stored: Sequence[int] | None) -> _Mark | None:
    return None if stored is None else (stored[0], stored[1], stored[2])
