"""Errors and warnings: their messages are short, and they reach another process unchanged."""

from __future__ import annotations

import inspect
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import higen
from higen import errors
from higen.errors import FallbackWarning, HigenError, MissingExtra, PromptWarning, RequestError, quoted

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, (HigenError, Warning))]


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        "\ud800" * 10**6,
        b"x" * 10**6,
        [1] * 10**6,
        [["a" * 1000] * 1000] * 1000,
        {str(i): i for i in range(10**5)},
        10**400,
        -(10**100_000),
        np.zeros((300, 300)),
        torch.zeros(30, 30),
        "many\nlines\n" * 1000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_quoted_value_is_one_line(value: Any) -> None:
    assert len(quoted(value)) <= 120
    assert "\n" not in quoted(value)


def test_a_short_value_is_quoted_as_it_is() -> None:
    values = ("a  b", 3, [1, 2], {"b": 1}, None, 1.5, (True,), "\n")
    assert [quoted(value) for value in values] == list(map(repr, values))


def test_what_cannot_be_shown_is_named_by_its_type() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    assert quoted(Odd()).startswith("<Odd instance")


@pytest.mark.parametrize("kind", [RequestError, PromptWarning, FallbackWarning])
def test_no_message_is_endless(kind: type[Exception]) -> None:
    text = str(kind("a" + "x" * 10**6 + "b"))
    assert len(text) < 2001
    assert (text[0], text[-1]) == ("a", "b")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_arrives_in_another_process(kind: type[Exception]) -> None:
    """A process pool sends an exception from a worker to the parent."""
    made = kind("torch", "torch", "x") if kind is MissingExtra else kind("what is wrong")
    found = pickle.loads(pickle.dumps(made))
    assert (type(found), str(found), vars(found)) == (kind, str(made), vars(made))


def test_the_tree_at_the_top_of_the_file_has_every_error() -> None:
    listed = inspect.getdoc(errors) or ""
    assert [kind.__name__ for kind in CLASSES if kind.__name__ not in listed and kind.__name__[0] != "_"] == []
    assert {kind.__name__ for kind in CLASSES if kind.__name__[0] != "_"} <= set(errors.__all__)


class TooLong(Exception):
    """The time limit of a user's program."""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals")
@pytest.mark.parametrize("kind", [TooLong, TimeoutError])
def test_a_signal_handlers_error_is_passed_on(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error passes through unchanged from the middle of a stage and from an encoder."""

    def stop(*_: object) -> None:
        raise kind("too long")

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with higen.load(backend="onnx", threads=1) as pipe:
            run = onnxruntime.InferenceSession.run_with_iobinding

            def interrupted(*arguments: Any) -> None:
                run(*arguments)
                os.kill(os.getpid(), signal.SIGUSR1)

            with monkeypatch.context() as patch:
                patch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", interrupted)
                with pytest.raises(kind, match="too long"):
                    pipe("a heart", steps=1, frames=2, width=32, height=32)
        clip = higen.Video(np.zeros((2, 8, 8, 3), np.uint8), 8)
        monkeypatch.setattr("numpy.save", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(kind, match="too long"):
            clip.save(tmp_path / "a.npy")
        assert list(tmp_path.iterdir()) == []
    finally:
        signal.signal(signal.SIGUSR1, before)
