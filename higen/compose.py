"""Joins two model directories to one: the first model draws a picture, the second one makes a clip of it.

Weights are hard links if the file system supports them, else copies. Graphs are copied; if a weights file gets a new
name, the graphs are changed to refer to that name. Engines are not copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from higen.backends.external_data import graph_files
from higen.bundle import Bundle, FileRecord, GraphInput, check_free, file_record, staged, variant
from higen.errors import MissingExtra, ModelError
from higen.families.composed import spec
from higen.manifest_file import check_version, read_manifest, write_manifest
from higen.paths import given_path
from higen.precision import PRECISIONS
from higen.staging import link_or_copy

__all__ = ["compose"]


@dataclass(frozen=True)
class _Copy:
    """A file of a model, and its name in the new directory."""

    bundle: Bundle
    name: str
    here: str


def compose(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Bundle:
    """Write the model directory `output`: the picture that `first` draws is the input picture of `second`.

    first    a model that draws a picture, from a text or other inputs
    second   a model that needs one picture and makes a clip from it
    A name of the second model that the first one also uses gets the prefix `second_`: stages, loops, controls, files.

    Raises ModelError with the reason if the two do not fit or `output` cannot be written, IntegrityError for a damaged
    file, MissingExtra if a graph has to be rewritten and the package onnx-ir is not installed. A failure leaves nothing
    behind.
    """
    target = check_free(output, overwrite)
    bundles = [Bundle.open(path) for path in (first, second)]
    for bundle in bundles:
        check_version(bundle.path, read_manifest(bundle.path))
        if bundle.path.resolve() == target.resolve():
            raise ModelError(f"{target}: is one of the two models; choose another folder")
    one, two = bundles
    manifest = spec.compose(one.manifest, two.manifest, _same_tokenizer(one, two))
    made_of = spec.architecture(manifest)
    copies = [*_copies(one, made_of.first, {})]
    copies += _copies(two, made_of.second, {copy.here: copy.bundle.files[copy.name] for copy in copies})
    files: dict[str, FileRecord] = {}
    graphs: dict[str, tuple[GraphInput, ...]] = {}
    with staged(output, overwrite) as folder:
        for copy in copies:
            weights = (made_of.first if copy.bundle is one else made_of.second).weights
            files[copy.here] = _put(copy, folder / copy.here, weights)
            if copy.name in copy.bundle.graphs:
                graphs[copy.here] = copy.bundle.graphs[copy.name]
        write_manifest(folder, manifest, files, graphs)
    return Bundle.open(given_path(output))


def _same_tokenizer(one: Bundle, two: Bundle) -> bool:
    texts = (one.manifest.text, two.manifest.text)
    if texts[0] is None or texts[1] is None:
        return True
    return one.files.get(texts[0].tokenizer) == two.files.get(texts[1].tokenizer)


def _copies(bundle: Bundle, part: spec.Part, taken: Mapping[str, FileRecord]) -> Iterator[_Copy]:
    """The files of a model that its stages use in the new directory, with the graphs and weights of each precision.

    A file that both models contain identically is taken once.
    """
    variants = bundle.manifest.variants
    owners = {name: bundle.manifest.listed(name) for name in (*part.stages, *variants)}
    # A variant's name begins with its stage's name.
    stages = {name: part.stages[own] + name[len(own) :] for name, own in owners.items() if own in part.stages}
    for name in bundle.files:
        stem, _, rest = name.partition(".")
        if name.endswith(".onnx"):
            here = f"{stages[stem]}.{rest}" if stem in stages else None
        else:
            here = _variant(name, part.weights)
        if here is None or taken.get(here) == bundle.files[name]:
            continue
        if here in taken:
            raise ModelError(
                f"{bundle.path / name}: would be called {here} in the new model, but the first model already has "
                "that file"
            )
        yield _Copy(bundle, name, here)


def _variant(name: str, names: Mapping[str, str]) -> str | None:
    """The new name of a weights file, or of its variant in another precision (unet.fp16.safetensors)."""
    for own, here in names.items():
        if name == own:
            return here
        for precision in PRECISIONS:
            if name == variant(own, precision):
                return variant(here, precision)
    return None


def _put(copy: _Copy, to: Path, names: Mapping[str, str]) -> FileRecord:
    """Put a checked file into the new directory. A graph is rewritten if its weights files have new names."""
    path = copy.bundle.file(copy.name)
    to.parent.mkdir(parents=True, exist_ok=True)
    if copy.name.endswith(".onnx"):
        pointed = {name: _variant(name, names) or name for name in graph_files(copy.bundle, copy.name)[1:]}
        if any(name != here for name, here in pointed.items()):
            _point(path, to, pointed)
            return file_record(to)
    link_or_copy(path, to)
    return copy.bundle.files[copy.name]


def _point(graph: Path, to: Path, names: Mapping[str, str]) -> None:
    """Rewrite a graph with new names for the files that contain its tensors. Raises MissingExtra."""
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise MissingExtra("onnx-ir", "export", "pointing a graph to its weights' new name") from error
    model = ir.load(graph)
    for inner in model.graphs():
        for value in inner.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.ExternalTensor(
                    names[os.fspath(tensor.location)],
                    tensor.offset,
                    tensor.length,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name,
                    base_dir=to.parent,
                )
    ir.save(model, to)
