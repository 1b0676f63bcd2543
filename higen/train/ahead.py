"""Makes the batches of a run in worker processes, before they are needed, and brings them to the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from higen.train.batches import Source, StepBatches

__all__ = ["Ahead"]


class Ahead:
    """The batches of another source (`higen.train.batches.Source`), unchanged: they depend only on the step.

    Workers make them in the order of the steps. Another step than the next one starts the workers again from there.
    """

    def __init__(self, source: Source, steps: int, device: torch.device, workers: int = 0) -> None:
        """steps: number of steps in the run; workers: number of processes, 0: this process makes the batches."""
        self.source, self.steps, self.device, self.workers = source, steps, device, workers
        self._next = -1
        self._made: Iterator[StepBatches] = iter(())

    def batches(self, step: int) -> StepBatches:
        """The batches of a step, on the device."""
        if step != self._next:
            self._next, self._made = step, iter(self._loader(step))
        self._next += 1
        return next(self._made).to(self.device)

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
