"""A model directory to a model directory with graphs: weights, export, parity gate, manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, drop_file, graph_file, put_file, weights_file
from higen.errors import BackendError, HigenError, OutputError, RequestError
from higen.export.graphs import export_stage
from higen.export.parity import Parity, check_graph, check_rounding, references
from higen.export.precision import check_opset, lowered, write_weights
from higen.stages import STAGES

__all__ = ["export_model"]

TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_model(
    bundle: Bundle,
    stages: Sequence[str] = tuple(STAGES),
    *,
    precision: str = "fp32",
    opset: int | None = None,
    static: Mapping[str, int] | None = None,
    on_parity: Callable[[Parity], None] | None = None,
) -> Bundle:
    """Write the graph of each stage into the model's folder, each only after it passed the parity gate.

    precision  what the graphs compute in (bundle.PRECISIONS); another than fp32 makes a second weights file, unless
               the model's own are stored in it
    opset      of ONNX; None: the precision's default
    static     sizes of B, F, H and W to fix (`graphs.static_sizes`); None: they stay dynamic

    Files are written aside and moved; the manifest changes with each, so that at every moment the model can be
    opened. An interrupted export can be run again. Raises RequestError for an unknown stage or precision or an opset
    that it cannot have, BackendError where the gate fails.
    """
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        raise RequestError(f"stages={unknown}: of {', '.join(STAGES)}")
    opset = check_opset(precision, opset)

    def passes(parity: Parity) -> None:
        if on_parity is not None:
            on_parity(parity)
        if not parity.passed:
            raise BackendError(
                f"{parity.stage} at {parity.shape}: the {parity.way} differs by {parity.error:.1e}, "
                f"allowed is {parity.tolerance:.0e}"
            )

    parts = {name: bundle.path / f".{graph_file(name, precision)}.part" for name in stages}
    try:
        for name in stages:
            bundle = write_weights(bundle, name, precision)
        # One network in memory at a time: the float32 one says what is right, the low one is traced, then ONNX Runtime
        # loads the graphs.
        expected = TorchBackend(bundle, "cpu", "float32")
        outputs = {name: references(expected, name, precision, static) for name in stages}
        traced = expected
        if precision != "fp32":
            expected.close()
            traced = TorchBackend(bundle, "cpu", TORCH_NAMES[precision], verify=False)
        for name, aside in parts.items():
            export_stage(bundle, lowered(traced.module(name), precision), name, aside, opset, precision, static)
            if precision != "fp32":
                passes(check_rounding(traced, name, outputs[name][0], precision))
        traced.close()
        for name, aside in parts.items():
            for parity in check_graph(bundle, name, aside, outputs[name], precision):
                passes(parity)
            bundle = put_file(bundle, aside, graph_file(name, precision))
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
    used = {weights_file(name, precision) for name in STAGES if graph_file(name, precision) in bundle.files}
    for name in {weights_file(stage, precision) for stage in STAGES} - used:
        if name in bundle.files:
            bundle = drop_file(bundle, name)
