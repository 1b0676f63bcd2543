"""Distils a model of the default recipe so that it draws in a few plain steps, and resumes exactly where it stopped.

    python -m higen.train.emoji.few_steps --model DIR --state FOLDER --output DIR

FOLDER has the cache of latents, `latents.safetensors`. The adapters are also written, to FOLDER/few_steps.safetensors.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch

from higen.bundle import Bundle
from higen.locks import claimed
from higen.model_folder import check_free
from higen.train.batches import StepBatches
from higen.train.distil import Distillation, distilled
from higen.train.emoji.clips import Clips, EmojiSource
from higen.train.emoji.configuration import FEW_STEPS, FewSteps
from higen.train.emoji.further import ending, held_out, settings_for, train_further, whole_from
from higen.train.emoji.subjects import subjects_named
from higen.train.gradients import DenoiserGradients
from higen.train.held_out import averaged
from higen.train.layers import denoiser_weights, trained_parameters, whole_weights, write_lora
from higen.train.networks import build, write_model
from higen.train.optimise import Optimiser
from higen.train.processes import Alone
from higen.train.settings import Settings

__all__ = ["RESULT", "settings_of", "train"]

RESULT = "few_steps.safetensors"
"""The adapters, in the folder of the state."""
CHECKPOINTS = "few_steps"


def settings_of(model: Path, few: FewSteps = FEW_STEPS) -> Settings:
    """The run's settings."""
    return replace(settings_for(model, few), lora=few.lora, distil=few.distil)


def train(model: Bundle, state: Path, output: Path, few: FewSteps = FEW_STEPS) -> Bundle:
    """Distil `model` to the last step, and write the model directory `output`. Ctrl-C saves a checkpoint.

    The caller must have claimed `state` (higen.locks). Raises SettingsError for a model of another recipe, or if
    `state` contains a run of another configuration or model, TrainingError and ModelError.
    """
    check_free(output, overwrite=True)
    subjects_named(model.manifest.prompts)
    settings = settings_of(model.path, few)
    networks = build(settings, ())
    # The name is new; everything else that describes the model is the teacher's.
    own = replace(distilled(networks.config, settings.distil), name=f"{model.manifest.name}, few steps")
    networks = replace(networks, own=own)
    clips = Clips(state / "latents.safetensors", networks.config.unet, settings=settings)
    source = EmojiSource(clips, networks.tokenizer, networks.config.schedule.timesteps)
    empty = torch.from_numpy(networks.tokenizer.encode([""]))
    objective = Distillation(networks, settings.distil, empty)
    base = denoiser_weights(networks)  # before adapters give them other names
    gradients = DenoiserGradients(objective, trained_parameters(objective, settings), source, settings, Alone())
    batches = held_out(clips, source)

    def measure(optimiser: Optimiser) -> str:
        with averaged(objective, optimiser), torch.no_grad():
            said = [f"{name} {value:.2f} dB" for name, value in _decibels(objective, batches).items()]
        return f"held-out latents, {', '.join(said)}"

    average = train_further(model, state, CHECKPOINTS, gradients, settings, measure, few.measure_every)
    write_lora(state / RESULT, average, settings.lora)
    weights = whole_weights(base, average, settings)
    return write_model(networks, weights, output, "fp16", overwrite=True)


def _decibels(objective: Distillation, batches: StepBatches) -> dict[str, float]:
    """PSNR in dB of the latents that the student draws (unit variance, so the peak is 1), against the teacher's and the
    real ones."""
    found = {}
    for loop, (kind, batch) in enumerate((("key frame", batches.images), ("clip", batches.videos))):
        assert batch is not None
        drawn = objective.drawn(batch, loop)
        for name, other in (("teacher", objective.drawn(batch, loop, teacher=True)), ("real", batch.x0)):
            found[f"{kind} to the {name}"] = -10 * math.log10(max(float((drawn - other).pow(2).mean()), 1e-10))
    return found


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Distil a model of the default recipe.")
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--state", type=Path, required=True, help="folder of the latents cache and the checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--steps", type=whole_from(1), default=FEW_STEPS.steps, help="training steps")
    arguments = parser.parse_args()
    with ending(parser), claimed(arguments.state):
        train(
            Bundle.open(arguments.model), arguments.state, arguments.output, replace(FEW_STEPS, steps=arguments.steps)
        )


if __name__ == "__main__":
    main()
