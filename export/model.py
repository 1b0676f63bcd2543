"""A model directory to a model directory with graphs: weights, export, parity gate, manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from higen import families
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, drop_file, graph_file, put_file
from higen.errors import BackendError, HigenError, OutputError, RequestError
from higen.export.graphs import export_stage
from higen.export.interface import check_interface, graph_inputs
from higen.export.parity import Parity, check_graph, check_rounding, references
from higen.export.precision import check_opset, computed_in, lowered, rounded, write_weights

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
    that it cannot have, UnknownFamily where the networks' code is not installed, BackendError where the gate fails.
    """
    opset = check_opset(precision, opset)
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

    parts = {name: bundle.path / f".{graph_file(name, precision)}.part" for name in names}
    try:
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
    except BaseException as error:
        _drop_unused_weights(bundle, precision)
        if isinstance(error, OSError) and not isinstance(error, HigenError):
            raise OutputError(f"{bundle.path}: the graphs cannot be written: {error}") from error
        raise
    finally:
        for aside in parts.values():
            aside.unlink(missing_ok=True)
    return bundle


def _drop_unused_weights(bundle: Bundle, precision: str) -> None:
    """A precision's weights are kept with a graph only: none is left behind where the gate failed."""
    if precision == "fp32":
        return
    made = {name: bundle.weights_variant(name, precision) for name in bundle.manifest.stage_names}
    used = {weights for name, weights in made.items() if graph_file(name, precision) in bundle.files}
    for name in {*made.values()} - used:
        if name in bundle.files:
            bundle = drop_file(bundle, name)
