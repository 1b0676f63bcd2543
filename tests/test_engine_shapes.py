"""Profiles: from TOML files to ranges for every input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY as TINY_CONFIG

from higen.engines.shapes import Range, profile_names, read_profile, stage_profiles
from higen.errors import RequestError
from higen.families.higen import spec
from higen.families.higen.spec import Defaults, ModelConfig
from higen.tables import Tiles

RELEASED_CONFIG = ModelConfig(name="released")
RELEASED = spec.manifest(RELEASED_CONFIG)
"""The released model's tables: 448x256, 32 frames, latents at an eighth of the size."""

TINY = spec.manifest(TINY_CONFIG)

GOOD = 'about = "x"\nbatch = [1, 2, 3]\nframes = [2, 4, 8]\nheight = 16\nwidth = [8, 24, 32]\nimages = 2\n'


def written(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", profile_names())
def test_the_shipped_profiles_fit_the_released_model(name: str) -> None:
    profile = read_profile(name, RELEASED)
    for stage in RELEASED.stages:
        (made,) = stage_profiles(stage.name, [profile], RELEASED)
        assert [span.name for span in made.spans] == [t.name for t in stage.inputs]
        for span in made.spans:
            assert all(0 < a <= b <= c for a, b, c in zip(span.smallest, span.best, span.largest, strict=True))


def test_the_released_models_own_clip_is_in_the_interactive_profile() -> None:
    (made,) = stage_profiles("temporal_unet", [read_profile("interactive", RELEASED)], RELEASED)
    spans = {span.name: span for span in made.spans}
    assert spans["latents"].smallest == (1, 4, 8, 32, 56)
    assert spans["latents"].best == spans["latents"].largest == (1, 4, 32, 32, 56)
    assert spans["prior"].best == (1, 4, 32, 56)
    assert spans["frame_embedding"].best == (1, 32, 1280)
    assert spans["t"].best == (1,)
    assert spans["context"].best == (1, 16, 1024)


def test_the_default_profile_is_the_models_own_size() -> None:
    manifest = spec.manifest(
        replace(TINY_CONFIG, defaults=replace(TINY_CONFIG.defaults, frames=6, width=48, height=32))
    )
    profile = read_profile("default", manifest)
    assert profile.frames == Range(6, 6, 6)
    assert profile.images == Range(1, 2, 2)
    (made,) = stage_profiles("spatial_unet", [profile], manifest)
    assert made.spans[0].best == (1, 4, 1, 16, 24)


def test_the_pipelines_own_single_runs_are_always_inside(tmp_path: Path) -> None:
    text = GOOD.replace("batch = [1, 2, 3]", "batch = 4").replace("frames = [2, 4, 8]", "frames = 8")
    profile = read_profile(written(tmp_path, text), TINY)
    (conditioner,) = stage_profiles("conditioner", [profile], TINY)
    motion = next(span for span in conditioner.spans if span.name == "motion")
    assert motion.holds((1, 1, 32))  # for the empty prompt and the key frame
    assert motion.holds((4, 8, 32))
    assert not motion.holds((5, 8, 32))
    (text_encoder,) = stage_profiles("text_encoder", [profile], TINY)
    assert text_encoder.spans[0].holds((1, 12))


def test_pixels_and_latents_agree(tmp_path: Path) -> None:
    profile = read_profile(written(tmp_path, GOOD), TINY)
    (encoder,) = stage_profiles("vae_encoder", [profile], TINY)
    (decoder,) = stage_profiles("vae_decoder", [profile], TINY)
    assert encoder.spans[0].largest == (2, 3, 16, 32)
    assert decoder.spans[0].largest == (2, 4, 8, 16)


def test_a_stage_in_tiles_is_built_for_a_tile(tmp_path: Path) -> None:
    profile = read_profile(written(tmp_path, GOOD), TINY)
    whole = {t.name: t for t in stage_profiles("temporal_unet", [profile], TINY)[0].spans}["latents"]
    _, height, width = whole.largest[-3:]
    tiles = Tiles(height=height - 2, width=width + 2, stride=1)
    loops = tuple(replace(loop, tiles=tiles if "temporal_unet" in loop.stages else None) for loop in TINY.loops)
    manifest = replace(TINY, loops=loops)
    (made,) = stage_profiles("temporal_unet", [profile], manifest)
    latents = {span.name: span for span in made.spans}["latents"]
    assert latents.largest == (*whole.largest[:-2], height - 2, width)
    assert all(a <= b <= c for a, b, c in zip(latents.smallest, latents.best, latents.largest, strict=True))
    other = ("spatial_unet", [profile])
    assert stage_profiles(*other, manifest) == stage_profiles(*other, TINY)


def test_profiles_that_are_alike_for_a_stage_are_kept_once(tmp_path: Path) -> None:
    first = read_profile(written(tmp_path, GOOD), TINY)
    second = replace(first, name="wider", width=Range(8, 24, 40))
    assert [p.name for p in stage_profiles("text_encoder", [first, second], TINY)] == ["own"]
    assert [p.name for p in stage_profiles("spatial_unet", [first, second], TINY)] == ["own", "wider"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch = [1, 2, 3]", "batch = [3, 2, 1]", r"batch=\[3, 2, 1\]: smallest <= best <= largest"),
        ("batch = [1, 2, 3]", "batch = [1, 2]", "a whole number from 1, or"),
        ("batch = [1, 2, 3]", "batch = 0", "batch=0: a whole number from 1"),
        ("batch = [1, 2, 3]", "batch = 1.5", r"batch=1\.5"),
        ("batch = [1, 2, 3]", "batch = true", "batch=True"),
        ("batch = [1, 2, 3]", 'batch = "default"', "batch='default': a whole number from 1, or"),
        ("frames = [2, 4, 8]", "frames = [2, 4, 41]", "frames=41: this model makes 1 to 40"),
        ("height = 16", "height = 18", r"height=\[18, 18, 18\]: multiples of 4 pixels"),
        ("width = [8, 24, 32]", "width = [8, 24, 30]", "width=.*multiples of 4 pixels"),
        ("images = 2\n", "", "images: missing"),
        ("images = 2", "images = 2\nlatents = 3", "latents: unknown; a profile has about, batch"),
        ("images = 2", "images = ", "not valid TOML"),
        ("batch = [1, 2, 3]", "batch = [1, 2, 100000000]", "TensorRT takes 2147483647"),
    ],
)
def test_a_wrong_profile_is_one_error_that_names_it(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RequestError, match=message):
        stage_profiles("temporal_unet", [read_profile(written(tmp_path, GOOD.replace(old, new)), TINY)], TINY)


def test_a_wrong_name_lists_the_profiles() -> None:
    with pytest.raises(
        RequestError, match=r"profile='fast': one of batch, default, flexible, interactive, or the path"
    ):
        read_profile("fast", TINY)
    with pytest.raises(RequestError, match=r"nowhere\.toml.*cannot be read"):
        read_profile("nowhere.toml", TINY)


def test_a_model_with_fewer_frames_refuses_the_interactive_profile() -> None:
    short = spec.manifest(replace(RELEASED_CONFIG, max_frames=16, defaults=Defaults(frames=16)))
    with pytest.raises(RequestError, match="profile interactive: frames=32: this model makes 1 to 16"):
        read_profile("interactive", short)
