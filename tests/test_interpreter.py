"""The pipeline as an interpreter of tables: loops, replaced loops, starts, decoding, loading and closing."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import older_graph
import pytest
from conftest import write_tiny_model
from interpreter_model import FORMULAS, MANIFEST, Formulas, changed, linear, paint, see, step
from numpy.typing import NDArray
from sealing import write

import higen
from higen import noise
from higen.api import default_model
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.select import StageRouter, select_backend
from higen.bundle import MANIFEST as FILE
from higen.bundle import Bundle, create_model, drop_file, file_record
from higen.errors import BackendError, BackendUnavailable, ManifestError, PromptWarning, RequestError
from higen.families.higen import spec
from higen.images import load_picture
from higen.manifest import Manifest
from higen.pipeline import Pipeline
from higen.sampler import Step
from higen.schedule import NoiseSchedule, solver_table
from higen.stages import Output, Tensor
from higen.tables import Mix, NoiseRule, Replaced, Start, Windows
from higen.tokenizer import build_word_tokenizer, write_tokenizer

PICTURES = [np.random.default_rng(i).integers(0, 256, (8, 12, 3), np.uint8) for i in range(3)]
CLIP = np.random.default_rng(9).integers(0, 256, (6, 8, 12, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of the made-up tables. Tests put other tables into its bundle."""
    path = tmp_path_factory.mktemp("models") / "made-up"
    with create_model(path, MANIFEST) as inside:
        write_tokenizer(build_word_tokenizer(("a", "red", "kite", "climbs")), inside / "words.json")
    return path


def pipeline_of(
    folder: Path, manifest: Manifest = MANIFEST, formulas: Mapping[str, Any] = FORMULAS, lacks: tuple[str, ...] = ()
) -> tuple[Pipeline, Formulas]:
    backend = Formulas(manifest, formulas, lacks)
    return Pipeline(replace(Bundle.open(folder), manifest=manifest), backend), backend


def steps_of(pipeline: Pipeline, prompt: Any = "a kite", **options: Any) -> list[Step]:
    return [event for event in pipeline.stream(prompt, **options) if isinstance(event, Step)]


# A whole video against numpy


def by_hand(seed: int, words: NDArray[Any], frames: int, shake: float, guidance: NDArray[Any]) -> NDArray[Any]:
    """The film of one prompt as docs/manifest.md defines it, in plain numpy: latents [1,C,F,H,W]."""
    still: Any = None
    for loop, count, purpose in (("draft", 1, 21), ("film", frames, 22)):
        table = solver_table(MANIFEST.loop(loop).schedule, "epsilon", MANIFEST.loop(loop).solvers[0], 3)
        x = noise.normal(seed, purpose, count * 2 * 4 * 6).astype(float).reshape(count, 2, 4, 6).swapaxes(0, 1)[None]
        x = x * table.initial
        if loop == "film":
            offset = noise.normal(seed, 23, count * 2).astype(float).reshape(count, 2).T[None, :, :, None, None]
            x = x + 0.25 * offset
        hints = [w[None, None] + (0.0 if loop == "draft" else shake) + 0.3 for w in words]
        hints = [np.repeat(h, count, axis=1) for h in hints]
        scale = np.full(count, 2.0) if loop == "draft" else guidance
        previous = np.zeros_like(x)
        for row in range(3):
            given, empty = (linear(x, table.t[row], h) for h in hints)
            m = empty + scale[None, None, :, None, None] * (given - empty)
            x0 = table.alpha[row] * x - table.sigma[row] * m
            x, previous = table.A[row] * x + table.B[row] * m + table.C[row] * previous, x0
        still = x if loop == "draft" else still
    return x


def test_a_video_is_what_the_tables_say(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    assert pipeline._tokenizer is not None
    words = [
        FORMULAS["reader"](tokens=pipeline._tokenizer.encode([text]))["words"][0] for text in ("a red kite", "climbs")
    ]
    made = steps_of(pipeline, "a red kite", negative_prompt="climbs", seed=11, frames=4, shake=1.5)
    wanted = by_hand(11, np.array(words), 4, 1.5, np.linspace(1, 3, 4))
    np.testing.assert_allclose(made[-1].latents, wanted, atol=2e-5)
    video = pipeline("a red kite", negative_prompt="climbs", seed=11, frames=4, shake=1.5)
    pixels = paint(wanted[0].swapaxes(0, 1))["pixels"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(video.frames, np.trunc(255 * np.clip(pixels / 2 + 0.5, 0, 1)), atol=1)


def test_a_batch_is_its_prompts_one_by_one(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    prompts, seeds = ["a kite", "a red kite", "a kite"], [4, 5, 4]
    batch = pipeline(prompts, seed=seeds, sketch=PICTURES, shake=[0, 1, 0, 1])
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, seed=seeds[i], sketch=PICTURES[i], shake=[0, 1, 0, 1])
        np.testing.assert_array_equal(batch[i].frames, alone.frames)
    assert [video.metadata["seed"] for video in batch] == seeds


# Controls


def test_the_pipeline_lists_its_controls(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    assert pipeline.controls == MANIFEST.controls
    with pytest.raises(RequestError, match=r"^motion: unknown; a request takes prompt, .*, fps, shake, sway, drift,"):
        pipeline("a kite", motion=3)


def test_generate_and_load_pass_controls_on() -> None:
    """HiGen's own keywords are passed on through its controls."""
    picture = np.zeros((32, 32, 3), np.uint8)
    options = {"steps": 1, "frames": 2, "width": 32, "height": 32, "progress": False}
    with higen.load() as pipe:
        assert [control.name for control in pipe.controls][:4] == ["motion", "appearance", "offset_noise", "image"]
        made = pipe("a red heart", image=picture, motion=30, appearance=0.5, offset_noise=0.0, **options)
    same = higen.generate("a red heart", image=picture, motion=30, appearance=0.5, offset_noise=0.0, **options)
    np.testing.assert_array_equal(made.frames, same.frames)
    assert "spatial" not in made.metadata["seconds"]


# Guidance, steps and solvers of each loop


def test_guidance_per_frame_reaches_the_stage(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    pipeline(["a kite", "a red kite"], frames=4, steps=(1, 2), guidance=[1.5, [1, 2, 3, 4]])
    assert [given["guidance"].tolist() for given in backend.of("draft_two")] == [[[1.5], [1.5]]]
    assert [given["guidance"].tolist() for given in backend.of("film_two")] == [[[1, 2, 3, 4]] * 2] * 2
    assert all(given["guidance"].dtype == np.float32 for given in backend.of("film_two"))


def test_guidance_per_frame_acts_per_frame(folder: Path) -> None:
    """These stages process each frame on its own, so a frame's result depends only on its own guidance."""
    pipeline, _ = pipeline_of(folder)
    mixed = steps_of(pipeline, frames=3, guidance=[2, [1, 2.5, 4]])[-1].latents
    for frame, scale in enumerate((1, 2.5, 4)):
        alone = steps_of(pipeline, frames=3, guidance=[2, scale])[-1].latents
        np.testing.assert_allclose(mixed[:, :, frame], alone[:, :, frame], atol=1e-6)


def test_a_models_own_guidance_is_spread_over_the_frames(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    pipeline("a kite", frames=5)
    np.testing.assert_allclose(backend.of("film_two")[0]["guidance"], [[1, 1.5, 2, 2.5, 3]])


def test_steps_and_solver_of_each_loop(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    stream = pipeline.stream("a kite", steps=(2, 4), solver=("ddim", "euler_ancestral"), frames=3)
    assert stream.loops == [("draft", 2), ("film", 4), ("decode", 3)]
    made = [event for event in stream if isinstance(event, Step)]
    assert [(s.loop, s.index, s.total) for s in made] == [
        *[("draft", i, 2) for i in range(2)],
        *[("film", i, 4) for i in range(4)],
    ]
    film = MANIFEST.loop("film")
    table = solver_table(film.schedule, "epsilon", film.solver("euler_ancestral"), 4)
    assert [s.t for s in made[2:]] == table.t.tolist()
    metadata = stream.videos[0].metadata
    assert (metadata["steps"], metadata["solver"]) == ([2, 4], ["ddim", "euler_ancestral"])


def test_a_drawn_seed_is_recorded_and_makes_the_same_video_again(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    video = pipeline("a kite", seed="random")
    np.testing.assert_array_equal(pipeline("a kite", seed=video.metadata["seed"]).frames, video.frames)


# The plain stage


def test_guidance_one_is_run_by_the_plain_stage(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    pipeline("a kite", guidance=(1, 1.0))
    assert {name for name in backend.names if name.startswith(("draft", "film"))} == {"draft_one", "film_one"}
    assert backend.names.count("reader") == 1  # the empty text is not needed
    pipeline("a kite", guidance=(1, [1, 1, 1, 1, 1.0001]))
    assert "film_two" in backend.names


def test_both_stages_give_the_same_at_guidance_one(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    lacking, backend = pipeline_of(folder, lacks=("draft_one", "film_one"))
    plain, guided = (p("a kite", guidance=1, seed=3).frames for p in (pipeline, lacking))
    assert "film_two" in backend.names
    assert "film_one" not in backend.names
    assert np.abs(plain.astype(int) - guided).max() <= 1


def test_a_loop_of_one_stage(folder: Path) -> None:
    guided = changed(MANIFEST, "film", plain=None)
    pipeline, backend = pipeline_of(folder, guided)
    pipeline("a kite", guidance=1)
    assert "film_two" in backend.names
    plain = changed(changed(MANIFEST, "film", guided=None, guidance=1.0), "draft", guided=None, guidance=1.0)
    pipeline, backend = pipeline_of(folder, plain)
    pipeline("a kite")
    assert {name for name in backend.names if name.startswith(("draft", "film"))} == {"draft_one", "film_one"}
    with pytest.raises(RequestError, match="the loop draft has no guidance"):
        pipeline("a kite", guidance=2)


# Pictures and clips


def test_a_picture_for_each_prompt_replaces_the_first_loop(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    stream = pipeline.stream(["a kite", "a red kite"], sketch=PICTURES[:2])
    assert stream.loops == [("film", 3), ("decode", 10)]
    assert [type(event) for event in stream].count(Step) == 3
    assert "draft_two" not in backend.names
    still = backend.of("film_two")[0]["still"]
    for i in (0, 1):
        pixels = load_picture(MANIFEST.control("sketch"), PICTURES[i], 1, 12, 8).pixels[None]
        np.testing.assert_allclose(still[i], see(pixels)["seen"][0], atol=1e-6)
    assert sorted(stream.videos[0].metadata["seconds"]) == ["decode", "film", "sketch", "text"]
    assert "sketch" not in {name for name in stream.videos[0].metadata if name != "seconds"}


def test_a_picture_in_place_of_the_last_loop_is_a_still_clip(folder: Path) -> None:
    manifest = changed(MANIFEST, "film", replaced=Replaced("sketch", "look.seen"))
    pipeline, _ = pipeline_of(folder, manifest)
    frames = pipeline("a kite", sketch=PICTURES[0], frames=4).frames
    pixels = load_picture(MANIFEST.control("sketch"), PICTURES[0], 1, 12, 8).pixels[None]
    shown = paint(see(pixels)["seen"])["pixels"][0].transpose(1, 2, 0)
    for frame in frames:
        np.testing.assert_allclose(frame, np.trunc(255 * np.clip(shown / 2 + 0.5, 0, 1)), atol=1)


def test_a_single_frame_skips_what_is_for_longer_clips(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    video = pipeline("a kite", frames=1, seed=2)
    assert video.frames.shape == (1, 8, 12, 3)
    assert "film_two" not in backend.names
    np.testing.assert_array_equal(pipeline.image("a kite", seed=2), video.frames[0])


def test_a_loop_whose_latents_nothing_takes_is_left_out_of_longer_clips(folder: Path) -> None:
    alone = tuple(t for t in MANIFEST.stage("film_two").inputs if t.name != "still")
    plain = tuple(t for t in MANIFEST.stage("film_one").inputs if t.name != "still")
    lone = changed(changed(MANIFEST, "film_two", inputs=alone), "film_one", inputs=plain)
    assert [loop.name for loop in lone.wanted(1)] == ["draft"]
    assert [loop.name for loop in lone.wanted(2)] == ["film"]
    assert [loop.name for loop in MANIFEST.wanted(2)] == ["draft", "film"]
    mixed = changed(lone, "film", noise=NoiseRule(22, mix=Mix("draft", 1.0)))
    assert [loop.name for loop in mixed.wanted(2)] == ["draft", "film"]
    pipeline, _ = pipeline_of(folder, lone)
    assert [name for name, _ in pipeline.stream("a kite", frames=3).loops] == ["film", "decode"]
    assert {step.loop for step in steps_of(pipeline, frames=1)} == {"draft"}
    needed = {name for ways in pipeline.stages(pipeline.request("a kite", frames=3)) for name in ways}
    assert needed == {"reader", "mixer", "film_two", "paint"}


def test_a_picture_of_a_model_whose_only_loop_is_over_frames(folder: Path) -> None:
    """The model spreads guidance over a clip; a single frame takes the first value."""
    film = replace(MANIFEST.loop("film"), least_frames=1, start=None, guidance=(4.0, 1.0))
    stages = tuple(
        replace(s, inputs=tuple(t for t in s.inputs if t.name != "still")) if s.name.startswith("film") else s
        for s in MANIFEST.stages
    )
    pipeline, backend = pipeline_of(folder, replace(MANIFEST, loops=(film,), stages=stages))
    assert pipeline.image("a kite").shape == (8, 12, 3)
    assert backend.of("film_two")[0]["guidance"].tolist() == [[4.0]]
    pipeline.image("a kite", guidance=[[1, 2, 3, 4, 5]])
    assert pipeline("a kite", frames=1).frames.shape == (1, 8, 12, 3)


def test_a_model_that_cannot_draw_a_single_picture_says_so(folder: Path) -> None:
    manifest = replace(MANIFEST, sizes=replace(MANIFEST.sizes, frames=(2, 5, 24)))
    with pytest.raises(RequestError, match="tables alone makes 2 frames or more, so it cannot make a single picture"):
        pipeline_of(folder, manifest)[0].image("a kite")


def test_a_clip_starts_the_loop_in_the_tail_of_the_table(folder: Path) -> None:
    """The last two of four rows are run, from the clip's latents at the third row's noise level."""
    pipeline, backend = pipeline_of(folder)
    stream = pipeline.stream("a kite", footage=CLIP, steps=4, seed=3, push=0.5)
    assert stream.loops == [("draft", 4), ("film", 2), ("decode", 5)]
    assert [(s.loop, s.index, s.total) for s in stream if isinstance(s, Step)][4:] == [("film", 0, 2), ("film", 1, 2)]
    given = backend.of("film_two")
    film = MANIFEST.loop("film")
    table = solver_table(film.schedule, "epsilon", film.solvers[0], 4)
    assert [call["t"].tolist() for call in given] == [[t] for t in table.t[2:]]
    pixels = load_picture(MANIFEST.control("footage"), CLIP, 5, 12, 8).pixels.swapaxes(0, 1)
    clean = see(pixels)["seen"].swapaxes(0, 1)[None]
    offset = 0.25 * noise.offset_noise(3, 23, 2, 5)[None]
    unit = noise.frame_noise(3, 22, 2, 5, 4, 6)[None]
    wanted = table.start_alpha[2] * clean + table.start_sigma[2] * (unit + offset)
    np.testing.assert_allclose(given[0]["latents"], wanted, atol=1e-5)


@pytest.mark.parametrize(("push", "rows"), [(1.0, 4), (0.99, 3), (0.3, 1), (0.0, 1)])
def test_the_strength_of_a_start(folder: Path, push: float, rows: int) -> None:
    pipeline, backend = pipeline_of(folder)
    pipeline("a kite", footage=CLIP, steps=4, push=push)
    assert backend.names.count("film_two") == rows
    fixed, backend = pipeline_of(folder, changed(MANIFEST, "film", start=Start("footage", "watch.seen", push)))
    fixed("a kite", footage=CLIP, steps=4)
    assert backend.names.count("film_two") == rows


def test_a_picture_begins_every_frame(folder: Path) -> None:
    manifest = changed(MANIFEST, "film", start=Start("sketch", "look.seen", 0.0))
    manifest = changed(manifest, "draft", replaced=None)
    pipeline, backend = pipeline_of(folder, manifest)
    pipeline("a kite", sketch=PICTURES[0], glow=0.0)
    (first,) = backend.of("film_two")
    assert first["latents"].shape == (1, 2, 5, 4, 6)


# Noise


def test_noise_is_mixed_with_an_earlier_loops_latents(folder: Path) -> None:
    manifest = changed(MANIFEST, "film", noise=NoiseRule(22, mix=Mix("draft", "control:glow")), start=None)
    pipeline, backend = pipeline_of(folder, manifest)
    draft = [s for s in steps_of(pipeline, seed=6, glow=0.5, frames=3) if s.loop == "draft"][-1].latents
    unit = noise.frame_noise(6, 22, 2, 3, 4, 6)[None]
    np.testing.assert_allclose(backend.of("film_two")[0]["latents"], unit + 0.5 * draft, atol=1e-6)


def test_windows_of_a_long_clip(folder: Path) -> None:
    windowed = changed(MANIFEST, "film", windows=Windows(4, 2))
    pipeline, backend = pipeline_of(folder, windowed)
    whole, _ = pipeline_of(folder)
    made = pipeline("a kite", frames=9, seed=1).frames
    assert {given["latents"].shape[2] for given in backend.of("film_two")} == {4}
    assert backend.names.count("film_two") == 3 * 4  # windows at 0, 2, 4 and 5
    assert np.abs(made.astype(int) - whole("a kite", frames=9, seed=1).frames).max() <= 1
    pipeline("a kite", frames=4)
    assert backend.given[-3][1]["latents"].shape[2] == 4


# Decoding


class Receptive:
    """A video decoder for [1,C,n,H,W] that sees `reach` frames on each side, and zeros beyond the given frames."""

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __call__(self, z: NDArray[Any]) -> dict[str, NDArray[Any]]:
        n = z.shape[2]
        padded = np.pad(z[:, :1], [(0, 0), (0, 0), (self.reach, self.reach), (0, 0), (0, 0)])
        seen = sum((k + 1) * padded[:, :, k : k + n] for k in range(2 * self.reach + 1))
        grey = np.tanh(0.2 * seen).repeat(2, axis=3).repeat(2, axis=4)
        return {"pixels": np.repeat(grey, 3, axis=1)}


def video_decoder(chunk: int, overlap: int) -> Manifest:
    axes = ("B", "C", "F", "H", "W")
    sizes = replace(MANIFEST.sizes, chunk=chunk, overlap=overlap)
    inputs, outputs = (Tensor("z", axes),), (Output("pixels", ("B", 3, "F", "Y", "X")),)
    return replace(changed(MANIFEST, "paint", inputs=inputs, outputs=outputs, batch=False), sizes=sizes)


@pytest.mark.parametrize(("chunk", "overlap"), [(1, 2), (2, 2), (3, 2), (3, 5), (4, 4), (100, 0), (5, 100)])
@pytest.mark.parametrize("frames", [1, 2, 7, 11])
def test_chunks_with_enough_overlap_are_the_whole_clip(folder: Path, chunk: int, overlap: int, frames: int) -> None:
    pipeline, backend = pipeline_of(folder, video_decoder(chunk, overlap), {"paint": Receptive(2)})
    z = np.random.default_rng(0).standard_normal((2, 2, frames, 4, 6)).astype(np.float32)
    made = pipeline.decode(z, pipeline.request(["a kite", "a red kite"], frames=frames))
    assert made.shape == (2, frames, 8, 12, 3)
    for i in (0, 1):
        whole = Receptive(2)(z[i : i + 1])["pixels"][0].transpose(1, 2, 3, 0)
        np.testing.assert_array_equal(made[i], np.trunc(255 * np.clip(whole / 2 + 0.5, 0, 1)).astype(np.uint8))
    assert all(given["z"].shape[0] == 1 for given in backend.of("paint"))
    assert max(given["z"].shape[2] for given in backend.of("paint")) <= min(chunk + 2 * overlap, frames)


def test_too_little_overlap_would_be_seen(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder, video_decoder(2, 1), {"paint": Receptive(2)})
    z = np.random.default_rng(0).standard_normal((1, 2, 7, 4, 6)).astype(np.float32)
    made = pipeline.decode(z, pipeline.request("a kite", frames=7))
    whole = Receptive(2)(z)["pixels"][0].transpose(1, 2, 3, 0)
    assert np.abs(made[0] - np.trunc(255 * np.clip(whole / 2 + 0.5, 0, 1))).max() > 3


def test_a_decoder_of_single_frames_may_overlap_too(folder: Path) -> None:
    manifest = replace(MANIFEST, sizes=replace(MANIFEST.sizes, chunk=3, overlap=1))
    pipeline, backend = pipeline_of(folder, manifest)
    plain, _ = pipeline_of(folder)
    np.testing.assert_array_equal(pipeline("a kite", frames=7).frames, plain("a kite", frames=7).frames)
    assert [len(given["z"]) for given in backend.of("paint")] == [4, 5, 2]


def test_a_decoder_with_conditions_is_given_their_frames(folder: Path) -> None:
    shaking = Tensor("shake", ("B", "F"), source="control:shake")
    grain = Tensor("grain", ("B",), source="control:grain")
    base = video_decoder(2, 1)
    manifest = changed(base, "paint", inputs=(*base.stage("paint").inputs, shaking, grain))
    pipeline, backend = pipeline_of(folder, manifest, {"paint": lambda z, shake, grain: Receptive(1)(z)})
    pipeline(["a kite", "a red kite"], frames=5, shake=[0, 0.5, 1, 1.5, 2], grain=4)
    shakes = [given["shake"].tolist() for given in backend.of("paint")]
    assert shakes == [[[0, 0.5, 1]], [[0.5, 1, 1.5, 2]], [[1.5, 2]]] * 2
    assert {given["grain"].item() for given in backend.of("paint")} == {4.0}


# What is loaded


def test_prepare_loads_what_a_default_request_needs(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    pipeline.prepare()
    assert backend.loaded == ["reader", "mixer", "draft_two", "film_two", "paint"]
    assert backend.given == []


def test_prepare_loads_only_the_plain_stage_at_guidance_one(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder, changed(MANIFEST, "film", guidance=1.0))
    pipeline.prepare()
    assert backend.loaded == ["reader", "mixer", "draft_two", "film_one", "paint"]
    pipeline, backend = pipeline_of(folder, changed(MANIFEST, "film", guidance=(1.0, 1.0)), lacks=("film_one",))
    pipeline.prepare()
    assert backend.loaded == ["reader", "mixer", "draft_two", "film_two", "paint"]


def test_prepare_for_a_request_loads_what_it_needs(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    request = pipeline.request("a kite", sketch=PICTURES[0], footage=CLIP, guidance=1)
    pipeline.prepare(request)
    assert backend.loaded == ["look", "watch", "reader", "mixer", "film_one", "paint"]
    pipeline.make(request, progress=False)
    assert set(backend.names) == set(backend.loaded)
    one, backend = pipeline_of(folder)
    one.prepare(one.request("a kite", frames=1))
    assert backend.loaded == ["reader", "mixer", "draft_two", "paint"]


def test_prepare_of_a_model_that_needs_a_picture(folder: Path) -> None:
    """The model has no default request, but its stages are still loaded."""
    manifest = changed(MANIFEST, "draft", replaced=None)
    seen = Tensor("seen", ("B", 3, "Y", "X"), source="picture:sketch")
    mixer = manifest.stage("mixer")
    manifest = changed(manifest, "mixer", inputs=(*mixer.inputs, seen))
    pipeline, backend = pipeline_of(folder, manifest)
    pipeline.prepare()
    assert backend.loaded == ["reader", "mixer", "draft_two", "film_two", "paint"]
    replaced, backend = pipeline_of(folder, changed(manifest, "draft", replaced=Replaced("sketch", "look.seen")))
    replaced.prepare()
    assert backend.loaded == ["look", "reader", "mixer", "film_two", "paint"]
    replaced, backend = pipeline_of(folder, changed(manifest, "draft", replaced=Replaced("footage", "watch.seen")))
    replaced.prepare()
    assert "draft_two" in backend.loaded


def test_nothing_is_loaded_unprepared(tiny_model: Path) -> None:
    with higen.load(tiny_model, device="cpu", prepare=False) as pipe:
        assert pipe.backend.choices == {}
        assert pipe.report() == "every stage: auto"
        pipe.request("a whale")
        assert pipe.backend.choices == {}
        pipe.image("a whale", steps=1)
        assert set(pipe.backend.choices) == {"text_encoder", "conditioner", "spatial_unet", "vae_decoder"}
    with higen.load(tiny_model, device="cpu") as pipe:
        assert "temporal_unet" in pipe.backend.choices
        assert "temporal_unet_plain" not in pipe.backend.choices
        assert "vae_encoder" not in pipe.backend.choices


# Graphs of the plain stage, and directories of version 1


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the built-in model that a test may change."""
    return Path(shutil.copytree(default_model(), tmp_path / "model"))


SMALL = {"steps": 2, "frames": 3, "width": 32, "height": 32, "progress": False}


def test_a_directory_with_only_the_guided_graphs_serves_guidance_one(copy: Path) -> None:
    with higen.load(copy, "onnx") as pipe:
        half = pipe("a red heart", guidance=1, **SMALL).frames
        assert {"spatial_unet_plain", "temporal_unet_plain"} <= set(pipe.backend.choices)
    opened = Bundle.open(copy)
    for name in ("spatial_unet_plain.onnx", "temporal_unet_plain.onnx"):
        opened = drop_file(opened, name)
    with higen.load(copy, "onnx") as pipe:
        whole = pipe("a red heart", guidance=1, **SMALL).frames
        assert set(pipe.backend.choices) == {
            *("text_encoder", "conditioner", "spatial_unet", "temporal_unet", "vae_decoder")
        }
    assert np.abs(half.astype(int) - whole).max() <= 1


def as_version_1(copy: Path) -> None:
    """The built-in model as commit 86f7997 wrote it: its weights, and graphs and manifest of version 1."""
    opened, names = Bundle.open(copy), ("spatial_unet", "temporal_unet")
    for name in names:
        opened = drop_file(opened, f"{name}_plain.onnx")
    for name in names:
        older_graph.as_version_1(copy, name)
    records = {p.name: vars(file_record(p)) for p in sorted(copy.iterdir()) if p.name != FILE}
    model = spec.write_config(spec.config(opened.manifest))
    write(copy, {"format": "higen", "version": 1, "model": model, "files": records})


def test_a_directory_of_version_1_gives_the_same_frames(copy: Path) -> None:
    options = {**SMALL, "seed": 5, "guidance": (4.0, 2.0), "motion": [10, 40]}
    with higen.load(default_model(), "onnx") as pipe:
        wanted, wanted_image = pipe("a red heart", **options).frames, pipe.image("a red heart", steps=2)
    as_version_1(copy)
    assert Bundle.open(copy).version == 1
    with higen.load(copy, "onnx") as pipe:
        np.testing.assert_array_equal(pipe("a red heart", **options).frames, wanted)
        np.testing.assert_array_equal(pipe.image("a red heart", steps=2), wanted_image)
        assert pipe("a red heart", **{**options, "guidance": 1}).frames.shape == (3, 32, 32, 3)
        assert not [name for name in pipe.backend.choices if name.endswith("_plain")]


def test_a_graph_of_version_1_refuses_what_it_cannot_express(copy: Path) -> None:
    as_version_1(copy)
    with higen.load(copy, "onnx") as pipe:
        message = rf"temporal_unet: .*guidance.*\(make it again: higen-export onnx {copy} --stage temporal_unet\)"
        with pytest.raises(BackendUnavailable, match=message):
            pipe("a red heart", guidance=[1.5, [1, 2, 3]], **SMALL)
        same = pipe("a red heart", guidance=[1.5, [2, 2, 2]], **SMALL)  # equal guidance is possible
        np.testing.assert_array_equal(same.frames, pipe("a red heart", guidance=(1.5, 2.0), **SMALL).frames)


def test_a_half_timestep_is_refused_by_a_graph_of_version_1(copy: Path) -> None:
    as_version_1(copy)
    backend = OnnxBackend(Bundle.open(copy))
    stage = backend.bundle.manifest.stage("spatial_unet")
    sizes = {**backend.bundle.manifest.fixed, "B": 1, "H": 8, "W": 8}
    inputs: dict[str, Any] = {
        t.name: np.zeros([sizes[n] if isinstance(n, str) else n for n in t.shape], np.float32) for t in stage.inputs
    }
    backend.run("spatial_unet", **{**inputs, "t": np.float32([3])})
    with pytest.raises(BackendUnavailable, match=r"spatial_unet: .* t could be \[3\.5\].*higen-export onnx"):
        backend.run("spatial_unet", **{**inputs, "t": np.float32([3.5])})


# Warnings of a request


def test_warnings_go_to_the_request_that_asked(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    told: list[Warning] = []
    pipeline("a submarine", warn=told.append)
    assert [type(warning) for warning in told] == [PromptWarning]
    stream = pipeline.stream("a submarine", warn=told.append)
    for event in stream:
        if isinstance(event, Step):
            stream.preview()  # no second warning
    assert len(told) == 2


@pytest.mark.parametrize("text", ["a submarine", "a " * 40])
def test_a_warning_says_which_text_it_means(folder: Path, text: str) -> None:
    pipeline, _ = pipeline_of(folder)

    def told(prompt: Any, **options: Any) -> list[str]:
        found: list[Warning] = []
        pipeline(prompt, warn=found.append, **options)
        return [str(warning).partition(":")[0].partition(" has ")[0] for warning in found]

    assert told(text) == ["prompt"]
    assert told("a kite", negative_prompt=text) == ["negative_prompt"]
    assert told(["a kite", text, "a red kite"]) == ["prompt 2 of 3"]
    assert told([text, text], negative_prompt=text) == ["prompt 1 of 2"]  # the same text is read once


# Previews


def painting(origin: str, manifest: Manifest = MANIFEST) -> tuple[Manifest, Mapping[str, Any]]:
    """Tables whose decoder adds the latents of a loop."""
    still = Tensor("still", ("B", "C", "H", "W"), source=origin)
    tables = changed(manifest, "paint", inputs=(*MANIFEST.stage("paint").inputs, still), batch=False)
    return tables, {"paint": lambda z, still: paint(z=z + still)}


def test_a_preview_of_a_decoder_that_is_fed_by_a_loop(folder: Path) -> None:
    """The preview shows the estimate of that loop, or uses its last latents if that loop has already run."""
    tables, formulas = painting("draft.latents")
    pipeline, _ = pipeline_of(folder, tables, formulas)
    stream, last = pipeline.stream("a kite", frames=3), np.zeros(0)
    for event in stream:
        if isinstance(event, Step):
            still = event.previous if event.loop == "draft" else last
            last = event.latents if event.loop == "draft" else last
            pixels = paint(z=event.previous[0].swapaxes(0, 1) + still[:, :, 0])["pixels"].transpose(0, 2, 3, 1)
            wanted = np.trunc(255 * np.clip(pixels / 2 + 0.5, 0, 1))
            np.testing.assert_allclose(stream.preview()[0], wanted, atol=1)
    np.testing.assert_array_equal(stream.preview().shape, stream.videos[0].frames[None].shape)


def test_a_preview_that_needs_a_later_loop_says_so(folder: Path) -> None:
    tables, formulas = painting("film.latents", replace(MANIFEST, sizes=replace(MANIFEST.sizes, frames=(2, 5, 9))))
    pipeline, _ = pipeline_of(folder, tables, formulas)
    stream = pipeline.stream("a kite", frames=3)
    next(stream)
    with pytest.raises(RequestError, match="preview: it needs the latents of the loop film, which has not run yet"):
        stream.preview()
    assert len(list(stream)) > 3
    assert stream.videos


# Bars


def test_a_call_without_a_standard_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pythonw, windowed applications and services have no standard error."""
    pipeline, _ = pipeline_of(folder)
    monkeypatch.setattr(sys, "stderr", None)
    for progress in (None, False, True):
        assert len(pipeline("a kite", progress=progress)) == 5


# Stopping and closing


class Slow(Formulas):
    """Signals that a step has begun, and waits for permission to continue."""

    def __init__(self, manifest: Manifest = MANIFEST) -> None:
        super().__init__(manifest)
        self.begun, self.on = threading.Event(), threading.Event()

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        if stage == "film_two":
            self.begun.set()
            assert self.on.wait(30)
        return super().run(stage, **tensors)


def test_a_stream_closed_by_another_thread_stops_after_its_step(folder: Path) -> None:
    backend = Slow()
    pipeline = Pipeline(Bundle.open(folder), backend)
    stream, seen = pipeline.stream("a kite", steps=(1, 50)), list[object]()
    reader = threading.Thread(target=lambda: seen.extend(stream))
    reader.start()
    assert backend.begun.wait(30)
    stream.close()
    stream.close()
    backend.on.set()
    reader.join(30)
    assert not reader.is_alive()
    assert backend.names.count("film_two") == 1
    with pytest.raises(RequestError, match="not been read to its end"):
        _ = stream.videos
    assert len(pipeline("a kite")) == 5


def test_a_stream_may_be_read_by_several_threads(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    alone = list(pipeline.stream("a kite", steps=40))
    stream, seen, failed = pipeline.stream("a kite", steps=40), list[object](), list[Exception]()

    def read() -> None:
        try:
            seen.extend(stream)
        except Exception as error:
            failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert failed == []
    assert len(seen) == len(alone)
    assert len(stream.videos[0]) == 5


def test_a_stream_closed_from_within_its_own_work_ends(folder: Path) -> None:
    """A Ctrl-C handler runs in the thread that makes a step."""

    class Stops(Formulas):
        def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
            if stage == "film_two":
                stream.close()
            return super().run(stage, **tensors)

    pipeline = Pipeline(Bundle.open(folder), Stops(MANIFEST))
    stream = pipeline.stream("a kite", steps=(1, 50))
    assert [event.index for event in stream if isinstance(event, Step) and event.loop == "film"] == [0]


def test_nothing_continues_after_close_on_any_backend(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder)
    request = pipeline.request("a kite")
    pipeline.close()
    pipeline.close()
    for call in (
        lambda: pipeline("a kite"),
        lambda: pipeline.image("a kite"),
        lambda: next(pipeline.stream("a kite")),
        lambda: pipeline.make(request),
        lambda: pipeline.prepare(),
        lambda: pipeline.prepare(request),
    ):
        with pytest.raises(BackendError, match=r"^the pipeline was closed: load the model again$"):
            call()


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_call_after_close_is_refused(backend: str) -> None:
    pipe = higen.load(backend=backend)
    pipe.close()
    pipe.close()
    for call in (lambda: pipe("a red heart", **SMALL), lambda: pipe.image("a red heart"), pipe.prepare):
        with pytest.raises(BackendError, match="the pipeline was closed: load the model again"):
            call()
    stream = pipe.stream("a red heart", **{k: v for k, v in SMALL.items() if k != "progress"})
    with pytest.raises(BackendError, match="the pipeline was closed"):
        next(stream)
    alone = OnnxBackend(pipe.bundle)
    alone.close()
    with pytest.raises(BackendError, match="the pipeline was closed"):
        alone.prepare("conditioner")


def test_closing_while_another_thread_generates_is_one_clear_error(tiny_model: Path) -> None:
    """At any moment, that thread either finishes its video or fails with BackendError."""
    pipe = higen.load(backend="onnx", threads=1, prepare=False)
    video, seen = pipe("a red heart", **SMALL), dict[str, int]()
    pipe.close()

    def work(pipeline: Pipeline) -> None:
        try:
            made = pipeline("a red heart", **SMALL)
            assert np.abs(made.frames.astype(int) - video.frames).max() <= 1
            result = "done"
        except BackendError as error:
            result = str(error)
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        seen[result] = seen.get(result, 0) + 1

    for i in range(8):
        pipeline = higen.load(backend="onnx", threads=1, prepare=i % 2 == 0)
        worker = threading.Thread(target=work, args=(pipeline,))
        worker.start()
        time.sleep(0.006 * i)
        pipeline.close()
        worker.join(60)
        assert not worker.is_alive()
    assert set(seen) <= {"done", "the pipeline was closed: load the model again"}
    assert sum(seen.values()) == 8


class Gate:
    """A backend with stages that wait in the middle of a run."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.begun, self.on = inner, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        made: Mapping[str, Any] = self.inner.run(stage, **tensors)
        self.begun.set()
        assert self.on.wait(30)
        return made


def test_what_was_made_can_be_read_after_close() -> None:
    """A stage that is running during `close` finishes, its result can be read, and the next stage is refused."""
    bundle = Bundle.open(default_model())
    gate = Gate(OnnxBackend(bundle, Options(device="cpu")))
    router = StageRouter(bundle, {"onnx": lambda: gate}, {})
    caught: list[BaseException] = []

    def work() -> None:
        try:
            made = router.run("text_encoder", tokens=np.ones((1, bundle.manifest.fixed["L"]), np.int64))
            assert router.to_numpy(made["hidden"]).shape[0] == 1
            router.run("text_encoder", tokens=np.ones((1, bundle.manifest.fixed["L"]), np.int64))
        except BaseException as error:
            caught.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    assert gate.begun.wait(30)
    router.close()
    gate.on.set()
    worker.join(30)
    assert [str(error) for error in caught] == ["the pipeline was closed: load the model again"]
    assert isinstance(caught[0], BackendError)


def test_two_backends_of_one_model_share_what_is_kept_and_not_the_backend(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    other = Formulas()
    twin = pipeline.on(other)
    first = pipeline("a kite").frames
    np.testing.assert_array_equal(twin("a kite").frames, first)
    assert "reader" in backend.names
    assert "reader" not in other.names


def test_a_router_that_was_closed_loads_nothing(tiny_model: Path) -> None:
    router = select_backend(Bundle.open(tiny_model), "torch", Options(device="cpu"))
    router.close()
    for call in (
        lambda: router.choose("text_encoder"),
        lambda: router.prepare("text_encoder"),
        lambda: router.describe("text_encoder"),
        lambda: router.run("text_encoder", tokens=np.ones((1, 12), np.int64)),
    ):
        with pytest.raises(BackendError, match="the pipeline was closed"):
            call()
    assert router.choices == {}


# Mismatched tables are found when they are made


def test_tables_are_checked_by_whoever_makes_them() -> None:
    with pytest.raises(ManifestError, match=r"loops\.film\.start\.strength=2"):
        changed(MANIFEST, "film", start=Start("footage", "watch.seen", 2.0))
    with pytest.raises(ManifestError, match="prediction='flow'"):
        changed(MANIFEST, "film", prediction="flow")
    assert changed(MANIFEST, "film", schedule=NoiseSchedule("cosine")).loop("film").schedule.kind == "cosine"


def test_a_family_whose_step_is_not_linear_in_its_hints_still_runs(folder: Path) -> None:
    pipeline, _ = pipeline_of(folder, formulas={"film_two": step(lambda x, t, h: np.tanh(x) * h.sum())})
    assert np.isfinite(steps_of(pipeline)[-1].latents).all()


def test_a_tiny_model_written_twice_is_the_same(tmp_path: Path) -> None:
    one, two = (write_tiny_model(tmp_path / name) for name in ("one", "two"))
    assert one.files == two.files
