"""The model inside the package: it is small and complete, and makes a video from every prompt it lists."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest

import higen
from higen.api import _default_pipeline, default_model
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.errors import PromptWarning
from higen.families.higen import spec
from higen.pipeline import Pipeline
from higen.tokenizer import PromptTokenizer
from higen.video import Video


@pytest.fixture(scope="module")
def model() -> Bundle:
    return Bundle.open(default_model())


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    """Free the model that `higen.generate` keeps, because other tests need the memory."""
    yield
    _default_pipeline.cache_clear()


def test_every_file_is_what_the_manifest_says(model: Bundle) -> None:
    needed = {spec.UNET, spec.TEXT_ENCODER, spec.AUTOENCODER, spec.TOKENIZER}
    assert needed <= set(model.files)
    for name in model.files:
        assert model.file(name).stat().st_size == model.files[name].size


def test_it_is_small(model: Bundle) -> None:
    assert sum(path.stat().st_size for path in model.path.rglob("*") if path.is_file()) < 29e6  # 25 MB as a wheel


def test_generate_makes_a_video() -> None:
    prompt = Bundle.open(default_model()).manifest.prompts[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = higen.generate(prompt, seed=7)
    assert isinstance(video, Video)
    assert video.frames.shape == (16, 128, 128, 3)
    assert video.prompt == prompt
    assert 1 < video.duration < 4
    assert video.frames.std() > 10  # it is a picture
    assert np.abs(np.diff(video.frames.astype(int), axis=0)).mean() > 0.1  # it moves


def test_prompts_give_different_pictures_and_seeds_are_kept() -> None:
    prompts = Bundle.open(default_model()).manifest.prompts
    first, other = prompts[0], prompts[-1]
    assert first != other
    bundle = Bundle.open(default_model())
    with Pipeline(bundle, TorchBackend(bundle, Options(device="cpu"))) as pipe:
        one, two = pipe.image([first, other], seed=3)
        assert np.abs(one.astype(int) - two).mean() > 10
        np.testing.assert_array_equal(one, pipe.image(first, seed=3))


def test_the_autoencoder_preserves_a_given_picture(model: Bundle) -> None:
    with Pipeline(model, TorchBackend(model, Options(device="cpu"))) as pipe:
        drawn = pipe.image(model.manifest.prompts[0], seed=3)
        again = pipe(model.manifest.prompts[0], image=drawn, frames=1, progress=False).frames[0]
    error = np.abs(again.astype(int) - drawn).mean()
    assert error < 8  # of 255; a mode of the latents, or a forgotten shift or scale, gives 40 and more


def test_every_listed_prompt_has_only_known_words(model: Bundle) -> None:
    assert len(model.manifest.prompts) >= 8
    assert len(set(model.manifest.prompts)) == len(model.manifest.prompts)
    tokenizer = PromptTokenizer.from_file(model.file(spec.TOKENIZER), model.manifest.text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenizer.encode(model.manifest.prompts)
    assert len({tuple(row) for row in ids.tolist()}) == len(model.manifest.prompts)


def test_a_word_it_does_not_know_is_a_warning(model: Bundle) -> None:
    tokenizer = PromptTokenizer.from_file(model.file(spec.TOKENIZER), model.manifest.text)
    with pytest.warns(PromptWarning, match="does not know 'parliament'"):
        tokenizer.encode([model.manifest.prompts[0] + " parliament"])


def test_its_licence_and_its_card_are_there(model: Bundle) -> None:
    assert model.manifest.licence
    card = (default_model().parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "MIT" in card  # the licence of the emoji it was trained on
    assert "Microsoft" in card


def test_plain_text_to_video_has_the_preset_fast(model: Bundle) -> None:
    size = {"seed": 1, "frames": 4, "width": 64, "height": 64, "progress": False}
    with higen.load(model.path, prepare=False) as pipe:
        usual, fast = pipe("a whale", **size), pipe("a whale", preset="fast", **size)
        assert {stage for stage in pipe.backend.choices if "_unet" in stage} == {
            "spatial_unet_plain",
            "temporal_unet_plain",
        }
        full, named = (pipe("a whale", **size, **how) for how in (GUIDED, {"preset": "full"}))
    assert usual.metadata["preset"] == "fast"
    assert np.array_equal(usual.frames, fast.frames)
    assert (named.metadata["preset"], "preset" in full.metadata) == ("full", False)
    assert (named.metadata["steps"], named.metadata["guidance"]) == ([12, 3], [1.5, 1.0])
    assert np.array_equal(named.frames, full.frames)
    assert not np.array_equal(usual.frames, full.frames)


GUIDED = {"steps": (12, 3), "guidance": (1.5, 1.0)}
