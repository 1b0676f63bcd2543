"""Converts released checkpoints to a model directory. Each model family reads its own checkpoints.

Tensors are cast and written one at a time: a conversion needs about as much memory as its largest tensor.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from higen import families
from higen.adapt import adapt, is_model
from higen.add_preview import add_preview
from higen.bundle import Bundle, check_free, create_model
from higen.errors import CheckpointError, OutputError, quoted
from higen.models.checkpoint_files import read_state, seen_names
from higen.models.nestings import found_in
from higen.models.weights import DTYPES, unmade, write_safetensors
from higen.paths import given_path

__all__ = ["DTYPES", "convert", "convert_sources", "read_state", "recognised", "write_safetensors"]

Progress = Callable[[str, int, int], None]
"""Called with (file being written, bytes written so far, bytes in all)."""


def convert(
    denoiser: str | os.PathLike[str],
    text: str | os.PathLike[str],
    autoencoder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "fp16",
    overwrite: bool = False,
    arguments: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Make the model directory `output` from the three files of the first family (`families.FIRST`).

    `arguments`: for a denoiser of another size than the released one, the settings that its files do not contain.
    Everything else is as in `convert_sources`.
    """
    sources = (denoiser, text, autoencoder)
    return convert_sources(
        sources,
        output,
        family=families.FIRST,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
        arguments=arguments,
    )


def convert_sources(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    family: str | None = None,
    dtype: str = "fp16",
    overwrite: bool = False,
    progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
    **options: Any,
) -> Bundle:
    """Make the model directory `output` from checkpoints.

    sources    files and folders, in the family's order; or a model directory, to which `loras` (higen/adapt.py) or
               `preview` (higen/add_preview.py) are added: its weights keep their precision
    family     the family of the sources; None: the family that recognises one of them
    dtype      "fp16", "bf16" or "fp32": how the weights are stored
    on_note    called with notes for the user: licence terms, what was left out
    options    options of the family

    Raises UnknownFamily, CheckpointError (a source is missing, refused, does not fit or has non-finite weights),
    OutputError (unknown dtype, disk full) or ModelError (`output` exists or cannot be written). A failure leaves
    nothing behind.
    """
    if dtype not in DTYPES:
        raise OutputError(f"dtype={quoted(dtype)}: one of {', '.join(map(repr, DTYPES))}")
    check_free(output, overwrite)  # before reading gigabytes
    paths = [given_path(source, "source") for source in sources]
    if len(paths) == 1 and is_model(paths[0]):
        given = {name for name, value in options.items() if value}
        if family is not None or len(given) > 1 or given - {"loras", "preview"}:
            takes = "it takes adapters (loras) or a tiny decoder (preview), one of the two, and nothing else"
            raise CheckpointError(f"{paths[0]}: a model directory; {takes}")
        if "preview" in given:
            return add_preview(paths[0], given_path(output, "output"), options["preview"], dtype, overwrite, on_note)
        return adapt(paths[0], given_path(output, "output"), options.get("loras", ()), overwrite, on_note)
    converted = families.checkpoint(family or recognised(paths)).convert(paths, **options)
    tensors = (t for state in converted.weights.values() for t in unmade(state).values())
    total = sum(t.numel() for t in tensors) * DTYPES[dtype].itemsize
    with create_model(output, converted.manifest, overwrite) as folder:
        _check_space(folder, total)
        done = 0

        def advance(name: str, size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(name, done, total)

        for name, state in converted.weights.items():
            write_safetensors(folder / name, state, dtype, lambda size, name=name: advance(name, size))  # type: ignore[misc]
        for name, text in converted.texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    for note in converted.notes:
        if on_note is not None:
            on_note(note)
    return Bundle.open(output)


def recognised(sources: Sequence[Path]) -> str:
    """The family that recognises one of the sources.

    Raises CheckpointError naming the installed families and what was found in the sources, or what is wrong with the
    first source that cannot be read.
    """
    for source in sources:
        if not source.exists():
            raise CheckpointError(f"{source}: no such file")
    for family in families.installed():
        if any(families.checkpoint(family).recognise(source) for source in sources):
            return family
    named, known = ", ".join(map(os.fspath, sources)) or "no sources", ", ".join(families.installed())
    found = "".join(f"; {source.name}: {found_in(seen_names(source))}" for source in sources if source.is_file())
    raise CheckpointError(f"{named}: no installed family recognises this; installed are {known}{found}")


def _check_space(folder: Path, size: int) -> None:
    """Check that the weights, and 8 MiB for tokenizer and manifest, fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < size + 8 * 2**20:
        raise OutputError(
            f"{folder.parent}: the model takes {size / 2**30:.2f} GiB, but the disk has {free / 2**30:.2f} GiB free"
        )
