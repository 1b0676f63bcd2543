"""Presets of a model and the stretch of a loop's result: against a closed form, and refused input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from interpreter_model import FORMULAS, MANIFEST, Formulas, changed
from known_model import MANIFEST as KNOWN

from higen import bundle as files
from higen.bundle import Bundle
from higen.errors import ModelError, RequestError
from higen.families.composed.spec import compose
from higen.generate_command import generate
from higen.manifest import Manifest
from higen.manifest_file import Opened, manifest_text, read_manifest
from higen.pipeline import Pipeline
from higen.presets import Preset, Stretch
from higen.sampler import Step
from higen.tokenizer import build_word_tokenizer, write_tokenizer

FAST = Preset("fast", (2, 1), (1.0, None), (None, 1.75))
WIDE = Preset("wide", (None, None), (None, None), (None, 0.5))


def preset(manifest: Manifest, *presets: Preset, **stretch: Any) -> Manifest:
    return replace(changed(manifest, "film", stretch=Stretch("draft", **stretch)), presets=presets)


MODEL = preset(KNOWN, FAST, WIDE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "presets"
    with files.create_model(path, MODEL) as inside:
        write_tokenizer(build_word_tokenizer(("a", "red", "kite")), inside / "words.json")
    return path


def pipeline_of(folder: Path, manifest: Manifest = MODEL) -> Pipeline:
    return Pipeline(replace(Bundle.open(folder), manifest=manifest), Formulas(manifest, FORMULAS))


def last(pipeline: Pipeline, **options: Any) -> dict[str, Step]:
    """The last step of each loop, by its name."""
    events = pipeline.stream(["a kite", "red"], **{"frames": 5, "seed": [3, 4], **options})
    return {event.loop: event for event in events if isinstance(event, Step)}


def by_hand(plain: dict[str, Step], by: float, known: float | np.ndarray = 0.0) -> np.ndarray:
    """The stretched latents, from the recorded latents of a run without a stretch, in float64."""
    x, z = plain["film"].latents.astype(float), plain["draft"].latents.astype(float)
    made: np.ndarray = z + (1 + (1 - known) * (by - 1)) * (x - z)
    return made


def test_a_preset_fills_in_what_is_left_out(folder: Path) -> None:
    pipeline = pipeline_of(folder)
    request = pipeline.request("a kite", preset="fast")
    assert (request.steps, request.guidance[0]) == ((2, 1), 1.0)
    assert request.guidance[1] == pipeline.request("a kite").guidance[1]  # null in the preset: the loop's own
    assert (request.settings.preset, dict(request.settings.stretch)) == ("fast", {"film": 1.75})
    own = pipeline.request("a kite", preset="fast", steps=(None, 3), guidance=4.0)
    assert (own.steps, own.guidance) == ((2, 3), (4.0, 4.0))
    assert pipeline.request("a kite", preset="wide").steps == pipeline.request("a kite").steps
    assert pipeline("a kite", preset="fast").metadata["preset"] == "fast"
    assert not {"preset", "stretch"} & set(pipeline("a kite").metadata)


USUAL = preset(KNOWN, WIDE, replace(FAST, usual=True))
PIXELS = np.zeros((8, 12, 3), np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 4, "frames": 5, "width": 16, "height": 12, "fps": 9},
        {"steps": None, "guidance": None, "negative_prompt": None, "mood": None, "windows": None, "preset": None},
        {"negative_prompt": "", "warn": print},
    ],
)
def test_a_request_that_chooses_nothing_has_the_usual_preset(folder: Path, options: dict[str, Any]) -> None:
    request = pipeline_of(folder, USUAL).request(["a kite", "red"], **options)
    truth = pipeline_of(folder).request(["a kite", "red"], **{**options, "preset": "fast"})
    assert (request.settings, request.steps, request.guidance) == (truth.settings, truth.steps, truth.guidance)
    assert request.settings.preset == "fast"


@pytest.mark.parametrize(
    "options",
    [
        {"steps": KNOWN.loops[0].steps},
        {"steps": (None, None)},
        {"guidance": (None, None)},
        {"guidance": 1.0},
        {"solver": KNOWN.loops[0].solvers[0].name},
        {"negative_prompt": "red"},
        {"mood": "dim"},  # its default
        {"grain": 3},
        {"push": 0.5},
        {"shake": 0.5},
        {"sway": "unspecified"},
        {"drift": np.eye(5)},
        {"sketch": PIXELS},
        {"footage": np.stack([PIXELS] * 5)},
        {"keyframes": {0: PIXELS}},
        {"keyframes": {0: PIXELS}, "mask": PIXELS},
        {"guidance_interval": (0, 1)},
        {"windows": 0},
        {"windows": 3, "window_noise": "fresh"},
        {"free_init": 1},
        {"free_init": 1, "free_init_filter": "butterworth"},
        {"reuse": 1},
        {"inversion": "red", "footage": np.stack([PIXELS] * 5), "solver": "ddim"},
        {"preset": "wide"},
    ],
    ids=str,
)
def test_what_chooses_how_to_draw_leaves_the_usual_preset_out(folder: Path, options: dict[str, Any]) -> None:
    usual, plain = (pipeline_of(folder, model).request("a kite", frames=5, **options) for model in (USUAL, MODEL))
    assert usual.settings == plain.settings
    assert usual.settings.preset == options.get("preset")
    assert (usual.steps, usual.guidance, usual.solvers) == (plain.steps, plain.guidance, plain.solvers)


def test_the_usual_presets_stages_are_loaded_and_recorded(folder: Path) -> None:
    usual, named = pipeline_of(folder, USUAL), pipeline_of(folder)
    assert usual._default_stages() == named.stages(named.request("a kite", preset="fast"))
    made, truth = usual("a kite", seed=3), named("a kite", seed=3, preset="fast")
    np.testing.assert_array_equal(made.frames, truth.frames)
    assert {**made.metadata, "seconds": 0} == {**truth.metadata, "seconds": 0}
    assert (made.metadata["preset"], made.metadata["steps"]) == ("fast", [2, 1])
    rows = [name for name, _ in usual.stream("a kite").loops]
    assert usual.stream("a kite").loops == named.stream("a kite", preset="fast").loops
    assert rows == ["draft", "film", "decode"]
    assert usual.image("a kite", seed=3).shape == (8, 12, 3)


def test_a_loop_of_frames_draws_its_first_frame_as_the_clip(folder: Path) -> None:
    """The clip has known frames, so it has no usual preset; the clip that gives them has none either."""
    clip = pipeline_of(folder, USUAL).loop("a kite", frames=4, seed=3)
    np.testing.assert_array_equal(clip.frames, pipeline_of(folder).loop("a kite", frames=4, seed=3).frames)


def test_the_drawn_key_frame_of_an_edit_is_drawn_as_its_clip(folder: Path) -> None:
    """A clip with controls has no usual preset, so its key frame has none either."""
    usual = replace(MODEL, presets=(replace(FAST, usual=True), WIDE))
    pipeline = pipeline_of(folder, usual)
    clip = np.random.default_rng(0).integers(0, 256, (7, 8, 12, 3), dtype=np.uint8)
    made = pipeline.edit(clip, "a kite", key="drawn", seed=2)
    key = pipeline("a kite", frames=1, steps=[None, None], width=12, height=8, seed=2).frames[0]
    np.testing.assert_array_equal(made.frames, pipeline.edit(clip, "a kite", key=key, seed=2).frames)
    other = pipeline("a kite", frames=1, width=12, height=8, seed=2).frames[0]
    assert not np.array_equal(key, other), "the usual preset draws another picture"


@pytest.mark.parametrize("name", ["fast", "wide"])
def test_the_result_is_stretched_from_the_earlier_loop(folder: Path, name: str) -> None:
    pipeline = pipeline_of(folder)
    made = last(pipeline, preset=name)
    steps, guidance = pipeline.request("a kite", preset=name).steps, pipeline.request("a kite", preset=name).guidance
    plain = last(pipeline, steps=steps, guidance=[guidance[0], None])
    by = {"fast": 1.75, "wide": 0.5}[name]
    np.testing.assert_array_equal(made["draft"].latents, plain["draft"].latents)
    np.testing.assert_allclose(made["film"].latents, by_hand(plain, by), atol=1e-5)
    shown = replace(plain["film"], latents=plain["film"].previous)
    np.testing.assert_allclose(made["film"].previous, by_hand({**plain, "film": shown}, by), atol=1e-5)
    frames = pipeline.stream(["a kite", "red"], frames=5, seed=[3, 4], preset=name)
    list(frames)
    np.testing.assert_array_equal(frames.videos[0].frames, pipeline.decode(made["film"].latents, frames.request)[0])


def test_a_picture_may_stand_for_the_earlier_loop(folder: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    pipeline = pipeline_of(folder)
    made, plain = last(pipeline, sketch=picture, preset="wide"), last(pipeline, sketch=picture)
    rows = picture[..., 0].astype(float).reshape(4, 2, 6, 2) / 127.5 - 1
    draft = np.stack([rows.mean(axis=(1, 3)), rows[:, 0, :, 0]])[None, :, None]
    x = plain["film"].latents
    np.testing.assert_allclose(made["film"].latents, draft + 0.5 * (x - draft), atol=1e-5)


def test_the_models_own_stretch_needs_no_preset(folder: Path) -> None:
    plain = last(pipeline_of(folder))
    model = preset(KNOWN, replace(FAST, steps=(None, None), guidance=(None, None), stretch=(None, None)), by=1.25)
    for options in ({}, {"preset": "fast"}):
        made = last(pipeline_of(folder, model), **options)
        np.testing.assert_allclose(made["film"].latents, by_hand(plain, 1.25), atol=1e-5)
    unchanged = last(pipeline_of(folder, preset(KNOWN)))
    np.testing.assert_array_equal(unchanged["film"].latents, plain["film"].latents)


def test_known_frames_stay_as_they_are(folder: Path) -> None:
    """The factor falls to 1 where a frame is known; a mask's cells in between have a factor in between."""
    first, final = np.random.default_rng(1).integers(0, 256, (2, 8, 12, 3), np.uint8)
    masks = np.zeros((8, 12), np.uint8)
    masks[:, 8:], masks[:2, :1] = 255, 255  # whole cells, and half of one cell
    pipeline = pipeline_of(folder)
    known = {"keyframes": {0: first, -1: final}, "mask": masks}
    made, plain = last(pipeline, preset="wide", **known), last(pipeline, **known)
    kept = np.zeros((1, 1, 5, 4, 6))
    kept[:, :, [0, 4]] = 1 - masks.reshape(4, 2, 6, 2).mean(axis=(1, 3)) / 255
    assert sorted(set(kept.ravel())) == [0, 0.5, 1]
    np.testing.assert_allclose(made["film"].latents, by_hand(plain, 0.5, kept), atol=1e-5)
    exact = np.broadcast_to(kept == 1, made["film"].latents.shape)
    np.testing.assert_array_equal(made["film"].latents[exact], plain["film"].latents[exact])


def test_free_init_stretches_once(folder: Path) -> None:
    model = changed(MODEL, "film", start=None)
    pipeline = pipeline_of(folder, model)
    made, plain = last(pipeline, preset="wide", free_init=2), last(pipeline, free_init=2)
    np.testing.assert_allclose(made["film"].latents, by_hand(plain, 0.5), atol=1e-5)


def test_a_single_frame_has_no_stretch(folder: Path) -> None:
    assert dict(pipeline_of(folder).request("a kite", preset="fast", frames=1).settings.stretch) == {}


# The manifest


def test_a_manifest_without_the_new_keys_is_written_as_before(folder: Path, tmp_path: Path) -> None:
    document = json.loads(manifest_text(Opened(KNOWN, {}, {})))
    assert "presets" not in document
    assert all("stretch" not in row for row in document["loops"])
    (tmp_path / "higen.json").write_text(manifest_text(Opened(MODEL, {}, {})))
    assert read_manifest(tmp_path).manifest == MODEL
    assert read_manifest(folder).manifest.presets == (FAST, WIDE)
    assert "usual" not in json.loads((tmp_path / "higen.json").read_text())["presets"][0]
    (tmp_path / "higen.json").write_text(manifest_text(Opened(USUAL, {}, {})))
    assert read_manifest(tmp_path).manifest == USUAL


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Stretch("draft", -0.5), "by=-0.5: a number from 0 to 100"),
        (lambda: Stretch("draft", float("inf")), "by=inf: a number from 0 to 100"),
        (lambda: preset(MANIFEST, replace(FAST, stretch=(None, 101.0))), "stretch=101.0: a number from 0 to 100"),
        (lambda: preset(MANIFEST, replace(FAST, name="very fast")), "name='very fast': letters, digits and _"),
        (lambda: preset(MANIFEST, FAST, FAST), "presets: fast appears twice"),
        (
            lambda: preset(MANIFEST, replace(FAST, usual=True), replace(WIDE, usual=True)),
            "presets: fast, wide are usual; at most one is",
        ),
        (lambda: preset(MANIFEST, replace(FAST, steps=(2,))), "presets.fast.steps: 2 entries, one per loop, not 1"),
        (lambda: preset(MANIFEST, replace(FAST, steps=(2, 0))), "presets.fast.steps has 0 for the loop film: null, or"),
        (lambda: preset(MANIFEST, replace(FAST, guidance=(-1.0, 1.0))), "presets.fast.guidance has -1.0 for the loop"),
        (lambda: preset(MANIFEST, replace(FAST, stretch=(2.0, None))), "but loops.draft.stretch is null"),
        (lambda: changed(MANIFEST, "film", stretch=Stretch("look")), "loops.film.stretch.loop='look': an earlier loop"),
        (lambda: changed(MANIFEST, "draft", stretch=Stretch("film")), "circle|earlier loop"),
        (lambda: changed(preset(MANIFEST), "draft", least_frames=3), "is left out for"),
        (lambda: compose(preset(MANIFEST, by=1.5), MANIFEST, True), "loops.film.stretch: a composed model cannot have"),
    ],
)
def test_wrong_tables_are_refused(make: Any, said: str) -> None:
    with pytest.raises(Exception, match=said.replace("(", r"\(")) as caught:
        make()
    assert isinstance(caught.value, ModelError)


# Requests


@pytest.mark.parametrize("given", ["quick", "", 3, ["fast"], np.array(["fast", "wide"])])
def test_an_unknown_preset_is_refused(folder: Path, given: Any) -> None:
    with pytest.raises(RequestError, match=r"^preset=.*: the presets of tables alone are 'fast', 'wide'$"):
        pipeline_of(folder).request("a kite", preset=given)
    with pytest.raises(RequestError, match=r"^preset=.*: tables alone has no presets$"):
        pipeline_of(folder, MANIFEST).request("a kite", preset=given)


def test_a_stretch_of_a_loop_that_begins_from_a_clip_is_refused(folder: Path) -> None:
    clip = np.zeros((5, 8, 12, 3), np.uint8)
    with pytest.raises(RequestError, match=r"^preset='fast': the loop film begins from footage, .* one of the two$"):
        pipeline_of(folder).request("a kite", preset="fast", footage=clip)
    with pytest.raises(RequestError, match=r"^loops.film.stretch: .* leave out footage$"):
        pipeline_of(folder, preset(MANIFEST, by=2.0)).request("a kite", footage=clip)


def test_the_command_line_takes_a_preset(tmp_path: Path) -> None:
    result = CliRunner().invoke(generate, ["a whale", "--preset=quick", f"-o{tmp_path / 'a.npy'}"])
    assert result.exit_code == 2
    assert "preset='quick': the presets of higen default: animated emoji are 'fast'" in result.output
