"""An output file that the user named. An existing file is replaced, also through a link, unless it is read-only."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from higen.errors import OutputError, quoted
from higen.paths import given_path
from higen.staging import whole_file

__all__ = ["check_file", "check_folder", "check_names", "check_own", "check_writable", "keep_mode"]
__all__ += ["lies", "output_file"]


def check_file(path: str | os.PathLike[str]) -> Path:
    """The file to replace; for a link, the file that it points to. Call this before the work.

    Raises OutputError for a name that the file system does not accept, a folder, a pipe or a device, a read-only file,
    and a missing or read-only folder.
    """
    path = given_path(path, "output")
    with check_names(path):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; name a file in it")
        check_folder(path, path.parent)
        found = lies(path)
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise OutputError(f"{path}: is a pipe or a device, not a regular file; choose another name")
        if found is not None:
            check_writable(path)
        if not target.parent.is_dir():
            raise OutputError(f"{path}: is a link into the folder {target.parent}, which does not exist")
        check_folder(path, target.parent, writing=True)
    return target


def check_folder(path: Path, folder: Path, writing: bool = False) -> None:
    """Raise OutputError if `folder` does not exist or, with `writing`, if files for `path` cannot be made in it."""
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; make it first")
    # The path of the temporary file can be longer than `path`.
    lies(folder / f".higen-{'0' * 20}" / "new" / f"new_00000{path.suffix}")
    if writing and not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no permission to write in the folder {folder.absolute()}")


def check_own(folder: Path, names: Sequence[str], mark: str) -> None:
    """Check that a report with these files can be written into the user's folder. Call this before the work.

    Files with these names may be replaced if an earlier report wrote them. The first file shows this: it is written
    first, and `mark` (a regular expression) is found in its first 4096 bytes.
    Raises OutputError naming the file in the way, and for a folder that cannot be made or written.
    """
    with check_names(folder):
        lies(folder / names[0])
        found = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not found.is_dir():
            raise OutputError(f"{found}: is not a folder")
        if not os.access(found, os.W_OK | os.X_OK):
            raise OutputError(f"{folder}: no permission to write in the folder {found}")
    there = [name for name in names if os.path.lexists(folder / name)]
    if not there:
        return
    with suppress(OSError), (folder / names[0]).open("rb") as file:
        if re.search(mark, file.read(4096).decode("utf-8", "replace")):
            return
    raise OutputError(
        f"{folder / there[0]}: was not written by an earlier report: move it away, or choose another folder"
    )


def check_writable(path: Path) -> None:
    """Raise OutputError for a read-only file, even if its folder allows replacing it.

    A missing file passes: another process may have removed it a moment ago.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not mode & 0o222 or (not os.access(path, os.W_OK) and path.exists()):
        raise OutputError(f"{path}: is read-only: make it writable, or choose another name")


def keep_mode(new: Path, old: Path) -> None:
    """Give a file the permissions of the one that it replaces, if there is one."""
    if old.exists():
        new.chmod(stat.S_IMODE(old.stat().st_mode))


@contextmanager
def output_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a name to write to. On a clean exit, the file is moved to `path`, with the permissions of the file that it
    replaces. Raises what `check_file` raises, and OSError.
    """
    target = check_file(path)
    with whole_file(target, Path(path).suffix) as temporary:  # the target of a link may have another suffix
        yield temporary
        keep_mode(temporary, target)


@contextmanager
def check_names(path: Path) -> Iterator[None]:
    """Use around accesses to files named after `path`: raises OutputError if the file system refuses the name."""
    text = os.fspath(path)
    if "\0" in text:
        raise OutputError(f"{quoted(text)}: a path cannot contain the character NUL")
    try:
        yield
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be encoded
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OutputError(f"{quoted(text)}: the file system does not take this name: {reason}") from error


def lies(path: Path) -> os.stat_result | None:
    """The status of the file at a path; None if there is none. Raises OSError if the file system refuses the path."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
