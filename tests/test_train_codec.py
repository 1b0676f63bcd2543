"""Training an autoencoder from a TOML file: its loss, compared with a second computation, and the use of its result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_run import MODEL, make_settings, write_settings

import higen
from higen.bundle import Bundle
from higen.errors import SettingsError
from higen.families.higen import spec
from higen.models.companion_stages import EncoderStage
from higen.models.companions import load_autoencoder
from higen.train.codec import CodecBatch, CodecObjective, CodecTrainer
from higen.train.latents import to_pixels
from higen.train.record import read_losses
from higen.train.settings import CodecSettings, Settings
from higen.train.trainer import export, train

CODEC: dict[str, Any] = {
    "data__images": 0,
    "codec__layers": "all",
    "codec__frames": 2,
    "optimiser__learning_rate": 1e-2,
}
DC: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 4,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "encoder_layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], []],
    "decoder_qkv_multiscales": [[], []],
}


@pytest.fixture(scope="module")
def model(training_model: Path) -> Path:
    return training_model


@pytest.fixture(scope="module")
def clips(training_clips: Path) -> Path:
    return training_clips


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, clips: Path) -> Settings:
    """A finished run that started from the model's own codec."""
    settings = make_settings(
        tmp_path_factory.mktemp("codec"), model, clips, data__held_out=clips, run__held_out_every=3, **CODEC
    )
    train(settings)
    return settings


def encoder_of(bundle: Bundle) -> EncoderStage:
    config = spec.config(bundle.manifest).autoencoder
    network = load_autoencoder(bundle.file(spec.AUTOENCODER), config.kind, config.arguments, torch.float32)
    return EncoderStage(network, config.shift, config.scale).eval()


def test_a_trained_codec_is_better_and_its_latents_have_unit_deviation(
    trained: Settings, model: Path, clips: Path
) -> None:
    made = Bundle.open(Path(trained.run.output, "model"))
    losses = read_losses(Path(trained.run.output, "losses.jsonl"))
    shown = [line["held-out PSNR"] for line in losses if "held-out PSNR" in line]
    assert len(shown) == 2
    assert shown[1] > shown[0] + 0.1
    assert [line["step"] for line in losses if "codec" in line] == [1, 2, 3, 4, 5, 6]
    before, after = (load_file(path / spec.UNET) for path in (model, made.path))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert made.manifest.name == "run"
    assert "fine-tuned from tiny" in made.manifest.licence
    # A second computation of the scale by its definition, from the clips' frames cropped as in training.
    trainer = CodecTrainer(trained)
    try:
        pixels = torch.cat([to_pixels(clip) for clip in trainer.reader.pixels(1, 0, range(8))])
    finally:
        trainer.close()
    stage = encoder_of(made)
    with torch.no_grad():
        posterior = stage.autoencoder.encode(pixels).latent_dist  # type: ignore[operator]
        mean = (posterior.mean - stage.shift) * stage.scale
        variance = mean.var(dim=(0, 2, 3)) + (posterior.var * stage.scale.square()).mean(dim=(0, 2, 3))
    assert torch.all(mean.mean(dim=(0, 2, 3)).abs() < 0.2)
    assert torch.all((variance - 1).abs() < 0.2)


def test_a_decoder_alone_leaves_the_latents_as_they_are(tmp_path: Path, model: Path, clips: Path) -> None:
    settings = make_settings(tmp_path, model, clips, **{**CODEC, "codec__layers": "decoder"}, run__steps=2)
    made = train(settings)
    before, after = (load_file(path / spec.AUTOENCODER) for path in (model, made.path))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert spec.config(made.manifest).autoencoder == MODEL.autoencoder
    assert export(settings, tmp_path / "again").files[spec.AUTOENCODER] == made.files[spec.AUTOENCODER]


def test_a_new_codec_and_a_denoiser_on_top_of_it(tmp_path: Path, model: Path, clips: Path) -> None:
    """Two runs. The second takes its companions from the first run's model directory."""
    architecture = tmp_path / "architecture.json"
    config = spec.write_config(replace(MODEL, name="new", licence="mine"))
    autoencoder = {"kind": "AutoencoderDC", "arguments": DC, "factor": 2, "shift": [0.0], "scale": [1.0]}
    architecture.write_text(json.dumps({**config, "autoencoder": autoencoder}))
    anew = {"model__init": None, "model__architecture": architecture, "run__steps": 2}
    codec = train(make_settings(tmp_path / "codec", model, clips, **anew, **CODEC, model__companions=model))
    assert spec.config(codec.manifest).autoencoder.arguments == DC
    assert len(spec.config(codec.manifest).autoencoder.scale) == 4
    without = {key: value for key, value in config.items() if key not in ("autoencoder", "text")}
    architecture.write_text(json.dumps(without))
    made = train(make_settings(tmp_path / "denoiser", model, clips, **anew, model__companions=codec.path))
    assert made.files[spec.AUTOENCODER] == codec.files[spec.AUTOENCODER]
    with higen.load(made.path, "torch") as pipe:
        assert pipe("a blue whale", frames=4, steps=2, progress=False).frames.shape == (4, 16, 24, 3)


class Posterior(nn.Module):
    """An autoencoder in closed form: the mean is a third of the picture's first channel, and the deviation is 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def encode(self, pixels: torch.Tensor, return_dict: bool) -> tuple[Any]:
        mean = pixels[:, :1] / 3
        return (type("Gaussian", (), {"mean": mean, "std": torch.full_like(mean, 0.5)})(),)

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return ((self.weight * latents).expand(-1, 3, -1, -1),)


def test_the_loss_by_hand() -> None:
    random = np.random.default_rng(0)
    pixels, noise = random.standard_normal((2, 3, 4, 6)), random.standard_normal((2, 1, 4, 6))
    level = np.array([0.1, 0.3]).reshape(2, 1, 1, 1)
    settings = CodecSettings("all", mse_weight=0.4, edge_weight=0.7, prior_weight=0.05)
    objective = CodecObjective(EncoderStage(Posterior(), [0.25], [2.0]), settings)
    batch = CodecBatch(*(torch.tensor(value, dtype=torch.float32) for value in (pixels, noise, level)))
    mean = (pixels[:, :1] / 3 - 0.25) * 2
    latents = mean + np.sqrt(level**2 + (0.5 * 2) ** 2) * noise
    error = 3 * (latents / 2 + 0.25) - pixels
    edges = np.abs(np.diff(error, axis=3)).mean() + np.abs(np.diff(error, axis=2)).mean()
    prior = mean.mean() ** 2 + np.log(mean.var(ddof=1)) ** 2
    wanted = np.abs(error).mean() + 0.4 * (error**2).mean() + 0.7 * edges + 0.05 * prior
    assert float(objective(batch).detach()) == pytest.approx(wanted, rel=1e-5)


# Run in a separate process, which kills itself right after the fifth step of its optimiser.
KILLED = """
import os, signal, sys, torch
from higen.cli import main

step, made = torch.optim.AdamW.step, []

def killing(*arguments, **options):
    step(*arguments, **options)
    made.append(1)
    if len(made) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

torch.optim.AdamW.step = killing
main(["train", sys.argv[1]])
"""


def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, model: Path, clips: Path, trained: Settings) -> None:
    config = write_settings(
        tmp_path / "train.toml", model, clips, data__held_out=clips, run__held_out_every=3, model__name="run", **CODEC
    )
    where = {**os.environ, "PYTHONPATH": str(Path(higen.__file__).parents[1])}
    where["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    killed = subprocess.run([sys.executable, "-c", KILLED, str(config)], env=where, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    from higen.train.settings import read_settings

    train(read_settings(config), resume=True)
    whole, output = Path(trained.run.output), tmp_path / "run"
    assert (output / "losses.jsonl").read_bytes() == (whole / "losses.jsonl").read_bytes()
    for name in (spec.AUTOENCODER, spec.UNET):
        assert (output / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec__layers": "encoder"}, "codec.layers"),
        ({"codec__frames": 0}, "codec.frames=0: 1 or more"),
        ({"codec__noise": -1.0}, "codec.noise=-1.0: 0 or more"),
        ({"lora__rank": 2}, "lora.rank=2: codec.layers='all' trains the autoencoder alone"),
        ({"optimiser__layers": "spatial"}, "optimiser.layers='spatial': codec.layers"),
        ({"optimiser__train_text": True}, "optimiser.train_text=True: codec.layers"),
        ({"data__cache": "latents"}, "data.cache="),
        ({"run__sample_every": 2, "run__sample_prompts": ["a whale"]}, "run.sample_every=2: codec.layers"),
    ],
)
def test_what_a_codec_is_not_trained_with(
    tmp_path: Path, model: Path, clips: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said.replace(".", r"\.")):
        make_settings(tmp_path, model, clips, **{**CODEC, **changes})


def test_a_decoder_needs_a_model(tmp_path: Path, model: Path, clips: Path) -> None:
    anew = {"model__init": None, "model__architecture": "a.json", "model__companions": model}
    with pytest.raises(SettingsError, match=r"codec\.layers='decoder': needs model\.init"):
        make_settings(tmp_path, model, clips, **anew, codec__layers="decoder")


def test_a_checkpoint_of_a_denoiser_is_none_of_a_codec(tmp_path: Path, model: Path, clips: Path) -> None:
    train(make_settings(tmp_path, model, clips, run__steps=1, data__images=0))
    with pytest.raises(SettingsError, match=r"codec\.layers was 'none' and is now 'all'"):
        train(make_settings(tmp_path, model, clips, run__steps=1, data__images=0, codec__layers="all"))
