"""The commands `higen train` and `higen cues`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from training_run import moving_square, write_clips, write_counted, write_settings

from higen.bundle import Bundle
from higen.cli import main
from higen.errors import RequestError
from higen.train.curves import Curves, as_text, measure
from higen.video import Video


def test_train_takes_a_file_or_a_recipe() -> None:
    shown = CliRunner().invoke(main, ["train", "--help"]).stdout
    assert "CONFIG.toml | RECIPE" in shown
    assert "Train as the file CONFIG says.\n" in shown
    assert "--work" in CliRunner().invoke(main, ["train", "default", "--help"]).stdout
    assert "--fresh" in CliRunner().invoke(main, ["train", "some.toml", "--help"]).stdout
    assert CliRunner().invoke(main, ["train", "default"]).exit_code == 2  # --work is missing


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"run__stepz": 3}, 2, "SettingsError: .*run.stepz: unknown key"),
        ({"data__path": "absent"}, 2, "SettingsError: data.path="),
        ({"model__init": "absent"}, 2, "ManifestError: .*not a model directory"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, tiny_model: Path, changes: dict[str, object], code: int, message: str
) -> None:
    config = write_settings(tmp_path / "train.toml", tiny_model, write_clips(tmp_path / "clips"), **changes)
    result = CliRunner().invoke(main, ["train", str(config)])
    assert result.exit_code == code
    assert result.stderr.count("\n") == 1
    assert re.match(message, result.stderr)
    assert not (tmp_path / "run").exists()


def test_a_run_is_trained_and_exported(tmp_path: Path, tiny_model: Path) -> None:
    config = write_settings(tmp_path / "train.toml", tiny_model, write_clips(tmp_path / "clips"), run__steps=1)
    assert CliRunner().invoke(main, ["train", str(config), "--resume"]).exit_code == 1
    result = CliRunner().invoke(main, ["train", str(config)])
    assert result.stdout.strip() == str(tmp_path / "run" / "model"), result.output
    assert result.stderr.splitlines()[-1].startswith("step 1 of 1: image ")
    result = CliRunner().invoke(main, ["train", str(config), "--export", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert Bundle.open(tmp_path / "out").files == Bundle.open(tmp_path / "run" / "model").files


@pytest.mark.parametrize(
    ("minutes", "message"),
    [
        ("nan", "--codec-minutes=nan: a number of minutes, 0 or more"),
        ("inf", "--codec-minutes=inf: a number of minutes, 0 or more"),
        ("-1", "--codec-minutes=-1: a number of minutes, 0 or more"),
        ("0", "--codec-minutes=0: more than 0, or --start with a model whose codec is to be kept"),
    ],
)
def test_a_codec_that_would_stay_untrained_is_refused_before_any_work(
    tmp_path: Path, minutes: str, message: str
) -> None:
    options = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "model"), "--codec-minutes", minutes]
    result = CliRunner().invoke(main, ["train", "default", *options])
    assert (result.exit_code, result.stderr) == (2, f"SettingsError: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_takes_no_time_for_a_codec_that_it_starts_from(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def run(*arguments: object) -> Bundle:
        given.extend(arguments)
        return Bundle.open(tiny_model)

    monkeypatch.setattr("higen.train.emoji.run.run", run)
    options = ["--work", "w", "--output", "o", "--codec-minutes", "0", "--start", str(tiny_model)]
    result = CliRunner().invoke(main, ["train", "default", *options])
    assert result.stdout == f"{tiny_model}\n", result.output  # the path of the model
    assert given == [Path("w"), Path("o"), None, 0.0, tiny_model, False]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that is still for 4 frames and then moves for 4, at the tiny model's 8 frames per second."""
    moving = moving_square(20, 4, 16, 24)
    frames = np.concatenate([np.repeat(moving[:1], 4, axis=0), moving])
    return Video(frames, 8).save(tmp_path_factory.mktemp("cues") / "video.gif")


def test_the_curves_show_where_a_video_moves(tiny_model: Path, video: Path) -> None:
    curves = measure(Bundle.open(tiny_model), video)
    assert len(curves.motion) == 7
    assert curves.motion[:4] == (0, 0, 0, 0)
    assert min(curves.motion[4:]) > 0
    assert curves.motion_factor == pytest.approx(np.mean(curves.motion), abs=0.05)
    assert curves.appearance[:5] == (1.0,) * 5
    assert max(curves.appearance[5:]) < 1
    assert curves.appearance_factor > 0
    assert len(measure(Bundle.open(tiny_model), video, fps=4, frames=3).appearance) == 3
    with pytest.raises(RequestError, match="shorter than 9 frames"):
        measure(Bundle.open(tiny_model), video, frames=9)
    with pytest.raises(RequestError, match="fps=0: 1 or more frames a second"):
        measure(Bundle.open(tiny_model), video, fps=0)
    with pytest.raises(RequestError, match="at least 2 frames"):
        measure(Bundle.open(tiny_model), video, frames=1)


def test_the_text_has_bars_and_a_table() -> None:
    text = as_text(Curves(4.0, (0.0, 70.0), (1.0, 0.5, -0.75), 35.0, 0.6))
    assert text.splitlines() == [
        "motion      ▁█  mean 35",
        "appearance  █▆▁  factor 0.6",
        "",
        "  time s    motion  appearance",
        "    0.00                 1.000",
        "    0.25         0       0.500",
        "    0.50        70      -0.750",
    ]


def test_cues_prints_plots_and_refuses(tmp_path: Path, tiny_model: Path, video: Path) -> None:
    options = ["cues", str(video), "--model", str(tiny_model)]
    result = CliRunner().invoke(main, [*options, "--plot", str(tmp_path / "plot.png")])
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 4 + 8
    assert result.stderr.startswith("appearance is measured on the latents: if tiny learnt it with OpenCLIP")
    assert result.stderr.count("\n") == 1
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size == (640, 360)
        assert ((np.asarray(plot)[..., 2] > 150) & (np.asarray(plot)[..., 0] < 60)).sum() > 200  # the plotted lines
    numbers = json.loads(CliRunner().invoke(main, [*options, "--json"]).stdout)
    assert len(numbers["motion"]) + 1 == len(numbers["appearance"]) == 8
    assert CliRunner().invoke(main, [*options, "--plot", str(tmp_path / "plot.xyz")]).exit_code == 2
    (tmp_path / "no.mp4").write_bytes(b"no")
    refused = CliRunner().invoke(main, ["cues", str(tmp_path / "no.mp4"), "--model", str(tiny_model)])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("RequestError: ")
    assert refused.stderr.count("\n") == 1


def test_cues_of_a_trimmed_video_are_those_of_what_it_shows(tmp_path: Path, tiny_model: Path) -> None:
    options = ["--model", str(tiny_model), "--json"]
    video = write_counted(tmp_path / "trimmed.mp4", frames=30, cut=17)
    whole = CliRunner().invoke(main, ["cues", str(video), *options])
    assert whole.exit_code == 0, whole.output
    assert len(json.loads(whole.stdout)["appearance"]) == 13


def test_cues_say_what_the_video_was_sampled_at_and_where_it_is_cut(tmp_path: Path, tiny_model: Path) -> None:
    shots = [moving_square(shade, 8) for shade in (20, 200)]
    Video(np.concatenate(shots), 10).save(tmp_path / "a.webm")
    result = CliRunner().invoke(main, ["cues", str(tmp_path / "a.webm"), "--model", str(tiny_model), "--json"])
    numbers = json.loads(result.stdout)
    assert numbers["fps"] == 10
    assert len(numbers["motion"]) == 15
    lines = result.stderr.splitlines()
    assert "the video is sampled at 10 frames a second, not at 8: every n-th frame is used" in lines
    assert lines == [line for line in lines if "appearance" in line] + numbers["notes"]
