"""Gives a model of the default recipe layers for known frames, and trains only these. Resumes exactly where it stopped.

    python -m higen.train.emoji.known_frames --model DIR --state FOLDER --output DIR

FOLDER has the cache of latents, `latents.safetensors`. Clips without known frames are drawn as before. A GPU trains on
many more clips in a step, and several workers make them: `--device cuda --workers 12 --clips 128 --bf16 --compile`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch

from higen.bundle import Bundle
from higen.families.higen.unet import Known
from higen.locks import claimed
from higen.model_folder import check_free
from higen.train.ahead import Ahead
from higen.train.batches import Batch
from higen.train.emoji.clips import Clips, EmojiSource
from higen.train.emoji.configuration import KNOWN_FRAMES, KnownFrames
from higen.train.emoji.further import (
    HOST,
    Where,
    add_where,
    ending,
    held_out,
    positive,
    precision_of,
    settings_for,
    train_further,
    where_of,
    whole_from,
)
from higen.train.emoji.subjects import subjects_named
from higen.train.gradients import DenoiserGradients
from higen.train.held_out import averaged
from higen.train.layers import denoiser_weights, trained_parameters, whole_weights
from higen.train.networks import Objective, build, write_model
from higen.train.optimise import Optimiser
from higen.train.processes import Alone
from higen.train.settings import Settings

__all__ = ["MEASURED", "settings_of", "train"]

CHECKPOINTS = "known_frames"
MEASURED = ("ends", "second", "prefix")
"""The sets of known frames that are measured on held-out combinations."""


def settings_of(model: Path, known: KnownFrames = KNOWN_FRAMES) -> Settings:
    """The run's settings."""
    settings = settings_for(
        model,
        known,
        high_part=known.high_part,
        high_levels=known.high_levels,
        known=known.sets,
        known_noise=known.noise,
    )
    return replace(
        settings,
        model=replace(settings.model, known_frames=True),
        run=replace(settings.run, losses_in_turn=False),
    )


def train(model: Bundle, state: Path, output: Path, known: KnownFrames = KNOWN_FRAMES, where: Where = HOST) -> Bundle:
    """Train layers for known frames to the last step, and write the model `output`. Ctrl-C saves a checkpoint.

    The caller must have claimed `state` (higen.locks). Raises SettingsError for a model of another recipe, or if
    `state` contains a run of another configuration or model, TrainingError and ModelError.
    """
    check_free(output, overwrite=True)
    subjects_named(model.manifest.prompts)
    settings = settings_of(model.path, known)
    networks = build(settings, ())
    # Everything that describes the model stays.
    networks = replace(networks, own=replace(networks.config, name=model.manifest.name))
    clips = Clips(state / "latents.safetensors", networks.config.unet, settings=settings)
    source = EmojiSource(clips, networks.tokenizer, networks.config.schedule.timesteps)
    base = denoiser_weights(networks)
    processes = Alone(where.device)
    objective = Objective(networks, gain_weight=0.0).to(processes.device)
    if where.compile:
        objective.known_unet.compile()
    trained = trained_parameters(objective, settings)
    watched = {name: _held_out(clips, source, name).to(processes.device) for name in MEASURED}
    ahead = Ahead(source, known.steps, processes.device, where.workers)
    gradients = DenoiserGradients(objective, trained, ahead, settings, processes)

    def measure(optimiser: Optimiser) -> str:
        with averaged(objective, optimiser), torch.no_grad():
            said = [f"{name} {_gain(objective, batch):+.2f} dB" for name, batch in watched.items()]
        return f"held-out latents, above the blend: {', '.join(said)}"

    try:
        average = train_further(model, state, CHECKPOINTS, gradients, settings, measure, known.measure_every)
    finally:
        ahead.close()
    average = {name: tensor.cpu() for name, tensor in average.items()}
    return write_model(networks, whole_weights(base, average, settings), output, "fp16", overwrite=True)


def _held_out(clips: Clips, source: EmojiSource, name: str) -> Batch:
    """Clips of combinations that are not trained, with one set of known frames. Always the same."""
    data = replace(clips.settings.data, videos=len(clips.loops) // 2 or 1)
    objective = replace(clips.settings.objective, known={name: 1.0}, known_noise=0.0)
    videos = held_out(clips, source, replace(clips.settings, data=data, objective=objective)).videos
    assert videos is not None
    return videos


def _gain(objective: Objective, batch: Batch) -> float:
    """By how many dB the estimate from pure noise is closer to the clip than the blend of the known frames, over the
    other frames' latents."""
    assert batch.known is not None
    assert batch.mask is not None
    known, last = Known(batch.known, batch.mask), torch.full_like(batch.t, len(objective.alpha) - 1)
    context, embedding = objective.conditions(batch)
    noise = batch.noise * (1 - known.wide(batch.noise))
    # Not the compiled network, which would be compiled again for this number of clips.
    estimate = objective.known_unet.forward(noise, last, context, embedding, batch.prior, known)
    wanted, drawn = batch.x0 - known.blend(), 1 - known.wide(batch.noise)
    before, after = ((drawn * (wanted - other)).pow(2).sum() for other in (torch.zeros_like(wanted), estimate))
    return 10 * math.log10(float(before) / max(float(after), 1e-10))


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train layers for known frames for a model of the default recipe.")
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--state", type=Path, required=True, help="folder of the latents cache and the checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--steps", type=whole_from(1), default=KNOWN_FRAMES.steps, help="training steps")
    parser.add_argument("--clips", type=whole_from(1), default=KNOWN_FRAMES.videos, help="clips of a training step")
    parser.add_argument("--rate", type=positive, default=KNOWN_FRAMES.optimiser.learning_rate, help="learning rate")
    parser.add_argument("--workers", type=whole_from(0), default=0, help="processes that make the batches")
    add_where(parser)
    arguments = parser.parse_args()
    where = replace(where_of(parser, arguments), workers=arguments.workers)
    known = replace(
        KNOWN_FRAMES,
        steps=arguments.steps,
        videos=arguments.clips,
        precision=precision_of(arguments),
        optimiser=replace(KNOWN_FRAMES.optimiser, learning_rate=arguments.rate),
    )
    with ending(parser), claimed(arguments.state):
        train(Bundle.open(arguments.model), arguments.state, arguments.output, known, where)


if __name__ == "__main__":
    main()
