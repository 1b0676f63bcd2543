"""Rows on a Ray cluster: Ray Data hands blocks of rows to a pool of actors, each with a model of its own.

A worker that dies is started again and its block given out again; what it had made is found in the journal. Ray Data
holds rows back while the workers are busy, and records while the index is being written.
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
"""Bytes of a local cluster's object store: rows and records alone pass through it."""
_BLOCKS = 20_000
"""Blocks at most, since Ray keeps account of each."""
_EACH, _ROWS = 32, 8
"""Blocks of one worker, where there are rows enough: then all workers end at nearly the same time. Rows of a block,
where that does not make too many blocks: records arrive a block at a time.
"""
_ANSI = re.compile("\x1b\\[[0-9;]*m")
_LONGEST, _PATIENCE = 1e6, 10.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Ray reports nothing to anybody, and writes nothing between the lines of the progress bar."""


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
                raise RequestError(f"{name}={quoted(value)}: below 1 a fraction, above it a whole number")


def on_ray(pool: Pool) -> Callable[[Order, list[Row]], Generator[Record, None, None]]:
    """What makes rows on a cluster. Raises MissingExtra."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray.data  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "ray", "ray", "higen batch --ray") from error
    return lambda order, rows: _records(pool, order, rows)


def _records(pool: Pool, order: Order, rows: list[Row]) -> Generator[Record, None, None]:
    """Raises BackendUnavailable where there is no cluster, and what a worker raised when it could not go on."""
    import ray

    with redirect_stdout(sys.stderr):  # Ray writes there when a worker dies, at its shutdown too
        ours = _connected(ray, pool.address)
        try:
            yield from _streamed(ray, pool, order, rows)
        except ray.exceptions.RayError as error:
            raise BackendError(f"the cluster could not go on: {_ANSI.sub('', str(error))}") from error
        finally:
            if ours:
                ray.shutdown()


def _connected(ray: Any, address: str) -> bool:
    """Join the cluster, unless this process has done so; whether it is ours to leave."""
    if ray.is_initialized():
        return False
    _check_port(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    for name in ("ray", "ray.data"):  # what goes wrong with a row is in its record
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if address == _LOCAL:
            ray.init(address=_LOCAL, include_dashboard=False, object_store_memory=_STORE, **options)
        else:
            ray.init(address=address, **options)
    except Exception as error:  # Ray's own and Python's: ConnectionError, ValueError, RuntimeError, ...
        raise BackendUnavailable(f"ray={quoted(address)}: no cluster can be joined: {error}") from error
    return True


def _check_port(address: str) -> None:
    """Raise BackendUnavailable where nothing listens at HOST:PORT: Ray itself waits for minutes."""
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
    """How many workers, and the CPUs and GPUs of each. Raises RequestError where a local machine has no room."""
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
    """An actor: a model that makes the rows of one block after the other.

    What ends the run is handed on in the column `stop`, pickled: Ray would hand on its text alone.
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
