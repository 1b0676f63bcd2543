"""The default model's decoder, trained on the denoiser's output."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_run import killed_after

import higen
from higen import bundle
from higen.api import default_model
from higen.bundle import Bundle
from higen.errors import SettingsError
from higen.families.higen import spec
from higen.train.emoji import assemble, autoencoder, decoder, latent_cache
from higen.train.emoji import packs as data
from higen.train.emoji.decoder import DECODER, Drawn, draw, train
from higen.train.emoji.subjects import BACKGROUNDS, SPEEDS, SUBJECTS, caption
from higen.typed_json import to_json

TWO = SUBJECTS[:2]


class Squares(autoencoder.Pictures):
    """Replaces each emoji by a square of its own colour that moves one pixel per frame."""

    def __init__(self, folder: Path) -> None:
        self.loops = []
        for s in range(len(TWO)):
            loop = np.zeros((40, 128, 128, 4), np.uint8)
            for n, frame in enumerate(loop):
                frame[40:80, 20 + n : 60 + n] = (250, 120 * s, 40, 255)
            self.loops.append(torch.from_numpy(loop))
        self.backgrounds = torch.from_numpy(np.stack([data.background(b.name) for b in BACKGROUNDS]))
        self.training = [(s, b) for s in range(len(TWO)) for b in (0, 4)]
        self.validation = self.training


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the built-in model's codec, its latents' scale, and real clips in place of the drawn ones."""
    for module in (decoder, latent_cache):
        monkeypatch.setattr(module, "SUBJECTS", TWO)
    monkeypatch.setattr(decoder, "Pictures", Squares)
    monkeypatch.setattr(autoencoder, "Pictures", Squares)
    start = Bundle.open(default_model())
    autoencoder.train(tmp_path, tmp_path, 0, start)
    codec = spec.autoencoder_config(start.manifest)
    mean, std = torch.tensor(codec.shift), 1 / torch.tensor(codec.scale)
    save_file({"mean": mean, "std": std}, tmp_path / "latents.safetensors")
    codec, pictures = autoencoder.load(tmp_path), Squares(tmp_path)
    (tmp_path / "drawn").mkdir()
    with torch.no_grad():
        for s, subject in enumerate(TWO):
            asked = [(0, 1), (4, 2)]
            clips = [_encoded(codec, pictures, s, b, speed) for b, speed in asked]
            rows = latent_cache.normalise(torch.stack(clips), mean, std).transpose(1, 2)
            save_file(
                {"latents": rows.half().contiguous(), "asked": torch.tensor(asked)},
                tmp_path / "drawn" / f"{subject.name}.safetensors",
            )
    return tmp_path


def _encoded(codec: Any, pictures: Squares, s: int, b: int, speed: int) -> Tensor:
    places = data.clip_indices(40, SUBJECTS[s].key_frame, SPEEDS[speed].factor)
    encoded: Tensor = codec.encoder(pictures.compose(s, b, torch.from_numpy(places))[0])
    return encoded


def test_a_codec_that_starts_from_a_model_has_its_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "Pictures", Squares)
    model = Bundle.open(default_model())
    config = spec.config(model.manifest)
    other = autoencoder.CodecConfig(decoder_block_out_channels=(16, 8, 16, 16, 16))
    codec = autoencoder.build(other).state_dict()
    narrow = replace(config, autoencoder=replace(config.autoencoder, arguments=to_json(other)))
    with bundle.create_model(tmp_path / "model", spec.manifest(narrow)) as folder:
        for name in (spec.UNET, spec.TEXT_ENCODER, spec.TOKENIZER):
            shutil.copy(model.file(name), folder)
        save_file(codec, folder / spec.AUTOENCODER)
    autoencoder.train(tmp_path, tmp_path, 0, Bundle.open(tmp_path / "model"))
    found = autoencoder.load(tmp_path).state_dict()
    assert found.keys() == codec.keys()
    assert all(torch.equal(found[name], codec[name]) for name in codec)


def test_drawn_pictures_are_paired_with_the_requested_pictures(state: Path) -> None:
    cache, codec = load_file(state / "latents.safetensors"), autoencoder.load(state)
    drawn = Drawn(state / "drawn", Squares(state), cache["mean"], cache["std"])
    found, pictures, coverage = drawn.batch(12, torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = codec.encoder(pictures)
    assert found.shape == (12, 32, 8, 8)
    assert coverage.amax(dim=(1, 2, 3)).tolist() == [1] * 12
    # The difference between neighbouring frames is 40 times as large.
    np.testing.assert_allclose(found, wanted, atol=4e-3 * float(wanted.abs().max()))


@pytest.mark.usefixtures("single")
def test_it_continues_as_if_never_stopped_and_keeps_the_encoder(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, codec = replace(DECODER, steps=3, batch=4, save_seconds=0.0), (state / "autoencoder.safetensors").read_bytes()
    gradients = decoder.DecoderGradients.__call__
    train(state, state, run)
    whole = load_file(state / decoder.RESULT)
    (state / decoder.RESULT).unlink()
    shutil.rmtree(state / "decoder")

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return gradients(*given)

    with monkeypatch.context() as patch:
        patch.setattr(decoder.DecoderGradients, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(state, state, run)
    assert [p.name for p in (state / "decoder").iterdir()] == ["step-00000001.pt"]
    assert not (state / decoder.RESULT).exists()
    train(state, state, run)
    stopped = load_file(state / decoder.RESULT)
    assert stopped.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in stopped.items())
    (state / decoder.RESULT).unlink()
    shutil.rmtree(state / "decoder")
    killed_after(2, lambda: train(state, state, run))
    assert [p.name for p in (state / "decoder").iterdir()] == ["step-00000001.pt"]
    train(state, state, run)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(state / decoder.RESULT).items())
    before = autoencoder.load(state).decoder.state_dict()
    assert before.keys() == whole.keys()
    assert any(not torch.equal(before[name], tensor) for name, tensor in whole.items())
    assert (state / "autoencoder.safetensors").read_bytes() == codec


@pytest.mark.usefixtures("single")
def test_a_run_of_another_configuration_is_not_continued(state: Path) -> None:
    run = replace(DECODER, steps=1, batch=2)
    train(state, state, run)
    with pytest.raises(SettingsError, match=r"decoder holds a run of another configuration: batch was 2 and is now 4"):
        train(state, state, replace(run, batch=4))
    codec = load_file(state / "autoencoder.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in codec.items()}, state / "autoencoder.safetensors")
    with pytest.raises(SettingsError, match="the codec has other weights"):
        train(state, state, run)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("batch", 0), ("noise", -1.0), ("detail_weight", float("nan")), ("batch", 3)]
)
def test_wrong_settings_are_named_before_anything_is_written(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"{name}={value}"):
        train(tmp_path, tmp_path, replace(DECODER, **{name: value}))
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named_before_anything_is_drawn(state: Path) -> None:
    command = [sys.executable, "-m", "higen.train.emoji.decoder", "--data", state, "--state", state, "--model"]
    (state / "latents.safetensors").unlink()
    ended = subprocess.run([*command, default_model()], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "latents.safetensors: missing (make it: python -m higen.train.emoji.latent_cache" in ended.stderr
    for option, value in (("--batch", "3"), ("--steps", "0"), ("--threads", "x")):
        ended = subprocess.run([*command, default_model(), option, value], capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert f"argument {option}: '{value}': " in ended.stderr


def test_clips_that_another_model_has_drawn_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "SUBJECTS", SUBJECTS[:1])
    monkeypatch.setattr(decoder, "BACKGROUNDS", BACKGROUNDS[:1])
    draw(Bundle.open(default_model()), tmp_path / "drawn")
    monkeypatch.setattr(decoder, "weights_of", lambda model: {"unet.safetensors": "other"})
    with pytest.raises(SettingsError, match=r"whale\.safetensors: drawn by another model than .*; remove .*drawn"):
        draw(Bundle.open(default_model()), tmp_path / "drawn")


def test_a_decoder_learns_what_a_changed_latent_means(state: Path) -> None:
    for subject in TWO:
        path = state / "drawn" / f"{subject.name}.safetensors"
        content = load_file(path)
        save_file({**content, "latents": content["latents"] * 0.7}, path)  # a denoiser that fades the clip
    pictures, cache = Squares(state), load_file(state / "latents.safetensors")
    drawn = Drawn(state / "drawn", pictures, cache["mean"], cache["std"])
    batch, real, _ = drawn.batch(16, torch.Generator().manual_seed(7))

    def error(weights: dict[str, Tensor]) -> float:
        codec = autoencoder.load(state)
        codec.decoder.load_state_dict(weights)
        with torch.no_grad():
            return float((codec.decoder(batch) - real).square().mean())

    before = error(autoencoder.load(state).decoder.state_dict())
    train(state, state, replace(DECODER, steps=30, batch=8))
    assert error(load_file(state / decoder.RESULT)) < 0.5 * before


def test_the_model_gets_the_decoder_and_keeps_its_encoder(state: Path) -> None:
    codec = load_file(state / "autoencoder.safetensors")
    assert assemble._codec(state).keys() == codec.keys()
    train(state, state, replace(DECODER, steps=1, batch=2))
    found = assemble._codec(state)
    assert found.keys() == codec.keys()
    for name, tensor in load_file(state / decoder.RESULT).items():
        assert torch.equal(found[f"decoder.{name}"], tensor)
    assert all(torch.equal(found[name], codec[name]) for name in codec if name.startswith("encoder."))


def test_a_model_draws_the_clips_of_its_prompts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "SUBJECTS", SUBJECTS[:1])
    monkeypatch.setattr(decoder, "BACKGROUNDS", BACKGROUNDS[:2])
    draw(Bundle.open(default_model()), tmp_path / "drawn")
    (path,) = (tmp_path / "drawn").iterdir()
    content = load_file(path)
    assert content["asked"].tolist() == [[0, 0], [1, 1]]
    with higen.load(default_model()) as pipeline:
        for i, options in enumerate(({}, {"preset": "full"})):  # the clips with odd seeds have the loops' own steps
            prompt = caption(SUBJECTS[0], BACKGROUNDS[i], SPEEDS[i])
            frames = pipeline.decode(content["latents"][i : i + 1].float().numpy(), pipeline.request(prompt))[0]
            made = pipeline(prompt, seed=i, progress=False, **options).frames
            np.testing.assert_allclose(frames.astype(int), made, atol=3)
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(decoder, "_latents", None)  # nothing is drawn again
    draw(Bundle.open(default_model()), tmp_path / "drawn")
    assert path.stat().st_mtime_ns == written
