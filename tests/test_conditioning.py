"""Cues as arrays, compared with closed forms, the reference's tables and torch's interpolation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from higen.conditioning import (
    Curve,
    curve_rows,
    curve_values,
    frequencies,
    resample_in_time,
    similarity_rows,
    sinusoid,
    sinusoid_rows,
)
from higen.errors import RequestError
from higen.models.layers import Sinusoid

MISC = load_file(Path(__file__).parent / "reference" / "fixtures" / "misc.safetensors")


def motion_values(value: Curve, frames: int) -> NDArray[np.float32]:
    """HiGen's motion cue: a curve with values of at least 0."""
    return curve_values("motion", value, frames, low=0.0)


def motion_cue(value: Curve, frames: int, dim: int) -> NDArray[np.float32]:
    return sinusoid_rows(None if value is None else motion_values(value, frames), frames, dim)


def appearance_rows(value: Curve, frames: int, columns: int) -> NDArray[np.float32]:
    """HiGen's appearance cue: similarities."""
    return similarity_rows("appearance", value, frames, columns)


@pytest.mark.parametrize("dim", [32, 64, 320])
def test_sinusoid_equals_the_references(dim: int) -> None:
    np.testing.assert_allclose(sinusoid(MISC["sinusoid_t"], dim), MISC[f"sinusoid_dim{dim}"], atol=2e-7, rtol=0)


@pytest.mark.parametrize("dim", [2, 5, 32, 33])
def test_sinusoid_closed_form(dim: int) -> None:
    values = np.array([[0.0, 1.0, 37.5], [500.0, 981.0, 999.0]])
    half = dim // 2
    table = sinusoid(values, dim)
    assert table.shape == (2, 3, dim)
    assert table.dtype == np.float32
    for k in range(half):
        angle = values * 10000.0 ** (-k / half)
        # The angle is rounded to float32 as in the reference; near 1000 the rounding error is 3e-5.
        np.testing.assert_allclose(table[..., k], np.cos(angle), atol=1e-4)
        np.testing.assert_allclose(table[..., half + k], np.sin(angle), atol=1e-4)
    assert dim % 2 == 0 or not table[..., -1].any()


def test_the_networks_sinusoid_is_the_same() -> None:
    t = np.arange(0, 1000, 7)
    network = Sinusoid(320)(torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(network, sinusoid(t, 320), atol=2e-7, rtol=0)
    assert frequencies(320)[0] == 1.0


@settings(max_examples=60, deadline=None)
@given(given_rows=st.integers(1, 70), frames=st.integers(1, 70), seed=st.integers(0, 99))
def test_resampling_equals_torchs_linear_interpolation(given_rows: int, frames: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((given_rows, 4)).astype(np.float32)
    wanted = F.interpolate(torch.from_numpy(vectors.T[None]), size=frames, mode="linear", align_corners=False)[0].T
    np.testing.assert_allclose(resample_in_time(vectors, frames), wanted.numpy(), atol=2e-5, rtol=0)


def test_resampling_by_hand() -> None:
    rows = np.array([[0.0], [1.0], [3.0]], np.float32)
    # Positions (i + .5) 3/4 - .5 are -1/8, 5/8, 11/8, 17/8; the first and the last are clamped.
    np.testing.assert_allclose(resample_in_time(rows, 4)[:, 0], [0.0, 0.625, 1.75, 3.0])


def test_motion_is_resampled_after_the_sinusoid() -> None:
    motion = [0.0, 500.0, 100.0]
    cue = motion_cue(motion, 4, 32)
    np.testing.assert_allclose(cue, resample_in_time(sinusoid(np.array(motion), 32), 4))
    before = sinusoid(resample_in_time(np.array(motion, np.float32)[:, None], 4)[:, 0], 32)
    assert np.abs(cue - before).max() > 0.5


@pytest.mark.parametrize("frames", [1, 2, 3, 32])
def test_one_motion_for_all_frames(frames: int) -> None:
    cue = motion_cue(500, frames, 32)
    assert cue.shape == (frames, 32)
    np.testing.assert_allclose(cue, np.broadcast_to(sinusoid([500.0], 32), (frames, 32)), atol=1e-6)


def test_motion_per_pair_and_per_frame() -> None:
    assert motion_values([1, 2, 3], 4).tolist() == [1, 2, 3]
    assert motion_values([1, 2, 3, 4], 4).tolist() == [1, 2, 3, 4]
    assert motion_values(np.float64(7.5), 3).tolist() == [7.5, 7.5]
    assert motion_values([9], 1).tolist() == [9]
    np.testing.assert_allclose(motion_cue([1, 2, 3, 4], 4, 32), sinusoid([1.0, 2.0, 3.0, 4.0], 32))


def test_unspecified_motion_differs_from_every_value() -> None:
    cue = motion_cue(None, 5, 32)
    assert cue.shape == (5, 32)
    assert not cue.any()
    # Every value gives pairs with cos^2 + sin^2 = 1, so the zeros differ from all values.
    assert np.isclose((motion_cue(3.0, 5, 32) ** 2).sum(), 5 * 16)


@pytest.mark.parametrize("motion", [[1, 2], [1, 2, 3, 4, 5], [], [[1, 2, 3]], -1.0, [1, -1, 1], np.nan, np.inf, "much"])
def test_wrong_motion(motion: object) -> None:
    with pytest.raises(RequestError, match=r"motion.*one number, 3 \(one per pair"):
        motion_values(motion, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_appearance_equals_the_references_at_32_frames(factor: float) -> None:
    rows = appearance_rows(factor, 32, 32)
    np.testing.assert_allclose(rows, MISC[f"appearance_f32_a{factor}"], atol=1e-7, rtol=0)
    i, k = np.mgrid[:32, :32]
    np.testing.assert_allclose(rows, 1 - factor * np.abs(i - k) / 31, atol=1e-7, rtol=0)


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(2, 100), factor=st.floats(-2, 2), columns=st.sampled_from([32, 5]))
def test_appearance_closed_form(frames: int, factor: float, columns: int) -> None:
    rows = appearance_rows(factor, frames, columns)
    assert rows.shape == (frames, columns)
    assert rows.dtype == np.float32
    i, k = np.arange(frames)[:, None] / (frames - 1), np.arange(columns) / (columns - 1)
    np.testing.assert_allclose(rows, 1 - factor * np.abs(i - k), atol=1e-6)


def test_appearance_of_a_longer_clip_is_the_same_in_relative_time() -> None:
    np.testing.assert_allclose(appearance_rows(0.7, 63, 32)[::2], appearance_rows(0.7, 32, 32), atol=1e-7)


def test_one_frame_looks_like_itself() -> None:
    assert appearance_rows(1.0, 1, 32).tolist() == [[1.0] * 32]
    assert appearance_rows(0.3, 1, 32).tolist() == [[1.0] * 32]


def test_appearance_per_frame() -> None:
    rows = appearance_rows([0.0, 0.5, 1.0], 3, 32)
    for i, factor in enumerate((0.0, 0.5, 1.0)):
        np.testing.assert_array_equal(rows[i], appearance_rows(factor, 3, 32)[i])


def test_appearance_matrices() -> None:
    given_rows = np.random.default_rng(0).random((5, 32))
    np.testing.assert_array_equal(appearance_rows(given_rows, 5, 32), given_rows.astype(np.float32))
    # A matrix between frames is resampled to the columns. For a single factor the closed form is piecewise linear.
    between = appearance_rows(0.8, 5, 5)
    resampled = appearance_rows(between, 5, 32)
    at = np.linspace(0, 31, 5)
    for i in (0, 4):  # the first and last rows are linear throughout
        np.testing.assert_allclose(resampled[i], 1 - 0.8 * np.abs(np.arange(32) - at[i]) / 31, atol=1e-6)
    np.testing.assert_allclose(resampled[:, 0], between[:, 0])
    np.testing.assert_allclose(resampled[:, 31], between[:, 4])


def test_unspecified_appearance_gives_only_the_position() -> None:
    np.testing.assert_allclose(appearance_rows(None, 5, 32), appearance_rows(1.0, 5, 32) - 1, atol=1e-7)


@pytest.mark.parametrize(
    "appearance",
    [[1.0, 0.5], [[1.0, 2.0]], np.zeros((32, 4)), np.zeros((4, 31)), np.nan, [np.inf] * 4, "still", [[1], [1, 2]]],
)
def test_wrong_appearance(appearance: object) -> None:
    with pytest.raises(RequestError, match=r"appearance.*one number, 4 numbers, or a matrix \[4, 32\] or \[4, 4\]"):
        appearance_rows(appearance, 4, 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [[-3.0, 0, 1], [0, 1, 2.5], 2.5, -2.5])
def test_a_curve_keeps_to_its_range(value: Curve) -> None:
    assert curve_values("shake", [-2, 0, 2], 4, -2.0, 2.0).tolist() == [-2, 0, 2]
    with pytest.raises(RequestError, match=r"^shake=.*each finite and >= -2 and <= 2$"):
        curve_values("shake", value, 4, -2.0, 2.0)
    assert curve_values("shake", value, 4).shape == (3,)  # without a range any finite number is allowed


def test_a_curve_as_rows() -> None:
    """F - 1 numbers are resampled to F; F numbers are taken as they are."""
    np.testing.assert_array_equal(curve_rows(curve_values("shake", [1, 2, 4], 3), 3), [1, 2, 4])
    np.testing.assert_allclose(curve_rows(curve_values("shake", [1, 3], 3), 3), [1, 2, 3], atol=1e-6)
    np.testing.assert_array_equal(curve_rows(curve_values("shake", 0.5, 7), 7), np.full(7, 0.5, np.float32))
    assert curve_rows(curve_values("shake", [8], 1), 1).tolist() == [8]
