"""What the runs have in common that train a finished model of the recipe further (`few_steps`, `known_frames`)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from higen.bundle import Bundle
from higen.errors import HigenError, one_line, quoted
from higen.train.batches import StepBatches
from higen.train.checkpoints import Checkpoints
from higen.train.denormals import flushed_denormals
from higen.train.emoji.clips import Clips, EmojiSource
from higen.train.emoji.configuration import Further, recipe
from higen.train.emoji.progress_lines import say
from higen.train.emoji.subjects import BACKGROUNDS, is_held_out
from higen.train.gradients import DenoiserGradients
from higen.train.loop import Cadence, Loop, Periodic
from higen.train.optimise import Optimiser
from higen.train.sections import ModelSettings
from higen.train.settings import Settings, difference, flat, refuse_other_run

__all__ = ["HOST", "Where", "add_where", "ending", "held_out", "positive", "precision_of", "settings_for"]
__all__ += ["train_further", "weights_of", "where_of", "whole_from"]


@dataclass(frozen=True)
class Where:
    """Where a run computes. The result depends on it only through rounding.

    workers  processes that make the batches; 0: the run's own process
    compile  whether torch.compile makes the network faster; it takes minutes first
    """

    device: str = "cpu"
    workers: int = 0
    compile: bool = False


HOST = Where()


def whole_from(least: int) -> Callable[[str], int]:
    """Reads an option's value: a whole number, `least` or more."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{quoted(text)}: a whole number from {least}")
        return int(text)

    return read


def positive(text: str) -> float:
    """Reads an option's value: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{quoted(text)}: a finite number above 0")
    return value


@contextmanager
def ending(parser: argparse.ArgumentParser) -> Iterator[None]:
    """An error of higen ends the command with status 1 and one line."""
    try:
        yield
    except HigenError as error:
        parser.exit(1, f"{parser.prog}: error: {one_line(error)}\n")


def weights_of(model: Bundle) -> dict[str, str]:
    """The sha256 of each of a model's files of weights, by name."""
    return {name: record.sha256 for name, record in sorted(model.files.items()) if name.endswith(".safetensors")}


def add_where(parser: argparse.ArgumentParser) -> None:
    """The options of `where_of` and `precision_of`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    parser.add_argument("--compile", action="store_true", help="compile the network first")
    parser.add_argument("--threads", type=whole_from(1), default=2)


def where_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Where:
    """Where the options ask the run to compute. A missing GPU ends the command with status 2."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no GPU")
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda":
        torch.set_float32_matmul_precision("high")  # products in TF32
    return Where(arguments.device, compile=arguments.compile)


def precision_of(arguments: argparse.Namespace) -> Literal["fp32", "bf16"]:
    """The precision that the options ask for."""
    return "bf16" if arguments.bf16 else "fp32"


def settings_for(model: Path, run: Further, **objective: Any) -> Settings:
    """The settings of a run: those of the recipe, with what `run` and `objective` replace. Clips are whole, and every
    caption is a full one, because an empty prompt cannot be requested."""
    base = recipe()
    return replace(
        base,
        model=ModelSettings(init=str(model)),
        data=replace(base.data, images=run.images, videos=run.videos),
        objective=replace(base.objective, text_dropout=0.0, gain_clips=0, windows=(), late_windows=(), **objective),
        optimiser=run.optimiser,
        run=replace(
            base.run,
            steps=run.steps,
            precision=run.precision,
            save_every=run.save_every,
            log_every=run.log_every,
        ),
    )


def train_further(
    model: Bundle,
    state: Path,
    what: str,
    gradients: DenoiserGradients,
    settings: Settings,
    measure: Callable[[Optimiser], str],
    measure_every: int,
) -> Mapping[str, Tensor]:
    """Train to the last step, with checkpoints in `state`; returns the averages of the trained weights, by name.

    what     folder of the checkpoints in `state`
    measure  measures the averaged weights, and returns a line of text

    Raises SettingsError if `state` contains a run of another configuration or from another model, and TrainingError.
    """
    files = weights_of(model)
    optimiser = Optimiser(gradients.trained, settings.optimiser, settings.run.steps)

    def check(made: Mapping[str, Any]) -> None:
        found = difference(made.get("settings", {}), settings)
        if found is None and made.get("model") != files:
            found = f"{model.path} has other weights"
        refuse_other_run(state / what, found)

    def measured() -> None:
        say(measure(optimiser))

    loop = Loop(
        gradients,
        optimiser,
        Checkpoints(state / what, settings.run.keep),
        Cadence(settings.run.log_every, settings.run.save_every),
        seed=settings.run.seed,
        kept={"settings": flat(settings), "model": files},
        periodic=(Periodic(measure_every, measured),),
        say=say,
    )
    with flushed_denormals():
        if not loop.resume(check):
            measured()
        loop.run()
    return optimiser.average


def held_out(clips: Clips, source: EmojiSource, settings: Settings | None = None) -> StepBatches:
    """A step's batches of combinations that are not trained. Always the same. `settings`: other ones for the clips."""
    trained, before = clips.pairs, clips.settings
    clips.pairs = [(s, b) for s in clips.loops for b in range(len(BACKGROUNDS)) if is_held_out(s, b)]
    clips.settings = settings or before
    try:
        return replace(source.batches(0), gains=None)
    finally:
        clips.pairs, clips.settings = trained, before
