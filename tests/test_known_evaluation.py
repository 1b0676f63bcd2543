"""The measures of known frames, on made-up models with known results."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from higen.measures.fidelity import BEST
from higen.train.emoji.evaluation.known import CASES, Situation, as_text, known_frames
from higen.train.emoji.evaluation.plan import NORMAL
from higen.train.emoji.evaluation.real_clips import RealClips
from higen.train.emoji.packs import background, clip_indices
from higen.train.emoji.subjects import BACKGROUNDS, FRAMES

Frames = NDArray[np.uint8]
SIDE, LOOP = 32, 60
SITUATIONS = (Situation("normal", NORMAL, 6), Situation("warped", NORMAL, 9, 0.7))


def loop() -> Frames:
    """A disc that moves up and down. It also grows, so no two frames are equal."""
    y, x = (v / SIDE * 2 - 1 for v in np.mgrid[:SIDE, :SIDE].astype(float))
    rows = []
    for i in range(LOOP):
        size = 0.25 + 0.2 * i / LOOP
        alpha = np.clip((size - np.hypot(x, y - 0.4 * np.sin(2 * np.pi * i / LOOP))) * SIDE / 2 + 0.5, 0, 1)
        rows.append(np.dstack([*(np.full_like(x, c) for c in (200, 40, 60)), 255 * alpha]))
    frames: Frames = np.rint(np.stack(rows)).astype(np.uint8)
    return frames


@pytest.fixture(scope="module")
def real() -> RealClips:
    return RealClips([loop()], [20], [background(b.name, SIDE) for b in BACKGROUNDS])


class Maker:
    """A lossless codec; a text gives a black clip."""

    def __call__(self, prompt: str, seed: int, motion: float | None, appearance: float | None) -> Frames:
        assert "whale" in prompt
        return np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)

    def encode(self, clip: Frames) -> NDArray[np.float32]:
        return clip.astype(np.float32).transpose(3, 0, 1, 2)

    def decode(self, latents: NDArray[np.float32]) -> Frames:
        return latents.transpose(1, 2, 3, 0).astype(np.uint8)


class Interpolates(Maker):
    """Interpolates linearly from each given frame to the next, and holds the last one."""

    def through(self, prompt: str, seed: int, frames: Mapping[int, Frames]) -> Frames:
        places = sorted(frames)
        flat = np.stack([frames[i].reshape(-1) for i in places]).astype(float)
        columns = [np.interp(range(FRAMES), places, column) for column in flat.T]
        clip: Frames = np.rint(np.stack(columns, axis=1)).reshape(FRAMES, SIDE, SIDE, 3).astype(np.uint8)
        return clip


class Knows(Maker):
    """Returns the real clip."""

    def __init__(self, real: RealClips) -> None:
        self.real = real

    def through(self, prompt: str, seed: int, frames: Mapping[int, Frames]) -> Frames:
        clips = [self.real.clip(0, b, 1.0, s.later, s.warp) for s in SITUATIONS for b in range(len(BACKGROUNDS))]
        return min(clips, key=lambda clip: float(np.mean([(clip[i] != frame).mean() for i, frame in frames.items()])))


def test_a_model_that_interpolates_is_no_better_than_the_baselines(real: RealClips) -> None:
    found = known_frames(Interpolates(), real, [0], SITUATIONS)
    for case in CASES:
        assert set(found.case(case)) == {"normal", "warped"}
        for row in found.case(case).values():
            assert row.gain == pytest.approx(0, abs=0.1) or (case == "prefix" and row.gain < 0)
            assert row.given == row.given_codec == BEST
            assert row.psnr["text"] < row.psnr["model"] < BEST
            assert row.inside["model"] < row.psnr["model"]
    assert found.prefix["normal"].seam == pytest.approx(0)
    assert found.prefix["normal"].motion < 0.6
    assert found.end > 0.9
    assert "a swapped last frame: Spearman" in as_text(found)


def test_a_model_that_knows_is_at_the_codecs_bound(real: RealClips) -> None:
    found = known_frames(Knows(real), real, [0], SITUATIONS)
    for case in CASES:
        for row in found.case(case).values():
            assert row.psnr["model"] == row.psnr["codec"] == BEST
            assert row.gain > 10
            assert row.inside_gain > 10
            assert row.motion == pytest.approx(1)
    assert found.prefix["normal"].seam == pytest.approx(1, abs=0.8)


def test_a_warped_clip_changes_its_speed_and_keeps_its_mean() -> None:
    even = clip_indices(600, 300, 1.0)
    assert (clip_indices(600, 300, 1.0, warp=0.0, turn=0.3) == even).all()
    for turn in (0.0, 0.25, 0.6):
        warped = clip_indices(600, 300, 1.0, warp=0.7, turn=turn)
        assert warped[8] == 300
        steps = np.diff(warped)
        assert warped[-1] - warped[0] == pytest.approx(45, abs=1)
        assert steps.min() <= 2
        assert 5 <= steps.max() <= 7
