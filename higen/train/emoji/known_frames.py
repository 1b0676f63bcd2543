"""Gives a model of the default recipe layers for known frames, and trains only these. Resumes exactly where it stopped.

    python -m higen.train.emoji.known_frames --model DIR --state FOLDER --output DIR

FOLDER has the cache of latents, `latents.safetensors`. Clips without known frames are drawn as before.
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
from higen.train.batches import Batch
from higen.train.emoji.clips import Clips, EmojiSource
from higen.train.emoji.configuration import KNOWN_FRAMES, KnownFrames, recipe
from higen.train.emoji.further import held_out, train_further
from higen.train.emoji.subjects import subjects_named
from higen.train.gradients import DenoiserGradients
from higen.train.held_out import averaged
from higen.train.layers import denoiser_weights, trained_parameters, whole_weights
from higen.train.networks import Objective, build, write_model
from higen.train.optimise import Optimiser
from higen.train.processes import Alone
from higen.train.sections import ModelSettings
from higen.train.settings import Settings

__all__ = ["MEASURED", "settings_of", "train"]

CHECKPOINTS = "known_frames"
MEASURED = ("ends", "second", "prefix")
"""The sets of known frames that are measured on held-out combinations."""


def settings_of(model: Path, known: KnownFrames = KNOWN_FRAMES) -> Settings:
    """The run's settings: those of the recipe, with what `known` replaces. Clips are whole, and every caption is a full
    one, because an empty prompt cannot be requested."""
    base = recipe()
    objective = replace(
        base.objective,
        text_dropout=0.0,
        gain_clips=0,
        windows=(),
        late_windows=(),
        high_part=known.high_part,
        high_levels=known.high_levels,
        known=known.sets,
        known_noise=known.noise,
    )
    return replace(
        base,
        model=ModelSettings(init=str(model), known_frames=True),
        data=replace(base.data, images=0, videos=known.videos),
        objective=objective,
        optimiser=known.optimiser,
        run=replace(
            base.run, steps=known.steps, losses_in_turn=False, save_every=known.save_every, log_every=known.log_every
        ),
    )


def train(model: Bundle, state: Path, output: Path, known: KnownFrames = KNOWN_FRAMES) -> Bundle:
    """Train layers for known frames to the last step, and write the model `output`. Ctrl-C saves a checkpoint.

    The caller must have claimed `state` (higen.locks). Raises SettingsError for a model of another recipe, or if
    `state` contains a run of another configuration or model, TrainingError and ModelError.
    """
    subjects_named(model.manifest.prompts)
    settings = settings_of(model.path, known)
    networks = build(settings, ())
    # Everything that describes the model stays.
    networks = replace(networks, own=replace(networks.config, name=model.manifest.name))
    clips = Clips(state / "latents.safetensors", networks.config.unet, settings=settings)
    source = EmojiSource(clips, networks.tokenizer, networks.config.schedule.timesteps)
    objective = Objective(networks, gain_weight=0.0)
    base = denoiser_weights(networks)
    gradients = DenoiserGradients(objective, trained_parameters(objective, settings), source, settings, Alone())
    watched = {name: _held_out(clips, source, name) for name in MEASURED}

    def measure(optimiser: Optimiser) -> str:
        with averaged(objective, optimiser), torch.no_grad():
            said = [f"{name} {_gain(objective, batch):+.2f} dB" for name, batch in watched.items()]
        return f"held-out latents, above the blend: {', '.join(said)}"

    average = train_further(model, state, CHECKPOINTS, gradients, settings, measure, known.measure_every)
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
    estimate = objective.known_unet(noise, last, context, embedding, batch.prior, known)
    wanted, drawn = batch.x0 - known.blend(), 1 - known.wide(batch.noise)
    before, after = ((drawn * (wanted - other)).pow(2).sum() for other in (torch.zeros_like(wanted), estimate))
    return 10 * math.log10(float(before) / max(float(after), 1e-10))


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train layers for known frames for a model of the default recipe.")
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--state", type=Path, required=True, help="folder of the latents cache and the checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--steps", type=int, default=KNOWN_FRAMES.steps, help="training steps")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    known = replace(KNOWN_FRAMES, steps=arguments.steps)
    with claimed(arguments.state):
        train(Bundle.open(arguments.model), arguments.state, arguments.output, known)


if __name__ == "__main__":
    main()
