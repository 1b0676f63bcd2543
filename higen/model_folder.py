"""A model's folder appears finished. It replaces another folder only if that one has no files but a model's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from higen.errors import HigenError, ManifestError, ModelError, quoted
from higen.manifest_file import MANIFEST, read_manifest
from higen.paths import given_path
from higen.staging import PREFIX, exclusive, settle, staging

__all__ = ["check_free", "opened_folder", "staged"]

_ENGINE = re.compile(r"engines/[^/]+/(\.?[^/]+\.(engine|json|log|cache|part)|\.lock|\.cache\.lock)")
"""What the engines of a model are, by path (higen/backends/plans.py)."""


@contextmanager
def staged(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Make a folder as a whole: yields an empty one beside `path`, which is moved there on a clean exit.

    Nothing appears at `path` before everything is written, and nothing stays behind when writing fails; what a killed
    process left is removed. A link at `path` stays, and the folder it points to is replaced.
    Raises what `check_free` raises, and ModelError if it cannot be written: an OSError inside the block is taken for
    that.
    """
    target = check_free(path, overwrite)
    try:
        with staging(target.parent) as stage:
            yield stage.folder
            with exclusive(target.parent):
                check_free(target, overwrite)
                if os.path.lexists(target):
                    stage.swap(target)
                else:
                    stage.folder.replace(target)
    except OSError as error:
        if isinstance(error, HigenError):
            raise
        raise ModelError(f"{target}: cannot be written: {error}") from error


def check_free(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """The folder that a model can be written to; ask before the work.

    Raises ModelError if `path` exists (with `overwrite`: exists and is no model directory, or holds what is not the
    model's), its parent does not or cannot be written, or its name is none that the file system takes.
    """
    target = given_path(path, "output")
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()
        taken = os.path.lexists(target)
        if target.is_symlink() and target.is_dir():
            target = target.resolve()
        whole = overwrite and (target / MANIFEST).is_file()
    except (OSError, ValueError) as error:
        raise ModelError(f"{quoted(os.fspath(path))}: the file system does not take this name: {error}") from error
    if taken and not whole:
        raise ModelError(f"{target}: exists already" + (" and is no model directory" if overwrite else ""))
    if taken and (foreign := _foreign(target)):
        raise ModelError(
            f"{target}: holds what is not the model's, such as {foreign[0]}: move it away, or choose another folder"
        )
    if not target.parent.is_dir():
        raise ModelError(f"{target}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ModelError(f"{target}: cannot write in {target.parent}: no permission, or a read-only file system")
    return target


def opened_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a model that is to be read, after what a killed process began to change there was finished."""
    try:
        folder = given_path(path, "model").absolute()  # the working directory may change while the model is open
    except OSError as error:  # or it was removed
        raise ManifestError(f"{path}: the working directory is gone: {error.strerror}") from error
    settle(folder if os.path.lexists(folder) else folder.parent)
    return folder


def _foreign(folder: Path) -> list[str]:
    """Files of a model's folder that neither its manifest lists nor an engine build or an interrupted writer made."""
    listed = {MANIFEST, *read_manifest(folder, sealed=False).files}
    found = []
    for place, names, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        for name in [*files, *(n for n in names if (Path(place) / n).is_symlink())]:
            path = (inside / name).as_posix()
            if path not in listed and not _ENGINE.fullmatch(path) and not path.startswith(PREFIX):
                found.append(path)
    return sorted(found)
