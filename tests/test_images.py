"""Pictures and clips from the user: scaled, cropped, and resampled for CLIP as Stable Video Diffusion does."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

from higen.errors import RequestError
from higen.images import load_clip, load_image, load_picture, resampling
from higen.tables import Control
from higen.video import Video

SKETCH, FOOTAGE = Control("sketch", "picture", "a drawing"), Control("footage", "clip", "what it starts with")


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "to_height", "to_width"),
    [(576, 1024, 224, 224), (64, 40, 24, 32), (33, 31, 16, 8), (20, 17, 33, 40), (24, 24, 24, 24), (9, 12, 1, 2)],
)
def test_resampling_equals_diffusers(height: int, width: int, to_height: int, to_width: int) -> None:
    pixels = load_image(picture(height, width), width, height)
    theirs = _resize_with_antialiasing(torch.from_numpy(pixels)[None], (to_height, to_width))[0].numpy()
    ours = resampling(height, to_height) @ pixels.astype(np.float64) @ resampling(width, to_width).T
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("size", "to"), [(1, 1), (1, 5), (2, 7), (3, 1), (50, 7), (7, 50), (1024, 224)])
def test_resampling_keeps_one_colour(size: int, to: int) -> None:
    matrix = resampling(size, to)
    assert matrix.shape == (to, size)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)


def test_resampling_has_its_corners_aligned() -> None:
    """Without shrinking, the Gaussian is a point: the ends stay fixed, and a straight line stays straight."""
    line = np.linspace(-1, 1, 9)
    np.testing.assert_allclose((resampling(9, 17) @ line)[2:-2], np.linspace(-1, 1, 17)[2:-2], atol=1e-12)
    np.testing.assert_allclose((resampling(9, 17) @ line)[[0, -1]], [-1, 1], atol=1e-12)


@pytest.mark.parametrize("wrap", [np.float32, np.float64, torch.tensor, lambda values: torch.tensor(values).double()])
def test_floats_from_0_to_1_are_the_bytes_of_the_same_picture(wrap: Callable[[np.ndarray], object]) -> None:
    pixels = picture(16, 24)
    np.testing.assert_array_equal(load_image(wrap(pixels / np.float32(255)), 24, 16), load_image(pixels, 24, 16))
    np.testing.assert_array_equal(load_image(torch.from_numpy(pixels), 24, 16), load_image(pixels, 24, 16))
    clip = np.stack([pixels] * 3)
    np.testing.assert_array_equal(load_clip(wrap(clip / np.float32(255)), 2, 24, 16), load_clip(clip, 2, 24, 16))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0), (0.0, np.inf), (np.nan, 1.0)])
def test_floats_of_another_range_are_refused_with_theirs(low: float, high: float) -> None:
    pixels = np.full((8, 8, 3), low)
    pixels[0, 0, 0] = high
    with pytest.raises(RequestError, match=r"^sketch has values from .* to .*: uint8 \[H,W,3\] is wanted, or floats"):
        load_image(pixels, 8, 8, "sketch")
    np.testing.assert_array_equal(load_image(np.full((8, 8, 3), 1.0005), 8, 8), np.ones((3, 8, 8), np.float32))


def test_a_picture_covers_the_size_and_is_cropped_in_the_middle() -> None:
    wide = np.zeros((16, 72, 3), np.uint8)
    wide[:, 24:48] = 255
    np.testing.assert_array_equal(load_image(wide, 24, 16), np.ones((3, 16, 24), np.float32))
    tall = np.zeros((48, 12, 3), np.uint8)
    tall[20:28] = (255, 0, 255)
    np.testing.assert_array_equal(load_image(tall, 12, 8)[:, 0, 0], [1, -1, 1])


def test_the_scale_of_the_pixels() -> None:
    shades = np.array([0, 1, 127, 128, 255], np.uint8).repeat(3).reshape(1, 5, 3)
    np.testing.assert_allclose(load_image(shades, 5, 1)[0, 0], np.array([0, 1, 127, 128, 255]) / 127.5 - 1, atol=1e-7)
    assert load_image(shades, 5, 1).dtype == np.float32


def png(width: int, height: int) -> bytes:
    """A file that claims this size but holds one line."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_file_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    with pytest.raises(RequestError, match=r"^sketch='.*bomb\.png': cannot be read as a picture"):
        load_picture(SKETCH, tmp_path / "bomb.png", 1, 8, 8)


def test_the_control_is_named(tmp_path: Path) -> None:
    for bad in (7, tmp_path / "nowhere.png", np.zeros((2, 2)), PIL.Image.new("RGB", (0, 0))):
        with pytest.raises(RequestError, match=r"^sketch"):
            load_picture(SKETCH, bad, 1, 8, 8)
        with pytest.raises(RequestError, match=r"^footage"):
            load_picture(FOOTAGE, bad, 1, 8, 8)


def test_a_digest_tells_pictures_apart() -> None:
    one, again, other = (load_picture(SKETCH, p, 1, 8, 8) for p in (picture(8, 8), picture(8, 8), 255 - picture(8, 8)))
    assert one.digest == again.digest != other.digest
    assert len(one.digest) == 16


# Clips


def test_a_clip_is_a_file_or_a_video_or_frames(tmp_path: Path) -> None:
    frames = np.stack([picture(16, 24) // (i + 1) for i in range(6)])
    video = Video(frames, 8)
    video.save(tmp_path / "clip.npy")
    video.save(tmp_path / "clip.webp")
    expected = np.stack([load_image(frame, 12, 8) for frame in frames[:4]], axis=1)
    for form in (frames, video):
        made = load_clip(form, 4, 12, 8)
        assert made.shape == (3, 4, 8, 12)
        assert made.flags.c_contiguous
        np.testing.assert_array_equal(made, expected)
    from_file = load_clip(tmp_path / "clip.webp", 4, 12, 8)
    saved = Video.open(tmp_path / "clip.webp").frames
    np.testing.assert_array_equal(from_file, np.stack([load_image(frame, 12, 8) for frame in saved[:4]], axis=1))
    np.testing.assert_array_equal(load_clip(str(tmp_path / "clip.webp"), 4, 12, 8), from_file)


def test_a_clip_has_enough_frames() -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    assert load_clip(frames, 3, 8, 8).shape == (3, 3, 8, 8)
    with pytest.raises(RequestError, match=r"^footage has 3 frames: the request has 4$"):
        load_picture(FOOTAGE, frames, 4, 8, 8)


@pytest.mark.parametrize(
    "clip",
    [np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8, 3), int), np.zeros((3, 8, 8, 4), np.uint8), None, [1], b"x"],
)
def test_invalid_clips(clip: object) -> None:
    with pytest.raises(RequestError, match=r"^footage is a .*: a video file, a Video or uint8 frames \[n,H,W,3\]$"):
        load_picture(FOOTAGE, clip, 1, 8, 8)


def test_a_clip_without_pixels() -> None:
    with pytest.raises(RequestError, match=r"^footage"):
        load_picture(FOOTAGE, np.zeros((3, 0, 8, 3), np.uint8), 1, 8, 8)
    with pytest.raises(RequestError, match=r"^footage has 0 frames"):
        load_picture(FOOTAGE, np.zeros((0, 8, 8, 3), np.uint8), 1, 8, 8)


@pytest.mark.parametrize("change", ["bfloat16", "requires_grad_", "uint8"])
def test_a_tensor_of_any_type_is_a_picture(change: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    tensor = torch.from_numpy(picture)
    given = tensor if change == "uint8" else getattr(tensor / 255, change)()
    assert np.abs(load_image(given, 8, 8) - (picture.transpose(2, 0, 1) / 127.5 - 1)).max() < 0.01


def test_a_transparent_colour_of_16_bits(tmp_path: Path) -> None:
    """Pillow keeps 8 bits of each channel, but the transparent colour as stored in the file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for key in ((5, 6, 7), (0x1234, 6, 0x4321)):
        rows = b"".join(b"\0" + struct.pack(">6H", *key, 0x9999, 0x9999, 0x9999) for _ in range(2))
        header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
        content = [
            (b"IHDR", header),
            (b"tRNS", struct.pack(">3H", *key)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        ]
        file = tmp_path / "deep.png"
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in content))
        pixels = load_image(file, 2, 2)
        assert (pixels[:, :, 0] == 1).all()
        assert (pixels[:, :, 1] < 0.5).all()
