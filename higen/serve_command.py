"""The command `higen serve`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from higen.errors import MissingExtra
from higen.terminal import JSON, PATH, reported, say

__all__ = ["serve"]


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all addresses.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on; 0: any free port.")
@click.option(
    "--data", type=PATH, default=Path("higen-serve"), show_default=True, help="Folder of the queue and the videos."
)
@click.option("--backend", help="Where the stages run; see `higen doctor`.  [auto]")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [a GPU if there is one]")
@click.option("--precision", help="Precision of the stages.  [fp32 on a CPU]")
@click.option("--threads", type=int, help="CPU threads of one stage.  [the library's choice]")
@click.option("--memory", help="Bytes of weights loaded at once: 8GB.  [no limit]")
@click.option("--slots", default=8, show_default=True, help="Jobs that run at the same time.")
@click.option("--max-batch", default=8, show_default=True, help="Largest number of samples in a shared batch.")
@click.option(
    "--quota", default="20GB", show_default=True, help="Bytes of results that are kept; the oldest are removed first."
)
@click.option("--max-age", default="7d", show_default=True, help="How long a finished video is kept.")
@click.option("--api-keys", type=PATH, help="File of hashed keys: only requests with one of these keys are answered.")
@click.option("--new-key", metavar="NAME", help="Add a key to the file --api-keys, print it, and exit.")
@click.option(
    "--cors", "origins", multiple=True, metavar="ORIGIN", help="Origin of pages that may call the API; repeatable."
)
@click.option(
    "--allow-host", "hosts", multiple=True, help="Another host name of this server than localhost; repeatable."
)
@click.option("--max-body", default="32MB", show_default=True, help="Largest size of a request in bytes.")
@click.option("--max-frames", default=256, show_default=True)
@click.option(
    "--max-pixels", default=2**21, show_default=True, help="Largest number of pixels of a frame, width times height."
)
@click.option("--max-steps", default=200, show_default=True, help="Largest number of denoising steps of each loop.")
@click.option(
    "--max-queue", default=64, show_default=True, help="Largest number of waiting and running jobs of one key."
)
@click.option(
    "--max-streams", default=256, show_default=True, help="Largest number of event streams and waiting calls."
)
@click.option("--max-connections", default=768, show_default=True)
@JSON
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    data: Path,
    backend: str | None,
    device: str | None,
    precision: str | None,
    threads: int | None,
    memory: str | None,
    slots: int,
    max_batch: int,
    quota: str,
    max_age: str,
    api_keys: Path | None,
    new_key: str | None,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    max_body: str,
    max_frames: int,
    max_pixels: int,
    max_steps: int,
    max_queue: int,
    max_streams: int,
    max_connections: int,
    as_json: bool,
) -> None:
    """Serve MODELs over HTTP with OpenAI's video API. The default is the built-in small model.

    A MODEL is a directory, or NAME=DIRECTORY. Jobs and results outlive the process: see docs/serving.md.
    """
    if new_key is not None and api_keys is None:
        raise click.UsageError("--new-key needs --api-keys FILE")
    with reported(as_json):
        if new_key is not None and api_keys is not None:
            from higen.serve.keys import add_key

            key = add_key(api_keys, new_key)
            click.echo(json.dumps({"name": new_key, "key": key}) if as_json else key)
            return
        try:
            from higen.serve.server import serve as run
        except ModuleNotFoundError as error:
            if (error.name or "higen").partition(".")[0] == "higen":
                raise
            raise MissingExtra(error.name or "fastapi", "serve", "higen serve") from error
        from higen.serve.settings import Limits, Settings, seconds_of, size_of

        settings = Settings(
            folder=data,
            models=models,
            host=host,
            port=port,
            backend=backend,
            device=device,
            precision=precision,
            threads=threads,
            memory=None if memory is None else size_of(memory, "memory"),
            slots=slots,
            max_batch=max_batch,
            quota=size_of(quota, "quota"),
            age=seconds_of(max_age, "max-age"),
            keys=api_keys,
            origins=origins,
            hosts=hosts,
            limits=Limits(
                body=size_of(max_body, "max-body"),
                frames=max_frames,
                pixels=max_pixels,
                steps=max_steps,
                queue=max_queue,
                streams=max_streams,
                connections=max_connections,
            ),
        )
        if not settings.is_local and api_keys is None:
            say(f"{host} can be reached from other machines, and no key is asked for: see --api-keys", fg="yellow")

        def started(host: str, port: int) -> None:
            shown = f"[{host}]" if ":" in host else host
            url = f"http://{shown}:{port}"
            click.echo(json.dumps({"url": url}) if as_json else f"{url}  (the API: {url}/v1; Ctrl-C ends it)")

        run(settings, started)
