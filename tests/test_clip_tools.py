"""Tools that use known frames: the requests they make, the frames they keep, the input they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreter_model import FORMULAS, Formulas, changed
from known_model import MANIFEST as KNOWN

from higen import bundle as files
from higen.bundle import Bundle
from higen.conditioning import measured_curve
from higen.errors import RequestError
from higen.manifest import Manifest
from higen.pipeline import Pipeline
from higen.tables import Control, Start
from higen.tokenizer import build_word_tokenizer, write_tokenizer
from higen.train.cues import appearance_similarity, motion_of
from higen.video import Video

MANIFEST: Manifest = replace(
    KNOWN, controls=tuple(replace(c, measured="distance") if c.name == "sway" else c for c in KNOWN.controls)
)
CLIP = Video(np.random.default_rng(3).integers(0, 256, (7, 8, 12, 3), np.uint8), 6.0, {"prompt": "a kite"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tools"
    with files.create_model(path, MANIFEST) as inside:
        write_tokenizer(build_word_tokenizer(("a", "red", "kite", "climbs")), inside / "words.json")
    return path


def pipeline_of(folder: Path, manifest: Manifest = MANIFEST) -> tuple[Pipeline, list[dict[str, Any]]]:
    """A pipeline, and a list that collects the options of each of its requests."""
    pipeline = Pipeline(replace(Bundle.open(folder), manifest=manifest), Formulas(manifest, FORMULAS))
    asked: list[dict[str, Any]] = []
    request = pipeline.request

    def kept(prompt: Any = "", **options: Any) -> Any:
        asked.append({"prompt": prompt, **options})
        return request(prompt, **options)

    pipeline.request = kept  # type: ignore[method-assign]
    return pipeline, asked


def test_a_clip_is_extended_in_as_many_requests_as_it_takes(folder: Path) -> None:
    pipeline, asked = pipeline_of(folder)
    longer = pipeline.extend(CLIP, 5, overlap=3, seed=8)
    assert (longer.frames.shape, longer.fps) == ((12, 8, 12, 3), 6.0)
    np.testing.assert_array_equal(longer.frames[:7], CLIP.frames)
    assert [(one["prompt"], one["frames"], one["seed"]) for one in asked] == [("a kite", 5, 8 + i) for i in range(3)]
    for i, one in enumerate(asked):  # each request passes through the three previous frames
        assert list(one["keyframes"]) == [0, 1, 2]
        np.testing.assert_array_equal(one["keyframes"][0], longer.frames[4 + 2 * i])
    alone = pipeline(asked[1]["prompt"], frames=5, seed=9, keyframes=asked[1]["keyframes"])
    np.testing.assert_array_equal(longer.frames[9:11], alone.frames[3:])


def test_frames_are_put_between_those_of_a_clip(folder: Path) -> None:
    pipeline, asked = pipeline_of(folder)
    slow = pipeline.interpolate(CLIP, 4, prompt="a red kite", seed=1)
    assert (slow.frames.shape, slow.fps) == ((25, 8, 12, 3), 24.0)
    np.testing.assert_array_equal(slow.frames[::4], CLIP.frames)
    # Each part has three known frames and shares one with the next: 7 frames in 3 parts, then 13 frames in 6 parts.
    assert [one["frames"] for one in asked] == [5] * 9
    assert all(list(one["keyframes"]) == [0, 2, 4] for one in asked)
    assert [one["seed"] for one in asked] == list(range(1, 10))
    alone = pipeline(
        "a red kite", frames=5, seed=2, keyframes={0: CLIP.frames[2], 2: CLIP.frames[3], 4: CLIP.frames[4]}
    )
    np.testing.assert_array_equal(slow.frames[[10, 14]], alone.frames[[1, 3]])
    short = pipeline.interpolate(CLIP.frames[:2], prompt="a kite")
    assert len(short) == 3


def test_the_end_of_a_loop_meets_its_beginning(folder: Path) -> None:
    pipeline, asked = pipeline_of(folder)
    made = pipeline.loop("a kite", seed=4, frames=6)
    assert len(made) == 6
    first, last = asked[1]["keyframes"][0], asked[1]["keyframes"][-1]
    np.testing.assert_array_equal(first, last)
    closed = pipeline("a kite", seed=4, frames=7, keyframes={0: first, -1: last}).frames
    np.testing.assert_array_equal(closed[:-1], made.frames)
    np.testing.assert_array_equal(closed[0], closed[-1])


def test_an_edit_begins_from_the_clip_and_keeps_what_is_not_masked(folder: Path) -> None:
    pipeline, asked = pipeline_of(folder)
    made = pipeline.edit(CLIP, "a red kite", strength=0.7, seed=2)
    latents = pipeline.start_latents(pipeline.request("a kite", frames=7, footage=CLIP), MANIFEST.loop("film"))
    motion = measured_curve("distance", latents[0])
    np.testing.assert_array_equal(asked[1]["sway"], motion)
    wanted = pipeline("a red kite", frames=7, footage=CLIP, push=0.7, sway=motion, seed=2)
    np.testing.assert_array_equal(made.frames, wanted.frames)
    given = pipeline.edit(CLIP, "a red kite", strength=0.7, seed=2, sway=motion)
    np.testing.assert_array_equal(given.frames, wanted.frames)
    own = pipeline.edit(CLIP, "a red kite", strength=0.7, seed=2, sway="unspecified")
    plain = pipeline("a red kite", frames=7, footage=CLIP, push=0.7, sway="unspecified", seed=2)
    np.testing.assert_array_equal(own.frames, plain.frames)
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:] = 255
    masked = pipeline.edit(CLIP, "a red kite", strength=1.0, mask=mask, seed=2)
    known = pipeline("a kite", frames=7, keyframes=dict(enumerate(CLIP.frames)), seed=9)
    np.testing.assert_array_equal(masked.frames[:, :, :6], known.frames[:, :, :6])
    assert np.abs(masked.frames[:, :, 6:].astype(int) - known.frames[:, :, 6:]).max() > 20


def test_an_edit_on_another_key_frame(folder: Path) -> None:
    """The latents keep their differences from the frame that is closest to the key frame."""
    pipeline, _ = pipeline_of(folder)
    film = MANIFEST.loop("film")

    def latents(clip: Any) -> Any:
        return pipeline.start_latents(pipeline.request("a kite", frames=7, footage=clip), film)

    key = np.full((8, 12, 3), 90, np.uint8)
    z, still = latents(CLIP), latents(np.repeat(key[None], 7, axis=0))
    nearest = min(range(7), key=lambda i: float(np.linalg.norm(z[:, :, i] - still[:, :, 3])))
    assert nearest != 3
    moved = z - z[:, :, [nearest]] + still[:, :, 3:4]
    start = pipeline.decode(moved, pipeline.request("a kite", frames=7, footage=CLIP))[0]
    curve = measured_curve("distance", z[0])
    wanted = pipeline("a kite", frames=7, footage=start, push=0.2, sway=curve, seed=2)
    made = pipeline.edit(CLIP, "a kite", strength=0.2, key=key, seed=2)
    np.testing.assert_array_equal(made.frames, wanted.frames)
    drawn = pipeline("a kite", frames=1, seed=2).frames[0]
    of_drawn = pipeline.edit(CLIP, "a kite", strength=0.2, key=drawn, seed=2)
    np.testing.assert_array_equal(
        pipeline.edit(CLIP, "a kite", strength=0.2, key="drawn", seed=2).frames, of_drawn.frames
    )


def test_curves_are_measured_as_training_measures_them() -> None:
    latents = np.random.default_rng(0).standard_normal((3, 6, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(measured_curve("distance", latents), motion_of(torch.from_numpy(latents)[None])[0])
    features = torch.from_numpy(latents).transpose(0, 1).flatten(1)
    wanted = appearance_similarity(features[None])[0]
    np.testing.assert_allclose(measured_curve("similarity", latents), wanted, atol=1e-5)


def test_a_clip_of_another_size_is_made_to_fit(folder: Path) -> None:
    pipeline, asked = pipeline_of(folder)
    large = Video(CLIP.frames.repeat(3, axis=1).repeat(3, axis=2), 6.0)
    assert pipeline.extend(large, 1, prompt="a kite", width=12, height=8).frames.shape == (8, 8, 12, 3)
    assert pipeline.extend(large, 1, prompt="a kite").frames.shape == (8, 24, 36, 3)
    odd = Video(CLIP.frames[:, :, :11], 6.0)
    assert pipeline.extend(odd, 1, prompt="a kite").frames.shape == (8, 8, 12, 3)
    assert all(picture.shape[:2] in ((8, 12), (24, 36)) for one in asked for picture in one["keyframes"].values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.extend(CLIP, 0), "frames=0: a whole number of new frames from 1"),
        (lambda p: p.extend(CLIP, 2, overlap=5), "overlap=5: a whole number from 1 to 4"),
        (lambda p: p.extend(CLIP, 2, length=1), "length=1: a whole number from 2 to 24"),
        (lambda p: p.extend("nowhere.mp4", 2), "video: cannot be read as a clip"),
        (lambda p: p.extend(np.zeros((0, 8, 12, 3), np.uint8), 2), "video: cannot be read as a clip: frames uint8"),
        (lambda p: p.extend(CLIP, 2, width=13), "width=13: a multiple of 4"),
        (lambda p: p.interpolate(CLIP, 3), "factor=3: 2, 4, 8"),
        (lambda p: p.interpolate(CLIP.frames[:1]), "video has 1 frame: at least two"),
        (lambda p: p.loop("a kite", frames=24), "frames=24: a whole number from 2 to 23"),
        (
            lambda p: p.loop("a kite", keyframes={0: CLIP.frames[0]}),
            r"keyframes: loop\(\) sets the known frame itself",
        ),
        (
            lambda p: p.edit(np.repeat(CLIP.frames, 4, 0), "a kite"),
            "video has 28 frames: tables alone edits clips of 1 to 24",
        ),
        (lambda p: p.edit(CLIP, "a kite", strength=2), "push=2: a number from 0 to 1"),
        (lambda p: p.edit(CLIP, "a kite", mask=np.zeros((3, 8, 12), np.uint8)), "mask has 3 frames: one picture, or"),
        (lambda p: p.interpolate(CLIP, 2, frames=5), "frames: this tool sets it itself; leave it out"),
        (lambda p: p.edit(CLIP, "a kite", frames=5), "frames: this tool sets it itself; leave it out"),
        (lambda p: p.extend(CLIP, 2, keyframes={0: CLIP.frames[0]}), "keyframes: this tool sets it itself"),
        (lambda p: p.interpolate(CLIP, 2, keyframes={0: CLIP.frames[0]}), "keyframes: this tool sets it itself"),
        (
            lambda p: p.edit(CLIP, "a kite", mask=np.zeros((8, 12), np.uint8), keyframes={0: CLIP.frames[0]}),
            "keyframes: this tool sets it itself",
        ),
        *(
            (call, r"prompt=\['a kite', 'a kite'\]: one text, because this tool makes one video")
            for call in (
                lambda p: p.extend(CLIP, 2, prompt=["a kite"] * 2),
                lambda p: p.interpolate(CLIP, prompt=["a kite"] * 2),
                lambda p: p.loop(["a kite"] * 2),
                lambda p: p.edit(CLIP, ["a kite"] * 2),
            )
        ),
        (lambda p: p.edit(CLIP, "a kite", glow="source"), "glow='source'"),
        (lambda p: p.edit(CLIP, "a kite", key="nowhere.png"), "key='nowhere.png': cannot be read"),
    ],
)
def test_what_is_refused(folder: Path, call: Any, message: str) -> None:
    pipeline, _ = pipeline_of(folder)
    with pytest.raises(RequestError, match=message):
        call(pipeline)
    assert not pipeline.backend.given  # type: ignore[attr-defined]


def test_numbers_of_numpy_are_as_pythons(folder: Path) -> None:
    pipeline, asked = pipeline_of(folder)
    made = pipeline.extend(CLIP, np.int64(3), prompt="a kite", length=np.int64(6), seed=np.int64(5))
    wanted = pipeline.extend(CLIP, 3, prompt="a kite", length=6, seed=5)
    np.testing.assert_array_equal(made.frames, wanted.frames)
    assert json.dumps(made.metadata["new_frames"]) == "3"
    assert [one["seed"] for one in asked[: len(asked) // 2]] == [one["seed"] for one in asked[len(asked) // 2 :]]
    pipeline.interpolate(CLIP, np.int64(2), prompt="a kite", seed=np.array(5))


def test_a_model_without_these_rows_is_refused(folder: Path) -> None:
    bare = changed(MANIFEST, "film", known=None, start=None)
    pipeline, _ = pipeline_of(folder, bare)
    for call in (lambda: pipeline.extend(CLIP, 2), lambda: pipeline.interpolate(CLIP), lambda: pipeline.loop("a kite")):
        with pytest.raises(RequestError, match="tables alone takes no known frames: no loop of it has `known`"):
            call()
    with pytest.raises(RequestError, match="edit: tables alone cannot start from a video"):
        pipeline.edit(CLIP, "a kite")
    fixed = changed(MANIFEST, "film", known=None, start=Start("footage", "watch.seen", 0.5))
    pipeline, _ = pipeline_of(folder, fixed)
    with pytest.raises(RequestError, match=r"strength: tables alone fixes it at 0\.5; leave it out"):
        pipeline.edit(CLIP, "a kite", strength=0.2)
    with pytest.raises(RequestError, match="tables alone takes no known frames"):
        pipeline.edit(CLIP, "a kite", mask=np.zeros((8, 12), np.uint8))
    assert Control("x", "curve", "", "curve", default=0.0).measured is None
