"""One process or many: who makes which samples, and how they stop together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from higen.errors import MissingExtra, SettingsError, TrainingError
from higen.train.data import IMAGE, VIDEO
from higen.train.settings import Settings

__all__ = ["shares", "start_processes", "stop_signals"]


def start_processes(unused_parameters: bool) -> Any:
    """accelerate's Accelerator for this process, one of those that torchrun (or accelerate launch) started, or alone.

    unused_parameters: a step does not use all parameters. Raises MissingExtra without accelerate, TrainingError where
    the processes do not find each other.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise MissingExtra("accelerate", "train", "training") from error
    # The precision is chosen by an autocast of our own: accelerate's is one for the whole life of a process.
    handler = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters, broadcast_buffers=False)
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[handler])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise TrainingError(f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}")
    return accelerator


def shares(settings: Settings, processes: int, index: int) -> dict[int, range]:
    """The samples of a step that process `index` makes, of each kind.

    Raises SettingsError if they do not divide by the processes, or a process's by its micro-batches.
    """
    found = {}
    parts = settings.run.micro_batches
    for kind, name in ((IMAGE, "images"), (VIDEO, "videos")):
        count = getattr(settings.data, name)
        if count % processes:
            raise SettingsError(f"data.{name}={count}: a multiple of the {processes} processes")
        part = count // processes
        if part % parts:
            raise SettingsError(f"run.micro_batches={parts}: the {part} data.{name} of a process do not divide by it")
        found[kind] = range(index * part, (index + 1) * part)
    return found


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that no step is cut in two; a second Ctrl-C stops at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
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
