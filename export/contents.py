"""What a model directory contains, for `higen-export inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from higen.bundle import Bundle
from higen.stages import Output, Tensor

__all__ = ["as_lines", "as_values"]


def as_values(bundle: Bundle) -> dict[str, Any]:
    """The name, the precisions of each stage's graphs, presets and sizes of files, as JSON-ready values."""
    return {
        "name": bundle.manifest.name,
        "graphs": _graphs(bundle),
        "presets": [asdict(preset) for preset in bundle.manifest.presets],
        "files": _sizes(bundle),
    }


def as_lines(bundle: Bundle) -> Iterator[str]:
    """Text for users: stages with their tensors, loops, presets, controls and files."""
    manifest, graphs, sizes = bundle.manifest, _graphs(bundle), _sizes(bundle)
    yield f"{manifest.name} ({manifest.licence}), family {manifest.family}"
    for stage in (stage for stage in manifest.all_stages if stage.name in graphs):
        found = ", ".join(graphs[stage.name])
        yield f"  {stage.name:<{_width(graphs)}}{f'graph in {found}' if found else 'no graph'}"
        for tensor in stage.inputs:
            yield f"    <- {_described(tensor):<46} {tensor.source}"
        for output in stage.outputs:
            yield f"    -> {_described(output)}"
    names = [loop.name for loop in manifest.loops]
    for loop in manifest.loops:
        yield f"  loop {loop.name:<17}{' or '.join(loop.stages)}"
    for preset in manifest.presets:
        yield f"  preset {preset.name:<15}{preset.described(names)}{' (the usual one)' if preset.usual else ''}"
    for control in manifest.controls:
        yield f"  control {control.name:<14}{control.kind}: {control.meaning}"
    for name, size in sizes.items():
        yield f"  {name:<{_width(sizes)}}{size / 1e6:9.2f} MB"


def _graphs(bundle: Bundle) -> dict[str, tuple[str, ...]]:
    """The precisions of the graphs of each stage; a variant without a graph is left out."""
    manifest = bundle.manifest
    rows = (*manifest.stage_names, *(name for name in manifest.variants if bundle.precisions(name)))
    return {name: bundle.precisions(name) for name in rows}


def _sizes(bundle: Bundle) -> dict[str, int]:
    return {name: record.size for name, record in bundle.files.items()}


def _width(names: dict[str, Any]) -> int:
    return max((len(name) for name in names), default=0) + 2


def _described(tensor: Tensor | Output) -> str:
    shape = str(list(tensor.shape)).replace("'", "")
    return f"{tensor.name:<16}{tensor.dtype:<9}{shape}".rstrip()
