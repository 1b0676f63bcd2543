"""Times higen on an NVIDIA GPU: videos of the built-in model, and the steps of the released topology at full size.

    python benchmarks/gpu.py WORK [--part built-in|full-size] [--repeats 5] [--channels 320]

WORK keeps the full-size model (1.48 B made-up parameters in float16, 3 GB) and its graphs; the same command continues
where it stopped. With fewer channels the model is smaller, for a trial on a CPU. A side is a backend in a precision.
Sides that cannot run here are listed with the reason. Times are medians after a warm-up; ratios are to the first side
of the same run. Prints Markdown.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import full_size_engines
import torch
from hardware import hardware, synchronise

import higen
from higen.api import default_model
from higen.backends.base import Backend
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, graph_file
from higen.errors import HigenError
from higen.export.model_graphs import export_model
from higen.export.shapes import example_inputs, sizes_for

SIDES = (("torch", "fp32"), ("torch", "fp16"), ("torch", "bf16"), ("onnx", "fp32"), ("onnx", "fp16"))
STAGES = full_size_engines.DENOISING
FRAMES, HEIGHT, WIDTH = 32, 256, 448


def median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of `run` over the repeats, after two warm-ups."""
    times = []
    for i in range(repeats + 2):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def memory() -> Iterator[list[float]]:
    """GiB of GPU memory that the block added. Allocators keep what they took, so this is the peak."""
    used: list[float] = []
    if not torch.cuda.is_available():
        yield used
        return
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    yield used
    used.append((before - torch.cuda.mem_get_info()[0]) / 2**30)


def built_in(work: Path, repeats: int) -> None:
    """Whole videos of the built-in model with its default settings."""
    model = work / "built-in"
    if not model.exists():
        shutil.copytree(default_model(), model)
        export_model(Bundle.open(model), precision="fp16")
    print("\n## A default video of the built-in model\n\n| side | load s | video s | ratio |\n|---|---|---|---|")
    prompt, first = Bundle.open(model).manifest.prompts[0], None
    for backend, precision, device in [("onnx", "fp32", "cpu"), *((*side, "cuda") for side in SIDES)]:
        name = f"{backend} {precision} on {device}"
        try:
            start = time.perf_counter()
            with higen.load(model, backend, device=device, precision=precision) as pipe:
                loaded = time.perf_counter() - start
                spent = median(lambda pipe=pipe: pipe(prompt, progress=False), repeats)  # type: ignore[misc]
        except HigenError as error:
            print(f"| {name} | | {reason(error)} | |", flush=True)
            continue
        first = first or spent
        print(f"| {name} | {loaded:.2f} | {spent:.3f} | {first / spent:.2f} x |", flush=True)


def full_size(work: Path, repeats: int, channels: int) -> None:
    """Both denoising steps of the released topology at full size: both branches of guidance, 32 frames at 448x256."""
    model = work / f"topology-{channels}"
    if not model.exists():
        full_size_engines.write_model(model, channels)
    with ThreadPoolExecutor() as pool:  # exports run on the CPU at the same time, each in its own process
        exports = [pool.submit(exported, model, stage) for stage in STAGES]
        size = f"{channels} channels, {FRAMES} frames at {WIDTH}x{HEIGHT}"
        print(f"\n## A step of the released topology, both branches of guidance: {size}\n")
        print("| side | stage | ms | ratio | GPU memory GiB |\n|---|---|---|---|---|")
        first: dict[str, float] = {}
        for backend, precision in SIDES:
            if backend == "onnx" and precision == "fp16":
                for export in exports:
                    export.result()
            for stage in STAGES:
                step(model, backend, precision, stage, first, repeats)


def exported(model: Path, stage: str) -> None:
    """Export a stage in its own process, because an exporter keeps gigabytes."""
    code = f"import full_size_engines as f; from pathlib import Path; f.export(Path({str(model)!r}), {stage!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL)


def step(model: Path, backend: str, precision: str, stage: str, first: dict[str, float], repeats: int) -> None:
    """Measure a step and print its row of the table."""
    kind: Callable[..., Backend] = TorchBackend if backend == "torch" else OnnxBackend
    bundle = Bundle.open(model)
    side = f"{backend} {precision}"
    if backend == "onnx" and graph_file(stage, precision) not in bundle.files:
        return
    sizes = sizes_for(bundle.manifest, {"B": 1, "F": FRAMES, "N": 1, "H": HEIGHT // 8, "W": WIDTH // 8})
    inputs: dict[str, Any] = example_inputs(bundle.manifest, bundle.manifest.stage(stage), sizes)
    if backend == "onnx":
        inputs = {name: tensor.numpy() for name, tensor in inputs.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with memory() as used:
            opened = kind(bundle, Options(device, precision, verify=False))
            spent = median(partial(opened.run, stage, **inputs), repeats)
    except HigenError as error:
        print(f"| {side} | {stage} | {reason(error)} | | |", flush=True)
        return
    opened.close()
    first.setdefault(stage, spent)
    peak = f"{used[0]:.1f}" if used else ""
    print(f"| {side} | {stage} | {1000 * spent:.1f} | {first[stage] / spent:.2f} x | {peak} |", flush=True)


def reason(error: HigenError) -> str:
    """The first line of an error, as a table cell."""
    return str(error).splitlines()[0].replace("|", "\\|")


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time higen on a GPU.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--part", choices=("built-in", "full-size"), action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--channels", type=int, default=320, help="width of the U-Net's first level")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    parts = arguments.part or ["built-in", "full-size"]
    print(hardware())
    if "built-in" in parts:
        built_in(arguments.work, arguments.repeats)
    if "full-size" in parts:
        full_size(arguments.work, arguments.repeats, arguments.channels)


if __name__ == "__main__":
    main()
