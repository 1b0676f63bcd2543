"""A model's folder appears only when it is complete. It replaces an old folder only if that has just model files."""

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
"""The paths of a model's engine files (higen/backends/plans.py)."""


@contextmanager
def staged(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Make a folder completely or not at all: yields an empty folder and moves it to `path` on a clean exit.

    Nothing appears at `path` before everything is written, and a failure leaves nothing behind. Remains of a killed
    process are removed. A link at `path` stays; the folder that it points to is replaced.
    Raises what `check_free` raises, and ModelError if the folder cannot be written or for an OSError inside the block.
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
    """The folder that a model can be written to; call this before the work.

    Raises ModelError if `path` exists (with `overwrite`: exists and is not a model directory, or has other files), if
    its parent does not exist or is not writable, or if the file system does not accept its name.
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
        raise ModelError(f"{target}: exists already" + (" and is not a model directory" if overwrite else ""))
    if taken and (foreign := _foreign(target)):
        raise ModelError(
            f"{target}: holds files that do not belong to the model, such as {foreign[0]}: move it away, or choose "
            "another folder"
        )
    if not target.parent.is_dir():
        raise ModelError(f"{target}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ModelError(f"{target}: cannot write in {target.parent}: no permission, or a read-only file system")
    return target


def opened_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a model for reading. A change that a killed process left unfinished is finished first."""
    try:
        folder = given_path(path, "model").absolute()  # the working directory may change while the model is open
    except OSError as error:  # the working directory was removed
        raise ManifestError(f"{path}: the working directory is gone: {error.strerror}") from error
    settle(folder if os.path.lexists(folder) else folder.parent)
    return folder


def _foreign(folder: Path) -> list[str]:
    """Files in a model's folder that are not in its manifest and not from an engine build or an interrupted writer."""
    listed = {MANIFEST, *read_manifest(folder, sealed=False).files}
    found = []
    for place, names, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        for name in [*files, *(n for n in names if (Path(place) / n).is_symlink())]:
            path = (inside / name).as_posix()
            if path not in listed and not _ENGINE.fullmatch(path) and not path.startswith(PREFIX):
                found.append(path)
    return sorted(found)
