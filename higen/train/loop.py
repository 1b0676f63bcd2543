"""The training loop: makes steps, averages the weights, saves, resumes, and logs.

All trainings use this loop. They differ in the function that computes the gradients of a step, and in what happens at
logs and checkpoints (`Follower`). A step's random numbers depend only on the seed and the step's number, so a killed
run continues as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from higen.train.checkpoints import Checkpoints
from higen.train.optimise import Optimiser
from higen.train.processes import Alone, Processes, stop_signals

__all__ = ["Cadence", "Follower", "Gradients", "Loop", "Periodic", "Say", "step_generator", "step_seed"]

Say = Callable[[str], None]
Gradients = Callable[[int, torch.Generator], Mapping[str, Tensor]]
"""Adds up the gradients of a step, given its number (from 0) and its random numbers; returns its losses by name."""

NOT_LOSSES = ("gradient", "rate")
"""Names of the values that `Loop.advance` adds to the losses."""
OLD = 0.98
"""Weight of the earlier losses in a smoothed loss."""


def step_seed(seed: int, step: int) -> int:
    """The seed of step `step` (from 0) in a run with the seed `seed`."""
    return seed * 1_000_003 + step


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of a step."""
    return torch.Generator().manual_seed(step_seed(seed, step))


@dataclass(frozen=True)
class Cadence:
    """How often a run logs and saves.

    log_every     steps between two log lines; 0: with every checkpoint
    save_every    steps between two checkpoints; 0: only `save_seconds` decides
    save_seconds  seconds between two checkpoints
    """

    log_every: int
    save_every: int = 0
    save_seconds: float = math.inf


@dataclass(frozen=True)
class Periodic:
    """An action after every `every` steps, before the checkpoint; 0: never."""

    every: int
    act: Callable[[], None]


class Follower:
    """Reacts to the events of a run. Every process calls both methods."""

    def logged(self, step: int, values: Mapping[str, Tensor], smoothed: Mapping[str, float]) -> Mapping[str, float]:
        """Called when a log line is due after `step` steps. `values` are the numbers of the last step, `smoothed` the
        losses smoothed over the run. Returns the numbers to show.
        """
        return {**smoothed, "rate": float(values["rate"])}

    def saved(self) -> None:
        """Called after a checkpoint was written."""


class Loop:
    """A run: `gradients` and `optimiser` make its steps, and `checkpoints` stores its state.

    kept       stored in every checkpoint with the optimiser's state (settings, identity)
    processes  this process and the processes that train with it
    """

    def __init__(
        self,
        gradients: Gradients,
        optimiser: Optimiser,
        checkpoints: Checkpoints,
        cadence: Cadence,
        *,
        seed: int,
        kept: Mapping[str, Any] | None = None,
        follower: Follower | None = None,
        processes: Processes | None = None,
        periodic: tuple[Periodic, ...] = (),
        say: Say = lambda _: None,
    ) -> None:
        self.gradients, self.optimiser, self.checkpoints, self.cadence = gradients, optimiser, checkpoints, cadence
        self.seed, self.kept, self.periodic, self.say = seed, kept or {}, periodic, say
        self.follower, self.processes = follower or Follower(), processes or Alone()
        self._saved: int | None = None
        self._since: list[Mapping[str, Tensor]] = []  # values that are not yet smoothed
        self._smoothed: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Number of steps made."""
        return self.optimiser.step

    def resume(self, check: Callable[[Mapping[str, Any]], None]) -> bool:
        """Continue from the newest checkpoint; False if there is none. `check` raises for another configuration.

        Raises TrainingError if the checkpoint cannot be read.
        """
        state = self.checkpoints.load()
        if state is None:
            return False
        check(state)
        self.optimiser.load(state)
        self._saved = self.step
        return True

    def advance(self) -> dict[str, Tensor]:
        """Make one step. Returns its losses (over this process's samples), the gradient's norm and the rate."""
        step, rate = self.step, self.optimiser.rate
        self.optimiser.clear()
        losses = self.gradients(step, step_generator(self.seed, step))
        norm = self.optimiser.advance()
        return {**losses, "gradient": norm, "rate": torch.tensor(rate, dtype=torch.float64)}

    def save(self) -> None:
        """Write a checkpoint, at most once per step. Every process must call this. Raises TrainingError."""
        if self._saved == self.step:
            return
        if self.processes.main:
            self.checkpoints.save(self.step, {**self.optimiser.state(), **self.kept})
        self.follower.saved()
        self.processes.wait()
        self._saved = self.step

    def run(self, progress: bool = False) -> None:
        """Make the remaining steps, and save after the last. `progress`: a bar on stderr in place of log lines.

        Ctrl-C or SIGTERM saves after the current step and raises KeyboardInterrupt.
        """
        began, first, spent_before = time.monotonic(), self.step, self.optimiser.seconds
        saved = began
        shown = progress and self.processes.main
        with stop_signals() as stopped, tqdm(total=self.optimiser.steps, initial=first, disable=not shown) as bar:
            while self.optimiser.left > 0:
                self._since.append(self.advance())
                bar.update()
                now = time.monotonic()
                self.optimiser.seconds = spent_before + now - began
                last, step = self.optimiser.left <= 0, self.step
                saves = last or _due(self.cadence.save_every, step) or now - saved >= self.cadence.save_seconds
                if last or (_due(self.cadence.log_every, step) if self.cadence.log_every else saves):
                    self._log(bar, (now - began) / (step - first))
                for other in self.periodic:
                    if _due(other.every, step):
                        other.act()
                stop = self.processes.any(stopped.is_set())
                if saves or stop:
                    self.save()
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt

    def _log(self, bar: Any, pace: float) -> None:
        for values in self._since:
            for name, value in values.items():
                if name not in NOT_LOSSES:
                    before = self._smoothed.get(name)
                    loss = float(value)
                    self._smoothed[name] = OLD * before + (1 - OLD) * loss if before else loss
        numbers = self.follower.logged(self.step, self._since[-1], self._smoothed)
        self._since.clear()
        bar.set_postfix({name: f"{value:.4f}" for name, value in numbers.items() if name not in NOT_LOSSES})
        if bar.disable and self.processes.main:
            listed = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self.say(f"{self.optimiser.place}: {listed}, {pace:.3g} s a step")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
