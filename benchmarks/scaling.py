"""How the cost of a video grows with its frames and its pixels: CPU time per part, and memory, with exponents.

    python benchmarks/scaling.py [--model DIR] [--frames 8,16,32,64,128] [--sides 128,192,256] [--windows 16,8]
        [--rounds 3]

Each case runs in its own process with one thread: clips of the given lengths, as a whole and in windows, and clips of
the model's own length at the given sizes. A copy of the model takes as many frames as the longest case. Every round
runs all cases; the figures are medians, after a warm-up in each process. Memory is the growth of the peak over that of
a clip of two frames. The exponent of cost over frames or pixels is the slope of a straight line through the logarithms;
an exponent of 1 is linear. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from hardware import cores
from sides import Side, run, serve, start

import higen
from higen.api import default_model
from higen.bundle import Bundle
from higen.manifest_file import write_manifest


@dataclass(frozen=True)
class Case:
    """A request."""

    group: str
    frames: int
    pixels: int
    """Width and height."""
    windows: tuple[int, int] | None = None


def longer(model: Path, frames: int, where: Path) -> Path:
    """A copy of the model that takes so many frames."""
    opened = Bundle.open(Path(shutil.copytree(model, where)))
    sizes = opened.manifest.sizes
    least, usual, most = sizes.frames
    changed = replace(opened.manifest, sizes=replace(sizes, frames=(least, usual, max(most, frames))))
    write_manifest(where, changed, opened.files, opened.graphs)
    return where


def costs(model: str, frames: int, pixels: int, windows: tuple[int, int] | None) -> Callable[[], dict[str, float]]:
    """Load the model and warm up; returns what runs a request and gives the CPU seconds of its parts, and the growth of
    the peak of memory in MiB.
    """
    pipe = higen.load(model, threads=1, verify=False)
    prompt = pipe.bundle.manifest.prompts[0]
    own = [None] * len(pipe.manifest.loops)  # the loops' own steps, also without windows: no usual preset

    def cost(count: int, given: tuple[int, int] | None) -> dict[str, float]:
        spent: dict[str, float] = {}
        last = time.process_time()
        for event in pipe.stream(prompt, seed=1, steps=own, frames=count, width=pixels, height=pixels, windows=given):
            now = time.process_time()
            part = event.loop if isinstance(event, higen.Step) else "decode"
            spent[part] = spent.get(part, 0.0) + now - last
            last = now
        return spent

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    cost(2, None)
    base = peak()
    return lambda: {**cost(frames, windows), "memory": peak() - base}


def exponent(xs: list[int], ys: list[float]) -> str:
    """The slope of log y over log x."""
    if len(xs) < 2 or min(ys) <= 0:
        return ""
    return f"{np.polyfit(np.log(xs), np.log(ys), 1)[0]:.2f}"


def numbers(text: str) -> list[int]:
    """Comma-separated whole numbers."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure cost over frames and pixels.")
    parser.add_argument("--model", type=Path, default=default_model())
    parser.add_argument("--frames", type=numbers, default=[8, 16, 32, 64, 128])
    parser.add_argument("--sides", type=numbers, default=[128, 192, 256])
    parser.add_argument("--windows", type=numbers, default=[16, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--as", dest="case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        serve(lambda: costs(*json.loads(given.case)))
        return
    sizes = Bundle.open(given.model).manifest.sizes
    window = (given.windows[0], given.windows[1])
    cases = [Case("whole", n, sizes.width) for n in given.frames]
    cases += [Case("windows", n, sizes.width, window) for n in given.frames if n > window[0]]
    cases += [Case("size", sizes.frames[1], side) for side in given.sides]
    with tempfile.TemporaryDirectory() as folder:
        model = str(longer(given.model, max(given.frames), Path(folder) / "model"))
        sides = [start("", "--as", json.dumps([model, c.frames, c.pixels, c.windows])) for c in cases]
        run(sides, given.rounds)
    if failed := next((side.failed for side in sides if side.failed), ""):
        sys.exit(failed)
    print(f"{cores()}, one thread; load {os.getloadavg()[0]:.1f}; median of {given.rounds} rounds\n")
    report(list(zip(cases, sides, strict=True)), [loop.name for loop in Bundle.open(given.model).manifest.loops])


def report(cases: list[tuple[Case, Side]], loops: list[str]) -> None:
    """The table, and the exponents."""
    parts = [*loops, "decode"]
    print(f"| clip | {' | '.join(f'{part}, CPU s' for part in parts)} | memory, MiB |")
    print("|---" * (len(parts) + 2) + "|")
    for case, side in cases:
        how = f" in windows of {case.windows[0]}" if case.windows else ""
        shown = " | ".join(f"{side.median(part):.2f}" for part in parts)
        print(f"| {case.frames} x {case.pixels}x{case.pixels}{how} | {shown} | {side.median('memory'):.0f} |")
    print()
    for group, over in (("whole", "frames"), ("windows", "frames"), ("size", "pixels")):
        chosen = [(case, side) for case, side in cases if case.group == group]
        xs = [case.frames if over == "frames" else case.pixels**2 for case, _ in chosen]
        shown = ", ".join(f"{part} {exponent(xs, [side.median(part) for _, side in chosen])}" for part in parts)
        print(f"Exponents over {over} ({group}): {shown}")


if __name__ == "__main__":
    main()
