"""Throughput of a denoising step by batch size and number of threads, in ONNX Runtime on the CPU.

    python benchmarks/batches.py                                       # the built-in model, 1, 2, 4 and 8 samples
    python benchmarks/batches.py --model DIR --samples 1,4 --threads 1,4,16 --repeats 9 --frames 16
    numactl --cpunodebind 0 --membind 0 python benchmarks/batches.py   # one node of several

The inputs are those of a real video, repeated. All combinations are timed in turn, so that other work on the machine
affects all of them alike. Times are per sample: the time of the batch divided by its samples. If this CPU time grows
with the number of samples, a batch costs more than it saves. If one thread needs less CPU time than several, then
several processes with `--threads 1` serve many requests with less work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from hardware import processor
from numpy.typing import NDArray

from higen.api import default_model
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.bundle import Bundle
from higen.trial import known_prompts, record

Tensors = Mapping[str, NDArray[Any]]


def numbers(text: str) -> list[int]:
    """Comma-separated whole numbers from 1."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def step(backend: OnnxBackend, stage: str, tensors: Tensors) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    backend.run(stage, **tensors)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time denoising steps of several samples.")
    parser.add_argument("--model", default=str(default_model()))
    parser.add_argument("--samples", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=numbers, default=[1, os.cpu_count() or 1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--frames", type=int, help="frames of the video; default: the model's own")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.model)
    stages = [name for name in bundle.manifest.denoising if bundle.manifest.stage(name).batch]
    sizes = {} if arguments.frames is None else {"frames": arguments.frames}
    calls = {stage: made[0] for stage, made in record(bundle, stages, known_prompts(bundle.manifest), **sizes).items()}
    backends = {threads: OnnxBackend(bundle, Options("cpu", threads=threads)) for threads in arguments.threads}
    combinations = [(stage, t, n) for stage in calls for t in backends for n in arguments.samples]
    times: dict[tuple[str, int, int], list[tuple[float, float]]] = {key: [] for key in combinations}
    load = os.getloadavg()[0]
    for repeat in range(arguments.repeats + 1):
        for stage, threads, samples in combinations:
            tensors = {name: np.repeat(value, samples, axis=0) for name, value in calls[stage].items()}
            measured = step(backends[threads], stage, tensors)
            if repeat:  # the first repeat is a warm-up
                times[stage, threads, samples].append(measured)
    print(f"{processor()}, ONNX Runtime {ort.__version__}, load {load:.1f} to {os.getloadavg()[0]:.1f}\n")
    print("| stage | threads | samples | wall, ms a sample: median, least | CPU, ms a sample: median, least |")
    print("|---|---|---|---|---|")
    for stage, threads, samples in combinations:
        columns = zip(*times[stage, threads, samples], strict=True)
        shown = [f"{1e3 * f(values) / samples:.1f}" for values in columns for f in (statistics.median, min)]
        print(f"| {stage} | {threads} | {samples} | {', '.join(shown[:2])} | {', '.join(shown[2:])} |")


if __name__ == "__main__":
    main()
