"""Trains the default model's text encoder and denoiser on cached latents, and resumes exactly where it stopped.

    python -m higen.train.emoji.denoiser --state FOLDER --steps 20000

Each step draws a batch of key frames for the spatial network, and a batch of windows for the temporal network. The
networks share parameters. Step n has its own random numbers (seed, n), so a resumed run continues as if never stopped.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from higen.bundle import Bundle
from higen.families.higen.spec import ModelConfig, UNetConfig
from higen.families.higen.unet import Denoiser
from higen.locks import claimed
from higen.models.companions import text_encoder
from higen.tokenizer import PromptTokenizer, build_word_tokenizer
from higen.train.checkpoints import Checkpoints
from higen.train.denormals import flushed_denormals
from higen.train.emoji.clips import Clips, EmojiSource, Selection
from higen.train.emoji.configuration import WORDS, architecture, recipe
from higen.train.emoji.progress_lines import say
from higen.train.emoji.subjects import SUBJECTS, subjects_named
from higen.train.emoji.warm_start import start_from
from higen.train.gradients import DenoiserGradients
from higen.train.layers import trained_parameters
from higen.train.loop import Cadence, Loop
from higen.train.networks import Objective, new_denoiser
from higen.train.optimise import Optimiser
from higen.train.processes import Alone
from higen.train.settings import difference, first_difference, flat, refuse_other_run
from higen.typed_json import to_json

__all__ = ["Networks", "make_loop", "networks_of", "train"]


@dataclass(frozen=True)
class Networks:
    """Everything that is trained, and the tokenizer (`higen.train.networks.Trainable`)."""

    config: ModelConfig
    denoiser: Denoiser
    text: nn.Module
    tokenizer: PromptTokenizer


def networks_of(unet: UNetConfig, seed: int) -> Networks:
    """The recipe's networks with random weights, which depend only on the seed."""
    config = replace(architecture(), unet=unet)
    torch.manual_seed(seed)
    text = text_encoder(config.text.clip).train()
    tokenizer = PromptTokenizer(build_word_tokenizer(WORDS), config.text.rules)
    return Networks(config, new_denoiser(unet), text, tokenizer)


def make_loop(networks: Networks, clips: Clips, checkpoints: Checkpoints) -> Loop:
    """The run over `clips` as their settings say, with the general objective on the recipe's batches."""
    settings = clips.settings
    run, processes = settings.run, Alone()
    source = EmojiSource(clips, networks.tokenizer, networks.config.schedule.timesteps)
    objective = Objective(networks, settings.objective.gain_weight, run.recompute)
    gradients = DenoiserGradients(objective, trained_parameters(objective, settings), source, settings, processes)
    return Loop(
        gradients,
        Optimiser(gradients.trained, settings.optimiser, run.steps),
        checkpoints,
        Cadence(run.log_every, run.save_every),
        seed=run.seed,
        kept={"settings": flat(settings), "data": described(clips)},
        say=say,
    )


def train(state: Path, clips: Clips, start: Bundle | None = None) -> None:
    """Train to the last step, and resume from the checkpoint in `state`. Ctrl-C saves a checkpoint.

    A new run starts from random weights, or from those of the model `start` as far as they fit. The caller must have
    claimed `state` (higen.locks).
    Raises SettingsError if `state` contains a run of another configuration (another number of steps is another
    schedule), and TrainingError.
    """
    settings, networks = clips.settings, networks_of(clips.config, clips.settings.run.seed)
    loop = make_loop(networks, clips, Checkpoints(state / "checkpoints", settings.run.keep))

    def check(made: Mapping[str, Any]) -> None:
        found = difference(made.get("settings", {}), settings)
        found = found or first_difference(made.get("data", {}), described(clips))
        refuse_other_run(state, found, f"put it back, or remove {loop.checkpoints.folder} to start over")

    with flushed_denormals():
        if not loop.resume(check) and start is not None:
            start_from(networks.text, networks.denoiser, networks.tokenizer.tokenizer, start)
            loop.optimiser.average_anew()
        total = sum(p.numel() for p in loop.optimiser.parameters.values())
        say(f"{total / 1e6:.2f} M parameters, from step {loop.step} of {settings.run.steps}")
        loop.run()


def all_clips(state: Path, steps: int | None, bf16: bool, start: Bundle | None = None) -> Clips:
    """The recipe's clips, from the whole latents cache in `state`. The arguments override the recipe's settings.

    Subjects that `start` does not know are new.
    """
    settings = recipe()
    run = replace(settings.run, steps=steps or settings.run.steps, precision="bf16" if bf16 else "fp32")
    known = range(len(SUBJECTS)) if start is None else subjects_named(start.manifest.prompts)
    new = tuple(i for i in range(len(SUBJECTS)) if i not in known)
    cache = state / "latents.safetensors"
    return Clips(cache, architecture().unet, Selection(new=new), replace(settings, run=run))


def described(clips: Clips) -> dict[str, Any]:
    """The data and the network of a run, with flat keys and JSON values."""
    found = {f"unet.{name}": value for name, value in to_json(clips.config).items()}
    selection = clips.selection
    found |= {"selection.motion": selection.motion, "selection.appearance": selection.appearance}
    for i in selection.subjects:
        found[f"subject {SUBJECTS[i].name}"] = {**to_json(SUBJECTS[i]), "new": i in selection.new}
    return found | {"words (sha256)": hashlib.sha256(" ".join(WORDS).encode()).hexdigest()}


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the default model's text encoder and denoiser.")
    parser.add_argument("--state", type=Path, required=True, help="folder of the latents cache and the checkpoints")
    parser.add_argument("--steps", type=int, help="training steps in total  [the recipe's]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, help="largest learning rate  [the recipe's]")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    parser.add_argument("--start", type=Path, help="model directory whose weights a new run starts from")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = None if arguments.start is None else Bundle.open(arguments.start)
    clips = all_clips(arguments.state, arguments.steps, arguments.bf16, start)
    if arguments.learning_rate is not None:
        optimiser = replace(clips.settings.optimiser, learning_rate=arguments.learning_rate)
        clips.settings = replace(clips.settings, optimiser=optimiser)
    with claimed(arguments.state):
        train(arguments.state, clips, start)


if __name__ == "__main__":
    main()
