"""Export and build the released model's topology at full size (1.48 B parameters, made-up weights) without a GPU.

    python benchmarks/full_size_engines.py WORK [--stage spatial_unet] [--target rtx-sm89] [--weight-streaming]

Each step runs in its own process, so that peak memory is measured per step. Prints each step's wall time, CPU time and
peak memory, the size of the plans, and how many of their kernels are fused attention. WORK keeps all results; the same
command continues where it stopped. Needs 12 GB of disk and 9 GiB of memory. Results: full_size_engines.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

DENOISING = ("spatial_unet", "temporal_unet")
"""The stages with both branches of guidance, which are the larger ones."""


def write_model(path: Path, channels: int = 320) -> None:
    """Write a model directory with only the denoiser, in float16. `channels`: of its first level; 320 at full size."""
    import torch

    from higen import bundle
    from higen.families.higen import spec
    from higen.models.weights import write_safetensors
    from higen.parity.fixtures import recipe_state

    config = spec.UNetConfig(base_channels=channels)
    with bundle.create_model(path, spec.manifest(spec.ModelConfig(name="full size", unet=config))) as folder:
        state = {name: tensor.to(torch.float16) for name, tensor in recipe_state(config, 0)}
        write_safetensors(folder / spec.UNET, state, "fp16")


def export(path: Path, stage: str) -> None:
    """Export the graph of a stage without the parity gate, whose float32 passes take most of the time at this size."""
    from higen.backends.options import Options
    from higen.backends.torch import TorchBackend
    from higen.bundle import Bundle, graph_file, put_file
    from higen.export.graphs import export_stage
    from higen.export.interface import graph_inputs
    from higen.export.precision import check_opset, lowered

    bundle = Bundle.open(path)
    if graph_file(stage, "fp16") in bundle.files:
        return
    module = lowered(TorchBackend(bundle, Options(device="cpu", precision="fp16", verify=False)).module(stage), "fp16")
    aside = path / f".{graph_file(stage, 'fp16')}.part"
    export_stage(bundle, module, stage, aside, check_opset("fp16", None), "fp16")
    put_file(bundle, aside, graph_file(stage, "fp16"), graph_inputs(aside))


def build(path: Path, stage: str, target: str, weight_streaming: bool) -> None:
    """Build the engine of a stage for 32 frames at 448x256."""
    from higen.bundle import Bundle
    from higen.engines.build import Options
    from higen.engines.model_engines import build_engines
    from higen.engines.shapes import read_profile
    from higen.engines.targets import parse_targets

    bundle = Bundle.open(path)
    profiles = [read_profile("default", bundle.manifest)]
    options = Options(weight_streaming=weight_streaming)
    (record,) = build_engines(bundle, parse_targets(target), profiles, [stage], "fp16", options)
    log = (path / "engines" / record.target / f"{stage}.log").read_text(encoding="utf-8")
    kernels = re.findall(r"^Name: \S*mha\S*", log, re.MULTILINE)
    print(json.dumps({"plan_mb": round(record.size / 1e6, 1), "fused_attention": len(kernels)}), flush=True)


def main() -> None:
    """Run every step in its own process: the same command line with the step and its stage appended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stage", action="append", choices=DENOISING)
    parser.add_argument("--target", default="rtx-sm89")
    parser.add_argument("--weight-streaming", action="store_true")
    parser.add_argument("--step", choices=("write", "export", "build"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    model, stages = given.work / "full-size", list(dict.fromkeys(given.stage or DENOISING))
    if given.step == "write":
        write_model(model)
    elif given.step == "export":
        export(model, given.stage[-1])
    elif given.step == "build":
        build(model, given.stage[-1], given.target, given.weight_streaming)
    else:
        given.work.mkdir(parents=True, exist_ok=True)
        if not model.exists():
            measured("write", [])
        for stage in stages:
            measured("export", ["--stage", stage])
            measured("build", ["--stage", stage])


def measured(step: str, arguments: list[str]) -> None:
    """Run a step of this script and print its time and memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *sys.argv, *arguments, "--step", step])
    _, status, used = os.wait4(process.pid, 0)
    cpu = used.ru_utime + used.ru_stime
    print(
        f"{step:<8}{' '.join(arguments[1:]):<16}{time.perf_counter() - start:8.0f} s wall {cpu:8.0f} s CPU "
        f"{used.ru_maxrss / 2**20:8.2f} GiB peak",
        flush=True,
    )
    if status:
        sys.exit(f"{step} failed")


if __name__ == "__main__":
    main()
