"""Times the loops of a model on several sides, each in its own process, as ratios to a baseline of the same run.

    python benchmarks/against.py WORK [--family animatediff] [--size small|tiny|full] [--steps 4] [--rounds 3]
        [--sides diffusers,torch,onnx,diffusers+compile,torch:bf16,onnx:fp16,onnx@openvino,gemm]
    python benchmarks/against.py WORK --family higen --reference CHECKOUT    # or higen_image: its first loop alone
    python benchmarks/against.py WORK --readme README.md    # the table of all families measured in WORK

Sides: `diffusers`; `diffusers+compile` (its denoiser with torch.compile); `reference`, HiGen's published code in a
checkout of VGen (vgen.py); higen as BACKEND[:PRECISION][@DEVICE] (torch, onnx, tensorrt; on the device of --device
unless it names one); and `gemm`, a product of large matrices that shows the machine's peak rate.
The first side is the baseline. All run the same request on the same weights and noise (models: families.py, vgen.py),
and their last latents are compared with the baseline's. Each round runs every side once; every second round runs them
in reverse order. Graphs that a side needs are exported first. Prints Markdown, and keeps it in WORK/FAMILY-SIZE.md and
.json; a side that cannot run here says why. `--threads`: of every side, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sides import Side, run, serve, start

FAMILIES = ("higen", "higen_image", "stable_diffusion", "animatediff", "modelscope", "svd")

GEMM = 4096
"""Rows and columns of the matrices of `gemm`."""


# ---- One side: a separate process ----


def rows(side: str, given: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Prepare a side; returns what runs its request once and measures it."""
    once, flops = gemm(given) if side == "gemm" else request(side, given)

    def row() -> dict[str, float]:
        cpu, start = time.process_time(), time.perf_counter()
        latents = once()
        seconds, used = time.perf_counter() - start, time.process_time() - cpu
        if latents is not None:
            np.save(kept(given, side), latents)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"seconds": seconds, "cpu": used, "memory": peak, "flops": flops}

    return row


def gemm(given: argparse.Namespace) -> tuple[Callable[[], None], float]:
    """A product of two large matrices in float32, and its number of operations."""
    import torch

    if given.threads:
        torch.set_num_threads(given.threads)
    one, other = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)

    def run() -> None:
        torch.mm(one, other)

    return run, 2.0 * GEMM**3


def request(side: str, given: argparse.Namespace) -> tuple[Callable[[], Any], float]:
    """The request on a side, and the operations of its matrix products (0 where PyTorch cannot count them)."""
    import families
    import torch

    if given.threads:
        torch.set_num_threads(given.threads)
    families.DEVICE = given.device
    where = model_folder(given)
    ours_alone = given.family.startswith("higen")
    if side == "reference":
        if not ours_alone or given.reference is None:
            raise ValueError("this side needs --family higen or higen_image, and --reference CHECKOUT")
        import vgen

        run = vgen.reference(given.reference, where, given.size, given.steps, clip=given.family == "higen")
        return run, 0.0
    if side.startswith("diffusers"):
        if ours_alone:
            raise ValueError("diffusers has no HiGen")
        pipeline, where = families.made(given.work, given.family, given.size, "fp32")
        if side.endswith("+compile"):
            pipeline.unet = torch.compile(pipeline.unet)
        model, job = families.Bundle.open(where), families.JOBS[given.family]

        def theirs() -> Any:
            with torch.inference_mode():
                return job.theirs(pipeline, model, given.steps, job.shapes[given.size])

        return theirs, 0.0 if side.endswith("+compile") else counted(theirs)
    backend, precision, device = parts(side)
    pipe = families.higen.load(
        where, backend, device=device or given.device, precision=precision or None, threads=given.threads
    )
    if ours_alone:
        import vgen

        options = vgen.options(given.size, given.steps, clip=given.family == "higen")
    else:
        options = families.request(given.family, given.size, given.steps)

    def ours() -> Any:
        return families.last_latents(pipe, options)

    return ours, counted(ours) if side == "torch" else 0.0


def model_folder(given: argparse.Namespace) -> Path:
    """Where higen's model is kept."""
    name = "higen" if given.family.startswith("higen") else given.family
    folder: Path = given.work / f"{name}-{given.size}-fp32"
    return folder


def parts(side: str) -> tuple[str, str, str]:
    """Backend, precision and device of a side, as given; "" for what it does not name."""
    rest, _, device = side.partition("@")
    backend, _, precision = rest.partition(":")
    return backend, precision, device


def counted(run: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products in a run. The run also serves as warm-up."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def kept(given: argparse.Namespace, side: str) -> Path:
    """The file of a side's last latents."""
    return given.work / f"{given.family}-{given.size}.{side.replace(':', '_')}.npy"


# ---- All sides ----


def prepare(given: argparse.Namespace) -> None:
    """Make the model and the graphs that the sides need, each in its own process."""
    where = model_folder(given)
    if given.family.startswith("higen"):
        make = f"import vgen; from pathlib import Path; vgen.make(Path({str(where)!r}), {given.size!r})"
    else:
        wanted = f"Path({str(given.work)!r}), {given.family!r}, {given.size!r}, 'fp32'"
        make = f"import families; from pathlib import Path; families.made({wanted})"
    here = Path(__file__).parent
    if not where.exists():
        subprocess.run([sys.executable, "-c", make], cwd=here, check=True)
    for side in given.sides:
        backend, precision, _ = parts(side)
        if backend in ("onnx", "tensorrt"):
            export = (
                "from higen.bundle import Bundle, graph_file; from higen.export.model_graphs import export_model; "
                f"model = Bundle.open({str(where)!r}); p = {precision or 'fp32'!r}; "
                "names = [n for n in model.manifest.stage_names if graph_file(n, p) not in model.files]; "
                "export_model(model, names, precision=p) if names else None"
            )
            subprocess.run([sys.executable, "-c", export], check=True)


def report(sides: list[Side], given: argparse.Namespace) -> list[str]:
    """The lines of the table."""
    ran = [side for side in sides if side.rows and side.name != "gemm"]
    rate = next(
        (side.rows[0]["flops"] / side.median("seconds") for side in sides if side.name == "gemm" and side.rows), 0
    )
    flops = max((row["flops"] for side in ran for row in side.rows), default=0.0)
    lines = [
        "| side | s | range | CPU s | speed | CPU | of the GEMM peak | peak GiB | latents apart (RMS) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side in ran:
        seconds = [row["seconds"] for row in side.rows]
        median, used = side.median("seconds"), side.median("cpu")
        speed, less = ran[0].median("seconds") / median, ran[0].median("cpu") / used
        peak = f"{100 * flops / median / rate:.0f} %" if rate and flops else ""
        memory = max(row["memory"] for row in side.rows)
        lines.append(
            f"| {side.name} | {median:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | {used:.2f} | {speed:.2f} x | "
            f"{less:.2f} x | {peak} | {memory:.1f} | {apart(given, ran[0].name, side.name)} |"
        )
    lines += [f"\n{side.name} did not run: {side.failed}" for side in sides if side.failed]
    return lines


def keep(sides: list[Side], given: argparse.Namespace, lines: list[str]) -> None:
    """Store a run's text, and its medians for the table of the README."""
    medians = {side.name: {"seconds": side.median("seconds"), "cpu": side.median("cpu")} for side in sides if side.rows}
    kept_as = given.work / f"{given.family}-{given.size}"
    kept_as.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept_as.with_suffix(".json").write_text(json.dumps({"shown": lines[0], "medians": medians}), encoding="utf-8")


SHOWN = {
    "reference": "published HiGen",
    "higen_image": "key frame",
    "higen": "clip",
    "stable_diffusion": "Stable Diffusion",
    "animatediff": "AnimateDiff",
    "modelscope": "ModelScope",
    "svd": "Stable Video Diffusion",
    "torch": "higen, PyTorch",
    "onnx": "higen, ONNX",
}
"""Sides and families in the table of the README, if other than their names."""

BEGIN, END = "<!-- benchmarks/against.py -->\n", "<!-- end -->\n"
"""They enclose the table in the README."""


def write_readme(given: argparse.Namespace) -> None:
    """Replace the table in the README by that of all families in WORK: CPU time, as a ratio to the baseline's."""
    text = given.readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{given.readme}: the lines {BEGIN.strip()} and {END.strip()} are wanted once each")
    found = {}
    for family in FAMILIES:
        file = given.work / f"{family}-{given.size}.json"
        if file.is_file():
            found[family] = json.loads(file.read_text(encoding="utf-8"))["medians"]
    if not found:
        raise SystemExit(f"{given.work} has no results of size {given.size}: run the benchmark for a family first")
    names = dict.fromkeys(name for medians in found.values() for name in list(medians)[1:] if name != "gemm")
    rows = [["less CPU time than", *(SHOWN.get(name, name) for name in names)], ["---"] * (len(names) + 1)]
    for family, medians in found.items():
        base = next(iter(medians))
        ratios = [f"{medians[base]['cpu'] / medians[n]['cpu']:.2f}x" if n in medians else "" for n in names]
        rows.append([f"{SHOWN.get(base, base)}, {SHOWN[family]}", *ratios])
    before, _, rest = text.partition(BEGIN)
    table = "".join(f"|{'|'.join(row)}|\n" for row in rows)
    given.readme.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


def apart(given: argparse.Namespace, base: str, side: str) -> str:
    """The relative distance of a side's latents from the baseline's."""
    if side == base:
        return ""
    wanted, found = (np.load(kept(given, name)).astype(np.float64) for name in (base, side))
    return f"{np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)):.1e}"


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time the loops of a model on several sides.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="animatediff")
    parser.add_argument("--size", choices=("full", "small", "tiny"), default="small")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT")
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--sides", type=lambda text: text.split(","))
    parser.add_argument("--as", dest="side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.readme:
        write_readme(given)
        return
    if given.sides is None:
        given.sides = ["reference" if given.family.startswith("higen") else "diffusers", "torch", "onnx", "gemm"]
    if given.side:
        serve(lambda: rows(given.side, given))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    prepare(given)
    sides = [start(side, *sys.argv[1:], "--as", side) for side in given.sides]
    run(sides, given.rounds, warm_up=1)
    from hardware import cores, hardware

    shown = f"{given.family}, {given.size}, {given.steps} steps with guidance; {cores()}; {hardware()}; "
    shown += f"load {os.getloadavg()[0]:.1f}; median of {given.rounds} rounds after a warm-up"
    lines = [shown, "", *report(sides, given)]
    keep(sides, given, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
