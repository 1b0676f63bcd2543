"""Trains the codec's decoder on latents that the denoiser draws. The encoder and the data's latents do not change.

    python -m higen.train.emoji.decoder --data FOLDER --state FOLDER --model DIR [--device cuda --batch 128 --bf16]

A decoder that was trained only on encoded pictures shows coloured fringes for a latent between two poses. The requested
clip is known pixel by pixel, so the decoder can learn to show a soft picture instead. Clips of trained prompts are
drawn once, by the model in DIR, into `STATE/drawn`. Half of every batch are frames of these clips. The other half are
encoded pictures, which must not become worse. The result is `STATE/decoder.safetensors`; `assemble` uses it in place of
the codec's own decoder. Run the command again to resume.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from higen.api import load as load_pipeline
from higen.bundle import Bundle, sha256
from higen.errors import SettingsError, quoted
from higen.locks import claimed
from higen.pipeline import Pipeline
from higen.sampler import Step
from higen.train.checkpoints import Checkpoints
from higen.train.denormals import flushed_denormals
from higen.train.emoji import autoencoder, latent_cache
from higen.train.emoji.autoencoder import Pictures, load, shown_loss
from higen.train.emoji.configuration import DECODER, CodecSettings
from higen.train.emoji.further import HOST, Where, add_where, ending, precision_of, weights_of, where_of, whole_from
from higen.train.emoji.latent_cache import denormalise, load_latents
from higen.train.emoji.packs import clip_indices, fetch
from higen.train.emoji.progress_lines import say
from higen.train.emoji.subjects import BACKGROUNDS, SPEEDS, SUBJECTS, caption, is_held_out
from higen.train.emoji.tensor_files import aside
from higen.train.loop import Cadence, Loop
from higen.train.optimise import Optimiser
from higen.train.settings import first_difference, refuse_other_run
from higen.typed_json import to_json

__all__ = ["draw", "train"]

MOVING = tuple(i for i, speed in enumerate(SPEEDS) if speed.factor)
"""Indices in SPEEDS of the speeds to draw. The trained pairs take them in turn."""
RESULT = "decoder.safetensors"
CHECKPOINTS = "decoder"


def draw(model: Bundle, folder: Path, shown: bool = False) -> None:
    """Draw a clip of every trained pair of subject and background, into one file per subject. Existing files are kept.

    `<name>.safetensors`: `latents`, float16 [n,32,16,8,8] as the denoiser draws them, and `asked`, int64 [n,2]: indices
    of the requested background and speed. Its metadata says which model drew them. Raises SettingsError if another
    model has drawn a file, TrainingError if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = json.dumps(weights_of(model))
    for subject in SUBJECTS:
        _check_drawn_by(folder / f"{subject.name}.safetensors", weights, model)
    with load_pipeline(model.path, threads=torch.get_num_threads()) as pipeline:
        for s, subject in enumerate(tqdm(SUBJECTS, desc="drawn", disable=not shown)):
            path = folder / f"{subject.name}.safetensors"
            if path.exists():
                continue
            asked = [(b, MOVING[(s + b) % len(MOVING)]) for b in range(len(BACKGROUNDS)) if not is_held_out(s, b)]
            drawn = [
                _latents(pipeline, caption(subject, BACKGROUNDS[b], SPEEDS[speed]), seed)
                for seed, (b, speed) in enumerate(asked)
            ]
            with aside(path) as temporary:
                content = {"latents": torch.cat(drawn).half(), "asked": torch.tensor(asked)}
                save_file(content, temporary, {"model": weights})


def _check_drawn_by(path: Path, weights: str, model: Bundle) -> None:
    """Raise SettingsError if another model has drawn an existing file."""
    if not path.is_file():
        return
    with safe_open(path, "pt") as file:
        drawn_by = (file.metadata() or {}).get("model", weights)
    if drawn_by != weights:
        raise SettingsError(f"{path}: drawn by another model than {model.path}; remove {path.parent} to draw again")


def _latents(pipeline: Pipeline, prompt: str, seed: int) -> Tensor:
    """The final latents of a clip [1,32,16,8,8], before decoding.

    Clips with an odd seed are drawn by the loops' own steps, as for a request with controls; the others as by default.
    """
    own = {"steps": [None] * len(pipeline.manifest.loops)} if seed % 2 else {}
    stream = pipeline.stream(prompt, seed=seed, **own)
    steps = (event for event in stream if isinstance(event, Step))
    last = next(step for step in steps if step.loop == "temporal" and step.index == step.total - 1)
    stream.close()
    return torch.from_numpy(pipeline.backend.to_numpy(last.latents))


class Drawn:
    """The drawn clips, and the real pictures that they should show."""

    def __init__(self, folder: Path, pictures: Pictures, mean: Tensor, std: Tensor) -> None:
        """`folder`: the files of `draw`. `mean` and `std` [32]: those of the latents cache."""
        self.pictures, self.mean, self.std = pictures, mean, std
        files = [load_file(folder / f"{subject.name}.safetensors") for subject in SUBJECTS]
        self.clips = [
            (s, b, speed, latents)
            for s, file in enumerate(files)
            for (b, speed), latents in zip(file["asked"].tolist(), file["latents"], strict=True)
        ]

    def to(self, device: torch.device) -> Drawn:
        """The same clips and pictures on another device."""
        moved = copy(self)
        moved.pictures, moved.mean, moved.std = self.pictures.to(device), self.mean.to(device), self.std.to(device)
        moved.clips = [(s, b, speed, latents.to(device)) for s, b, speed, latents in self.clips]
        return moved

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [n,32,8,8] for the decoder, the real pictures [n,3,128,128] and their coverage [n,1,128,128]."""
        latents, pictures, coverage = [], [], []
        for clip in torch.randint(len(self.clips), (size,), generator=random).tolist():
            s, b, speed, drawn = self.clips[clip]
            frame = int(torch.randint(drawn.shape[1], (), generator=random))
            places = clip_indices(len(self.pictures.loops[s]), SUBJECTS[s].key_frame, SPEEDS[speed].factor)
            picture, alpha = self.pictures.compose(s, b, torch.tensor([places[frame]]))
            latents.append(drawn[:, frame].float())
            pictures.append(picture)
            coverage.append(alpha)
        return denormalise(torch.stack(latents), self.mean, self.std), torch.cat(pictures), torch.cat(coverage)


class DecoderGradients:
    """The gradients of a step of the decoder (`higen.train.loop.Gradients`)."""

    def __init__(self, codec: Any, drawn: Drawn, settings: CodecSettings, device: torch.device) -> None:
        """`codec` and `drawn` are on `device`."""
        self.codec, self.drawn, self.settings, self.device = codec, drawn, settings, device

    def __call__(self, step: int, random: torch.Generator) -> Mapping[str, Tensor]:
        """Add up the gradients of a batch; returns the losses of drawn and of encoded latents."""
        settings, half = self.settings, self.settings.batch // 2
        latents, drawn_pictures, drawn_coverage = self.drawn.batch(half, random)
        pictures, coverage = self.drawn.pictures.batch(half, random)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            with torch.no_grad():
                encoded = self.codec.encoder(pictures).float()
            level = torch.rand((len(encoded), 1, 1, 1), generator=random) * settings.noise
            noisy = encoded + (level * torch.randn(encoded.shape, generator=random)).to(self.device)
            decoded = self.codec.decoder(torch.cat([latents, noisy])).float()
        own = shown_loss(decoded[: len(latents)], drawn_pictures, drawn_coverage, settings)
        others = shown_loss(decoded[len(latents) :], pictures, coverage, settings)
        (own + others).backward()
        return {"drawn": own.detach(), "encoded": others.detach()}


def train(data: Path, state: Path, settings: CodecSettings = DECODER, where: Where = HOST) -> None:
    """Train up to `settings.steps` steps, resume from the checkpoint in `state`, and write the decoder to `state`.

    Raises SettingsError for an odd batch, or if `state` contains a run of another configuration or codec; TrainingError
    if a file is missing or cannot be written, or if another process trains there.
    """
    if settings.batch % 2:
        raise SettingsError(f"batch={settings.batch}: an even number, because half of it are drawn latents")
    with claimed(state / CHECKPOINTS):
        _train(data, state, settings, where)


def _train(data: Path, state: Path, settings: CodecSettings, where: Where) -> None:
    pictures, cache = Pictures(data), load_latents(state / "latents.safetensors")
    device = torch.device(where.device)
    drawn = Drawn(state / "drawn", pictures, cache["mean"], cache["std"]).to(device)
    codec = load(state).to(device)
    codec.encoder.requires_grad_(False)
    if where.compile:
        codec.encoder.compile()
        codec.decoder.compile()
    optimiser = Optimiser(dict(codec.decoder.named_parameters()), settings.optimiser, settings.steps)
    kept: dict[str, Any] = {"settings": to_json(settings), "codec": sha256(state / "autoencoder.safetensors")}

    def check(made: Mapping[str, Any]) -> None:
        found = first_difference(made.get("settings", {}), kept["settings"], ("save_seconds",))
        if found is None and made.get("codec") != kept["codec"]:
            found = "the codec has other weights"
        refuse_other_run(state / CHECKPOINTS, found)

    loop = Loop(
        DecoderGradients(codec, drawn, settings, device),
        optimiser,
        Checkpoints(state / CHECKPOINTS, keep=1),
        Cadence(log_every=100, save_seconds=settings.save_seconds),
        seed=settings.seed,
        kept=kept,
        say=say,
    )
    loop.resume(check)
    with flushed_denormals():
        loop.run()
    with aside(state / RESULT) as path:
        save_file({name: tensor.cpu().contiguous() for name, tensor in optimiser.average.items()}, path)


def even(text: str) -> int:
    """Reads an option's value: an even number from 2."""
    value = whole_from(2)(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"{quoted(text)}: an even number, because half are drawn latents")
    return value


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the default model's decoder on what the denoiser draws.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the WebP loops; filled if empty")
    parser.add_argument("--state", type=Path, required=True, help="folder of the codec and the latents cache")
    parser.add_argument("--model", type=Path, required=True, help="model directory whose denoiser draws the latents")
    parser.add_argument("--steps", type=whole_from(1), default=DECODER.steps, help="training steps in total")
    parser.add_argument("--batch", type=even, default=DECODER.batch, help="pictures of a training step, an even number")
    add_where(parser)
    arguments = parser.parse_args()
    where = where_of(parser, arguments)
    settings = replace(DECODER, steps=arguments.steps, batch=arguments.batch, precision=precision_of(arguments))
    with ending(parser):
        model = Bundle.open(arguments.model)
        autoencoder.check_made(arguments.state)
        latent_cache.check_made(arguments.state / "latents.safetensors")
        fetch(arguments.data)
        with claimed(arguments.state / "drawn", "drawing"):
            draw(model, arguments.state / "drawn", shown=True)
            train(arguments.data, arguments.state, settings, where)


if __name__ == "__main__":
    main()
