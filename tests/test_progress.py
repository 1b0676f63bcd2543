"""Progress bars: terminals and notebooks show them, and a bar that cannot be written does not stop a generation."""

from __future__ import annotations

import io
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from higen.progress import Progress, is_watched

PARTS = [("draft", 2), ("decode", 1)]


class Shell:
    """IPython's shell in a kernel: a notebook, Colab, an editor."""

    kernel = object()


class Terminal:
    """IPython's shell in a terminal."""


def ipython(monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
    module: Any = types.ModuleType("IPython")
    module.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", module)


def run(shown: bool | None) -> None:
    bars = Progress(PARTS, shown)
    for done in (1, 2, 1):
        bars.reached(done)
    bars.close()


def test_a_notebook_is_watched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ipython(monkeypatch, Shell())
    assert is_watched()
    run(None)
    said = capsys.readouterr().err
    assert "draft   : 100%" in said
    assert "\r" in said
    run(False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shell", [None, Terminal()])
def test_ipython_without_a_kernel_is_watched_only_in_a_terminal(
    shell: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ipython(monkeypatch, shell)
    assert not is_watched()
    run(None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert is_watched()


class Closed(io.StringIO):
    """A standard error stream that a daemon has closed."""

    def __init__(self) -> None:
        super().__init__()
        self.close()


class Full(io.StringIO):
    """A standard error stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [None, Closed(), Full()])
@pytest.mark.parametrize("shown", [None, True, False])
def test_a_standard_error_that_cannot_be_written(
    stream: Any, shown: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    run(shown)
    assert not is_watched()


def test_a_standard_error_that_goes_while_a_bar_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = Progress(PARTS, True)
    for done, stream in ((1, Closed()), (2, None), (1, Full())):
        monkeypatch.setattr(sys, "stderr", stream)
        bars.reached(done)
    bars.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_video_is_made_though_its_bar_cannot_be_written() -> None:
    code = (
        "import higen; v = higen.load(threads=1)('a heart', steps=1, frames=2, width=32, height=32, progress=True);"
        "print(len(v))"
    )
    with Path("/dev/full").open("wb") as full:
        made = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, check=False, timeout=99
        )
    assert made.stdout == b"2\n"
