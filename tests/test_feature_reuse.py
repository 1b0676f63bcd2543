"""Full steps keep deep features and shallow steps take them: which rows do which, with plain formulas."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interpreter_model import COLUMNS, FORMULAS, MANIFEST, Formulas, changed
from made_up_model import write_made_up_model
from numpy.typing import NDArray

from higen.api import load
from higen.axes import limits, tile_of
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, create_model
from higen.engines.triton.interface import read_request
from higen.engines.triton.repository import Settings, write_repository
from higen.errors import BackendUnavailable, ManifestError, RequestError
from higen.export.deep_features import with_deep_features
from higen.manifest import Manifest
from higen.manifest_file import rewrite
from higen.pipeline import Pipeline
from higen.sampler import Step
from higen.schedule import solver_table
from higen.stages import Output, Stage
from higen.tables import Tiles, Windows
from higen.tokenizer import build_word_tokenizer, write_tokenizer
from higen.typed_json import from_json, to_json

Array = NDArray[Any]
K = 3
"""Channels of the deep features of one branch."""

REUSING = changed(changed(MANIFEST, "film_two", deep=K), "film_one", deep=K)
BOTH = changed(changed(REUSING, "draft_two", deep=K), "draft_one", deep=K)


def features(x: Array) -> Array:
    """[B,C,f,H,W] -> [B,K,f,H,W], not linear."""
    return np.stack([np.sin(k * x.sum(axis=1)) for k in range(1, K + 1)], axis=1)


def network(x: Array, deep: Array, hints: Array) -> Array:
    made: Array = 0.3 * x + 0.2 * deep.sum(axis=1, keepdims=True) + hints.mean(axis=2)[:, None, :, None, None]
    return made


def stepped(given: dict[str, Array], deep: Array) -> dict[str, Array]:
    """A solver's step with these features: [B,K,...] or, with guidance, [B,2K,...]."""
    x, row = given["latents"], {name: given[name][:, None, None, None, None] for name in COLUMNS}
    m = network(x, deep[:, :K], given["hints"])
    if "guidance" in given:
        empty = network(x, deep[:, K:], given["empty_hints"])
        m = empty + given["guidance"][:, None, :, None, None] * (m - empty)
    moved = row["A"] * x + row["B"] * m + row["C"] * given["previous"]
    return {"latents": moved, "previous": row["alpha"] * x - row["sigma"] * m}


def full(**given: Array) -> dict[str, Array]:
    own = features(given["latents"])
    deep = np.concatenate([own, 0.5 * own], axis=1) if "guidance" in given else own
    return {**stepped(given, deep), "deep": deep}


def ordinary(**given: Array) -> dict[str, Array]:
    made = full(**given)
    return {name: made[name] for name in ("latents", "previous")}


def shallow(**given: Array) -> dict[str, Array]:
    return stepped(given, given["deep"])


KINDS = {"": ordinary, "_deep": full, "_shallow": shallow}
NAMES = ("film_two", "film_one", "draft_two", "draft_one")
OWN = FORMULAS | {name + kind: formula for name in NAMES for kind, formula in KINDS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "made-up"
    with create_model(path, MANIFEST) as inside:
        write_tokenizer(build_word_tokenizer(("a", "red", "kite", "climbs")), inside / "words.json")
    return path


def pipeline_of(folder: Path, manifest: Manifest = REUSING, lacks: tuple[str, ...] = ()) -> tuple[Pipeline, Formulas]:
    backend = Formulas(manifest, OWN, lacks)
    return Pipeline(replace(Bundle.open(folder), manifest=manifest), backend), backend


def kinds(backend: Formulas, stage: str = "film") -> str:
    """The steps in order: D keeps its features, s is shallow, o is ordinary; then the number of branches, 2 or 1."""
    found = []
    for name in backend.names:
        if name.startswith(stage):
            kind = "D" if name.endswith("_deep") else "s" if name.endswith("_shallow") else "o"
            found.append(kind + ("2" if "_two" in name else "1"))
    return " ".join(found)


def last(pipeline: Pipeline, **options: Any) -> Array:
    steps = [e for e in pipeline.stream("a kite", **options) if isinstance(e, Step) and e.loop == "film"]
    return np.asarray(steps[-1].latents)


# Which rows


def test_every_second_or_third_row_is_a_full_step(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    pipeline("a kite", steps=5, reuse=[1, 2])
    assert kinds(backend) == "D2 s2 D2 s2 D2"
    assert kinds(backend, "draft") == "o2 o2 o2 o2 o2"
    pipeline, backend = pipeline_of(folder, BOTH)
    video = pipeline("a kite", steps=(4, 5), reuse=3)
    assert kinds(backend) == "D2 s2 s2 D2 s2"
    assert kinds(backend, "draft") == "D2 s2 s2 D2"
    assert video.metadata["reuse"] == {"draft": 3, "film": 3}


def test_reuse_of_1_reuses_nothing(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    plain, one = pipeline("a kite"), pipeline("a kite", reuse=1)
    assert np.array_equal(plain.frames, one.frames)
    assert kinds(backend) == "o2 o2 o2 o2 o2 o2"
    assert "reuse" not in one.metadata


def test_the_loop_equals_an_explicit_one(folder: Path) -> None:
    """A second implementation of the loop, which reuses the last full row's features."""
    pipeline, backend = pipeline_of(folder)
    got = last(pipeline, steps=5, reuse=[1, 2], seed=3)
    first = backend.of("film_two_deep")[0]
    loop = REUSING.loop("film")
    table = solver_table(loop.schedule, loop.prediction, loop.solvers[0], 5)
    x, previous, deep = first["latents"], first["previous"], np.zeros(0)
    for i in range(5):
        row = {name: np.full(1, getattr(table, name)[i]) for name in COLUMNS}
        given = {**first, **row, "latents": x, "previous": previous}
        if i % 2 == 0:
            deep = full(**given)["deep"]
        out = stepped(given, deep)
        x, previous = out["latents"], out["previous"]
    np.testing.assert_allclose(got, x, atol=1e-5)
    assert np.abs(got - last(pipeline, steps=5, seed=3)).max() > 1e-3


def test_the_other_kind_of_step_has_other_features(folder: Path) -> None:
    """If guidance ends within the loop, the first plain step is a full step."""
    pipeline, backend = pipeline_of(folder)
    pipeline("a kite", steps=8, reuse=[1, 3], guidance=2, guidance_interval=[None, (0.25, 0.625)])
    assert kinds(backend) == "D1 s1 D2 D2 s2 D1 D1 s1"
    pipeline, backend = pipeline_of(folder, lacks=("film_one_deep",))
    pipeline("a kite", steps=4, reuse=[1, 2], guidance=1)
    assert kinds(backend) == "D2 s2 D2 s2"  # the guided step runs, as for an ordinary step without a plain graph


def test_a_loop_that_begins_within_the_table_begins_with_a_full_step(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    clip = np.zeros((5, 8, 12, 3), np.uint8)
    pipeline("a kite", steps=6, reuse=[1, 2], footage=clip, push=0.5)
    assert kinds(backend) == "D2 s2 D2"


def test_each_iteration_begins_with_a_full_step(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    pipeline("a kite", steps=3, reuse=[1, 2], free_init=2)
    assert kinds(backend) == "D2 s2 D2 D2 s2 D2"


def test_each_window_and_each_tile_has_its_own_features(folder: Path) -> None:
    """A part gets its own features back, whatever other parts did in between."""
    tiled = changed(REUSING, "film", tiles=Tiles(4, 4, 2))
    pipeline, backend = pipeline_of(folder, tiled)
    pipeline("a kite", frames=9, windows=(4, 3), steps=4, reuse=[1, 2])
    kept = [full(**given)["deep"] for given in backend.of("film_two_deep")]
    taken = [given["deep"] for given in backend.of("film_two_shallow")]
    assert len(kept) == len(taken) == 2 * 3 * 2  # rows of each kind, windows, tiles
    for own, found in zip(kept, taken, strict=True):
        assert own.shape == (1, 2 * K, 4, 4, 4)
        np.testing.assert_allclose(found, own, atol=1e-6)


def test_a_video_does_not_depend_on_the_others_of_its_batch(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    both = pipeline(["a kite", "a red kite"], seed=[1, 2], reuse=[1, 2])
    assert backend.of("film_two_shallow")[0]["deep"].shape[0] == 2
    alone = pipeline("a red kite", seed=2, reuse=[1, 2])
    assert np.array_equal(both[1].frames, alone.frames)


def test_what_a_request_needs_is_loaded_before_it_begins(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder, lacks=("film_two_shallow",))
    with pytest.raises(RuntimeError, match="StopIteration"):  # this backend's error for a missing stage
        next(pipeline.events(pipeline.request("a kite", reuse=[1, 2])))
    assert backend.names == []
    pipeline, backend = pipeline_of(folder)
    asked = pipeline.stages(pipeline.request("a kite", reuse=[1, 2], guidance=1))
    assert ("film_one_deep", "film_two_deep") in asked
    assert ("film_one_shallow", "film_two_shallow") in asked
    assert ("film_one", "film_two") not in asked


# What is refused


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", "often", [1, 0], 1001, float("nan"), {"film": 2}])
def test_invalid_intervals(folder: Path, wrong: Any) -> None:
    pipeline, _ = pipeline_of(folder, BOTH)
    with pytest.raises(RequestError, match=r"^reuse=.*: a whole number from 1 to 1000"):
        pipeline.request("a kite", reuse=wrong)


def test_intervals_for_other_loops_than_there_are(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder, BOTH)
    with pytest.raises(RequestError, match=r"or 2 of them \(one per loop: draft, film\)"):
        pipeline.request("a kite", reuse=[1, 2, 3])


def test_a_model_without_shallow_steps(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder, MANIFEST)
    with pytest.raises(RequestError, match=r"reuse=2: the loop draft of tables alone has no shallow steps; `higen-ex"):
        pipeline.request("a kite", reuse=2)
    pipeline, _ = pipeline_of(folder, changed(REUSING, "film_one", deep=None))
    with pytest.raises(RequestError, match="the loop film of tables alone has no shallow steps"):
        pipeline.request("a kite", reuse=[1, 2])


def test_a_model_without_the_graphs_says_the_command(tmp_path: Path) -> None:
    bundle = write_made_up_model(tmp_path / "model", without=("film_two_shallow",), reuse=True)
    pipeline = Pipeline(bundle, OnnxBackend(bundle, Options("cpu", threads=1)))
    command = f"no film_two_shallow.onnx in {bundle.path} (make it: higen-export onnx {bundle.path} --reuse)"
    with pytest.raises(BackendUnavailable, match=re.escape(command)):
        pipeline("a kite", reuse=[1, 2])
    assert len(pipeline("a kite", guidance=1, reuse=[1, 2], frames=3)) == 3  # the plain graphs exist


def test_the_built_in_model_has_the_graphs() -> None:
    with load(backend="onnx", threads=1) as pipeline:
        variants = pipeline.manifest.variants
        assert len(variants) == 12  # of six denoising stages
        assert all(pipeline.bundle.precisions(name) == ("fp32",) for name in variants)
        shallow = pipeline.manifest.stage(pipeline.manifest.denoising[0]).variants[1].name
        steps = [
            step.stage for step in pipeline.stream("a horse", frames=1, steps=3, reuse=2) if isinstance(step, Step)
        ]
        assert shallow in steps


def test_triton_takes_an_interval_and_the_stages_that_are_there(tmp_path: Path) -> None:
    given = {"prompt": np.array([b"a kite"], object), "reuse": np.array([1, 3], np.int32)}
    assert read_request(REUSING, given)[0]["reuse"] == [1, 3]
    bundle = write_made_up_model(tmp_path / "model", without=("film_one_shallow",), reuse=True)
    write_repository(bundle, tmp_path / "repository", Settings())
    names = {path.name for path in (tmp_path / "repository").iterdir()}
    assert {"film_two_deep", "film_two_shallow", "film_one_deep"} < names
    assert "film_one_shallow" not in names
    config = (tmp_path / "repository" / "film_two_shallow" / "config.pbtxt").read_text()
    assert 'name: "deep"' in config


def test_an_older_model_gets_the_rows(tiny_model: Path, tmp_path: Path) -> None:
    """`higen-export onnx --reuse` before it writes graphs, on a model without deep features in its manifest."""
    path = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = Bundle.open(path).manifest
    stages = tuple(replace(stage, deep=None) for stage in before.stages)
    rewrite(path, lambda opened: replace(opened, manifest=replace(before, stages=stages)))
    older = Bundle.open(path)
    assert older.manifest.variants == ()
    with pytest.raises(RequestError, match="--reuse` adds them"):
        Pipeline(older, TorchBackend(older)).request("a whale", reuse=2)
    made = with_deep_features(older)
    assert made.manifest == before
    assert with_deep_features(made) is made
    video = Pipeline(made, TorchBackend(made))("a whale", steps=3, frames=2, reuse=2, warn=lambda _: None)
    assert video.metadata["reuse"] == {"spatial": 2, "temporal": 2}


# The rows of the manifest


def test_the_variants_are_rows_that_no_file_lists() -> None:
    stage = REUSING.stage("film_two")
    keeps, takes = stage.variants
    state = ("B", 2 * K, "F", "H", "W")
    assert keeps == replace(stage, name="film_two_deep", deep=None, outputs=(*stage.outputs, Output("deep", state)))
    assert takes.inputs[-1].shape == state
    assert takes.outputs == stage.outputs
    assert takes.inputs[:-1] == stage.inputs
    assert REUSING.stage("film_one_shallow").input("deep").shape == ("B", K, "F", "H", "W")
    assert keeps.denoises
    assert takes.guided
    assert takes.graph_outputs == ("next_latents", "next_previous")
    assert len(to_json(REUSING)["stages"]) == len(MANIFEST.stages)
    assert "film_two_deep" not in REUSING.stage_names
    assert "deep" not in to_json(MANIFEST.stage("film_two"))
    assert MANIFEST.stage("film_two").variants == ()
    assert from_json(Manifest, to_json(REUSING), whole=True) == REUSING


def test_the_sizes_of_a_variant_are_those_of_its_stage() -> None:
    windowed = changed(changed(REUSING, "film", windows=Windows(4, 2)), "film", tiles=Tiles(4, 8, 2))
    for name in ("film_two_deep", "film_one_shallow"):
        assert limits(windowed, name) == limits(windowed, "film_two")
        assert tile_of(windowed, name) == (4, 8)
    assert windowed.listed("film_one_shallow") == "film_one"


@pytest.mark.parametrize("wrong", [0, -2, 2**31 + 1])
def test_invalid_numbers_of_channels(wrong: int) -> None:
    with pytest.raises(ManifestError, match=r"stages.film_two.deep=.*: a whole number from 1"):
        changed(MANIFEST, "film_two", deep=wrong)


def test_only_a_step_has_deep_features() -> None:
    with pytest.raises(ManifestError, match=r"stages.mixer.deep=4: only for a denoising stage"):
        changed(MANIFEST, "mixer", deep=4)
    rows = (*REUSING.stages, Stage("film_two_deep", "w.safetensors", MANIFEST.stages[0].inputs, (Output("x", ("B",)),)))
    with pytest.raises(ManifestError, match="film_two_deep appears twice"):
        replace(REUSING, stages=rows)
    keeps = REUSING.stage("film_two_deep")
    with pytest.raises(ManifestError, match="must give only latents, previous"):
        changed(MANIFEST, "film_two", outputs=keeps.outputs)
