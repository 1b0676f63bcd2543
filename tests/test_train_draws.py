"""Random choices for a training sample: noise levels, windows of clips, given cues, clips that teach the gain."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_model
from training_run import CAPTIONS, MODEL, make_settings

from higen.errors import SettingsError
from higen.families.higen import spec
from higen.families.higen.configuration import FewStepPreset
from higen.families.higen.cues import appearance_cue
from higen.families.higen.spec import UNetConfig
from higen.tables import Mix
from higen.tokenizer import PromptTokenizer, build_word_tokenizer
from higen.train.batches import Batches, StepBatches
from higen.train.data import IMAGE, VIDEO
from higen.train.draws import draw_timesteps, draw_window, noisy_prior
from higen.train.emoji.configuration import FILE, architecture, recipe
from higen.train.latents import Encoded
from higen.train.networks import _named, read_architecture
from higen.train.objective import residual_square
from higen.train.reader import Sample
from higen.train.record import read_losses
from higen.train.settings import (
    CueSettings,
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    RunSettings,
    Settings,
    key_index,
)
from higen.train.trainer import Trainer, train

OPTIONAL = replace(MODEL, optional_cues=True, unet=replace(MODEL.unet, prior_preconditioning=True))


def batches(cues: CueSettings | None = None, key_frame: float = 0.5, **objective: Any) -> Batches:
    tokenizer = PromptTokenizer(build_word_tokenizer(" ".join(CAPTIONS).split()), OPTIONAL.text.rules)
    objective = {"text_dropout": 0.0, "offset_noise": 0.0, **objective}
    return Batches(OPTIONAL, tokenizer, cues or CueSettings(), ObjectiveSettings(**objective), 0, key_frame)


def clip(frames: int = 8) -> Sample:
    """A clip with frames that all differ."""
    latents = torch.randn(4, frames, 4, 6, generator=torch.Generator().manual_seed(1))
    return Sample("a blue whale", Encoded(latents))


def test_the_prior_may_be_mixed_into_a_clips_noise() -> None:
    """MicroCinema's appearance noise prior. Target and state use only the mixed noise, so the prediction follows."""
    plain, mixed = (batches(noise_mix=mix).batch([clip()], VIDEO, 0, range(1)) for mix in (None, 0.4))
    torch.testing.assert_close(mixed.noise, plain.noise + 0.4 * mixed.prior[:, :, None])
    torch.testing.assert_close(mixed.x0, plain.x0)
    pictures = [batches(noise_mix=mix).batch([clip(1)], IMAGE, 0, range(1)) for mix in (None, 0.4)]
    torch.testing.assert_close(pictures[0].noise, pictures[1].noise)
    for mix in (float("nan"), 1e9):
        with pytest.raises(SettingsError, match="noise_mix="):
            ObjectiveSettings(noise_mix=mix)


def test_a_model_trained_on_mixed_noise_begins_its_clips_so() -> None:
    trained = replace(OPTIONAL, defaults=replace(OPTIONAL.defaults, noise_mix=0.4))
    made = spec.manifest(trained)
    assert made.loop("temporal").noise.mix == Mix("spatial", 0.4)
    assert spec.config(made) == trained
    assert spec.manifest(OPTIONAL).loop("temporal").noise.mix is None
    settings = Settings(
        ModelSettings("m"), DataSettings("d"), RunSettings("o", 1), objective=ObjectiveSettings(noise_mix=0.25)
    )
    assert _named(OPTIONAL, trained, settings).defaults.noise_mix == 0.25
    preset = FewStepPreset("fast", (2, 1), usual=True)
    source = replace(OPTIONAL, defaults=replace(OPTIONAL.defaults, presets=(preset,)))
    assert _named(source, source, settings).defaults.presets == (replace(preset, usual=False),)
    own = replace(settings, model=ModelSettings(architecture="a.toml", companions="c"))
    assert _named(source, source, own).defaults.presets == (preset,)
    own = Batches(trained, PromptTokenizer(build_word_tokenizer(["a"]), trained.text.rules), CueSettings(),
                  ObjectiveSettings(), 0)  # fmt: skip
    assert own.noise_mix == 0.4


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("part", "high"), [(0.0, 0.3), (0.5, 0.65), (1.0, 1.0)])
def test_a_part_of_the_samples_has_one_of_the_highest_noise_levels(part: float, high: float) -> None:
    settings = ObjectiveSettings(high_part=part, high_levels=0.12)
    for clips in (False, True):
        t = draw_timesteps(10_000, clips, settings, 1000, random())
        assert float((t > 700).double().mean()) == pytest.approx(high, abs=0.02)
        assert int(t.max()) <= 999
    assert int(draw_timesteps(1000, False, replace(settings, high_part=1.0), 1000, random()).min()) >= 880


def test_clips_may_have_high_noise_levels_more_often() -> None:
    """The square root of a uniform number is below x with probability x squared."""
    settings = ObjectiveSettings(clip_levels="high")
    of_clips, of_pictures = (draw_timesteps(10_000, clips, settings, 1000, random()) for clips in (True, False))
    for x in (0.25, 0.5, 0.9):
        assert float((of_clips < 1000 * x).double().mean()) == pytest.approx(x**2, abs=0.02)
        assert float((of_pictures < 1000 * x).double().mean()) == pytest.approx(x, abs=0.02)


def test_windows_are_drawn_for_each_half_of_the_run() -> None:
    settings = ObjectiveSettings(windows=(2, 2, 4), late_windows=(8,))
    early = [draw_window(settings, 8, 0.5, random(seed)) for seed in range(300)]
    assert {draw_window(settings, 8, 0.6, random(seed)) for seed in range(20)} == {8}
    assert early.count(2) / 300 == pytest.approx(2 / 3, abs=0.1)
    assert set(early) == {2, 4}
    assert draw_window(ObjectiveSettings(), 8, 0.1, random()) == 8


def test_a_window_has_the_cues_and_the_key_frame_of_its_clip() -> None:
    whole = batches().batch([clip()], VIDEO, 0, range(1))
    starts = set()
    for step in range(40):
        window = batches().batch([clip()], VIDEO, step, range(1), length=2)
        assert window.x0.shape == window.noise.shape == (1, 4, 2, 4, 6)
        (start,) = (i for i in range(7) if torch.equal(window.x0[0], whole.x0[0, :, i : i + 2]))
        starts.add(start)
        for name in ("motion", "appearance"):
            assert torch.equal(getattr(window, name)[0], getattr(whole, name)[0, start : start + 2])
        assert torch.equal(window.prior, whole.prior)
    assert starts == set(range(7))


def test_the_key_frame_is_at_the_given_place() -> None:
    assert [key_index(8, 0.5), key_index(5, 0.5), key_index(8, 0.0), key_index(8, 0.99)] == [4, 2, 0, 7]
    sample = clip()
    for place in (0.0, 0.25, 0.9):
        prior = batches(key_frame=place).batch([sample], VIDEO, 0, range(1)).prior
        assert torch.equal(prior[0], sample.encoded.mean[:, int(8 * place)])


def test_noise_on_the_prior_has_a_deviation_up_to_the_setting() -> None:
    prior, settings = torch.zeros(4, 40, 40), ObjectiveSettings(prior_noise=0.2)
    assert noisy_prior(prior, ObjectiveSettings(), random()) is prior
    found = [float(noisy_prior(prior, settings, random(seed)).std()) for seed in range(200)]
    assert max(found) == pytest.approx(0.2, abs=0.01)
    assert min(found) < 0.01
    assert np.mean(found) == pytest.approx(0.1, abs=0.01)


def test_cues_are_given_with_the_set_frequencies() -> None:
    parts, count = (0.4, 0.3, 0.2, 0.1), 1500
    batch = batches(CueSettings(given=parts)).batch([clip(3)] * count, VIDEO, 0, range(count))
    bare = torch.from_numpy(appearance_cue(None, 3, 32))
    motion = batch.motion.flatten(1).any(dim=1)
    appearance = (batch.appearance != bare).flatten(1).any(dim=1)
    for (has_motion, has_appearance), part in zip(
        ((False, False), (True, False), (False, True), (True, True)), parts, strict=True
    ):
        share = float(((motion == has_motion) & (appearance == has_appearance)).double().mean())
        assert share == pytest.approx(part, abs=4 * math.sqrt(0.25 / count))


def test_clips_that_teach_the_gain_are_whole_and_every_second_has_no_cue() -> None:
    sample = clip()
    found = batches().gains([sample] * 4, 3, range(4))
    bare = torch.from_numpy(appearance_cue(None, 8, 32))
    assert [bool(row.any()) for row in found.motion] == [False, True, False, True]
    assert [bool((row != bare).any()) for row in found.appearance] == [False, True, False, True]
    x0 = sample.encoded.mean
    assert torch.equal(found.square[0], residual_square(x0[None], x0[None, :, 4])[0])


def test_the_batches_of_a_step_are_split_by_sample_and_by_kind() -> None:
    images = batches().batch([clip(1)] * 4, IMAGE, 0, range(4))
    videos = replace(batches().batch([clip()] * 2, VIDEO, 0, range(2)), prior=None)
    gains = batches().gains([clip()] * 2, 0, range(2))
    parts = StepBatches(images, videos, gains).split(2)
    assert [(len(p.images.x0), len(p.videos.x0), len(p.gains.square)) for p in parts] == [(2, 1, 1)] * 2  # type: ignore[union-attr]
    assert torch.equal(torch.cat([p.images.noise for p in parts]), images.noise)  # type: ignore[union-attr]
    assert all(p.videos.prior is None for p in parts)  # type: ignore[union-attr]
    assert StepBatches(images, None, gains).singly() == [StepBatches(images=images), StepBatches(gains=gains)]


# Runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", OPTIONAL).path


@pytest.fixture(scope="module")
def clips(training_clips: Path) -> Path:
    return training_clips


RECIPE = {
    "cues__given": [0.35, 0.35, 0.15, 0.15],
    "cues__as_numbers": 0.5,
    "objective__gain_clips": 2,
    "objective__high_part": 0.5,
    "objective__clip_levels": "high",
    "objective__prior_noise": 0.05,
    "objective__windows": [2, 4],
    "objective__late_windows": [4],
    "run__losses_in_turn": True,
    "optimiser__train_text": True,
}
"""All training options of the built-in model, for a data set of files."""


def recorded(settings: Settings) -> list[dict[str, float]]:
    return read_losses(Path(settings.run.output, "losses.jsonl"))


def test_options_of_the_recipe_work_for_files_and_resume_exactly(tmp_path: Path, model: Path, clips: Path) -> None:
    whole = make_settings(tmp_path / "whole", model, clips, data__workers=2, **RECIPE)
    train(whole)
    stopped = make_settings(tmp_path / "stopped", model, clips, data__cache=tmp_path / "cache", **RECIPE)
    made = Trainer(stopped)
    made.start()
    for _ in range(4):
        values = made.loop.advance()
        made.record.log(made.loop.step, {name: float(v) for name, v in values.items()})  # type: ignore[union-attr]
    sizes = {tuple(made.source.batch(VIDEO, step).x0.shape[::2][:2]) for step in range(6)}  # type: ignore[union-attr]
    assert sizes == {(4, 2), (2, 4)}  # short windows have as many frames in total as whole clips
    made.loop.save()
    made.close()
    train(stopped)
    assert recorded(stopped) == recorded(whole)
    # One backward pass of all losses gives the same except for rounding.
    together = make_settings(tmp_path / "together", model, clips, **{**RECIPE, "run__losses_in_turn": False})
    train(together)
    for ours, theirs in zip(recorded(together), recorded(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__key_frame": 1.0}, r"data\.key_frame=1\.0: a place in the clip, from 0 to below 1"),
        ({"cues__given": [0.5, 0.5]}, r"cues\.given=\[0\.5, 0\.5\]: four parts that add up to 1"),
        ({"cues__given": [1.0, 1.0, -0.5, -0.5]}, r"cues\.given=.*: four parts that add up to 1"),
        ({"cues__given": [0.25] * 4, "cues__dropout": 0.1}, r"cues\.dropout=0\.1: 0 together with given"),
        ({"objective__high_part": 1.1}, r"objective\.high_part=1\.1: a part, from 0 to 1"),
        ({"objective__clip_levels": "low"}, r"objective\.clip_levels='low': one of 'uniform', 'high'"),
        ({"objective__prior_noise": -1.0}, r"objective\.prior_noise=-1\.0: 0 or more"),
        ({"objective__windows": [1]}, r"objective\.windows=\[1\]: at least 2 frames each"),
        ({"objective__late_windows": [4]}, r"objective\.late_windows=\[4\]: needs windows"),
    ],
)
def test_what_a_file_may_not_say_is_named(
    tmp_path: Path, model: Path, clips: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings(tmp_path, model, clips, **changes)


def test_what_does_not_fit_the_model_or_the_clips_is_refused(tmp_path: Path, model: Path, clips: Path) -> None:
    plain = write_tiny_model(tmp_path / "plain", MODEL).path
    for init, changes, message in (
        (plain, {"objective__gain_clips": 2}, r"objective\.gain_clips=2: tiny has no gain to train"),
        (plain, {"cues__given": [1.0, 0.0, 0.0, 0.0]}, r"cues\.given=.*: tiny takes no unspecified cues"),
        (model, {"objective__windows": [3]}, r"objective\.windows: 3 does not divide data\.frames=4"),
        (model, {"objective__gain_clips": 3, "run__micro_batches": 2}, r"the 3 objective\.gain_clips of a process"),
    ):
        with pytest.raises(SettingsError, match=message):
            Trainer(make_settings(tmp_path, init, clips, **changes))


# The recipe's files


def test_the_recipe_is_settings_of_the_general_objective() -> None:
    settings = recipe()
    assert settings.objective == ObjectiveSettings(
        gain_clips=32,
        offset_noise=0.0,
        high_part=0.5,
        clip_levels="high",
        prior_noise=0.05,
        windows=(4, 4, 4, 16),
        late_windows=(4, 8, 16, 16),
    )
    assert (settings.run.steps, settings.data.images, settings.data.videos * settings.data.frames) == (20_000, 12, 48)  # type: ignore[operator]


def test_the_example_architecture_shows_every_key_and_is_the_built_in_models() -> None:
    from higen.api import default_model
    from higen.bundle import Bundle
    from higen.families.higen import spec

    file = FILE.with_name("architecture.toml")
    text = file.read_text(encoding="utf-8")
    keys = [line.strip("# ").partition(" =")[0] for line in text.splitlines() if " = " in line]
    for kind in (UNetConfig, spec.Defaults, spec.AutoencoderConfig):
        missing = set(kind.__dataclass_fields__) - {*keys, "arguments", "presets"}
        assert missing == set(), kind
    assert "[[defaults.presets]]" in text
    assert set(FewStepPreset.__dataclass_fields__) <= set(keys)
    built_in = spec.config(Bundle.open(default_model()).manifest)
    ours = replace(architecture(), autoencoder=built_in.autoencoder, prompts=built_in.prompts)
    ours = replace(ours, unet=replace(ours.unet, known_layers=True))  # they are added at the end
    assert ours == built_in
    assert read_architecture(file, MODEL).autoencoder == MODEL.autoencoder
