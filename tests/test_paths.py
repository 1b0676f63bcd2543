"""Paths from users: ~ is the home folder in every path, and the working directory may change."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

import click
import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import higen
from higen.bundle import Bundle
from higen.cli import main
from higen.errors import ManifestError, OutputError, RequestError
from higen.paths import given_path
from higen.terminal import PATH
from higen.video import Video


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a model, a picture and a clip. The working directory is a different folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_model)
    PIL.Image.new("RGB", (24, 16), "red").save(folder / "red.png")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("~", "{home}"),
        ("~/a/b", "{home}/a/b"),
        (Path("~/a"), "{home}/a"),
        ("a/~/b", "a/~/b"),
        ("~no-such-user-of-this-machine/a", "~no-such-user-of-this-machine/a"),
        (PurePosixPath("/a/b"), "/a/b"),
        ("", "."),
    ],
    ids=str,
)
def test_a_home_folder(home: Path, given: Any, path: str) -> None:
    assert given_path(given) == Path(path.format(home=home))


@pytest.mark.parametrize("given", [None, 3, b"bytes", ["a"], np.zeros(3), object()], ids=lambda g: type(g).__name__)
def test_invalid_paths(given: Any) -> None:
    with pytest.raises(RequestError, match=r"^model=.*: a path, as a text or a pathlib\.Path"):
        given_path(given, "model")


@pytest.mark.usefixtures("home")
def test_every_path_that_python_is_given() -> None:
    pipe = higen.load("~/model", "torch")
    assert Bundle.open("~/model").path == pipe.bundle.path == Path.home() / "model"
    video = pipe("a whale", image="~/red.png", steps=1)
    assert video.save("~/whale.webp") == Path.home() / "whale.webp"
    np.testing.assert_array_equal(Video.open("~/whale.webp").frames, video.frames)
    assert list(Path().iterdir()) == []


@pytest.mark.usefixtures("home")
def test_every_path_that_the_command_is_given() -> None:
    """A shell does not expand ~ in --model=~/model."""
    wanted = ["generate", "a whale", "--model=~/model", "-o", "~/whale.npy", "--image=~/red.png", "--steps", "1"]
    result = CliRunner().invoke(main, wanted, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (Path.home() / "whale.npy").is_file()
    assert list(Path().iterdir()) == []
    assert CliRunner().invoke(main, ["generate", "--help", "--model=~/model"]).output.count("--motion") == 1


def test_every_command_takes_paths_of_that_kind() -> None:
    """Every path option has the one type that expands ~."""
    from higen.exporter import main as exporter

    context = click.Context(main)
    for group in (main, exporter, main.get_command(context, "train")):
        assert isinstance(group, click.Group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            for parameter in command.params:
                assert getattr(parameter.type, "name", "") != "path" or parameter.type is PATH, (name, parameter.name)
                assert type(parameter.type).__name__ != "Path", (name, parameter.name)


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_model_loaded_by_a_relative_path_survives_a_change_of_the_folder(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for files that are loaded late, such as the picture encoder."""
    monkeypatch.chdir(higen.api.default_model().parent)
    pipe = higen.load("default", backend, threads=1, prepare=False)
    monkeypatch.chdir(tmp_path)
    picture = np.zeros((32, 32, 3), np.uint8)
    assert len(pipe("a heart", image=picture, steps=1, frames=2, width=32, height=32)) == 2
    stream = pipe.stream("a heart", steps=1, frames=2, width=32, height=32)
    next(stream)
    monkeypatch.chdir("/")
    list(stream)
    assert len(stream.videos[0]) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "higen.json"
    os.mkfifo(pipe)
    with pytest.raises(ManifestError, match="not a regular file"):
        higen.load(tmp_path)
    with pytest.raises(RequestError, match=r"^image"):
        higen.load(prepare=False).request("a heart", image=pipe)
    for suffix in (".mp4", ".gif", ".npy", ".png"):
        clip = tmp_path / f"clip{suffix}"
        os.mkfifo(clip)
        with pytest.raises(OutputError):
            Video.open(clip)
