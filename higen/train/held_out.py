"""Losses of a run's averaged weights on clips that it is not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from higen.errors import SettingsError
from higen.train.batches import Batches, StepBatches
from higen.train.data import list_items
from higen.train.file_source import FileSource, make_reader
from higen.train.layers import set_strength
from higen.train.networks import Networks, Objective
from higen.train.optimise import Optimiser
from higen.train.processes import Processes, gain_share, shares
from higen.train.reader import Reader
from higen.train.settings import Settings

__all__ = ["HeldOut", "averaged", "held_out_reader", "swap"]


class HeldOut:
    """The data set `data.held_out`. Every measurement uses the same few batches with the same noise."""

    def __init__(
        self, settings: Settings, networks: Networks, batches: Batches, processes: Processes, tower: str | None
    ) -> None:
        """Raises SettingsError for a data set that cannot be used."""
        self.settings, reader = held_out_reader(settings, networks, processes, tower)
        self.processes = processes
        place = processes.count, processes.index
        share, gains = shares(settings, *place), gain_share(settings, *place)
        self._source = FileSource(reader, batches, self.settings, share, gains, processes.device)
        self._batches: list[StepBatches] = []

    def losses(self, objective: Objective, optimiser: Optimiser) -> dict[str, float]:
        """ "held-out image" and "held-out video": means over all processes. Every process must call this."""
        if not self._batches:
            steps = range(self.settings.data.held_out_steps)
            self._batches = [replace(self._source.batches(step), gains=None) for step in steps]
        found: dict[str, list[Tensor]] = {}
        with averaged(objective, optimiser), torch.no_grad():
            for batches in self._batches:
                for name, loss in losses_of(objective, batches).items():
                    found.setdefault(f"held-out {name}", []).append(loss)
        return {name: float(self.processes.mean(torch.stack(losses).mean())) for name, losses in found.items()}


def held_out_reader(
    settings: Settings, networks: Networks, processes: Processes, tower: str | None
) -> tuple[Settings, Reader]:
    """The reader of `data.held_out`, and its settings. Raises SettingsError for a data set that cannot be used."""
    data = settings.data
    where = replace(data, path=data.held_out or "", cache=None, workers=0, crop="centre", start="centre")
    theirs = replace(settings, data=where)
    try:
        listing = list_items(where.path, settings.lora.scales)
        return theirs, make_reader(theirs, networks, listing, tower, processes.device)
    except SettingsError as error:
        raise SettingsError(f"data.held_out: {str(error).removeprefix('data.path')}") from error


def losses_of(objective: Objective, batches: StepBatches) -> dict[str, Tensor]:
    """ "image" and "video": means over the samples of a step, each with its own strength of the adapters."""
    found: dict[str, Tensor] = {}
    for strength, share, part in batches.evenly():
        set_strength(objective, strength)
        _, image, video = objective(part.images, part.videos)
        for name, loss, batch in (("image", image, part.images), ("video", video, part.videos)):
            if batch is not None:
                found[name] = loss * share + found[name] if name in found else loss * share
    return found


@contextmanager
def averaged(objective: Objective, optimiser: Optimiser) -> Iterator[None]:
    """Inside the block, the networks have the averaged weights and use no dropout."""
    training = [module for module in (objective.denoiser, *objective.unets, objective.text) if module.training]
    swap(optimiser.parameters, optimiser.average)
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()
        swap(optimiser.parameters, optimiser.average)


def swap(parameters: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
    """Exchange the memory of two sets of tensors."""
    for name, parameter in parameters.items():
        parameter.data, average[name].data = average[name].data, parameter.data
