"""Times a generation, part by part, as ratios against baselines measured in the same run.

    python benchmarks/generate.py [--model DIR] [--repeats 5]

The hardware is named in the output. Each figure is the median over the repeats, after one warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hardware import cores

import higen
from higen.api import default_model
from higen.backends.select import availability
from higen.bundle import Bundle


def median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of `run` over the repeats, after a warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def process(code: str) -> Callable[[], object]:
    """A fresh Python that runs `code`."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time a generation.")
    parser.add_argument("--model", type=Path, default=default_model(), help="model directory")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(cores())

    bare = median(process("pass"), arguments.repeats)
    imported = median(process("import higen"), arguments.repeats)
    print(f"import higen        {imported - bare:6.3f} s over an empty Python's {bare:.3f} s")

    prompt = Bundle.open(arguments.model).manifest.prompts[0]
    baseline = None
    for backend in [a.backend for a in reversed(availability()) if a.works]:  # torch comes first, as the baseline
        start = time.perf_counter()
        with higen.load(arguments.model, backend) as pipe:
            loading = time.perf_counter() - start
            total = median(lambda pipe=pipe: pipe(prompt, progress=False), arguments.repeats)
            parts = pipe(prompt, progress=False).metadata["seconds"]
        baseline = baseline or total
        shares = ", ".join(f"{part} {100 * spent / sum(parts.values()):.0f} %" for part, spent in parts.items())
        print(
            f"{backend:<8} a video   {total:6.2f} s ({total / baseline:.2f} x torch), loading {loading:.2f} s; {shares}"
        )


if __name__ == "__main__":
    main()
