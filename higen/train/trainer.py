"""Training as a TOML file says (`higen train CONFIG.toml`): any size, one process or many, exact resume.

Step n draws random numbers of its own (seed, n) and its samples are a function of (seed, n) alone, so a run that was
killed goes on as if it had never stopped, and N processes see the batches that one would.

    torchrun --nproc-per-node 4 -m higen train CONFIG.toml
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from higen.bundle import Bundle
from higen.errors import ModelError, SettingsError, TrainingError
from higen.families.higen import spec
from higen.locks import claim
from higen.model_folder import check_free
from higen.staging import staging, whole_file
from higen.train.batches import Batches
from higen.train.checkpoints import Checkpoints
from higen.train.data import Listing, list_items, summary
from higen.train.file_source import FileSource, make_reader
from higen.train.gradients import DenoiserGradients
from higen.train.held_out import HeldOut
from higen.train.latents import other_likeness, tower_sha256
from higen.train.layers import LORA, denoiser_weights, trained_parameters, whole_weights, write_lora
from higen.train.loop import NOT_LOSSES, Cadence, Follower, Loop, Periodic, Say
from higen.train.networks import Networks, Objective, build, write_model
from higen.train.notices import notices
from higen.train.optimise import Optimiser
from higen.train.processes import gain_share, shares, start_processes
from higen.train.record import Record
from higen.train.settings import Settings, difference, flat

__all__ = ["Trainer", "export", "train"]

ARCHITECTURE = "model (architecture)"
TOWER = "cues.openclip (configuration and weights)"


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
        trainer = Trainer(settings, say)
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
    """PyTorch takes so many threads for its arithmetic on the host; then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    listing = list_items(settings.data.path)
    networks = build(settings, (item.caption for item in listing.items))
    _check_same(state, settings, _identity(settings, networks, listing))
    weights = whole_weights(denoiser_weights(networks), state["average"], settings)
    return write_model(networks, weights, output, settings.run.weights, overwrite)


class Trainer(Follower):
    """Networks, their averages, optimiser and data of a run, on this process's device."""

    def __init__(self, settings: Settings, say: Say = lambda _: None) -> None:
        self.settings, self.say, run = settings, say, settings.run
        self.listing = list_items(settings.data.path)
        self.networks = build(settings, (item.caption for item in self.listing.items))
        self.processes = start_processes(unused_parameters=settings.data.videos == 0)
        device = self.processes.device
        share = shares(settings, self.processes.count, self.processes.index)
        gains = gain_share(settings, self.processes.count, self.processes.index)
        self.networks.encoder.to(device)
        self.objective = Objective(self.networks, settings.objective.gain_weight, run.recompute).to(device)
        self.identity = _identity(settings, self.networks, self.listing)
        self.reader = make_reader(settings, self.networks, self.listing, self.identity[TOWER], device)
        batches = Batches(
            self.networks.config,
            self.networks.tokenizer,
            settings.cues,
            settings.objective,
            run.seed,
            settings.data.key_frame,
        )
        self.source = FileSource(self.reader, batches, settings, share, gains, device)
        self._base = denoiser_weights(self.networks)  # before adapters give them other names
        trained = trained_parameters(self.objective, settings)
        self.gradients = DenoiserGradients(self.objective, trained, self.source, settings, self.processes)
        self.optimiser = Optimiser(self.gradients.trained, settings.optimiser, run.steps)
        self.checkpoints = Checkpoints(Path(run.output, "checkpoints"), run.keep)
        self.loop = Loop(
            self.gradients,
            self.optimiser,
            self.checkpoints,
            Cadence(run.log_every, run.save_every),
            seed=run.seed,
            kept={"settings": flat(settings), "identity": self.identity},
            follower=self,
            processes=self.processes,
            periodic=(Periodic(run.held_out_every, self._measure), Periodic(run.sample_every, self._sample)),
            say=say,
        )
        self._held_out = None
        if run.held_out_every:
            self._held_out = HeldOut(settings, self.networks, batches, self.processes, self.identity[TOWER])
        self._record: Record | None = None
        self._lock: int | None = None

    def start(self, resume: bool | None = None) -> None:
        """Load the newest checkpoint, unless told otherwise, and open the logs."""
        output = Path(self.settings.run.output)
        if self.processes.main:
            self._lock = claim(output)
            check_free(output / "model", overwrite=True)  # `finish` writes it
            if resume is False:
                self.checkpoints.clear()
        self.processes.wait()
        going_on = self.loop.resume(lambda state: _check_same(state, self.settings, self.identity))
        if going_on:
            self._tell(f"going on after step {self.loop.step} of {self.settings.run.steps}")
        elif resume:
            raise TrainingError(f"{self.checkpoints.folder}: no checkpoint to go on from")
        elif self.settings.model.init and (line := other_likeness(self.networks.config, self.settings.cues.openclip)):
            self._tell(line)
        if self.processes.main:
            if not going_on:
                self._warn()
            self._record = Record(output, self.loop.step, self.settings.run.tensorboard)

    def _warn(self) -> None:
        """Say what is to be known of the run before its first step."""
        bfloat16 = self.settings.run.precision == "bf16"
        for line in notices(self.listing, self.reader.frame, self.networks.encoder, self.networks.tokenizer, bfloat16):
            self.say(line)

    def logged(self, step: int, values: Mapping[str, Tensor], smoothed: Mapping[str, float]) -> Mapping[str, float]:
        """Log the numbers of a step, means over the processes."""
        whole = {name: v if name in NOT_LOSSES else self.processes.mean(v) for name, v in values.items()}
        numbers = {name: float(value) for name, value in whole.items()}
        if self._record is not None:
            self._record.log(step, numbers)
        return numbers

    def saved(self) -> None:
        """Write down which files were left out so far."""
        skipped = self.processes.gather(dict(self.listing.skipped))
        if self._record is not None:
            self._record.skipped(skipped)

    def finish(self) -> Bundle:
        """Save, write <output>/model, and report the files that were left out."""
        self.loop.save()
        output = Path(self.settings.run.output, "model")
        skipped = self.processes.gather(dict(self.listing.skipped))
        if self._record is not None:
            skipped = self._record.skipped(skipped)
        if self.processes.main:
            self._write(output, overwrite=True)
            if self.settings.lora.rank:
                write_lora(output.with_name(LORA), self.optimiser.average, self.settings.lora)
            if skipped:
                self._tell(f"{summary(skipped)}; see {Path(self.settings.run.output, 'skipped.jsonl')}")
            if self.listing.notes:
                self._tell(summary(self.listing.notes, "read otherwise than asked"))
        self.processes.wait()
        return Bundle.open(output)

    def close(self) -> None:
        """Stop reading ahead and close the logs."""
        self.source.close()
        if self._record is not None:
            self._record.close()
        if self._lock is not None:
            os.close(self._lock)
        self.processes.end()

    def _tell(self, line: str) -> None:
        """Say a line, once for all processes."""
        if self.processes.main:
            self.say(line)

    def _write(self, output: Path, overwrite: bool = False) -> None:
        weights = whole_weights(self._base, self.optimiser.average, self.settings)
        write_model(self.networks, weights, output, self.settings.run.weights, overwrite)

    def _measure(self) -> None:
        """Log the losses on the clips that are held out."""
        assert self._held_out is not None
        losses = self._held_out.losses(self.objective, self.optimiser)
        if self._record is not None:
            self._record.log(self.loop.step, losses)
        self._tell(", ".join(f"{name} {value:.4g}" for name, value in losses.items()))

    def _sample(self) -> None:
        """A contact sheet of the prompts, made by the pipeline a user has, from a model directory just written."""
        if self.processes.main:
            from higen.api import load
            from higen.video import contact_sheet

            output = Path(self.settings.run.output)
            with staging(output) as scratch:
                made = scratch.folder / "model"
                self._write(made)
                with load(made, "torch", device=str(self.processes.device), verify=False) as pipe:
                    options = {**vars(self.reader.frame), "seed": self.settings.run.seed}
                    videos = pipe(list(self.settings.run.sample_prompts), progress=False, **options)
            folder = output / "samples"
            folder.mkdir(exist_ok=True)
            with whole_file(folder / f"step-{self.loop.step:08d}.png") as temporary:
                contact_sheet(videos).save(temporary)
        self.processes.wait()


def _identity(settings: Settings, networks: Networks, listing: Listing) -> dict[str, Any]:
    """What lies at the paths of the settings, by content."""
    records = networks.companions.files
    return {
        "data.path (names and captions)": listing.fingerprint(),
        ARCHITECTURE: _unnamed(spec.write_config(networks.config)),
        "model (autoencoder)": records[spec.AUTOENCODER].sha256,
        "model (text encoder)": records[spec.TEXT_ENCODER].sha256,
        "model (tokenizer)": records[spec.TOKENIZER].sha256,
        TOWER: None if settings.cues.openclip is None else tower_sha256(settings.cues.openclip),
    }


def _unnamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what only says whose model it is, which may change when a run goes on."""
    return {key: value for key, value in config.items() if key not in ("name", "licence", "prompts")}


def _check_same(state: Mapping[str, Any], settings: Settings, identity: Mapping[str, Any]) -> None:
    """Raise SettingsError naming the first key in which a checkpoint is of another configuration.

    A finished run may become longer: it goes on by the schedule of a run of that length.
    """
    stored = dict(state["settings"])
    if state.get("step") == stored.get("run.steps") and settings.run.steps > state["step"]:
        stored["run.steps"] = settings.run.steps
    found = difference(stored, settings)
    for name, value in identity.items():
        # A checkpoint of an earlier version does not know all of them, and kept the names with the architecture.
        before = state["identity"].get(name, value)
        if name == ARCHITECTURE:
            before = _unnamed(before)
        if found is None and before != value:
            found = f"{name} is not what it was"
    if found is not None:
        raise SettingsError(
            f"{settings.run.output} holds a run of another configuration: {found}; "
            "put it back, choose another run.output, or start anew with --fresh"
        )
