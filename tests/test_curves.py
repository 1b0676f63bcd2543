"""Curves from files: a clip or a sound in place of a curve's numbers, and a plot of both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sounds import RATE, beats, write_wav

import higen
from higen import CurveFrom, Pipeline, Video
from higen.bundle import Bundle
from higen.cli import main
from higen.errors import ManifestError, MediaWarning, RequestError
from higen.families.higen import spec
from higen.images import load_picture
from higen.measured_curves import distances, likeness
from higen.media.sound import energy, read_sound
from higen.models.companions import load_autoencoder
from higen.request import make_request
from higen.tables import Control
from higen.train.cues import appearance_similarity, motion_of


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Iterator[Pipeline]:
    with higen.load(tiny_model, device="cpu") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def clip() -> Video:
    """Six frames of noise that fades in, in the tiny model's size, at its rate."""
    noise = np.random.default_rng(0).integers(0, 255, (6, 16, 24, 3))
    return Video((noise * np.array([0, 0.1, 0.1, 0.5, 0.9, 1])[:, None, None, None]).astype(np.uint8), 8)


def latents(model: Path, frames: np.ndarray) -> torch.Tensor:
    """Latents of frames by the autoencoder's own code: [1, C, F, H, W]."""
    bundle = Bundle.open(model)
    config = spec.autoencoder_config(bundle.manifest)
    codec = load_autoencoder(bundle.file(spec.AUTOENCODER), config.kind, config.arguments, torch.float32)
    pixels = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
    with torch.no_grad():
        mean = codec.encode(pixels).latent_dist.mean
    return ((mean - config.shift[0]) * config.scale[0]).transpose(0, 1)[None]


def test_a_clip_gives_the_cues_that_training_measures(pipe: Pipeline, tiny_model: Path, clip: Video) -> None:
    request = pipe.request("a whale", frames=6, motion=clip, appearance=clip)
    truth = latents(tiny_model, clip.frames)
    assert request.controls["motion"].tolist() == pytest.approx(motion_of(truth)[0].tolist(), abs=1)
    features = truth[0].transpose(0, 1).flatten(1)[None]
    np.testing.assert_allclose(request.controls["appearance"], appearance_similarity(features)[0], atol=1e-4)


def test_the_measures_of_latents_are_those_of_training() -> None:
    made = torch.randn(1, 4, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    frames = made[0].transpose(0, 1).numpy()
    assert distances(frames) == motion_of(made)[0].tolist()
    features = made[0].transpose(0, 1).flatten(1)[None]
    np.testing.assert_allclose(likeness(frames), appearance_similarity(features)[0], atol=1e-5)


def test_a_file_and_a_part_of_it_are_as_the_clip(pipe: Pipeline, clip: Video, tmp_path: Path) -> None:
    path = clip.save(tmp_path / "a.webp")
    whole = pipe.request("a whale", frames=6, motion=clip).controls["motion"].tolist()
    assert pipe.request("a whale", frames=6, motion=str(path)).controls["motion"].tolist() == whole
    assert pipe.request("a whale", frames=4, motion=path).controls["motion"].tolist() == whole[:3]
    later = pipe.request("a whale", frames=4, motion=f"{path}:start=0.25").controls["motion"].tolist()
    assert later == whole[2:]
    twice = Video(clip.frames.repeat(2, axis=0), 16)
    assert pipe.request("a whale", frames=6, motion=twice).controls["motion"].tolist() == whole


def test_a_sound_is_mapped_into_the_range(pipe: Pipeline, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", beats(1, (0.25, 0.75)))
    loud = energy(read_sound(path), 7, 8)
    request = pipe.request("a whale", frames=8, motion=path)  # the default is 60, so the range is 0 to twice that
    np.testing.assert_allclose(request.controls["motion"], 120 * loud, rtol=1e-6)
    request = pipe.request("a whale", frames=8, motion=CurveFrom(path, "onsets", low=10, high=30))
    assert [int(v) for v in np.flatnonzero(request.controls["motion"] > 20)] == [2, 6]
    assert request.controls["motion"].min() == 10
    request = pipe.request("a whale", frames=8, appearance=f"{path}:low=0.2")  # a factor per frame, up to 1
    np.testing.assert_allclose(request.controls["appearance"], 0.2 + 0.8 * energy(read_sound(path), 8, 8), rtol=1e-6)
    request = pipe.request("a whale", frames=8, guidance=str(path))  # the spatial loop keeps its own value
    assert request.guidance[0] == 3.0
    np.testing.assert_allclose(request.guidance[1], 1 + 2 * energy(read_sound(path), 8, 8), rtol=1e-6)
    np.testing.assert_allclose(pipe.request("a whale", frames=8, guidance=[5, path]).guidance[1], request.guidance[1])


def test_guidance_from_a_file_is_checked_as_numbers_are(pipe: Pipeline, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", beats(1, (0.0,)))
    with pytest.raises(RequestError, match=r"guidance has 8 numbers: .* one per frame \(1\)"):
        pipe.request("a whale", frames=8, guidance=[path, 3])
    with pytest.raises(RequestError, match="guidance='fast': a number, numbers, or a clip or sound file"):
        pipe.request("a whale", guidance="fast")
    with pytest.raises(RequestError, match=r"guidance='a\.wav': a finite number"):  # a server reads no files
        make_request(pipe.manifest, "a whale", guidance="a.wav", controls={}, load=load_picture)


def test_a_range_is_checked_and_has_defaults() -> None:
    curve = Control("gust", "curve", "how it blows", "sinusoid", low=0, default=3, usual=(1, 5))
    assert curve.span == (1, 5)
    assert replace(curve, usual=None).span == (0, 6)
    assert replace(curve, usual=None, high=9).span == (0, 9)
    assert replace(curve, usual=None, default=None, optional=True).span is None
    for wrong in ((5, 5), (5, 1), (-1, 5), (0, float("nan"))):
        with pytest.raises(ManifestError, match=r"usual=.*: only for a curve: two numbers in its range"):
            replace(curve, usual=wrong)
    with pytest.raises(ManifestError, match="usual="):
        Control("gust", "number", "how it blows", "number", low=0, default=3, usual=(1, 5))


def test_a_sound_that_ends_early_gives_a_warning(pipe: Pipeline, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", beats(0.5, (0.0,)))
    with pytest.warns(MediaWarning, match=r"motion=.*0\.50 s from 0 s on, for a clip of 1\.00 s: the rest is silence"):
        request = pipe.request("a whale", frames=8, motion=path)
    assert request.controls["motion"][4:].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("nothing.wav", "No such file"),
        ("nothing", "a number, numbers, or a clip or sound file; no such file exists"),
        ("empty.wav", "the file is empty"),
        ("silent.wav", "are silent"),
        ("beat.wav:high=x", "high='x': a finite number"),
        ("beat.wav:high=1:high=2", "high is given twice"),
        ("beat.wav:feature=pitch", "feature='pitch': one of 'energy', 'onsets'"),
        ("beat.wav:start=-1", "start=-1.0: a finite number, 0 or more"),
        ("beat.wav:start=9", "ends before 9 s"),
        ("beat.wav:high=-5", "motion='.*': one number"),
        ("clip.gif", "shorter than 8 frames at 8 frames a second"),
        ("clip.gif:start=0.5:high=3", "low, high: a clip is measured in the control's own units"),
        ("none.npy", "no frame in it"),
        ("text.mp4", "not in a supported video format"),
    ],
)
def test_a_file_that_cannot_serve_is_one_error(
    pipe: Pipeline, clip: Video, tmp_path: Path, value: str, reason: str
) -> None:
    write_wav(tmp_path / "silent.wav", np.zeros(2 * RATE))
    write_wav(tmp_path / "beat.wav", beats(2, (0.0,)))
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.mp4").write_text("no video")
    np.save(tmp_path / "none.npy", np.zeros((0, 16, 24, 3), np.uint8))
    clip.save(tmp_path / "clip.gif")
    with pytest.raises(RequestError, match=r"^motion") as raised:
        pipe.request("a whale", frames=8, motion=str(tmp_path / value))
    if "high=-5" not in value:
        assert raised.match(reason)


def test_numbers_and_words_are_as_before(pipe: Pipeline) -> None:
    assert pipe.request("a whale", motion=[1, 2, 3]).controls["motion"].tolist() == [1, 2, 3]
    assert pipe.request("a whale", motion=np.array([1, 2, 3])).controls["motion"].tolist() == [1, 2, 3]
    with pytest.raises(RequestError, match="was not trained without it"):
        pipe.request("a whale", motion="unspecified")


def test_a_control_without_a_range_asks_for_one(preconditioned_model: Path, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", beats(1, (0.0,)))
    with higen.load(preconditioned_model, device="cpu", prepare=False) as pipe:
        with pytest.raises(RequestError, match="names no range for it: add :low=NUMBER:high=NUMBER"):
            pipe.request("a whale", frames=8, motion=str(path))
        assert pipe.request("a whale", frames=8, motion=f"{path}:high=9").controls["motion"].max() == 9


def test_the_built_in_model_names_its_range() -> None:
    manifest = Bundle.open(higen.bundle.default_model()).manifest
    assert {c.name: c.span for c in manifest.controls if c.kind == "curve"} == {
        "motion": (0.0, 300.0),
        "appearance": (0.0, 1.0),
    }


def test_the_picture_shows_both_curves(pipe: Pipeline, tiny_model: Path) -> None:
    video = pipe("a whale", frames=6, steps=1, motion=[10, 20, 30, 20, 10])
    picture = np.asarray(video.plot_cues())
    assert picture.shape == (360, 640, 3)
    blue = (picture == (0x1F, 0x77, 0xB4)).all(axis=2).sum()
    orange = (picture == (0xFF, 0x7F, 0x0E)).all(axis=2).sum()
    assert min(blue, orange) > 200
    np.testing.assert_array_equal(np.asarray(Video(video.frames, 8, video.metadata).plot_cues(pipe)), picture)
    with pytest.raises(RequestError, match="the pipeline that made the clip is not here"):
        Video(video.frames, 8, video.metadata).plot_cues()
    with pytest.raises(RequestError, match="1 frame: at least 2"):
        Video(video.frames[:1], 8).plot_cues(pipe)
    measured, requested = pipe.cues(video)
    assert requested["motion"].tolist() == [10, 20, 30, 20, 10]
    assert (len(measured["motion"]), len(measured["appearance"])) == (5, 6)


def test_the_commands_take_files(tmp_path: Path, tiny_model: Path) -> None:
    sound = write_wav(tmp_path / "a.wav", beats(0.5, (0.0, 0.25)))
    out = tmp_path / "a.mp4"
    options = ["--model", str(tiny_model), "--steps", "1", "--motion", f"{sound}:feature=onsets", "--audio", str(sound)]
    made = CliRunner().invoke(main, ["generate", "a whale", *options, "-o", str(out)])
    assert made.exit_code == 0, made.output
    assert read_sound(out).seconds == pytest.approx(0.5, abs=0.03)
    printed = CliRunner().invoke(main, ["cues", str(sound), "--model", str(tiny_model), "--json"])
    assert printed.exit_code == 0, printed.output
    curves = json.loads(printed.stdout)
    assert curves["controls"]["motion"]["onsets"] == pytest.approx(Video.open(out).metadata["motion"], abs=1e-3)
    shown = CliRunner().invoke(
        main, ["cues", str(sound), "--model", str(tiny_model), "--plot", str(tmp_path / "a.png")]
    )
    assert shown.stdout.splitlines()[0].startswith("energy  ")
    assert (tmp_path / "a.png").is_file()
    for wrong in (["--audio", str(tmp_path / "no.wav")], ["--motion", "quickly"]):
        refused = CliRunner().invoke(main, ["generate", "a whale", *options[:4], *wrong, "-o", str(tmp_path / "b.mp4")])
        assert refused.exit_code == 2
        assert not (tmp_path / "b.mp4").exists()
