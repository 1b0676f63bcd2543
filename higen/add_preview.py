"""Adds a tiny decoder for previews to a model directory; the result is a new model directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, check_free, file_record, staged
from higen.errors import CheckpointError, HigenError, ModelError
from higen.families.preview_rows import WEIGHTS, preview_stage
from higen.families.preview_source import read_preview
from higen.manifest_file import check_version, read_manifest, write_manifest
from higen.models.weights import write_safetensors
from higen.staging import link_or_copy

__all__ = ["add_preview"]


def add_preview(
    model: Path,
    output: Path,
    preview: object,
    dtype: str = "fp16",
    overwrite: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> Bundle:
    """Make the model directory `output` from `model` with the tiny decoder `preview`, stored in `dtype`.

    All other files are hard links if the file system supports them, else copies. Engines are not copied. The new stage
    has no graph yet.

    Raises CheckpointError (not a tiny decoder, or one for other latents; a family without previews), ModelError
    (`output` exists, is `model`, or cannot be written) and what opening a model raises. A failure leaves nothing
    behind.
    """
    if output.resolve() == model.resolve():
        raise ModelError(f"{output}: is the model itself; choose another directory for the new model")
    check_free(output, overwrite)
    bundle = Bundle.open(model)
    check_version(bundle.path, read_manifest(bundle.path))
    source = read_preview(preview)
    assert source is not None
    manifest = source.tables(bundle.manifest)
    if WEIGHTS in bundle.files:
        raise ModelError(f"{bundle.path}: already has a file {WEIGHTS}")
    with staged(output, overwrite) as folder:
        for name in bundle.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(bundle.file(name), folder / name)
        write_safetensors(folder / WEIGHTS, source.state, dtype)
        write_manifest(folder, manifest, {**bundle.files, WEIGHTS: file_record(folder / WEIGHTS)}, bundle.graphs)
        try:
            TorchBackend(Bundle.open(folder), Options(device="cpu")).prepare(preview_stage(bundle.manifest))
        except HigenError as error:
            family = f"the family {manifest.family!r} takes no tiny decoder"
            raise CheckpointError(f"{bundle.path}: {family}: {error}") from error
    for note in source.notes:
        if on_note is not None:
            on_note(note)
    return Bundle.open(output)
