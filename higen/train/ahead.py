"""Makes the batches of a run in worker processes, before they are needed, and brings them to the device."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from higen.errors import SettingsError, TrainingError
from higen.train.batches import Source, StepBatches

__all__ = ["Ahead"]


class Ahead:
    """The batches of another source (`higen.train.batches.Source`), unchanged: they depend only on the step.

    Workers make them in the order of the steps. If a step other than the next one is asked for, the workers start again
    from it.
    """

    def __init__(self, source: Source, steps: int, device: torch.device, workers: int = 0) -> None:
        """steps: number of steps in the run; workers: number of processes, 0: this process makes the batches.

        Raises SettingsError for a negative number of workers.
        """
        if workers < 0:
            raise SettingsError(f"workers={workers}: 0 or more")
        self.source, self.steps, self.device, self.workers = source, steps, device, workers
        self._next = -1
        self._made: Iterator[StepBatches] = iter(())

    def batches(self, step: int) -> StepBatches:
        """The batches of a step, on the device.

        Raises the source's errors, which are TrainingErrors if a worker makes the batches; ValueError for a step that
        the run does not have.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step={step}: the run has {self.steps} steps")
        if step != self._next:
            self._next, self._made = step, iter(self._loader(step))
        self._next += 1
        if not self.workers:
            return next(self._made).to(self.device)
        try:
            return next(self._made).to(self.device)
        except Exception as error:
            failure = str(error).strip().rpartition("\n")[2]
            traceback.clear_frames(error.__traceback__)  # they hold the iterator, and with it the workers
        self._next, self._made = -1, iter(())
        raise TrainingError(f"the batches of step {step} could not be made: {failure}")

    def _loader(self, first: int) -> DataLoader[StepBatches]:
        return DataLoader(
            _Steps(self.source),
            batch_size=None,
            sampler=range(first, self.steps),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )

    def close(self) -> None:
        """Stop the workers, and close the source."""
        self._next, self._made = -1, iter(())
        self.source.close()


class _Steps(Dataset[StepBatches]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, step: int) -> StepBatches:
        return self.source.batches(step)
