"""Measures of clips, tested on made-up clips with known answers and on clips that must not score well."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from higen.measures import fidelity
from higen.measures.networks import ClipNetwork, PictureNetwork, fit, kept
from higen.measures.statistics import frechet_distance, spearman
from higen.measures.templates import Templates

Frames = NDArray[np.uint8]
RANDOM = np.random.default_rng(0)


def disc(radius: float, x: float = 32, y: float = 32, colour: tuple[int, int, int] = (220, 40, 40)) -> Frames:
    """A disc on a transparent background, RGBA [64,64,4]."""
    rows, columns = np.mgrid[:64, :64]
    alpha = np.clip(radius - np.hypot(rows - y, columns - x) + 0.5, 0, 1)
    return np.dstack([*(np.full((64, 64), c) for c in colour), np.rint(255 * alpha)]).astype(np.uint8)


def square(half: float, colour: tuple[int, int, int] = (40, 60, 220)) -> Frames:
    rows, columns = np.mgrid[:64, :64]
    inside = (abs(rows - 32) <= half) & (abs(columns - 32) <= half)
    return np.dstack([*(np.full((64, 64), c) for c in colour), 255 * inside]).astype(np.uint8)


def over(loop: Frames, picture: Frames) -> Frames:
    alpha = loop[..., 3:] / 255
    return np.rint(loop[..., :3] * alpha + picture * (1 - alpha)).astype(np.uint8)


def noisy(clip: Frames, deviation: float, blocks: int = 1, same: bool = False) -> Frames:
    """Add coloured noise in square blocks of `blocks` pixels, new in each frame or the `same` in all frames."""
    shape = (1 if same else len(clip), 64 // blocks, 64 // blocks, 3)
    noise = np.random.default_rng(1).normal(0, deviation, shape)
    return np.clip(np.rint(clip + noise.repeat(blocks, 1).repeat(blocks, 2)), 0, 255).astype(np.uint8)


PICTURE = np.full((64, 64, 3), 120, np.uint8)
DISC = np.stack([disc(14 + 5 * np.sin(i / 2)) for i in range(12)])
SQUARE = np.stack([square(12 + 3 * np.sin(i / 2)) for i in range(12)])
BEATING = over(DISC, PICTURE)


# rank correlation and Frechet distance


def test_spearman_of_known_lists() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 25, 100]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [5, 3, 2, -9]) == pytest.approx(-1)
    # Without ties, 1 - 6 sum d^2 / (n (n^2 - 1)): here d = 1, 1, 0, 1, 1.
    assert spearman([1, 2, 3, 4, 5], [2, 1, 3, 5, 4]) == pytest.approx(1 - 6 * 4 / 120)
    # Ties share their mean rank: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman([0, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])


def test_a_constant_list_has_no_correlation() -> None:
    assert spearman([1, 2, 3], [4, 4, 4]) == 0


@pytest.mark.parametrize(("x", "y"), [([1], [1]), ([1, 2], [1, 2, 3]), ([], [])])
def test_spearman_refuses_lists_that_do_not_go_together(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="two lists of the same length"):
        spearman(x, y)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-50, 50), min_size=3, max_size=20))
def test_spearman_depends_only_on_the_order(values: list[int]) -> None:
    other = list(RANDOM.permutation(len(values)))
    stretched = [np.exp(v / 10) for v in values]
    assert spearman(stretched, other) == pytest.approx(spearman(values, other))
    assert -1.0000001 <= spearman(values, other) <= 1.0000001


def test_the_frechet_distance_of_known_gaussians() -> None:
    # The samples are whitened, then scaled and shifted: their moments are exact.
    x = RANDOM.normal(size=(500, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    a, b, shift = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5]), np.array([0.0, 1.0, -2.0])
    # Diagonal covariances: |shift|^2 + sum (s - s')^2.
    assert frechet_distance(x * a, x * b + shift) == pytest.approx(5 + 1 + 0 + 6.25)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_is_blind_to_rotation_and_the_same_both_ways() -> None:
    a, b = RANDOM.normal(size=(60, 4)), RANDOM.normal(size=(40, 4)) * [1, 2, 3, 4] + 1
    turn, _ = np.linalg.qr(RANDOM.normal(size=(4, 4)))
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b))
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))


@pytest.mark.parametrize("shapes", [((3, 2), (3, 4)), ((1, 2), (5, 2)), ((6,), (6,))])
def test_the_frechet_distance_refuses_invalid_features(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        frechet_distance(*(np.zeros(shape) for shape in shapes))


# pixels


def test_psnr_of_a_known_error() -> None:
    assert fidelity.psnr(BEATING, BEATING) == fidelity.BEST
    assert fidelity.psnr(np.full((2, 4, 4, 3), 10, np.uint8), np.full((2, 4, 4, 3), 15, np.uint8)) == pytest.approx(
        10 * np.log10(255**2 / 25)
    )


def test_difference_of_a_known_change() -> None:
    ramp = np.arange(0, 50, 5, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    assert fidelity.difference(ramp) == 5
    assert fidelity.difference(np.repeat(BEATING[:1], 5, axis=0)) == 0


def test_flicker_is_the_deviation_of_noise_and_no_slow_change() -> None:
    everywhere = np.ones((64, 64), bool)
    grey = np.repeat(PICTURE[None], 16, axis=0)
    assert fidelity.flicker(noisy(grey, 8), everywhere) == pytest.approx(8, rel=0.05)
    assert fidelity.flicker(noisy(grey, 8, same=True), everywhere) == 0
    ramp = grey + np.arange(16, dtype=np.uint8)[:, None, None, None]
    assert fidelity.flicker(ramp, everywhere) == 0


def test_flicker_is_measured_within_the_mask() -> None:
    left = np.zeros((64, 64), bool)
    left[:, :20] = True
    clip = np.repeat(PICTURE[None], 8, axis=0)
    clip[::2, :, 40:] += 50
    assert fidelity.flicker(clip, left) == 0
    assert fidelity.flicker(clip, ~left) > 20
    assert fidelity.flicker(clip, np.zeros((64, 64), bool)) == 0


def test_sharpness_of_a_blurred_clip_is_below_one() -> None:
    blurred = nn.functional.avg_pool2d(torch.from_numpy(BEATING.astype(np.float32)).permute(0, 3, 1, 2), 5, 1, 2)
    soft = blurred.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert fidelity.sharpness(BEATING, BEATING) == 1
    assert fidelity.sharpness(soft[:, 8:-8, 8:-8], BEATING[:, 8:-8, 8:-8]) < 0.6
    assert fidelity.sharpness(noisy(BEATING, 20), BEATING) > 1.5


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("same", [True, False])
def test_speckle_of_any_size_is_seen(blocks: int, same: bool) -> None:
    clip = noisy(BEATING, 10, blocks, same)
    assert fidelity.speckle(clip, BEATING) > 2.5
    assert fidelity.speckle(noisy(BEATING, 20, blocks, same), BEATING) > 1.5 * fidelity.speckle(clip, BEATING)


def test_no_speckle_in_a_clip_that_is_real_or_blurred_or_a_little_off() -> None:
    off = over(np.stack([disc(14 + 5 * np.sin((i + 0.3) / 2), x=33.5) for i in range(12)]), PICTURE)
    soft = nn.functional.avg_pool2d(torch.from_numpy(BEATING.astype(np.float32)).permute(0, 3, 1, 2), 3, 1, 1)
    assert fidelity.speckle(BEATING, BEATING) == 0
    assert fidelity.speckle(off, BEATING) < 1
    assert fidelity.speckle(np.rint(soft.permute(0, 2, 3, 1).numpy()).astype(np.uint8)[:, 4:-4, 4:-4],
                            BEATING[:, 4:-4, 4:-4]) < 0.5  # fmt: skip


def test_the_nearest_background_is_found_outside_the_subject() -> None:
    pictures = [np.full((64, 64, 3), level, np.uint8) for level in (60, 120, 180)]
    outside = ~(DISC[..., 3] > 0).any(axis=0)
    for index, picture in enumerate(pictures):
        assert fidelity.nearest(noisy(over(DISC, picture), 15), pictures, outside) == index


# templates


@pytest.fixture(scope="module")
def templates() -> Templates:
    other_colour = np.stack([disc(14, colour=(40, 200, 60))] * 4)
    return Templates([DISC, SQUARE, other_colour], PICTURE)


def test_a_real_frame_matches_its_own_template(templates: Templates) -> None:
    for subject, loop in enumerate((DISC, SQUARE)):
        found = templates.match(over(loop[::2], PICTURE), subject)
        assert found.winner == subject
        assert found.score == pytest.approx(1, abs=1e-3)


def test_a_template_is_blind_to_brightness_and_not_to_colour_or_shape(templates: Templates) -> None:
    darker = (over(DISC[::2], PICTURE) * 0.7).astype(np.uint8)
    assert templates.match(darker, 0).score > 0.99
    assert templates.match(over(np.stack([disc(14, colour=(40, 200, 60))]), PICTURE), 0).winner == 2
    assert templates.match(over(SQUARE, PICTURE), 0).score < 0.6


def test_an_empty_picture_or_noise_matches_nothing(templates: Templates) -> None:
    empty = np.repeat(PICTURE[None], 4, axis=0)
    assert abs(templates.match(empty, 0).score) < 0.05
    assert templates.match(noisy(empty, 60), 0).score < 0.3


def test_a_template_score_is_the_weighted_correlation_it_says() -> None:
    """Compared with a plain numpy formula, for opaque templates at their own size (no reduction)."""
    loop, clip = SQUARE[:1], noisy(over(SQUARE[3:4], PICTURE), 10)
    inside = loop[0, ..., 3] > 0
    ring = np.zeros_like(inside)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            ring |= np.roll(inside, (dy, dx), (0, 1))
    x, t = (frames[0][ring].astype(float).ravel() for frames in (clip, over(loop, PICTURE)))
    assert Templates([loop], PICTURE).scores(clip)[0, 0] == pytest.approx(np.corrcoef(x, t)[0, 1], abs=1e-4)


# networks


def test_the_networks_have_the_shapes_they_say() -> None:
    assert PictureNetwork(5)(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    network = ClipNetwork({"a": 3, "b": 2})
    features = network(torch.zeros(2, 3, 16, 64, 64))
    assert features.shape == (2, 32)
    assert {name: tuple(x.shape) for name, x in network.answers(features).items()} == {"a": (2, 3), "b": (2, 2)}
    assert sum(p.numel() for p in PictureNetwork(49).parameters()) < 0.2e6


def line_loss(network: nn.Linear, random: torch.Generator) -> torch.Tensor:
    x = torch.randn((64, 1), generator=random)
    return (network(x) - (3 * x - 1)).pow(2).mean()


def test_fit_finds_a_line_and_is_deterministic() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        line = fit(nn.Linear(1, 1), line_loss, 400, "line", rate=5e-2)
        assert not line.training
        found.append((line.weight.item(), line.bias.item()))
    assert found[0] == pytest.approx((3, -1), abs=0.02)
    assert found[0] == found[1]


def test_a_network_is_kept_for_its_key(tmp_path: Path) -> None:
    path, made = tmp_path / "line.pt", []

    def make(network: nn.Linear) -> nn.Linear:
        made.append(1)
        nn.init.constant_(network.weight, 7)
        return network

    for _ in range(2):
        assert kept(path, {"data": 1}, nn.Linear(1, 1), make).weight.item() == 7
    assert len(made) == 1
    kept(path, {"data": 2}, nn.Linear(1, 1), make)
    assert len(made) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["line.pt"]


@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_a_broken_network_is_made_again(tmp_path: Path, part: float) -> None:
    path = tmp_path / "line.pt"
    kept(path, {}, nn.Linear(1, 1), lambda network: network)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))] if part < 1 else b"no network")
    made = nn.Linear(1, 1)
    assert kept(path, {}, nn.Linear(1, 1), lambda network: made) is made
    assert torch.equal(kept(path, {}, nn.Linear(1, 1), lambda network: network).weight, made.weight)


def test_two_processes_keep_a_network_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "line.pt", Path.write_bytes

    def interleaved(*given: Any) -> int:
        size = write(*given)
        with monkeypatch.context() as other:
            other.setattr(Path, "write_bytes", write)
            other.setattr(os, "getpid", lambda: -1)
            kept(path, {}, nn.Linear(1, 1), lambda network: network)
        return size

    monkeypatch.setattr(Path, "write_bytes", interleaved)
    kept(path, {}, nn.Linear(1, 1), lambda network: network)
    assert [p.name for p in tmp_path.iterdir()] == ["line.pt"]


def test_a_full_disk_under_a_network_is_the_systems_error(tmp_path: Path) -> None:
    with full_disk(64), pytest.raises(OSError, match="File too large"):
        kept(tmp_path / "line.pt", {}, nn.Linear(1, 1), lambda network: network)
    assert list(tmp_path.iterdir()) == []
