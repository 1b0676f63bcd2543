"""Graphs are written next to the weights that they refer to, under hidden names until they are finished."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from higen.bundle import Bundle
from higen.errors import HigenError, OutputError
from higen.staging import Staging, exclusive, link_or_copy, staging

__all__ = ["check_writable", "writing"]


@contextmanager
def writing(bundle: Bundle) -> Iterator[Staging]:
    """A place for unfinished graphs in a model's folder.

    Weights that are symbolic links to another folder (as in Hugging Face's cache) are replaced by hard links, or by
    copies where hard links are impossible, because ONNX Runtime takes weights only from the graph's own folder. The
    linked files do not change.
    Raises OutputError if the folder cannot be written. An OSError inside the block is also raised as OutputError.
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
    """Raises OutputError if the model's folder cannot be written. Call it before long work."""
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
            link_or_copy(there, own)
            own.replace(bundle.path / name)


def _outside(path: Path) -> bool:
    """Whether a file is a symbolic link to a file in another folder."""
    return path.is_symlink() and path.resolve().parent != path.parent.resolve()
