"""How the commands talk: errors and warnings as lines or JSON, and exit codes.

0 done, 1 failed (parity, a stage, the environment), 2 wrong input, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from higen.errors import (
    FallbackWarning,
    FixtureError,
    HigenError,
    MissingExtra,
    ModelError,
    OutputError,
    PromptWarning,
    RequestError,
    SettingsError,
)

__all__ = ["JSON", "Commands", "needs", "reported"]

WRONG_INPUT = (RequestError, OutputError, ModelError, FixtureError, SettingsError)
OPTIONAL = ("accelerate", "diffusers", "safetensors", "torch", "transformers")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object, errors too.")


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Turn our errors into one line (or JSON) and an exit code, our warnings into a line each; hide the libraries'."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        click.secho(f"{category.__name__}: {message}", fg="yellow", err=True)

    code = 0
    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        warnings.simplefilter("ignore")
        for ours in (PromptWarning, FallbackWarning):
            warnings.simplefilter("always", ours)
        try:
            yield
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            code = 130
        except HigenError as error:
            code = 2 if isinstance(error, WRONG_INPUT) else 1
            if as_json:
                click.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
            else:
                click.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
    if code:
        sys.exit(code)


@contextmanager
def needs(extra: str, command: str) -> Iterator[None]:
    """Around the late imports of a command: raises MissingExtra where a package of `extra` is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        raise MissingExtra(error.name, extra, command) from error


class Commands(click.Group):
    """A group of commands whose usage errors (an unknown option, say) are JSON too where --json is given."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As click's."""
        args = arguments[0] if arguments else options.get("args")
        given = sys.argv[1:] if args is None else list(args)
        if not options.get("standalone_mode", True) or "--json" not in given:
            return super().main(*arguments, **options)
        try:
            code: Any = super().main(*arguments, **{**options, "standalone_mode": False})
        except click.ClickException as error:
            click.echo(json.dumps({"error": type(error).__name__, "message": error.format_message()}))
            code = error.exit_code
        sys.exit(code if isinstance(code, int) else 0)
