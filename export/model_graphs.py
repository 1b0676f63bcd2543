"""Adds graphs to a model directory: weights, export, parity gate, manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from higen import families
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, check_place, drop_file, graph_file, put_file
from higen.errors import BackendError, RequestError
from higen.export.graphs import export_stage
from higen.export.interface import check_interface, graph_inputs
from higen.export.parity import Parity, check_graph, check_rounding, references
from higen.export.place import check_writable, writing
from higen.export.precision import check_opset, computed_in, lowered, rounded, write_weights
from higen.precision import PRECISIONS, QUANTIZED
from higen.staging import Staging, others

__all__ = ["current", "export_model"]


def current(bundle: Bundle, on_line: Callable[[str], None] = lambda _: None) -> Bundle:
    """A model whose manifest has the present version: an older one is upgraded, and `on_line` told what was done."""
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
    on_parity: Callable[[Parity], None] | None = None,
    on_line: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Write the graph of each stage into the model's folder, each only after it passed the parity gate.

    stages     by name; None: every stage of the model
    precision  what the graphs compute in (precision.PRECISIONS); another than fp32 makes a second weights file, unless
               the model's own are stored in it
    opset      of ONNX; None: the precision's default
    static     sizes of B, F, H and W to fix (`shapes.static_sizes`); None: they stay dynamic
    on_line    is told where the manifest is of an older version and is upgraded first

    Files are written aside and moved; the manifest changes with each, so that at every moment the model can be
    opened. An interrupted export can be run again. Raises RequestError for an unknown stage or precision or an opset
    that it cannot have, UnknownFamily where the networks' code is not installed, OutputError where the folder cannot be
    written, ModelError for a file in the place of a graph that is not the model's, BackendError where the gate fails.
    """
    opset = check_opset(precision, opset)
    check_writable(bundle)
    bundle = current(bundle, on_line)
    families.network(bundle.manifest.family)
    known = bundle.manifest.stage_names
    names = known if stages is None else tuple(stages)
    if unknown := [name for name in names if name not in known]:
        raise RequestError(f"stages={unknown}: of {', '.join(known)}")

    def passes(parity: Parity) -> None:
        if on_parity is not None:
            on_parity(parity)
        if not parity.passed:
            raise BackendError(
                f"{parity.stage} at {parity.shape}: the {parity.way} differs by {parity.error:.1e}, "
                f"allowed is {parity.tolerance:.0e}"
            )

    listed = Bundle.open(bundle.path).files  # as they are now
    for name in names:
        check_place(bundle.path, listed, graph_file(name, precision))
    with writing(bundle) as place:
        try:
            return _export(Bundle.open(bundle.path), place, names, precision, opset, static, passes)
        except BaseException:
            _drop_unused_weights(bundle, place, precision)
            raise


def _export(
    bundle: Bundle,
    place: Staging,
    names: Sequence[str],
    precision: str,
    opset: int,
    static: Mapping[str, int] | None,
    passes: Callable[[Parity], None],
) -> Bundle:
    parts = {name: place.beside(graph_file(name, precision)) for name in names}
    # One network in memory at a time: the float32 one says what is right, the low one is traced, then ONNX Runtime
    # loads the graphs.
    expected = TorchBackend(bundle, Options(device="cpu", precision="fp32"))
    for name in names:
        bundle = write_weights(bundle, name, precision)
    outputs = {name: references(expected, name, precision, static) for name in names}
    traced = expected
    if precision != "fp32":
        expected.close()
        traced = TorchBackend(bundle, Options(device="cpu", precision=precision, verify=False))
    for name, aside in parts.items():
        stage = bundle.manifest.stage(name)
        module = lowered(traced.module(name), computed_in(stage, precision))
        rounded(module, precision)  # as they are stored, whatever it computes in
        export_stage(bundle, module, name, aside, opset, precision, static)
        check_interface(stage, aside)
        if precision != "fp32":
            passes(check_rounding(traced, name, outputs[name][0], precision))
    traced.close()
    for name, aside in parts.items():
        for parity in check_graph(bundle, name, aside, outputs[name], precision):
            passes(parity)
        bundle = put_file(bundle, aside, graph_file(name, precision), graph_inputs(aside))
    return bundle


def _drop_unused_weights(bundle: Bundle, place: Staging, precision: str) -> None:
    """A precision's weights are kept with a graph only: none is left behind where the gate failed.

    Another process may be at work on their graph: then it is the one to say.
    """
    if precision == "fp32" or others(place):
        return
    bundle = Bundle.open(bundle.path)
    manifest = bundle.manifest
    made = {bundle.weights_variant(name, precision) for name in manifest.stage_names}
    used = {stage.weights for stage in manifest.stages} | {
        bundle.weights(name, p)
        for name in manifest.stage_names
        for p in (*PRECISIONS, *QUANTIZED)
        if graph_file(name, p) in bundle.files
    }
    for name in made - used:
        if name in bundle.files:
            bundle = drop_file(bundle, name)
