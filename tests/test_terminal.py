"""Commands with a full, closed or missing output: they print at most one line and return an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from higen import cli, exporter
from higen.api import default_model
from higen.errors import HigenError, OutOfMemory, RequestError
from higen.terminal import reported

FULL = Path("/dev/full")
RUN = "import sys; sys.argv[1:] = {!r}; from higen.{} import main; main(prog_name='{}')"


def commands() -> list[tuple[str, list[str]]]:
    """The help of every command, and the commands that can run here quickly."""
    found = [("cli", [name, "--help"]) for name in cli.main.list_commands(click.Context(cli.main))]
    found += [("exporter", [name, "--help"]) for name in exporter.main.commands]
    found += [("cli", ["--version"]), ("cli", ["prompts", "--json"]), ("cli", ["doctor"])]
    found += [("cli", ["upgrade", "nowhere", "--json"]), ("cli", ["parity", "nowhere", "--bad", "--json"])]
    return [*found, ("exporter", ["inspect", str(default_model())])]


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_output_is_one_line_and_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run in this process, which is faster. Real processes are tested below."""
    for module, arguments in commands():
        said: list[str] = []
        with FULL.open("w", encoding="utf-8") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            patch.setattr("click.echo", _noting(said))
            with pytest.raises(SystemExit) as caught:
                {"cli": cli.main, "exporter": exporter.main}[module].main(arguments)
        assert caught.value.code == 1, arguments
        assert said == ["OutputError: standard output cannot be written: No space left on device"], arguments


def _noting(said: list[str]):  # type: ignore[no-untyped-def]
    import click

    echo = click.echo

    def noted(message: object = None, *arguments: object, err: bool = False, **options: object) -> None:
        if err:
            said.append(click.unstyle(str(message)))
        else:
            echo(message, *arguments, **options)  # type: ignore[arg-type]

    return noted


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["prompts"], ["prompts", "--json"], ["--help"]])
def test_a_process_with_a_full_output(arguments: list[str]) -> None:
    with FULL.open("wb") as full:
        run = _process(arguments, stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == 1
    assert run.stderr == b"OutputError: standard output cannot be written: No space left on device\n"


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_standard_error_changes_no_exit_code(tmp_path: Path) -> None:
    with FULL.open("wb") as full:
        run = _process(["upgrade", str(tmp_path)], stdout=subprocess.PIPE, stderr=full)
        assert (run.returncode, run.stdout) == (2, b"")
        wanted = ["generate", "a zzz heart", "--steps", "1", "--frames", "1", "-o", str(tmp_path / "x.png")]
        run = _process(wanted, stdout=subprocess.PIPE, stderr=full)
    assert run.returncode == 0
    assert b"1 frames" in run.stdout


@pytest.mark.parametrize("arguments", [["prompts"], ["prompts", "--json"]])
def test_a_reader_that_leaves_early_is_not_an_error(arguments: list[str]) -> None:
    away, home = os.pipe()
    os.close(away)
    try:
        run = _process(arguments, stdout=home, stderr=subprocess.PIPE)
    finally:
        os.close(home)
    assert (run.returncode, run.stderr) == (1, b"")


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors in the child")
def test_closed_outputs(tmp_path: Path) -> None:
    """In this case Python has no sys.stdout and sys.stderr."""
    code = RUN.format(["upgrade", str(tmp_path)], "cli", "higen")
    shell = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code]
    assert subprocess.run(shell, check=False, timeout=100).returncode == 2
    code = RUN.format(["prompts"], "cli", "higen")
    assert subprocess.run([*shell[:-1], code], check=False, timeout=100).returncode == 0


def test_what_an_output_cannot_encode_is_escaped(tmp_path: Path) -> None:
    output = tmp_path / "\u9be8.png"
    wanted = ["generate", "a heart", "--steps", "1", "--frames", "1", "-o", str(output)]
    run = _process(wanted, stdout=subprocess.PIPE, stderr=subprocess.PIPE, PYTHONIOENCODING="latin-1")
    assert run.returncode == 0, run.stderr
    assert b"\\u9be8_0000.png: 1 frames" in run.stdout


def _process(arguments: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **{k: str(options.pop(k)) for k in ("PYTHONIOENCODING",) if k in options}}
    command = [sys.executable, "-c", RUN.format(arguments, "cli", "higen")]
    return subprocess.run(command, env=environment, check=False, timeout=100, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 1, "OutOfMemory: this command: there is too little memory here"),
        (OutOfMemory("load"), 1, "OutOfMemory: load"),
        (RequestError("steps=0"), 2, "RequestError: steps=0"),
        (HigenError("x"), 1, "HigenError: x"),
    ],
)
def test_errors_are_lines(error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, reported(False):
        raise error
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(line)


def test_a_command_is_imported_as_it_is_called() -> None:
    run = "import sys; from higen.cli import main; main(['prompts', '--json'], standalone_mode=False)"
    run += "; late = 'higen.generate_command', 'higen.serve_command', 'higen.train.cli'"
    run += "; sys.exit([name for name in late if name in sys.modules] or 0)"
    assert subprocess.run([sys.executable, "-c", run], capture_output=True).returncode == 0


def test_an_error_of_a_file_of_ours_is_not_taken_for_the_outputs() -> None:
    @cli.main.command("break-a-file", hidden=True)
    def broken() -> None:
        with FULL.open("wb", buffering=0) as file:
            file.write(b"x")

    try:
        result = CliRunner().invoke(cli.main, ["break-a-file"])
    finally:
        del cli.main.commands["break-a-file"]
    assert isinstance(result.exception, OSError)
