"""Adds graphs to a model directory: weights, export, parity gate, manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from higen import families
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, check_place, drop_file, graph_file, put_file
from higen.errors import BackendError, RequestError
from higen.export.deep_features import with_deep_features
from higen.export.graphs import export_stage
from higen.export.interface import check_interface, graph_inputs
from higen.export.origin import enter, is_finished, origin
from higen.export.parity import Parity, check_graph, check_rounding, references
from higen.export.place import check_writable, writing
from higen.export.precision import check_opset, computed_in, lowered, rounded, write_weights
from higen.precision import PRECISIONS, QUANTIZED
from higen.staging import Staging, others

__all__ = ["current", "export_model"]


def current(bundle: Bundle, on_line: Callable[[str], None] = lambda _: None) -> Bundle:
    """The model with a manifest of the current version. An older one is upgraded, and `on_line` gets a report."""
    from higen.upgrade import upgrade

    if bundle.version > 1:
        return bundle
    for line in upgrade(bundle.path).as_lines():
        on_line(line)
    return Bundle.open(bundle.path)


def export_model(
    bundle: Bundle,
    stages: Sequence[str] | None = None,
    *,
    precision: str = "fp32",
    opset: int | None = None,
    static: Mapping[str, int] | None = None,
    resume: bool = False,
    on_parity: Callable[[Parity], None] | None = None,
    on_line: Callable[[str], None] = lambda _: None,
    reuse: bool = False,
) -> Bundle:
    """Write the graph of each stage into the model's folder, each as soon as it has passed the parity gate.

    stages     by name; None: every stage of the model
    precision  in which the graphs compute (precision.PRECISIONS); any but fp32 adds a second weights file, unless the
               model's own weights are stored in that precision
    opset      of ONNX; None: the precision's default
    static     sizes of B, F, H and W to fix (`shapes.static_sizes`); None: they stay dynamic
    resume     skip a stage if its graph exists, is intact, and was made from the same weights and tables, with the same
               options, by the same versions of the programs
    on_line    called with a line for each step of a manifest upgrade and for each stage that is skipped
    reuse      also export the variants of these stages that keep and reuse deep features (higen/feature_reuse.py); the
               manifest then lists the deep features, if it did not yet

    Each file is written under a temporary name and then moved, and the manifest changes with it, so the model can be
    opened at any time. An interrupted export keeps the graphs that it has written. Raises RequestError for an unknown
    stage or precision or for an opset that the precision does not allow, UnknownFamily if the networks' code is not
    installed, OutputError if the folder cannot be written, ModelError if a file that is not the model's has the name of
    a graph, BackendError if the gate fails.
    """
    opset = check_opset(precision, opset)
    check_writable(bundle)
    bundle = current(bundle, on_line)
    families.network(bundle.manifest.family)
    known = (*bundle.manifest.stage_names, *bundle.manifest.variants)
    names = bundle.manifest.stage_names if stages is None else tuple(stages)
    if unknown := [name for name in names if name not in known]:
        raise RequestError(f"stages={unknown}: known are {', '.join(known)}")
    if reuse:
        bundle = with_deep_features(bundle)
        variants = [one.name for name in names for one in bundle.manifest.stage(name).variants]
        names = tuple(dict.fromkeys([*names, *variants]))

    def passes(parity: Parity) -> None:
        if on_parity is not None:
            on_parity(parity)
        if not parity.passed:
            raise BackendError(
                f"{parity.stage} at {parity.shape}: the {parity.way} differs by {parity.error:.1e}, "
                f"allowed is {parity.tolerance:.0e}"
            )

    listed = Bundle.open(bundle.path).files  # the current state
    for name in names:
        check_place(bundle.path, listed, graph_file(name, precision))
    with writing(bundle) as place:
        try:
            bundle = Bundle.open(bundle.path)
            for name in names:
                bundle = write_weights(bundle, name, precision)
                digest = origin(bundle, name, precision, opset, static)
                if resume and is_finished(bundle, name, precision, digest):
                    on_line(f"{graph_file(name, precision)}: it is there already")
                else:
                    bundle = _export(bundle, place, name, precision, opset, static, passes, digest)
            return bundle
        except BaseException:
            _drop_unused_weights(bundle, place, precision)
            raise


def _export(
    bundle: Bundle,
    place: Staging,
    name: str,
    precision: str,
    opset: int,
    static: Mapping[str, int] | None,
    passes: Callable[[Parity], None],
    digest: str,
) -> Bundle:
    stage, aside = bundle.manifest.stage(name), place.beside(graph_file(name, precision))
    # One network in memory at a time: first the float32 network computes the reference outputs, then the network in
    # the lower precision is traced, then ONNX Runtime loads the graph.
    expected = TorchBackend(bundle, Options(device="cpu", precision="fp32"))
    outputs = references(expected, name, precision, static)
    traced = expected
    if precision != "fp32":
        expected.close()
        traced = TorchBackend(bundle, Options(device="cpu", precision=precision, verify=False))
    module = lowered(traced.module(name), computed_in(stage, precision))
    rounded(module, precision)  # to the stored values, in whatever precision it computes
    export_stage(bundle, module, name, aside, opset, precision, static)
    check_interface(stage, aside)
    enter(aside, digest)
    if precision != "fp32":
        passes(check_rounding(traced, name, outputs[0], precision))
    traced.close()
    for parity in check_graph(bundle, name, aside, outputs, precision):
        passes(parity)
    return put_file(bundle, aside, graph_file(name, precision), graph_inputs(aside))


def _drop_unused_weights(bundle: Bundle, place: Staging, precision: str) -> None:
    """Delete a precision's weights that no graph uses, for example after the gate has failed.

    If another process is exporting graphs of this model, nothing is deleted: that process cleans up.
    """
    if precision == "fp32" or others(place):
        return
    bundle = Bundle.open(bundle.path)
    manifest = bundle.manifest
    names = [stage.name for stage in manifest.all_stages]
    made = {bundle.weights_variant(name, precision) for name in names}
    used = {stage.weights for stage in manifest.stages} | {
        bundle.weights(name, p)
        for name in names
        for p in (*PRECISIONS, *QUANTIZED)
        if graph_file(name, p) in bundle.files
    }
    for name in made - used:
        if name in bundle.files:
            bundle = drop_file(bundle, name)
