"""Load-tests a Triton server with asyncio clients: latency, throughput, shared batches, memory over time.

    pip install ".[triton]"
    python benchmarks/serving.py                                      # starts a CPU server of the built-in model
    python benchmarks/serving.py --minutes 10 --clients 1,4,16 --soak 4 --report serving.md

Each client sends its next request as soon as the last one is answered. Every request has another seed, and numbers of
steps that differ from the given ones by at most 1. Figures are of the requests that began and ended within the measured
time. The server's memory is that of all its processes (proportional set size). The output names the hardware and its
load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as grpc
from hardware import processor

from higen.api import default_model
from higen.bundle import Bundle
from higen.engines.triton.client import request_tensors
from higen.engines.triton.repository import Settings, write_repository
from higen.engines.triton.server import Server, running


@dataclass
class Load:
    """Measurements with a number of clients: seconds to the first event and to the end of each request, and errors."""

    clients: int
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    rows_per_batch: float = 0.0

    def as_row(self) -> str:
        """A row of the report's table."""
        cells = [*(f"{value:.2f}" for value in (*percentiles(self.whole), statistics.median(self.first)))]
        rate = 60 * len(self.whole) / self.seconds
        return (
            f"| {self.clients} | {len(self.whole)} | {' | '.join(cells)} | {rate:.1f} | {self.rows_per_batch:.2f} "
            f"| {len(self.errors)} |"
        )


HEADER = (
    "| clients | requests | p50 s | p90 s | p99 s | first event, p50 s | videos/min | samples per denoising batch "
    "| errors |\n|---|---|---|---|---|---|---|---|---|"
)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 50th, 90th and 99th percentile (nearest rank)."""
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(p * len(ordered)))] for p in (0.5, 0.9, 0.99))  # type: ignore[return-value]


async def request(client: grpc.InferenceServerClient, prompt: str, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first event and to the last one."""

    async def once() -> AsyncIterator[dict[str, Any]]:
        inputs = []
        for name, (kind, array) in request_tensors(prompt, **options).items():
            inputs.append(grpc.InferInput(name, list(array.shape), kind).set_data_from_numpy(array))
        yield {"model_name": "higen", "inputs": inputs, "enable_empty_final_response": True}

    start, first = time.perf_counter(), 0.0
    async for result, error in client.stream_infer(once()):
        if error is not None:
            raise error
        first = first or time.perf_counter() - start
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    return first, time.perf_counter() - start


async def load(server: Server, clients: int, seconds: float, prompts: Sequence[str], options: dict[str, Any]) -> Load:
    """Run `clients` at the same time for some seconds; requests unfinished then are cancelled and not counted."""
    found, before = Load(clients), executed(server)
    spatial, temporal = options["steps"]

    async def client(number: int) -> None:
        async with grpc.InferenceServerClient(server.grpc) as connection:
            for i in range(10**9):
                seed = number * 10**6 + i
                steps = [max(1, spatial + seed % 3 - 1), max(1, temporal + (seed // 3) % 3 - 1)]
                try:
                    first, whole = await request(
                        connection, prompts[seed % len(prompts)], options | {"seed": seed, "steps": steps}
                    )
                except grpc.InferenceServerException as error:
                    found.errors.append(str(error))
                else:
                    found.first.append(first)
                    found.whole.append(whole)

    start = time.perf_counter()
    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    await asyncio.wait(tasks, timeout=seconds)
    found.seconds = time.perf_counter() - start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    rows, batches = (now - then for now, then in zip(executed(server), before, strict=True))
    found.rows_per_batch = rows / max(batches, 1)
    return found


def executed(server: Server) -> tuple[int, int]:
    """Samples and batches that the denoising stages have run, guided and plain."""
    with urllib.request.urlopen(f"http://{server.http}/v2/models/stats", timeout=60) as answer:
        found = [model for model in json.load(answer)["model_stats"] if "_unet" in model["name"]]
    return sum(model["inference_count"] for model in found), sum(model["execution_count"] for model in found)


def memory(server: Server) -> float:
    """Megabytes of the server and its models' processes."""
    total = 0
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            group = int((process / "stat").read_text().rpartition(")")[2].split()[2])
            if group == server.process.pid:  # the server leads its own process group
                rollup = (process / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return total / 1024


async def soak(
    server: Server, clients: int, seconds: float, prompts: Sequence[str], options: dict[str, Any]
) -> tuple[Load, list[tuple[float, float]]]:
    """A long load, and the server's memory every half minute as (minutes, megabytes)."""
    start = time.perf_counter()
    work = asyncio.create_task(load(server, clients, seconds, prompts, options))
    samples = []
    while not work.done():
        samples.append(((time.perf_counter() - start) / 60, memory(server)))
        await asyncio.wait([work], timeout=30)
    return await work, samples


def hardware() -> str:
    """The processor's name, how many cores this process may use, and the machine's load before the benchmark."""
    cores = len(os.sched_getaffinity(0))
    busy = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{processor()}, {cores} of {os.cpu_count()} cores, load before {busy}"


async def measure(server: Server, arguments: argparse.Namespace, prompts: Sequence[str]) -> list[str]:
    """The report's lines."""
    options = {
        "steps": [int(n) for n in arguments.steps.split(",")],
        "frames": arguments.frames,
        "width": arguments.size,
        "height": arguments.size,
    }
    await load(server, 1, arguments.warm_up, prompts, options)
    lines = [HEADER]
    for clients in [int(n) for n in arguments.clients.split(",")]:
        lines.append((await load(server, clients, arguments.seconds, prompts, options)).as_row())
        print(lines[-1], flush=True)
    if arguments.minutes:
        found, samples = await soak(server, arguments.soak, 60 * arguments.minutes, prompts, options)
        lines += ["", f"{arguments.minutes:g} minutes with {arguments.soak} clients:", "", HEADER, found.as_row(), ""]
        lines += ["| minute | server memory, MB |", "|---|---|", *(f"| {m:.1f} | {size:.0f} |" for m, size in samples)]
        lines += sorted({f"- error: {error}" for error in found.errors})
    return lines


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Load-test a Triton server.")
    parser.add_argument("--model", type=Path, default=default_model(), help="model directory")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--seconds", type=float, default=60, help="seconds for each number of clients")
    parser.add_argument("--warm-up", type=float, default=10)
    parser.add_argument("--minutes", type=float, default=0, help="minutes of the long run, with memory over time")
    parser.add_argument("--soak", type=int, default=4, help="clients of the long run")
    parser.add_argument("--steps", default="4,3")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--report", type=Path, help="file to write")
    arguments = parser.parse_args()
    about = [
        f"{hardware()}; tritonserver 2.51 on the CPU, the Python stand-in for its onnxruntime backend, "
        "1 thread a stage.",
        f"Requests: {arguments.frames} frames of {arguments.size}x{arguments.size}, steps {arguments.steps} -1 to +1, "
        f"batches of at most {arguments.max_batch}; clients and server share these cores.",
        "",
    ]
    print("\n".join(about))
    bundle = Bundle.open(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder, "repository")
        write_repository(bundle, repository, Settings(max_batch=arguments.max_batch, threads=1))
        with running(repository) as server:
            lines = asyncio.run(measure(server, arguments, bundle.manifest.prompts or ("a whale",)))
    print("\n".join(lines))
    if arguments.report is not None:
        arguments.report.write_text("\n".join([*about, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
