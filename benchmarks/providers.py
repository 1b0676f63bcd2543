"""Writes a table of the devices that ONNX Runtime reaches through plugins: difference from the CPU, times.

    python benchmarks/providers.py openvino --report table.md
    python benchmarks/providers.py webgpu --frames 4 --width 64 --height 64

The CPU and the device take turns, prompt by prompt. The first prompt warms up: the times are medians of the others.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from hardware import cores
from numpy.typing import NDArray

import higen
from higen.api import default_model
from higen.measures.fidelity import psnr
from higen.pipeline import Pipeline
from higen.trial import known_prompts

HEADER = (
    "| device | prompts | largest difference, /255 | worst PSNR, dB | wall time / the CPU's | CPU time / the CPU's "
    "| wall, s (CPU) | load, s (CPU) |\n|---|---|---|---|---|---|---|---|"
)


def loaded(device: str) -> tuple[Pipeline, float]:
    """The built-in model's pipeline with every session of a text-to-video request, and the seconds that took."""
    start = time.perf_counter()
    pipe = higen.load(default_model(), "onnx", device=device)
    return pipe, time.perf_counter() - start


def timed(pipe: Pipeline, prompt: str, options: dict[str, Any]) -> tuple[NDArray[np.uint8], float, float]:
    """Frames, wall seconds, CPU seconds of a video."""
    wall, cpu = time.perf_counter(), time.process_time()
    frames = np.asarray(pipe(prompt, seed=0, **options).frames)
    return frames, time.perf_counter() - wall, time.process_time() - cpu


def measured(device: str, count: int, options: dict[str, Any]) -> str:
    """A row of the table, then the report of what ran where."""
    os.environ["HIGEN_CACHE"] = "off"  # both sides then load their graphs in the same way
    pipes = {name: loaded(name) for name in ("cpu", device)}
    walls: dict[str, list[float]] = {name: [] for name in pipes}
    cpus: dict[str, list[float]] = {name: [] for name in pipes}
    largest, worst = 0, float("inf")
    prompts = known_prompts(pipes["cpu"][0].bundle.manifest, count)
    for prompt in prompts:
        frames = {}
        for name, (pipe, _) in pipes.items():
            frames[name], wall, cpu = timed(pipe, prompt, options)
            walls[name].append(wall)
            cpus[name].append(cpu)
        apart = np.abs(frames["cpu"].astype(int) - frames[device].astype(int))
        largest, worst = max(largest, int(apart.max())), min(worst, psnr(frames[device], frames["cpu"]))
    wall = {name: statistics.median(values[1:] or values) for name, values in walls.items()}
    cpu_s = {name: statistics.median(values[1:] or values) for name, values in cpus.items()}
    load = {name: seconds for name, (_, seconds) in pipes.items()}
    row = (
        f"| {device} | {len(prompts)} | {largest} | {worst:.1f} | {wall[device] / wall['cpu']:.2f} "
        f"| {cpu_s[device] / cpu_s['cpu']:.2f} | {wall[device]:.2f} ({wall['cpu']:.2f}) "
        f"| {load[device]:.1f} ({load['cpu']:.1f}) |"
    )
    return f"{row}\n\n```\n{pipes[device][0].report()}\n```"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", help="openvino or webgpu")
    for name in ("frames", "width", "height"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--report", type=Path)
    asked = vars(parser.parse_args())
    options = {name: asked[name] for name in ("frames", "width", "height") if asked[name] is not None}
    before = os.getloadavg()[0]
    row = measured(asked["device"], asked["prompts"], options)
    text = f"{cores()}; load {before:.1f} to {os.getloadavg()[0]:.1f}; {options or 'defaults'}\n\n{HEADER}\n{row}\n"
    print(text)
    if asked["report"] is not None:
        asked["report"].write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
