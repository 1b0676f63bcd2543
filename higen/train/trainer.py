"""Trains as a TOML file says (`higen train CONFIG.toml`): any size, one process or many, exact resume.

Step n draws random numbers of its own (seed, n) and its samples are a function of (seed, n) alone, so a run that was
killed goes on as if it had never stopped, and N processes see the batches that one would.

    torchrun --nproc-per-node 4 -m higen train CONFIG.toml
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
from higen.train.data import list_items
from higen.train.file_source import FileSource, make_reader
from higen.train.gradients import DenoiserGradients
from higen.train.held_out import HeldOut
from higen.train.layers import LORA, denoiser_weights, trained_parameters, whole_weights, write_lora
from higen.train.loop import Periodic, Say
from higen.train.networks import Objective, build, write_model
from higen.train.notices import notices
from higen.train.processes import gain_share, shares, start_processes
from higen.train.runs import TOWER, Run, check_same, identity_of
from higen.train.settings import Settings

__all__ = ["Trainer", "export", "train"]


def train(
    settings: Settings, *, resume: bool | None = None, say: Say = lambda _: None, progress: bool = False
) -> Bundle:
    """Train to the last step and write the model directory <output>/model with the averaged weights.

    resume    True: there must be a checkpoint; False: start anew; None: go on where there is one
    say       receives a line for each event worth one
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
        except OSError as error:  # logs, sheets and what else is written on the way
            raise TrainingError(f"{settings.run.output}: {error}") from error
        finally:
            trainer.close()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch takes this many threads for its arithmetic on the host; then as many as before."""
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

    Raises TrainingError where there is no checkpoint, SettingsError where it is of another configuration, ModelError.
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
    networks = build(settings, (item.caption for item in listing.items))
    check_same(state, settings, identity_of(settings, networks, listing))
    weights = whole_weights(denoiser_weights(networks), state["average"], settings)
    return write_model(networks, weights, output, settings.run.weights, overwrite)


class Trainer(Run):
    """Networks, their averages, optimiser and data of a run, on this process's device."""

    def __init__(self, settings: Settings, say: Say = lambda _: None) -> None:
        self.settings, self.say, run = settings, say, settings.run
        self.listing = list_items(settings.data.path, settings.lora.scales)
        self.networks = build(settings, (item.caption for item in self.listing.items))
        self.processes = start_processes(unused_parameters=settings.data.videos == 0)
        device = self.processes.device
        share = shares(settings, self.processes.count, self.processes.index)
        gains = gain_share(settings, self.processes.count, self.processes.index)
        self.networks.encoder.to(device)
        self.objective = Objective(self.networks, settings.objective.gain_weight, run.recompute).to(device)
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

    def warn(self) -> None:
        """Say what is to be known of the run before its first step."""
        for note in self.networks.notes:
            self.say(note)
        if self.settings.model.init and (line := other_likeness(self.networks.config, self.settings.cues.openclip)):
            self.say(line)
        bfloat16 = self.settings.run.precision == "bf16"
        for line in notices(self.listing, self.reader.frame, self.networks.encoder, self.networks.tokenizer, bfloat16):
            self.say(line)

    def write(self, output: Path, overwrite: bool = False) -> None:
        """The averaged weights, with the other networks they go with; adapters beside them too."""
        self._model(output, overwrite)
        if self.settings.lora.rank:
            write_lora(output.with_name(LORA), self.optimiser.average, self.settings.lora)

    def _model(self, output: Path, overwrite: bool = False) -> None:
        weights = whole_weights(self._base, self.optimiser.average, self.settings)
        write_model(self.networks, weights, output, self.settings.run.weights, overwrite)

    def _measure(self) -> None:
        """Log the losses on the clips that are held out."""
        assert self._held_out is not None
        losses = self._held_out.losses(self.objective, self.optimiser)
        if self.record is not None:
            self.record.log(self.loop.step, losses)
        self.tell(", ".join(f"{name} {value:.4g}" for name, value in losses.items()))

    def _sample(self) -> None:
        """A contact sheet of the prompts, made by the pipeline a user has, from a model directory just written."""
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
