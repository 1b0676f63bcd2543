"""Trains as a TOML file says (`higen train CONFIG.toml`): any size, one process or many, exact resume.

Step n has its own random numbers (seed, n), and its samples depend only on (seed, n). So a killed run continues as if
it had never stopped, and N processes see the same batches as a single one.

    torchrun --nproc-per-node 4 -m higen train CONFIG.toml
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from higen.bundle import Bundle
from higen.errors import ModelError, TrainingError
from higen.model_folder import check_free
from higen.staging import staging, whole_file
from higen.train.batches import Batches
from higen.train.checkpoints import Checkpoints
from higen.train.codec import CodecTrainer
from higen.train.curves import other_likeness
from higen.train.data import Listing, list_items
from higen.train.distil import Distillation, distilled
from higen.train.file_source import FileSource, make_reader
from higen.train.gradients import DenoiserGradients
from higen.train.held_out import HeldOut
from higen.train.layers import LORA, denoiser_weights, trained_parameters, whole_weights, write_lora
from higen.train.loop import Periodic, Say
from higen.train.networks import Networks, Objective, build, write_model
from higen.train.notices import notices
from higen.train.processes import gain_share, shares, start_processes
from higen.train.runs import TOWER, Run, check_same, identity_of
from higen.train.settings import Settings

__all__ = ["Trainer", "export", "train"]


def train(
    settings: Settings, *, resume: bool | None = None, say: Say = lambda _: None, progress: bool = False
) -> Bundle:
    """Train to the last step and write the model directory <output>/model with the averaged weights.

    resume    True: there must be a checkpoint; False: start over; None: continue if there is a checkpoint
    say       receives a line of text for each notable event
    progress  show a bar on stderr

    Raises SettingsError (settings, data set, another configuration on resume), TrainingError (a file cannot be
    written, a loss that is not finite), ModelError (a model directory cannot be written), MissingExtra, what opening
    the model raises, and KeyboardInterrupt after Ctrl-C, when a checkpoint has been saved.
    """
    with _threads(settings.run.threads):
        trainer = _run_of(settings, say)
        try:
            trainer.start(resume)
            trainer.loop.run(progress)
            return trainer.finish()
        except OSError as error:  # logs, sheets and other files that are written on the way
            raise TrainingError(f"{settings.run.output}: {error}") from error
        finally:
            trainer.close()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Inside the block, PyTorch uses `count` threads for its arithmetic on the host. None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_of(settings: Settings, say: Say) -> Run:
    return Trainer(settings, say) if settings.codec.layers == "none" else CodecTrainer(settings, say)


def export(settings: Settings, output: Path, overwrite: bool = False) -> Bundle:
    """Write the averaged weights of a run's newest checkpoint as a model directory.

    Raises TrainingError if there is no checkpoint, SettingsError if its configuration differs, and ModelError.
    """
    state = Checkpoints(Path(settings.run.output, "checkpoints"), settings.run.keep).load()
    if state is None:
        raise TrainingError(f"{settings.run.output}: no checkpoint to export")
    if os.path.lexists(output) and not overwrite:
        raise ModelError(f"{output}: exists already; --overwrite replaces a model directory")
    check_free(output, overwrite)
    if settings.codec.layers != "none":
        codec = CodecTrainer(settings)
        try:
            codec.resume()
            codec.write(output, overwrite)
        finally:
            codec.close()
        return Bundle.open(output)
    listing = list_items(settings.data.path, settings.lora.scales)
    networks = _networks(settings, listing)
    check_same(state, settings, identity_of(settings, networks, listing))
    weights = whole_weights(denoiser_weights(networks), state["average"], settings)
    return write_model(networks, weights, output, settings.run.weights, overwrite)


def _networks(settings: Settings, listing: Listing) -> Networks:
    """The networks of a run, and the configuration that it writes."""
    networks = build(settings, (item.caption for item in listing.items))
    if not settings.distil.steps:
        return networks
    return replace(networks, own=distilled(networks.own or networks.config, settings.distil))


class Trainer(Run):
    """A run's networks, their averages, the optimiser and the data, on this process's device."""

    def __init__(self, settings: Settings, say: Say = lambda _: None) -> None:
        self.settings, self.say, run = settings, say, settings.run
        self.listing = list_items(settings.data.path, settings.lora.scales)
        self.networks = _networks(settings, self.listing)
        self.processes = start_processes(unused_parameters=settings.data.videos == 0)
        device = self.processes.device
        share = shares(settings, self.processes.count, self.processes.index)
        gains = gain_share(settings, self.processes.count, self.processes.index)
        self.networks.encoder.to(device)
        self.objective = self._objective().to(device)
        self.identity = identity_of(settings, self.networks, self.listing)
        self.reader = make_reader(settings, self.networks, self.listing, self.identity[TOWER], device)
        batches = Batches(
            self.networks.config,
            self.networks.tokenizer,
            settings.cues,
            settings.objective,
            run.seed,
            settings.data.key_frame,
            settings.lora.scales,
        )
        self.source = FileSource(self.reader, batches, settings, share, gains, device)
        self._base = denoiser_weights(self.networks)  # before adapters give them other names
        trained = trained_parameters(self.objective, settings)
        self.gradients = DenoiserGradients(self.objective, trained, self.source, settings, self.processes)
        measured, drawn = Periodic(run.held_out_every, self._measure), Periodic(run.sample_every, self._sample)
        self.loop = self.make_loop(self.gradients, self.gradients.trained, measured, drawn)
        self._held_out = None
        if run.held_out_every:
            self._held_out = HeldOut(settings, self.networks, batches, self.processes, self.identity[TOWER])

    def _objective(self) -> Objective:
        networks, settings = self.networks, self.settings
        if not settings.distil.steps:
            return Objective(networks, settings.objective.gain_weight, settings.run.recompute)
        empty = torch.from_numpy(networks.tokenizer.encode([""]))
        return Distillation(networks, settings.distil, empty, settings.run.recompute)

    def warn(self) -> None:
        """Give the user the notices about the run before its first step."""
        for note in self.networks.notes:
            self.say(note)
        if self.settings.model.init and (line := other_likeness(self.networks.config, self.settings.cues.openclip)):
            self.say(line)
        bfloat16 = self.settings.run.precision == "bf16"
        for line in notices(self.listing, self.reader.frame, self.networks.encoder, self.networks.tokenizer, bfloat16):
            self.say(line)

    def write(self, output: Path, overwrite: bool = False) -> None:
        """Write a model directory with the averaged weights and the other networks, and adapters next to it."""
        self._model(output, overwrite)
        if self.settings.lora.rank:
            write_lora(output.with_name(LORA), self.optimiser.average, self.settings.lora)

    def _model(self, output: Path, overwrite: bool = False) -> None:
        weights = whole_weights(self._base, self.optimiser.average, self.settings)
        write_model(self.networks, weights, output, self.settings.run.weights, overwrite)

    def _measure(self) -> None:
        """Log the losses on the held-out clips."""
        assert self._held_out is not None
        losses = self._held_out.losses(self.objective, self.optimiser)
        if self.record is not None:
            self.record.log(self.loop.step, losses)
        self.tell(", ".join(f"{name} {value:.4g}" for name, value in losses.items()))

    def _sample(self) -> None:
        """Save a contact sheet of the sample prompts. The usual pipeline draws it, from a temporary model directory."""
        if self.processes.main:
            from higen.api import load
            from higen.video import contact_sheet

            output = Path(self.settings.run.output)
            with staging(output) as scratch:
                made = scratch.folder / "model"
                self._model(made)
                with load(made, "torch", device=str(self.processes.device), verify=False) as pipe:
                    options = {**vars(self.reader.frame), "seed": self.settings.run.seed}
                    videos = pipe(list(self.settings.run.sample_prompts), progress=False, **options)
            folder = output / "samples"
            folder.mkdir(exist_ok=True)
            with whole_file(folder / f"step-{self.loop.step:08d}.png") as temporary:
                contact_sheet(videos).save(temporary)
        self.processes.wait()
