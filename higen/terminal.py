"""Shared parts of all commands: errors and warnings as lines or JSON, exit codes, and path types.

Exit codes: 0 done, 1 failed (parity, a stage, the environment, a full or closed output), 2 wrong input, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import click

from higen.errors import (
    FallbackWarning,
    FixtureError,
    HigenError,
    MediaWarning,
    MissingExtra,
    ModelError,
    OutputError,
    PromptWarning,
    RequestError,
    SettingsError,
    raised_in,
)
from higen.memory import enough_memory
from higen.paths import given_path

__all__ = ["JSON", "PATH", "Commands", "LateCommands", "needs", "reported", "say"]

WRONG_INPUT = (RequestError, OutputError, ModelError, FixtureError, SettingsError)
OPTIONAL = ("accelerate", "diffusers", "safetensors", "torch", "transformers")


class _GivenPath(click.Path):
    """A path with ~ for home folders, because shells do not expand the ~ in --model=~/model."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As in click, with ~ as a home folder."""
        return given_path(super().convert(value, param, ctx))


PATH = _GivenPath(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object, errors too.")


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Turn our errors into a line (or JSON) and an exit code, our warnings into a line each; hide library warnings."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        say(f"{category.__name__}: {message}", fg="yellow")

    code = 0
    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        warnings.simplefilter("ignore")
        for ours in (PromptWarning, FallbackWarning, MediaWarning):
            warnings.simplefilter("always", ours)
        try:
            with enough_memory("this command"):
                yield
        except KeyboardInterrupt:
            say("stopped")
            code = 130
        except HigenError as error:
            code = 2 if isinstance(error, WRONG_INPUT) else 1
            if as_json:
                click.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
            else:
                say(f"{type(error).__name__}: {error}", fg="red")
    if code:
        sys.exit(code)


def say(line: str, **style: Any) -> None:
    """Write a line to standard error. If that fails, ignore it: the exit code also tells the result."""
    with suppress(OSError, ValueError):
        click.echo(click.style(line, **style) if style else line, err=True)


@contextmanager
def needs(extra: str, command: str) -> Iterator[None]:
    """Use around a command's late imports: raises MissingExtra if a package of `extra` is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        raise MissingExtra(error.name, extra, command) from error


class Commands(click.Group):
    """A group of commands. With --json, usage errors (such as an unknown option) are JSON, too."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As in click. If an output is full or closed, the command ends with at most one line."""
        with _outputs():
            return self._main(*arguments, **options)

    def _main(self, *arguments: Any, **options: Any) -> Any:
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


class LateCommands(Commands):
    """A group that imports a command's module only when the command is called or listed in the help.

    late: name of the command -> "module:attribute"
    """

    def __init__(self, *arguments: Any, late: Mapping[str, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._late = dict(late)

    def list_commands(self, context: click.Context) -> list[str]:
        """As in click."""
        return sorted({*super().list_commands(context), *self._late})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """As in click."""
        if name not in self._late:
            return super().get_command(context, name)
        module, attribute = self._late[name].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


@contextmanager
def _outputs() -> Iterator[None]:
    """Use around a command: escape characters that an output cannot encode; exit with 1 if one cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # None; not a Python text stream; closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
    except OSError as error:
        if not _is_of_an_output(error):
            raise
        if error.errno != errno.EPIPE:  # the reader closed the pipe early: no message
            say(f"OutputError: standard output cannot be written: {error.strerror}", fg="red")
        sys.exit(1)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if _is_broken(stream):
                _silence(stream)


def _is_of_an_output(error: OSError) -> bool:
    """Whether an error comes from writing to the terminal or a pipe, not from one of our files."""
    return raised_in(error) in ("click._compat", "click.utils", "tqdm.std", "tqdm.utils")


def _is_broken(stream: TextIO | None) -> bool:
    """Whether a stream has text that cannot be flushed."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        return True
    except ValueError:  # it is closed: Python will not report that when it ends
        return False
    return False


def _silence(stream: TextIO) -> None:
    """Send the rest of a stream to os.devnull, because Python flushes the stream again when it ends."""
    with suppress(OSError, ValueError):  # not a system file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
