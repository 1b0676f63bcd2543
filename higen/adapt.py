"""Adds adapters (LoRA) to the weights of a model directory; the result is a new model directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from higen.bundle import MANIFEST, Bundle, check_free, create_model
from higen.errors import CheckpointError, ModelError
from higen.models.companions import TEXT_PREFIX
from higen.models.lora import Lora, merged
from higen.presets import unusual

__all__ = ["adapt", "is_model"]

ADAPTED = ("unet", "text_encoder")
"""Weights files that an adapter's names refer to; file names without the suffix."""


def is_model(source: Path) -> bool:
    """Whether a source is a model directory."""
    return (source / MANIFEST).is_file()


def adapt(
    model: Path,
    output: Path,
    loras: Sequence[Lora],
    overwrite: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> Bundle:
    """Make the model directory `output` from `model` with the adapters added, in the order given.

    Weights keep their stored precision. Files that no adapter changes are copied. Graphs and engines are not copied,
    because they belong to the old weights. The new model's name says which adapters were added.
    It has the same presets, but none is usual.

    Raises CheckpointError (no adapter, or one that does not fit or makes weights that are not finite), ModelError
    (`output` exists, is `model`, or cannot be written) and what opening a model raises.
    """
    if not loras:
        adds = "--lora FILE[:SCALE] adds an adapter to it, --preview a tiny decoder"
        raise CheckpointError(f"{model}: is already a model directory; {adds}")
    if output.resolve() == model.resolve():
        raise ModelError(f"{output}: is the model itself; choose another directory for the adapted model")
    check_free(output, overwrite)
    source = Bundle.open(model)
    stored = sorted({stage.weights for stage in source.manifest.stages} & set(source.files))
    states = {Path(name).stem: _read(source, name) for name in stored if Path(name).stem in ADAPTED}
    notes: list[str] = []
    changed = merged(states, loras, notes, nested={"text_encoder": TEXT_PREFIX})
    different = {network for network, state in changed.items() if _differs(state, states[network])}
    manifest = source.manifest
    if different:
        named = ", ".join(f"{lora.path.stem} ({lora.scale:g})" for lora in loras if lora.scale)
        name = f"{manifest.name} with {named}"
        manifest = replace(manifest, name=name, presets=unusual(manifest.presets))
    text = manifest.text
    kept = [*stored, *([] if text is None else [text.tokenizer])]
    with create_model(output, manifest, overwrite) as folder:
        for name in kept:
            network = Path(name).stem
            if name in stored and network in different:
                _write(folder / name, changed[network])
            else:
                shutil.copyfile(source.file(name), folder / name)
    for note in notes:
        if on_note is not None:
            on_note(note)
    return Bundle.open(output)


def _read(source: Bundle, name: str) -> dict[str, Tensor]:
    try:
        return load_file(source.file(name))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source.path / name}: cannot be read: {error}") from error


def _differs(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _write(path: Path, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{name}: has values that are not finite in {tensor.dtype} after merging the adapters; use a smaller "
                "scale"
            )
    content: dict[str, Any] = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(content, path, {"format": "pt"})
