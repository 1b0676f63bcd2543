"""Where graphs are written: beside the weights that they refer to, under hidden names until they are finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from higen.bundle import Bundle
from higen.errors import HigenError, OutputError
from higen.staging import Staging, exclusive, staging

__all__ = ["check_writable", "writing"]


@contextmanager
def writing(bundle: Bundle) -> Iterator[Staging]:
    """A place for unfinished graphs in a model's folder.

    Weights that are links to files elsewhere (as in Hugging Face's cache) become files of the folder, for ONNX Runtime
    takes weights from the graph's own folder only: hard links where the system makes them, else copies. What the links
    point to stays as it is.
    Raises OutputError where the folder cannot be written; an OSError inside the block is taken for that.
    """
    check_writable(bundle)
    try:
        with staging(bundle.path) as place:
            _own_weights(bundle, place)
            yield place
    except HigenError:
        raise
    except OSError as error:
        raise OutputError(f"{bundle.path}: the graphs cannot be written: {error}") from error


def check_writable(bundle: Bundle) -> None:
    """Ask before the work. Raises OutputError for a model's folder that cannot be written."""
    if not os.access(bundle.path, os.W_OK | os.X_OK):
        raise OutputError(
            f"{bundle.path}: its graphs cannot be written there: no permission, or a read-only file system; copy the "
            "model to a folder of your own"
        )


def _own_weights(bundle: Bundle, place: Staging) -> None:
    linked = [name for name in bundle.files if name.endswith(".safetensors") and _outside(bundle.path / name)]
    if not linked:
        return
    with exclusive(bundle.path):
        for name in linked:
            own, there = place.folder / Path(name).name, (bundle.path / name).resolve(strict=True)
            try:
                own.hardlink_to(there)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(there, own)
            own.replace(bundle.path / name)


def _outside(path: Path) -> bool:
    """Whether a file is a link to one that lies in another folder."""
    return path.is_symlink() and path.resolve().parent != path.parent.resolve()
