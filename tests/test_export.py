"""The exporter on a tiny model's small stages; test_onnx_backend compares the built-in model's graphs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from higen.bundle import Bundle, graph_file, weights_file
from higen.errors import BackendError, RequestError
from higen.export import model as export
from higen.export.cli import main
from higen.export.graphs import LARGEST_INLINE
from higen.export.model import export_model
from higen.export.parity import Parity, check_graph
from higen.stages import STAGES, dimensions

EXPORTED = ("text_encoder", "conditioner")


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[Parity]]:
    """A copy of the tiny model with graphs, and what the gate measured."""
    copy = shutil.copytree(tiny_model, tmp_path_factory.mktemp("export") / "model")
    parities: list[Parity] = []
    return export_model(Bundle.open(copy), EXPORTED, on_parity=parities.append), parities


def test_each_graph_passed_at_shapes_it_was_not_traced_with(exported: tuple[Bundle, list[Parity]]) -> None:
    bundle, parities = exported
    for name in EXPORTED:
        assert graph_file(name) in bundle.files
        assert len({p.shape for p in parities if p.stage == name}) >= 3
    assert all(p.passed for p in parities)


@pytest.mark.parametrize("name", EXPORTED)
def test_a_graph_is_valid_named_by_the_table_and_holds_no_weights(
    exported: tuple[Bundle, list[Parity]], name: str
) -> None:
    bundle, _ = exported
    path, stage = bundle.path / graph_file(name), STAGES[name]
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path), load_external_data=False).graph
    fixed = dimensions(bundle.config)
    for value, tensor in zip(graph.input, stage.inputs, strict=True):
        assert value.name == tensor.name
        sizes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert sizes == [fixed.get(n, n) if isinstance(n, str) else n for n in tensor.shape]
    assert [value.name for value in graph.output] == list(stage.graph_outputs)
    outside = [t for t in graph.initializer if t.external_data]
    assert outside
    for tensor in outside:
        assert {e.key: e.value for e in tensor.external_data}["location"] == weights_file(name)
    assert all(len(t.raw_data) <= LARGEST_INLINE for t in graph.initializer)


def test_a_graph_that_differs_is_refused_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = sorted(path.name for path in copy.iterdir())

    def off(*arguments: object) -> Iterator[Parity]:
        for parity in check_graph(*arguments):  # type: ignore[arg-type]
            yield Parity(parity.stage, parity.shape, 1e-3)

    monkeypatch.setattr(export, "check_graph", off)
    with pytest.raises(BackendError, match=r"text_encoder at B=3: the graph differs by 1\.0e-03, allowed is 2e-05"):
        export_model(Bundle.open(copy), ("text_encoder",))
    assert sorted(path.name for path in copy.iterdir()) == before


def test_an_unknown_stage_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RequestError, match="upscaler"):
        export_model(Bundle.open(tiny_model), ("upscaler",))


def test_inspect_says_what_a_model_holds(exported: tuple[Bundle, list[Parity]]) -> None:
    result = CliRunner().invoke(main, ["inspect", str(exported[0].path)])
    assert result.exit_code == 0
    assert "text_encoder  graph" in result.output
    assert "temporal_unet no graph" in result.output
