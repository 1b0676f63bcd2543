"""The noise contract: Philox4x64-10 and Box and Muller, checked against another implementation of both."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higen.noise import frame_noise, normal, offset_noise, row_purpose, shaped

SPATIAL, TEMPORAL, TEMPORAL_OFFSET = 0, 1, 2
"""HiGen's streams (higen/families/higen/spec.py)."""

MASK = 2**64 - 1

# kat_vectors of Random123: counter, key, output.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (MASK, MASK, MASK, MASK),
        (MASK, MASK),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]

# The first eight float32 numbers of each stream for seed 7, as a check for runtimes in other languages.
GOLDEN_SEED = 7
GOLDEN: dict[int, list[float]] = {
    SPATIAL: [-0.14712793, 0.50211215, -1.091101, 0.73758703, -0.73446286, -2.1076498, -1.1331282, -1.0716331],
    TEMPORAL: [-0.34011135, 0.36659575, -0.5645986, 1.0001918, -0.16626114, -0.7965191, 1.2466241, -0.6058427],
    TEMPORAL_OFFSET: [-1.1456288, 0.83353674, -0.265331, -0.5092667, -1.3265778, -0.9514957, 1.0185689, 1.7517806],
}


def philox4x64(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 10) -> tuple[int, ...]:
    """Salmon et al. 2011, section 3.3, in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & MASK, (p0 >> 64) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c0, c1, c2, c3


def other_normal(seed: int, purpose: int, count: int) -> list[float]:
    """The contract of higen/noise.py, computed one number at a time."""
    numbers: list[float] = []
    block = 1
    while len(numbers) < count:
        a, b, c, d = philox4x64((block, 0, 0, 0), (seed, purpose))
        for first, second in ((a, b), (c, d)):
            radius = math.sqrt(-2.0 * math.log(((first >> 11) + 1) * 2.0**-53))
            angle = 2.0 * math.pi * ((second >> 11) * 2.0**-53)
            numbers += [radius * math.cos(angle), radius * math.sin(angle)]
        block += 1
    return numbers[:count]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]) -> None:
    assert philox4x64(counter, key) == output
    # numpy increments the counter before its first block.
    before = (sum(word << (64 * i) for i, word in enumerate(counter)) - 1) % 2**256
    words = np.array([(before >> (64 * i)) & MASK for i in range(4)], dtype=np.uint64)
    raw = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=words).random_raw(4)
    assert tuple(int(word) for word in raw) == output


@pytest.mark.parametrize("purpose", [SPATIAL, TEMPORAL, TEMPORAL_OFFSET])
def test_golden_numbers(purpose: int) -> None:
    assert np.array_equal(normal(GOLDEN_SEED, purpose, 8), np.array(GOLDEN[purpose], np.float32))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, MASK), purpose=st.integers(0, 2) | st.integers(0, MASK), count=st.integers(0, 41))
def test_agrees_with_another_implementation(seed: int, purpose: int, count: int) -> None:
    ours = normal(seed, purpose, count)
    assert ours.dtype == np.float32
    assert ours.shape == (count,)
    # The logarithm and the circle functions of two libraries may differ in the last bit of a float64.
    np.testing.assert_allclose(ours, np.array(other_normal(seed, purpose, count), np.float32), rtol=2e-7, atol=1e-12)


def test_moments() -> None:
    x = normal(3, TEMPORAL, 400_000).astype(np.float64)
    assert abs(x.mean()) < 4 / len(x) ** 0.5
    assert abs((x**2).mean() - 1) < 4 * (2 / len(x)) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / len(x)) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / len(x)) ** 0.5
    assert abs((x[:-1] * x[1:]).mean()) < 4 / len(x) ** 0.5


def test_no_number_is_infinite() -> None:
    # The smallest uniform number is 2^-53, so the largest radius is sqrt(106 log 2).
    assert np.abs(normal(0, SPATIAL, 1_000_000)).max() <= math.sqrt(106 * math.log(2))


def test_streams_do_not_repeat_each_other() -> None:
    streams = [normal(seed, purpose, 4096) for seed in (0, 1, MASK) for purpose in (SPATIAL, TEMPORAL, TEMPORAL_OFFSET)]
    correlation = np.corrcoef(streams)
    assert np.abs(correlation - np.eye(len(streams))).max() < 0.08


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, MASK),
    channels=st.integers(1, 5),
    frames=st.integers(1, 6),
    more=st.integers(0, 6),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_a_longer_clip_begins_with_a_shorter_one(
    seed: int, channels: int, frames: int, more: int, height: int, width: int
) -> None:
    short = frame_noise(seed, TEMPORAL, channels, frames, height, width)
    long = frame_noise(seed, TEMPORAL, channels, frames + more, height, width)
    assert short.shape == (channels, frames, height, width)
    assert short.dtype == np.float32
    assert short.flags.c_contiguous
    assert np.array_equal(long[:, :frames], short)
    offset = offset_noise(seed, TEMPORAL_OFFSET, channels, frames)
    assert offset.shape == (channels, frames, 1, 1)
    assert np.array_equal(offset_noise(seed, TEMPORAL_OFFSET, channels, frames + more)[:, :frames], offset)


def test_order_of_the_numbers() -> None:
    flat = normal(5, SPATIAL, 2 * 3 * 4 * 5)
    noise = frame_noise(5, SPATIAL, channels=3, frames=2, height=4, width=5)
    for frame, channel, y, x in ((0, 0, 0, 0), (0, 0, 0, 1), (0, 2, 3, 4), (1, 0, 0, 0), (1, 1, 2, 3)):
        assert noise[channel, frame, y, x] == flat[((frame * 3 + channel) * 4 + y) * 5 + x]
    offset, flat = offset_noise(5, TEMPORAL_OFFSET, channels=3, frames=2), normal(5, TEMPORAL_OFFSET, 6)
    assert [offset[c, f, 0, 0] for f in range(2) for c in range(3)] == flat.tolist()


@pytest.mark.parametrize("shape", [(7,), (2, 3), (1, 2, 4, 3, 5)])
def test_noise_in_any_shape_has_the_last_axis_fastest(shape: tuple[int, ...]) -> None:
    made = shaped(9, 77, shape)
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, normal(9, 77, math.prod(shape)).reshape(shape))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_noise_with_a_frame_axis_is_drawn_frame_by_frame(axis: int) -> None:
    """A longer clip's noise therefore begins with a shorter clip's noise, at any position of the frame axis."""
    shape = [2, 3, 4, 5]
    made = shaped(9, 77, shape, axis)
    rest = [n for i, n in enumerate(shape) if i != axis]
    frames = normal(9, 77, math.prod(shape)).reshape(shape[axis], *rest)
    np.testing.assert_array_equal(np.moveaxis(made, axis, 0), frames)
    longer = shaped(9, 77, [n + 2 if i == axis else n for i, n in enumerate(shape)], axis)
    np.testing.assert_array_equal(np.take(longer, range(shape[axis]), axis), made)
    assert axis != 1 or np.array_equal(made, np.stack([*frames], axis=1))


def test_a_clips_noise_is_noise_with_a_frame_axis() -> None:
    np.testing.assert_array_equal(shaped(3, 1, (1, 4, 5, 2, 3), 2)[0], frame_noise(3, 1, 4, 5, 2, 3))


def test_a_rows_stream_is_its_own() -> None:
    """docs/manifest.md: purpose + 2^32 (row + 1); a manifest's own purposes are below 2^31."""
    assert row_purpose(5, 0) == 5 + 2**32
    assert row_purpose(5, 9) == 5 + 10 * 2**32
    made = {row_purpose(purpose, row) for purpose in range(40) for row in range(40)}
    assert len(made) == 1600
    assert min(made) > 2**31
