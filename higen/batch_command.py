"""The command `higen batch`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from higen.progress import is_watched
from higen.terminal import JSON, PATH, reported, say

__all__ = ["batch"]


@click.command()
@click.argument("rows", type=PATH)
@click.argument("output")
@click.option("--model", type=PATH, help="Model directory.  [the built-in small model]")
@click.option("--format", "kind", default="mp4", show_default=True, help="Format of the videos: mp4 webm gif webp npy.")
@click.option("--backend", help="Where the stages run; see `higen doctor`.  [auto]")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [a GPU if there is one]")
@click.option("--precision", help="Precision of the stages.  [fp32 on a CPU]")
@click.option("--threads", type=int, help="CPU threads of one stage.  [the library's choice; on Ray, --cpus]")
@click.option(
    "--slots", default=1, show_default=True, help="Rows that one model runs at the same time, in shared batches."
)
@click.option("--retries", default=2, show_default=True, help="How often a row that failed is tried again.")
@click.option(
    "--max-failures", default=100, show_default=True, help="End the run after this many failed rows in succession."
)
@click.option("--ray", metavar="ADDRESS", help="Run on a Ray cluster: HOST:PORT, auto, or local (on this machine).")
@click.option("--workers", type=int, help="On Ray: workers, each with its own model.  [as many as fit]")
@click.option("--cpus", type=float, help="On Ray: CPUs of one worker.  [1]")
@click.option(
    "--gpus", type=float, help="On Ray: GPUs of one worker; 0.25: four workers share one.  [1 if there are any]"
)
@JSON
def batch(
    rows: Path,
    output: str,
    model: Path | None,
    kind: str,
    backend: str | None,
    device: str | None,
    precision: str | None,
    threads: int | None,
    slots: int,
    retries: int,
    max_failures: int,
    ray: str | None,
    workers: int | None,
    cpus: float | None,
    gpus: float | None,
    as_json: bool,
) -> None:
    """Make a video of each row of the file ROWS (JSON Lines or CSV), into OUTPUT, a folder or URL.

    A row has a prompt and other options of a request. The same command continues a stopped run. See docs/bulk.md.
    """
    if ray is None and not (workers is cpus is gpus is None):
        raise click.UsageError("--workers, --cpus and --gpus need --ray ADDRESS")
    with reported(as_json):
        from higen.bulk.run import Settings, run

        settings = Settings(
            output,
            model,
            kind,
            max_failures,
            backend=backend,
            device=device,
            precision=precision,
            threads=threads,
            retries=retries,
            slots=slots,
        )
        start = None
        if ray is not None:
            from higen.bulk.ray_pool import Pool, on_ray

            start = on_ray(Pool(ray, workers, cpus, gpus))
        with _bar(not as_json) as progress:
            done = run(rows, settings, start, progress)
        if as_json:
            click.echo(json.dumps(done.as_json()))
        else:
            said = f"{done.made} videos made, {done.kept} were there, {done.failed} rows failed, {done.seconds:.1f} s"
            say(f"{done.index}: {said}")
    if done.failed:
        sys.exit(1)


@contextmanager
def _bar(wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that counts rows, in a terminal or notebook."""
    from tqdm import tqdm

    with tqdm(unit="video", disable=not (wanted and is_watched()), dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.initial = done
            bar.total = total
            bar.update(done - bar.n)

        yield show
