"""Makes rows on a Ray cluster: Ray Data sends blocks of rows to a pool of actors, each with its own model.

If a worker dies, it is started again and gets its block again. Rows it had finished are found in the journal. Ray Data
applies backpressure: rows wait while the workers are busy, and records wait while the index is written.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from higen.bulk.index import Record
from higen.bulk.maker import Maker, Order
from higen.bulk.rows import Row
from higen.errors import BackendError, BackendUnavailable, HigenError, MissingExtra, OutputError, RequestError, quoted
from higen.noise_schedule import is_whole

__all__ = ["Pool", "on_ray"]

_LOCAL = "local"
_STORE = 256 * 2**20
"""Bytes of a local cluster's object store: only rows and records pass through it."""
_BLOCKS = 20_000
"""Maximum number of blocks: Ray keeps state for each."""
_EACH, _ROWS = 32, 8
"""Blocks per worker, if there are enough rows: all workers then end at nearly the same time. Maximum rows per block,
unless that makes too many blocks: records arrive one block at a time.
"""
_ANSI = re.compile("\x1b\\[[0-9;]*m")
_LONGEST, _PATIENCE = 1e6, 10.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Turns off Ray's usage reports and its log messages, which would disturb the progress bar."""


@dataclass(frozen=True)
class Pool:
    """Where rows are made: a cluster's address (or "local"), how many workers, and the CPUs and GPUs of each."""

    address: str
    workers: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if not self.address:
            raise RequestError("ray='': local, auto, or the HOST:PORT of a cluster")
        if self.workers is not None and not is_whole(self.workers, 1, 10**5):
            raise RequestError(f"workers={quoted(self.workers)}: a whole number from 1")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= _LONGEST:
                raise RequestError(f"{name}={quoted(value)}: a number from 0")
            if value is not None and value > 1 and value != int(value):
                raise RequestError(f"{name}={quoted(value)}: a fraction below 1, or a whole number")


def on_ray(pool: Pool) -> Callable[[Order, list[Row]], Generator[Record, None, None]]:
    """The function that makes rows on the cluster. Raises MissingExtra."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray.data  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "ray", "ray", "higen batch --ray") from error
    return lambda order, rows: _records(pool, order, rows)


def _records(pool: Pool, order: Order, rows: list[Row]) -> Generator[Record, None, None]:
    """Raises BackendUnavailable if there is no cluster, and the error of a worker that could not continue."""
    import ray

    with redirect_stdout(sys.stderr):  # Ray writes to stdout when a worker dies and at shutdown
        ours = _connected(ray, pool.address)
        try:
            yield from _streamed(ray, pool, order, rows)
        except ray.exceptions.RayError as error:
            raise BackendError(f"the cluster could not go on: {_ANSI.sub('', str(error))}") from error
        finally:
            if ours:
                ray.shutdown()


def _connected(ray: Any, address: str) -> bool:
    """Join the cluster unless this process has joined already. Returns whether we joined and must leave it."""
    if ray.is_initialized():
        return False
    _check_port(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    for name in ("ray", "ray.data"):  # errors of rows are in their records
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if address == _LOCAL:
            ray.init(address=_LOCAL, include_dashboard=False, object_store_memory=_STORE, **options)
        else:
            ray.init(address=address, **options)
    except Exception as error:  # Ray's errors, ConnectionError, ValueError, RuntimeError, ...
        raise BackendUnavailable(f"ray={quoted(address)}: no cluster can be joined: {error}") from error
    return True


def _check_port(address: str) -> None:
    """Raise BackendUnavailable if nothing listens at HOST:PORT. Ray itself would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise BackendUnavailable(f"ray={quoted(address)}: no cluster answers there: {error}") from error


def _streamed(ray: Any, pool: Pool, order: Order, rows: list[Row]) -> Generator[Record, None, None]:
    workers, cpus, gpus = _shares(pool, ray.cluster_resources(), order)
    if order.threads is None and cpus >= 1:
        order = replace(order, threads=int(cpus))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    size = max(order.slots, min(_ROWS, len(rows) // (_EACH * workers)), math.ceil(len(rows) / _BLOCKS))
    items = [{"key": row.key, "text": row.text} for row in rows]
    data = ray.data.from_items(items, override_num_blocks=math.ceil(len(rows) / size))
    made = data.map_batches(
        _Worker,
        fn_constructor_args=(order,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(workers, math.ceil(len(rows) / size))),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for row in made.iter_rows():
        if row["stop"] is not None:
            raise pickle.loads(row["stop"])
        yield Record.from_json(row["record"])


def _shares(pool: Pool, there: dict[str, float], order: Order) -> tuple[int, float, float]:
    """Number of workers, and CPUs and GPUs of each. Raises RequestError if a local machine has too few."""
    all_cpus, all_gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    on_gpu = all_gpus > 0 and order.device != "cpu"
    cpus = 1.0 if pool.cpus is None else pool.cpus
    gpus = (1.0 if on_gpu else 0.0) if pool.gpus is None else pool.gpus
    room = min([int(total / each + 1e-9) for total, each in ((all_cpus, cpus), (all_gpus, gpus)) if each] or [1])
    if pool.address == _LOCAL and room < (pool.workers or 1):
        has = f"{all_cpus:g} CPUs and {all_gpus:g} GPUs"
        raise RequestError(
            f"workers={pool.workers or 1} with {cpus:g} CPUs and {gpus:g} GPUs each: this machine has {has}"
        )
    return pool.workers or max(1, room), cpus, gpus


class _Worker:
    """An actor with a model. It makes the rows of one block at a time.

    An error that ends the run is passed on, pickled, in the column `stop`: Ray would pass on only its text.
    """

    def __init__(self, order: Order) -> None:
        self._maker: Maker | None = None
        self._wrong: HigenError | None = None
        try:
            self._maker = Maker(order)
        except HigenError as error:
            self._wrong = error

    def __call__(self, block: Any) -> Any:
        import pyarrow

        records: list[str] = []
        if self._maker is not None:
            rows = zip(block["key"].to_pylist(), block["text"].to_pylist(), strict=True)
            try:
                records = [record.as_json() for record in self._maker.make(rows)]
            except HigenError as error:
                self._wrong = error
            except OSError as error:
                self._wrong = OutputError(f"the output cannot be written: {error}")
        if self._wrong is not None:
            return pyarrow.table({"record": [""], "stop": [pickle.dumps(self._wrong)]})
        return pyarrow.table({"record": records, "stop": pyarrow.array([None] * len(records), pyarrow.binary())})
