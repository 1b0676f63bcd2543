"""Trains the default model's codec for a given time: 128x128 RGB frames to 32x8x8 latents and back.

    python -m higen.train.emoji.autoencoder --data FOLDER --state FOLDER --until 16:01

The codec is diffusers' AutoencoderDC with residual blocks only. Its first stage is only a pixel (un)shuffle, so just
one thin convolution runs at full resolution. Run the command again to resume from the state folder.
"""

import argparse
import json
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from torch import Tensor

from higen.bundle import Bundle
from higen.errors import TrainingError
from higen.families.higen import spec
from higen.locks import claimed
from higen.train.checkpoints import Checkpoints
from higen.train.codec_loss import detail_loss, picture_loss, prior_loss
from higen.train.emoji.configuration import CODEC, CodecSettings
from higen.train.emoji.packs import background, fetch, load_loop
from higen.train.emoji.progress_lines import say
from higen.train.emoji.subjects import BACKGROUNDS, SUBJECTS, is_held_out
from higen.train.emoji.tensor_files import aside
from higen.train.loop import Cadence, Follower, Loop
from higen.train.optimise import Optimiser
from higen.typed_json import from_json

FOLDER = "autoencoder"
"""Name of the checkpoints' folder."""
NO_ATTENTION: tuple[tuple[int, ...], ...] = ((),) * 5


@dataclass(frozen=True)
class CodecConfig:
    """Constructor arguments of AutoencoderDC. Stages go from 128x128 (first, no layers) to 8x8 (last)."""

    latent_channels: int = 32
    encoder_block_types: str = "ResBlock"
    decoder_block_types: str = "ResBlock"
    encoder_block_out_channels: tuple[int, ...] = (16, 24, 48, 96, 96)
    decoder_block_out_channels: tuple[int, ...] = (16, 16, 32, 64, 128)
    encoder_layers_per_block: tuple[int, ...] = (0, 1, 1, 1, 1)
    decoder_layers_per_block: tuple[int, ...] = (0, 2, 3, 2, 2)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = NO_ATTENTION
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = NO_ATTENTION


class Pictures:
    """The loops of all subjects and all backgrounds in memory, composed on demand."""

    def __init__(self, folder: Path) -> None:
        """Read every subject's WebP loop from `folder`; about 50 MB of memory."""
        self.loops = [torch.from_numpy(load_loop(folder / f"{s.codepoint}.webp")) for s in SUBJECTS]
        # uint8 [10, 128, 128, 3]
        self.backgrounds = torch.from_numpy(np.stack([background(b.name) for b in BACKGROUNDS]))
        pairs = [(s, b) for s in range(len(SUBJECTS)) for b in range(len(BACKGROUNDS))]
        self.training = [pair for pair in pairs if not is_held_out(*pair)]
        self.validation = [pair for pair in pairs if is_held_out(*pair)]

    def to(self, device: torch.device) -> Self:
        """The same pictures on another device."""
        moved = copy(self)
        moved.loops = [loop.to(device) for loop in self.loops]
        moved.backgrounds = self.backgrounds.to(device)
        return moved

    def compose(self, subject: int, picture: int, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (int64 [n]) of a loop over a background: RGB float32 [n, 3, 128, 128] in [-1, 1], and the coverage
        of the subject, float32 [n, 1, 128, 128] in [0, 1]."""
        loop = self.loops[subject][frames].float() / 255.0
        alpha = loop[..., 3:]
        rgb = loop[..., :3] * alpha + (self.backgrounds[picture].float() / 255.0) * (1.0 - alpha)
        return (rgb * 2.0 - 1.0).permute(0, 3, 1, 2).contiguous(), alpha.permute(0, 3, 1, 2).contiguous()

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`size` random training pictures and their coverage, as from `compose`."""
        parts = []
        for index in torch.randint(len(self.training), (size,), generator=generator).tolist():
            subject, picture = self.training[index]
            frame = torch.randint(len(self.loops[subject]), (1,), generator=generator)
            parts.append(self.compose(subject, picture, frame))
        return torch.cat([rgb for rgb, _ in parts]), torch.cat([alpha for _, alpha in parts])


def build(config: CodecConfig | None = None) -> AutoencoderDC:
    """An untrained codec: `encoder` maps [n, 3, 128, 128] to [n, 32, 8, 8] float32, `decoder` the reverse."""
    return AutoencoderDC(**asdict(config or CodecConfig()))


def check_made(folder: Path) -> None:
    """Raise TrainingError if `folder` has no trained codec."""
    for name in ("autoencoder.json", "autoencoder.safetensors"):
        if not (folder / name).is_file():
            command = "python -m higen.train.emoji.autoencoder --data FOLDER"
            raise TrainingError(f"{folder / name}: missing (make it: {command} --state {folder} --minutes N)")


def load(folder: Path) -> AutoencoderDC:
    """The trained codec (EMA weights) from `autoencoder.json` and `autoencoder.safetensors` in `folder`.

    Raises TrainingError if one of them is missing.
    """
    check_made(folder)
    model = AutoencoderDC(**json.loads((folder / "autoencoder.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(folder / "autoencoder.safetensors"))
    return model.eval()


def codec_loss(
    model: AutoencoderDC, rgb: Tensor, coverage: Tensor, config: CodecSettings, generator: torch.Generator
) -> Tensor:
    """Scalar loss of a batch of `Pictures.batch`: reconstruction from noisy latents + unit-variance prior."""
    latents = model.encoder(rgb)
    level = torch.rand((len(rgb), 1, 1, 1), generator=generator) * config.noise
    decoded = model.decoder(latents + level * torch.randn(latents.shape, generator=generator))
    loss: Tensor = shown_loss(decoded, rgb, coverage, config) + config.prior_weight * prior_loss(latents)
    return loss


def shown_loss(decoded: Tensor, rgb: Tensor, coverage: Tensor, config: CodecSettings) -> Tensor:
    """Distance of decoded pictures [n, 3, 128, 128] and their edges from real ones: a scalar, weighted by coverage."""
    weight = 0.5 + config.subject_weight * coverage
    loss = picture_loss(decoded, rgb, config.mse_weight, config.edge_weight, weight)
    return loss + config.detail_weight * detail_loss(decoded, rgb) if config.detail_weight else loss


@torch.no_grad()
def psnr(model: AutoencoderDC, pictures: Pictures, pairs: list[tuple[int, int]], frames: int = 6) -> float:
    """Mean PSNR in dB over `frames` evenly spaced loop frames of each (subject, background) pair."""
    values: list[float] = []
    for subject, picture in pairs:
        count = len(pictures.loops[subject])
        rgb, _ = pictures.compose(subject, picture, torch.arange(frames) * count // frames)
        decoded = model.decoder(model.encoder(rgb)).clamp(-1.0, 1.0)
        mse = (decoded - rgb).square().mean(dim=(1, 2, 3)) / 4.0
        values += (-10.0 * mse.log10()).tolist()
    return sum(values) / len(values)


class CodecGradients(Follower):
    """The gradients of a step of the codec, and the numbers to log."""

    def __init__(self, model: AutoencoderDC, config: CodecConfig, pictures: Pictures, settings: CodecSettings) -> None:
        self.model, self.config, self.pictures, self.settings = model, config, pictures, settings
        self.optimiser = Optimiser(dict(model.named_parameters()), settings.optimiser, settings.steps)

    def __call__(self, step: int, random: torch.Generator) -> Mapping[str, Tensor]:
        """Add up the gradients of a batch of pictures; returns the loss."""
        rgb, coverage = self.pictures.batch(self.settings.batch, random)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16"):
            loss = codec_loss(self.model, rgb, coverage, self.settings, random)
        loss.backward()
        return {"loss": loss.detach()}

    def logged(self, step: int, values: Mapping[str, Tensor], smoothed: Mapping[str, float]) -> Mapping[str, float]:
        """The loss, and the PSNR of the averaged weights on trained and held-out pictures."""
        averaged = build(self.config)
        averaged.load_state_dict(self.optimiser.average)
        # There are nine pairs per subject, so every tenth pair has another subject and another background.
        seen = psnr(averaged, self.pictures, self.pictures.training[::10])
        unseen = psnr(averaged, self.pictures, self.pictures.validation)
        return {**smoothed, "PSNR": seen, "held-out PSNR": unseen}


def train(
    data: Path, state: Path, seconds: float, start: Bundle | None = None, settings: CodecSettings = CODEC
) -> None:
    """Train for `seconds` in total on the loops in `data`, resume from the checkpoint in `state`, and write the codec
    to `state`.

    A new run starts from random weights, or from those of the model `start`, whose widths it then has; 0 seconds leave
    these unchanged. Raises TrainingError if a file cannot be read or written, ManifestError if `start` has another kind
    of codec.
    """
    state.mkdir(parents=True, exist_ok=True)
    if (earlier := state / "autoencoder.ckpt").exists():
        raise TrainingError(f"{earlier}: a checkpoint of an earlier version; remove it to train the codec again")
    torch.manual_seed(settings.seed)
    config = CodecConfig() if start is None else _config_of(start)
    model = build(config)
    gradients = CodecGradients(model, config, Pictures(data), settings)
    optimiser = gradients.optimiser
    loop = Loop(
        gradients,
        optimiser,
        Checkpoints(state / FOLDER, keep=1),
        Cadence(log_every=0, save_seconds=settings.save_seconds),
        seed=settings.seed,
        follower=gradients,
        say=say,
    )
    if not loop.resume(lambda _: None) and start is not None:
        model.load_state_dict(load_file(start.file(spec.AUTOENCODER)))
        optimiser.average_anew()
    optimiser.time = max(seconds, optimiser.seconds)
    loop.run()
    export(optimiser.average, config, state)


def _config_of(model: Bundle) -> CodecConfig:
    arguments = spec.autoencoder_config(model.manifest).arguments
    return from_json(CodecConfig, arguments, "architecture.autoencoder.arguments", whole=True)


def export(weights: Mapping[str, Tensor], config: CodecConfig, folder: Path) -> None:
    """Write the constructor's arguments (`autoencoder.json`), and then the weights (`autoencoder.safetensors`). If the
    weights exist, the codec is complete. Raises TrainingError if a file cannot be written."""
    with aside(folder / "autoencoder.json") as path:
        path.write_text(json.dumps(asdict(config), indent=2) + "\n")
    with aside(folder / "autoencoder.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


def seconds_spent(folder: Path) -> float:
    """Training time in seconds of the checkpoint in `folder`; 0 if there is none. Raises TrainingError."""
    state = Checkpoints(folder / FOLDER, keep=1).load()
    return 0.0 if state is None else float(state["seconds"])


def seconds_until(clock: str) -> float:
    """Seconds from now to the next local time `HH:MM`."""
    now = datetime.now()
    moment = datetime.strptime(clock, "%H:%M").time()
    end = datetime.combine(now.date(), moment)
    return ((end if end > now else end + timedelta(days=1)) - now).total_seconds()


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the default model's codec.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the WebP loops; filled if empty")
    parser.add_argument("--state", type=Path, required=True, help="folder of the checkpoint and the result")
    when = parser.add_mutually_exclusive_group(required=True)
    when.add_argument("--until", metavar="HH:MM", help="train until this local time")
    when.add_argument("--minutes", type=float, help="training time in minutes, including earlier runs")
    arguments = parser.parse_args()
    with claimed(arguments.state):
        fetch(arguments.data)
        if arguments.until:
            seconds = seconds_spent(arguments.state) + seconds_until(arguments.until)
        else:
            seconds = 60 * arguments.minutes
        train(arguments.data, arguments.state, seconds)


if __name__ == "__main__":
    main()
