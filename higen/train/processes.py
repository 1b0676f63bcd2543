"""Training in one process or many: which process takes which samples, and how all stop together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from higen.errors import MissingExtra, SettingsError, TrainingError
from higen.train.data import IMAGE, VIDEO
from higen.train.settings import Settings

__all__ = ["Alone", "Launched", "Processes", "gain_share", "shares", "start_processes", "stop_signals"]


class Processes(Protocol):
    """The processes of a run, from the view of one of them."""

    count: int
    index: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        ...

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module, prepared so that its gradients are averaged over the processes."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss."""
        ...

    def waiting(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A context in which gradients of a prepared module are added up but not yet averaged."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a value over the processes."""
        ...

    def gather(self, found: dict[str, str]) -> dict[str, str]:
        """The entries that all processes found."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        ...

    def wait(self) -> None:
        """Wait for the other processes."""
        ...

    def end(self) -> None:
        """End the run."""
        ...


class Alone:
    """One process, on the host or on the given device."""

    count, index, main = 1, 0, True

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss."""
        loss.backward()

    def waiting(self, module: nn.Module) -> AbstractContextManager[Any]:
        """An empty context, because a single process averages nothing."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def gather(self, found: dict[str, str]) -> dict[str, str]:
        """The entries themselves."""
        return found

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def wait(self) -> None:
        """Does nothing: there are no other processes."""

    def end(self) -> None:
        """Does nothing."""


class Launched:
    """The processes that torchrun started, or a single one, on the available device. Uses accelerate's Accelerator."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.count, self.index = int(accelerator.num_processes), int(accelerator.process_index)
        self.device: torch.device = accelerator.device

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self._accelerator.is_main_process)

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module on the device, prepared so that its gradients are averaged over the processes."""
        prepared: nn.Module = self._accelerator.prepare(module)
        return prepared

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss."""
        self._accelerator.backward(loss)

    def waiting(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A context in which gradients are added up but not yet averaged."""
        context: AbstractContextManager[Any] = self._accelerator.no_sync(module)
        return context

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a value over the processes."""
        whole: Tensor = self._accelerator.reduce(value, "mean")
        return whole

    def gather(self, found: dict[str, str]) -> dict[str, str]:
        """The entries that all processes found."""
        if self.count == 1:
            return found
        from accelerate.utils import gather_object

        return dict(gather_object(list(found.items())))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        return bool(self._accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum") > 0)

    def wait(self) -> None:
        """Wait for the other processes."""
        self._accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the group of processes."""
        if self.count > 1:
            self._accelerator.end_training()


def start_processes(unused_parameters: bool) -> Launched:
    """Join the processes that torchrun (or accelerate launch) started; without them, this process runs alone.

    unused_parameters: whether a step leaves some parameters unused. Raises MissingExtra without accelerate, and
    TrainingError if the processes do not find each other.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise MissingExtra("accelerate", "train", "training") from error
    # We set the precision by our own autocast, because accelerate's is fixed for the whole life of a process.
    handler = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters, broadcast_buffers=False)
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[handler])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise TrainingError(f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}")
    return Launched(accelerator)


def shares(settings: Settings, processes: int, index: int) -> dict[int, range]:
    """The samples of a step that process `index` takes, for each kind.

    Raises SettingsError if the samples cannot be divided evenly among the processes, or a process's samples among its
    micro-batches.
    """
    counts = {IMAGE: ("data.images", settings.data.images), VIDEO: ("data.videos", settings.data.videos)}
    return {kind: _share(name, count, settings, processes, index) for kind, (name, count) in counts.items()}


def gain_share(settings: Settings, processes: int, index: int) -> range:
    """The same for the clips that train only the gain. Raises SettingsError as `shares` does."""
    return _share("objective.gain_clips", settings.objective.gain_clips, settings, processes, index)


def _share(name: str, count: int, settings: Settings, processes: int, index: int) -> range:
    if count % processes:
        raise SettingsError(f"{name}={count}: a multiple of the {processes} processes")
    part, parts = count // processes, settings.run.micro_batches
    if part % parts:
        raise SettingsError(f"run.micro_batches={parts}: does not divide the {part} {name} of a process")
    return range(index * part, (index + 1) * part)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that the current step is completed. A second Ctrl-C stops at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield stopped
        return

    def stop(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
