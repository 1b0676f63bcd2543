"""The command `higen-export triton`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from higen.terminal import JSON, PATH, reported

__all__ = ["triton"]


@click.command()
@click.argument("model", type=PATH)
@click.argument("repository", type=PATH)
@click.option("--device", default="cpu", show_default=True, help="Where the stages run: cpu, gpu (every GPU) or gpu:N.")
@click.option("--precision", default="fp32", show_default=True, help="Precision of the graphs: fp32, fp16 or bf16.")
@click.option("--engines", help="Use the TensorRT engines in this folder of MODEL/engines; other stages use graphs.")
@click.option("--max-batch", default=8, show_default=True, help="Largest number of samples in a denoising batch.")
@click.option("--slots", default=16, show_default=True, help="Requests that run at the same time.")
@click.option("--line", default=256, show_default=True, help="Requests that may wait for a slot.")
@click.option("--instances", default=1, show_default=True, help="Copies of each stage that run at the same time.")
@click.option("--threads", type=int, help="Threads of a stage on a CPU.  [ONNX Runtime's choice]")
@JSON
def triton(
    model: Path,
    repository: Path,
    device: str,
    precision: str,
    engines: str | None,
    max_batch: int,
    slots: int,
    line: int,
    instances: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write a Triton model repository for MODEL to the new folder REPOSITORY.

    It has a model for each stage and the model `higen`, which makes videos. Weights are linked, not copied.
    """
    with reported(as_json):
        from higen.bundle import Bundle
        from higen.engines.triton.repository import Settings, write_repository

        settings = Settings(
            device=device,
            precision=precision,
            max_batch=max_batch,
            slots=slots,
            line=line,
            instances=instances,
            threads=threads,
            engines=engines,
        )
        backends = write_repository(Bundle.open(model), repository, settings)
        if as_json:
            click.echo(json.dumps({"repository": str(repository), "backends": backends}))
        else:
            width = max(map(len, backends)) + 2
            for name, backend in backends.items():
                click.echo(f"{name:<{width}}{backend}")
