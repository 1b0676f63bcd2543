"""A training run in its folder: the lock, the logs, resuming, and the model directory at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from higen.bundle import Bundle
from higen.errors import TrainingError
from higen.families.higen import spec
from higen.locks import claim
from higen.model_folder import check_free
from higen.train.checkpoints import Checkpoints
from higen.train.data import Listing, summary
from higen.train.latents import tower_sha256
from higen.train.loop import NOT_LOSSES, Cadence, Follower, Gradients, Loop, Periodic, Say
from higen.train.networks import Networks
from higen.train.optimise import Optimiser
from higen.train.processes import Processes
from higen.train.record import Record
from higen.train.settings import Settings, difference, flat, refuse_other_run

__all__ = ["ARCHITECTURE", "TOWER", "Run", "check_same", "identity_of"]

ARCHITECTURE = "model (architecture)"
TOWER = "cues.openclip (configuration and weights)"


class Source(Protocol):
    """The source of a run's batches."""

    def close(self) -> None:
        """Stop reading ahead."""
        ...


class Run(Follower):
    """The tasks of all runs around their steps. A subclass makes the loop, and implements `warn` and `write`.

    identity  the contents at the paths of the settings (`identity_of`)
    """

    settings: Settings
    say: Say
    listing: Listing
    processes: Processes
    identity: Mapping[str, Any]
    checkpoints: Checkpoints
    optimiser: Optimiser
    source: Source
    loop: Loop
    record: Record | None = None
    _lock: int | None = None

    def warn(self) -> None:
        """Give the user the notices about the run before its first step. Only the main process calls this."""

    def write(self, output: Path, overwrite: bool = False) -> None:
        """Write the model directory `output` and what belongs to it. Only the main process calls this."""
        raise NotImplementedError

    def make_loop(self, gradients: Gradients, trained: Mapping[str, nn.Parameter], *periodic: Periodic) -> Loop:
        """The loop over these parameters, with its optimiser and the checkpoints of the run's folder."""
        run = self.settings.run
        self.optimiser = Optimiser(trained, self.settings.optimiser, run.steps)
        self.checkpoints = Checkpoints(Path(run.output, "checkpoints"), run.keep)
        return Loop(
            gradients,
            self.optimiser,
            self.checkpoints,
            Cadence(run.log_every, run.save_every),
            seed=run.seed,
            kept={"settings": flat(self.settings), "identity": self.identity},
            follower=self,
            processes=self.processes,
            periodic=periodic,
            say=self.say,
        )

    def start(self, resume: bool | None = None) -> None:
        """Load the newest checkpoint and open the logs. `resume`: False starts over, True requires a checkpoint."""
        output = Path(self.settings.run.output)
        if self.processes.main:
            self._lock = claim(output)
            check_free(output / "model", overwrite=True)  # because `finish` writes it
            if resume is False:
                self.checkpoints.clear()
        self.processes.wait()
        going_on = self.resume()
        if going_on:
            self.tell(f"continuing after step {self.loop.step} of {self.settings.run.steps}")
        elif resume:
            raise TrainingError(f"{self.checkpoints.folder}: no checkpoint to continue from")
        if self.processes.main:
            if not going_on:
                self.warn()
            self.record = Record(output, self.loop.step, self.settings.run.tensorboard)

    def resume(self) -> bool:
        """Load the newest checkpoint; False if there is none. Raises SettingsError if its configuration differs."""
        return self.loop.resume(lambda state: check_same(state, self.settings, self.identity))

    def logged(self, step: int, values: Mapping[str, Tensor], smoothed: Mapping[str, float]) -> Mapping[str, float]:
        """Log the numbers of a step, as means over the processes."""
        whole = {name: v if name in NOT_LOSSES else self.processes.mean(v) for name, v in values.items()}
        numbers = {name: float(value) for name, value in whole.items()}
        if self.record is not None:
            self.record.log(step, numbers)
        return numbers

    def saved(self) -> None:
        """Record which files were left out so far."""
        skipped = self.processes.gather(dict(self.listing.skipped))
        if self.record is not None:
            self.record.skipped(skipped)

    def finish(self) -> Bundle:
        """Save, write <output>/model, and report the files that were left out."""
        self.loop.save()
        output = Path(self.settings.run.output, "model")
        skipped = self.processes.gather(dict(self.listing.skipped))
        if self.record is not None:
            skipped = self.record.skipped(skipped)
        if self.processes.main:
            self.write(output, overwrite=True)
            if skipped:
                self.tell(f"{summary(skipped)}; see {Path(self.settings.run.output, 'skipped.jsonl')}")
            if self.listing.notes:
                self.tell(summary(self.listing.notes, "read differently than requested"))
        self.processes.wait()
        return Bundle.open(output)

    def close(self) -> None:
        """Stop reading ahead and close the logs."""
        self.source.close()
        if self.record is not None:
            self.record.close()
        if self._lock is not None:
            os.close(self._lock)
        self.processes.end()

    def tell(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.processes.main:
            self.say(line)


def identity_of(settings: Settings, networks: Networks, listing: Listing) -> dict[str, Any]:
    """The contents at the paths of the settings, mostly as sha256, so that a resumed run notices other contents."""
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
    """A configuration without the keys that only describe the model. They may change when a run is resumed."""
    return {key: value for key, value in config.items() if key not in ("name", "licence", "prompts")}


def check_same(state: Mapping[str, Any], settings: Settings, identity: Mapping[str, Any]) -> None:
    """Raise SettingsError that names the first key in which the configuration of a checkpoint differs.

    A finished run may get more steps. It then continues with the schedule of a run of the new length.
    """
    stored = dict(state["settings"])
    if state.get("step") == stored.get("run.steps") and settings.run.steps > state["step"]:
        stored["run.steps"] = settings.run.steps
    found = difference(stored, settings)
    for name, value in identity.items():
        # A checkpoint of an earlier version may lack some keys, and its architecture may include the descriptive keys.
        before = state["identity"].get(name, value)
        if name == ARCHITECTURE:
            before = _unnamed(before)
        if found is None and before != value:
            found = f"{name} has changed"
    remedy = "put it back, choose another run.output, or start over with --fresh"
    refuse_other_run(settings.run.output, found, remedy)
