"""`higen evaluate --clips`, for any model: what it measures, and what it refuses before it generates clips."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from training_run import moving_square, write_clips

from higen.cli import main
from higen.measures import fidelity
from higen.measures.features import FEATURES, clip_features
from higen.train.clip_evaluation import REQUESTS, distances
from higen.train.data import list_items
from higen.train.media import Placement, read_video
from higen.video import Video

CAPTIONS = ("a blue whale swimming", "a red heart beating")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data") / "clips", CAPTIONS)


def evaluate(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_a_model_against_clips_of_ones_own(tmp_path: Path, preconditioned_model: Path, clips: Path) -> None:
    output = tmp_path / "measured"
    result = evaluate(preconditioned_model, "--clips", clips, "--output", output, "--backend", "torch", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads((output / "measures.json").read_text()) == found
    assert [row["prompt"] for row in found["rows"]] == list(CAPTIONS)
    for row, item in zip(found["rows"], list_items(clips).items, strict=True):
        real = read_video(item.path, 24, 16, 8, 4, Placement())
        assert row["difference_real"] == pytest.approx(fidelity.difference(real))
        assert row["psnr_real_copy"] == pytest.approx(fidelity.psnr(np.stack([real[2]] * 4), real))
        assert row["beats_copy"] == (row["psnr"] > row["psnr_copy"] + 0.01)
    assert found["means"]["psnr"] == pytest.approx(np.mean([row["psnr"] for row in found["rows"]]))
    assert [(c["cue"], c["clips"]) for c in found["cues"]] == [(cue, 8) for cue in ("motion", "appearance")]
    assert all(-1 <= c["spearman"] <= 1 for c in found["cues"])
    assert len(REQUESTS) == 4
    assert found["distances"]["floor"] is None
    assert (output / "report.md").read_text().startswith("# Clips, measured\n")
    again = evaluate(preconditioned_model, "--clips", clips, "--output", output, "--limit", 1, "--backend", "torch")
    assert again.exit_code == 0, again.output  # the command may replace its own report
    assert json.loads((output / "measures.json").read_text())["distances"] is None


def test_features_in_closed_form() -> None:
    """A chessboard of single pixels with colours that swap in every frame."""
    board = 200 * (np.indices((3, 16, 16)).sum(axis=0) % 2)
    found = dict(zip(FEATURES, clip_features(np.stack([board] * 3, axis=-1).astype(np.uint8)), strict=True))
    assert found["mean of red"] == pytest.approx(100)
    assert found["deviation of blue"] == pytest.approx(np.std(board, ddof=1))
    for name in ("detail", "change"):
        assert found[f"{name} at 1 px"] == pytest.approx(np.log2(200**2 + 0.25))
        assert found[f"{name} at 4 px"] == pytest.approx(-2)


def test_distances_have_no_unit() -> None:
    """If the means differ in one feature by one standard deviation of the real clips, the distance is 1."""
    random = np.random.default_rng(0)
    real = 50 * random.standard_normal((6, len(FEATURES)))
    moved = real.copy()
    moved[:, 4] += real[:, 4].std()
    found = distances({"drawn": list(moved), "codec": list(real), "real": list(real)})
    assert found.drawn == pytest.approx(1, abs=1e-6)
    assert found.codec == pytest.approx(0, abs=1e-6)
    assert found.floor is not None


@pytest.mark.parametrize(
    ("captions", "frames", "said"),
    [
        (("a purple whale",), 6, r"caption 'a purple whale': .*purple"),
        (("a blue whale",), 2, r"clip0\.webm: shorter than 4 frames"),
        (("",), 6, r"caption '': a text is wanted"),
    ],
)
def test_bad_clips_are_named_before_anything_is_drawn(
    tmp_path: Path, tiny_model: Path, captions: tuple[str, ...], frames: int, said: str
) -> None:
    (tmp_path / "clips").mkdir()
    for i, caption in enumerate(captions):
        Video(moving_square(0, frames), 8).save(tmp_path / "clips" / f"clip{i}.webm")
        (tmp_path / "clips" / f"clip{i}.txt").write_text(caption)
    result = evaluate(tiny_model, "--clips", tmp_path / "clips", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert re.search(said, result.stderr.replace("\n", " ")), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--clips, --data: give one of the two"),
        (["--clips", "absent.jsonl"], "--clips: 'absent.jsonl': a folder, or a .jsonl or .csv file that exists"),
        (["--clips", "empty.jsonl"], "--clips: 'empty.jsonl': no usable item"),
        (["--clips", "picture.jsonl"], "--clips: picture.jsonl has no video"),
        (["--clips", "picture.jsonl", "--seeds", "0"], "--seeds=0: a whole number from 1"),
        (["--clips", "picture.jsonl", "--preset", "fast"], "preset='fast': tiny has no presets"),
        (["--clips", "picture.jsonl", "--quick"], "--fetch, --quick: only with --data"),
        (["--data", "emoji", "--limit", "3"], "--limit=3: only with --clips"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    Path("picture.jsonl").write_text('{"path": "a.png", "caption": "a blue whale"}\n')
    result = evaluate(tiny_model, "--output", "out", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not Path("out").exists()


def test_foreign_files_are_kept(tmp_path: Path, tiny_model: Path, clips: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    result = evaluate(tiny_model, "--clips", clips, "--output", tmp_path)
    assert result.exit_code == 2
    assert "was not written by an earlier report" in result.stderr
    assert (tmp_path / "report.md").read_text() == "mine"
