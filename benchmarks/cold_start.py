"""Times a cold process up to a saved video: seconds and share of each part, the loop's own overhead, peak memory.

    python benchmarks/cold_start.py [--model DIR] [--backend auto] [--threads N] [--guidance G] [--repeats 3]
    python benchmarks/cold_start.py --against CHECKOUT --repeats 7      # the command of another commit, in turn

Each repeat is a fresh process. The parts of the process with the median total are shown, and the hardware is named. The
loop's overhead is the time that the denoising loops take beyond their stages. Guidance decides which graphs are loaded:
steps with one branch for guidance 1, steps with both branches otherwise.

With `--against` the command `higen generate` is timed from the shell to the file on three sides: this checkout, this
checkout without the cache of optimised graphs, and the other checkout. Wall and CPU time are printed, each as median
and range. The first run of each side is not counted. Python's bytecode is kept in a separate folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hardware import cores


def child(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process does: import, load, generate, save; each part's seconds."""
    parts, last = {}, arguments["started"]

    def passed(part: str) -> None:
        nonlocal last
        now = time.time()
        parts[part], last = now - last, now

    passed("python")  # time since the parent's call
    import higen
    from higen.api import default_model

    model = arguments["model"] or default_model()
    pipe = higen.load(model, arguments["backend"], threads=arguments["threads"], prepare=False)
    wish = {"prompt": pipe.manifest.prompts[0], "guidance": arguments["guidance"]}
    pipe.prepare(pipe.request(**wish))
    passed("import and load")
    in_stages: dict[str, float] = {}
    run = pipe.backend.run

    def timed(stage: str, /, **tensors: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(stage, **tensors)
        finally:
            in_stages[stage] = in_stages.get(stage, 0.0) + time.perf_counter() - start

    pipe.backend.run = timed  # type: ignore[method-assign]
    manifest = pipe.manifest
    video = pipe(**wish, progress=False)
    last = time.time()
    parts |= video.metadata["seconds"]
    video.save(arguments["output"])
    passed("save")
    loops = sum(parts[loop.name] for loop in manifest.loops if loop.name in parts)
    inside = sum(spent for stage, spent in in_stages.items() if stage != manifest.sizes.decoder)
    peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return {
        "parts": parts,
        "total": time.time() - arguments["started"],
        "overhead": (loops - inside) / loops,
        "peak_mb": int(peak[0].split()[1]) * 1024 / 1e6 if peak else None,
        "backend": pipe.backend.name,
        "torch": "torch" in sys.modules,
        "stages": list(in_stages),
    }


PROMPT = "a whale flapping its tail on a blue sky"


def compare(other: str, repeats: int, output: str) -> None:
    """Time the command here and in another checkout, in turn."""
    here = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as folder:
        common = {**os.environ, "PYTHONPYCACHEPREFIX": f"{folder}/bytecode"}
        common.pop("PYTHONDONTWRITEBYTECODE", None)
        sides = {
            "here": {"PYTHONPATH": here, "HIGEN_CACHE": f"{folder}/cache"},
            "without cache": {"PYTHONPATH": here, "HIGEN_CACHE": "off"},
            "there": {"PYTHONPATH": other},
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for repeat in range(repeats + 1):
            for name, variables in sides.items():
                start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                command = [sys.executable, "-m", "higen", "generate", PROMPT, "-o", str(Path(output).absolute())]
                # In another folder than a checkout: `-m` prefers the package in the current folder.
                subprocess.run(command, env={**common, **variables}, check=True, capture_output=True, cwd=folder)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                if repeat:
                    times[name].append((time.perf_counter() - start, cpu))
    print(f"{repeats} runs of each, load {os.getloadavg()[0]:.1f}")
    print("|  | wall, s | CPU, s |\n|---|---|---|")
    for name, measured in times.items():
        shown = [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in zip(*measured, strict=True)]
        print(f"| {name} | {' | '.join(shown)} |")


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time a cold start.")
    parser.add_argument("--model", help="model directory")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--guidance", type=float, help="guidance of every loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="cold_start.mp4", help="the video; rewritten by each repeat")
    parser.add_argument("--against", metavar="CHECKOUT", help="a checkout of another commit")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(child(arguments.child)))
        return
    print(cores())
    if arguments.against is not None:
        compare(str(Path(arguments.against).resolve()), arguments.repeats, arguments.output)
        return
    runs = []
    for _ in range(arguments.repeats):
        given = {name: getattr(arguments, name) for name in ("model", "backend", "threads", "guidance", "output")}
        command = [sys.executable, __file__, "--child", json.dumps({**given, "started": time.time()})]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    shown = sorted(runs, key=lambda one: one["total"])[len(runs) // 2]
    for part, seconds in shown["parts"].items():
        print(f"{part:<16}{seconds:7.2f} s{100 * seconds / shown['total']:6.0f} %")
    totals = ", ".join(f"{one['total']:.2f}" for one in runs)
    print(f"{'total':<16}{shown['total']:7.2f} s   all runs: {totals}")
    print(f"loop overhead   {100 * shown['overhead']:7.2f} %")
    print(f"peak memory     {shown['peak_mb']:7.0f} MB   backend {shown['backend']}, torch imported: {shown['torch']}")
    print(f"stages          {', '.join(shown['stages'])}")


if __name__ == "__main__":
    main()
