"""Videos as training reads them: wrong time stamps, rates that do not divide, cuts, animations among the pictures."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from training_run import moving_square, numbers_shown, write_counted

from higen.media.cuts import find_cuts
from higen.media.timing import effective_rate
from higen.train.data import list_items
from higen.train.media import (
    IMAGES,
    VIDEOS,
    Damaged,
    Placement,
    Unusable,
    choose_frames,
    is_video,
    read_image,
    read_part,
    read_video,
    sampled_rate,
    video_length,
)
from higen.video import Video

CENTRE = Placement()


# Time stamps.


def write_jumbled(path: Path, frames: int = 96) -> Path:
    """Like `write_counted`, but each frame's time stamp is its decoding time, as some programs write it."""
    counted = write_counted(path.with_name("counted.mkv"), frames)
    with av.open(str(counted)) as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for count, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.stream = stream
            packet.pts = packet.dts = round(count / 8 / packet.time_base)
            output.mux(packet)
    with av.open(str(path)) as source:
        stamps = [frame.pts for frame in source.decode(video=0)]
    assert len(stamps) == frames
    assert stamps != sorted(stamps)
    return path


@pytest.mark.parametrize("form", ["mp4", "mov"])
def test_frames_are_shown_in_the_order_of_decoding_where_their_stamps_are_jumbled(tmp_path: Path, form: str) -> None:
    path = write_jumbled(tmp_path / f"jumbled.{form}")
    assert video_length(path, 8) == 96
    assert numbers_shown(Video.open(path).frames) == list(range(96))
    assert numbers_shown(read_part(path, 56, 16, 8, 96, CENTRE)) == list(range(96))
    for first in range(0, 93, 5):
        clip = read_video(path, 56, 16, 8, 4, Placement((first + 0.5) / 93))
        assert numbers_shown(clip) == list(range(first, first + 4))


# Rates.


@pytest.mark.parametrize(
    ("source", "wanted", "strides", "rate"),
    [
        (10, 8, {1}, 10),
        (12, 8, {2}, 6),
        (11.9, 8, {1}, 11.9),
        (15, 8, {2}, 7.5),
        (20, 8, {3}, 20 / 3),
        (23.976, 8, {3}, 7.992),
        (25, 8, {3, 4}, 8),
        (30, 8, {3, 4}, 8),
        (7.5, 8, {1}, 7.5),
        (16, 8, {2}, 8),
        (8, 8, {1}, 8),
    ],
)
def test_whole_strides_are_taken_below_a_ratio_of_three(
    source: float, wanted: float, strides: set[int], rate: float
) -> None:
    times = 3 + np.arange(90) / source
    assert effective_rate(times, wanted) == pytest.approx(rate, rel=1e-4)
    assert set(np.diff(choose_frames(times, wanted, 16, 0.5)).tolist()) == strides
    rounded = np.round(times, 3)  # Matroska's time resolution
    assert set(np.diff(choose_frames(rounded, wanted, 16, 0.5)).tolist()) == strides


@given(st.floats(7.5, 23.5), st.floats(0, 1))
def test_strides_never_beat(source: float, start: float) -> None:
    assert len(set(np.diff(choose_frames(np.arange(90) / source, 8, 16, start)).tolist())) == 1


def test_a_shorter_stride_is_taken_by_a_video_too_short_for_the_nearest_one() -> None:
    """24 frames at 12 a second last as long as 16 frames at 8 or 12 frames at 6."""
    times = np.arange(24) / 12
    assert choose_frames(times, 8, 12, 0.0).tolist() == list(range(0, 24, 2))
    assert choose_frames(times, 8, 16, 0.0).tolist() == list(range(16))
    assert choose_frames(times, 8, 16, 1.0).tolist() == list(range(8, 24))
    with pytest.raises(Unusable, match="shorter than 17 frames at 8 frames a second"):
        choose_frames(times, 8, 17, 0.0)


def test_even_motion_stays_even_and_the_rate_is_reported(tmp_path: Path) -> None:
    """A bar moves 2 pixels per frame at 10 frames per second. At exactly 8 it would move unevenly by 2 or 4 pixels."""
    frames = np.zeros((40, 16, 96, 3), np.uint8)
    for index in range(40):
        frames[index, :, 2 * index : 2 * index + 8] = 255
    path = Video(frames, 10).save(tmp_path / "a.webm")
    said: list[str] = []
    clip = read_video(path, 96, 16, 8, 16, CENTRE, None, said.append)
    left = (clip[..., 1] > 128).any(axis=1).argmax(axis=1)
    assert set(np.diff(left).tolist()) == {2}
    assert said == ["sampled at another rate: every frame, 10 a second for 8"]
    assert sampled_rate(path, 8, 16) == 10
    assert video_length(path, 8) == 40
    said.clear()
    read_video(path, 96, 16, 5, 16, CENTRE, None, said.append)
    assert said == []


# Cuts.


def scene(seed: int, frames: int, speed: int = 1) -> NDArray[np.uint8]:
    """A picture of blocks that moves to the left, uint8 [frames,48,64,3]."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([blocks[:, (at := speed * i % 250) : at + 64] for i in range(frames)])


def test_a_cut_is_found_and_a_flash_or_motion_is_not_a_cut() -> None:
    one, other = scene(0, 16), scene(1, 16)
    flash, light = one.copy(), one.copy()
    flash[7:9] = 255
    light[8:] = np.minimum(light[8:].astype(int) * 0.3 + 170, 255).astype(np.uint8)
    popped = np.full((16, 48, 64, 3), 200, np.uint8)
    popped[8:, 10:40, 10:40] = 0  # an object that appears
    fading = np.stack(
        [
            (a * (1 - k / 15.0) + b * (k / 15.0)).astype(np.uint8)
            for k, (a, b) in enumerate(zip(one, other, strict=True))
        ]
    )
    none = {"still": one[:1].repeat(16, 0), "slow": one, "fast": scene(0, 16, 15), "flash": flash, "light": light}
    none |= {
        "popped": popped,
        "fading": fading,
        "noise": np.random.default_rng(0).integers(0, 256, one.shape, np.uint8),
    }
    assert {name: find_cuts(clip) for name, clip in none.items()} == {name: [] for name in none}
    for at in (1, 5, 8, 15):
        assert find_cuts(np.concatenate([one[:at], other[at:]])) == [at]
    plain = np.zeros((16, 48, 64, 3), np.uint8)
    plain[6:] = 255
    assert find_cuts(plain) == [6]
    assert find_cuts(np.concatenate([one[:5], other[:6], scene(2, 5)])) == [5, 11]
    assert find_cuts(plain[4:9]) == []  # too few frames to decide


def test_a_clip_is_moved_past_a_cut(tmp_path: Path) -> None:
    """Shots of 14, 30 and 6 frames at 8 frames per second. A clip of 16 frames fits only into the second shot."""
    shots = [scene(seed, frames) for seed, frames in ((0, 14), (1, 30), (2, 6))]
    path = Video(np.concatenate(shots), 8).save(tmp_path / "a.webp")
    for start, first in ((0.0, 14), (0.3, 14), (0.5, 17), (1.0, 28)):
        said: list[str] = []
        clip = read_video(path, 64, 48, 8, 16, Placement(start), None, said.append)
        assert np.array_equal(clip, shots[1][first - 14 : first + 2])
        assert said == ([] if start == 0.5 else ["moved past a cut: its picture changes at once"])
    assert len(read_part(path, 64, 48, 8, 50, CENTRE)) == 50
    with pytest.raises(Damaged, match="a cut in every clip"):
        read_video(path, 64, 48, 8, 32, CENTRE)
    assert len(read_video(path, 64, 48, 8, 32, CENTRE, [16])) == 1  # one picture has no cut
    edge = Video(np.concatenate([shots[0], shots[1][:2]]), 8).save(tmp_path / "b.webp")
    assert len(read_video(edge, 64, 48, 8, 16, CENTRE)) == 16  # only 2 frames after the cut: accepted


# Listings and pictures.


def test_what_moves_is_a_video(tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in moving_square(90, 20)]
    for name, form in (("a.webp", "WEBP"), ("b.png", "PNG"), ("c.apng", "PNG"), ("d.gif", "GIF")):
        frames[0].save(tmp_path / name, form, save_all=True, append_images=frames[1:], duration=125, lossless=True)
    for name in ("e.webp", "f.png", "g.tiff", "h.jpg"):
        frames[0].save(tmp_path / name)
    # Phones keep a second picture in a JPEG file: that is not an animation.
    frames[0].save(tmp_path / "i.jpg", "MPO", save_all=True, append_images=frames[1:2])
    for file in list(tmp_path.iterdir()):
        file.with_suffix(".txt").write_text(file.name)
    listing = list_items(tmp_path)
    assert [item.name for item in listing.items if item.video] == ["a.webp", "b.png", "c.apng", "d.gif"]
    assert len(listing.items) == 9
    for item in listing.items:
        if item.video:
            assert np.abs(read_video(item.path, 28, 20, 8, 16, CENTRE)[..., 0].astype(int) - 90).mean() < 60
        else:
            assert read_image(item.path, 28, 20, CENTRE).shape == (1, 20, 28, 3)
    assert not is_video(tmp_path / "absent.webp")


def test_every_suffix_that_is_listed_is_read(tmp_path: Path) -> None:
    wanted = {".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".3gp", ".m4v", ".mov", ".mkv", ".avi"}
    assert wanted <= set(VIDEOS)
    assert not set(VIDEOS) & set(IMAGES)
    (tmp_path / "a.rm").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("x")
    write_counted(tmp_path / "b.ts", 24)
    (tmp_path / "b.txt").write_text("y")
    listing = list_items(tmp_path)
    assert [item.name for item in listing.items] == ["b.ts"]
    assert listing.skipped == {"a.rm": "its suffix '.rm' is unknown"}
    assert len(read_video(tmp_path / "b.ts", 56, 16, 8, 16, CENTRE)) == 16


def test_reasons_are_words(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("<html>")
    for name, words in (("a.mp4", "it is an HTML page"), ("b.mp4", "No such file or directory")):
        with pytest.raises(Unusable, match=f"^cannot be read: {words}"):
            read_video(tmp_path / name, 8, 8, 8, 2, CENTRE)
        with pytest.raises(Unusable, match=f"^cannot be read: {words}"):
            read_image(tmp_path / name, 8, 8, CENTRE)


@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
def test_a_recording_that_begins_between_key_frames_is_read_from_the_first_one(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.ts"
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 56, 16, "yuv420p", 25
        for index in range(100):
            bars = np.repeat(20 + 200 * ((index >> np.arange(7)) & 1), 8).astype(np.uint8)
            picture = np.ascontiguousarray(np.broadcast_to(bars[None, :, None], (16, 56, 3)))
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 3 // 188 * 188 :])
    video = Video.open(path)
    shown = numbers_shown(video.frames)
    assert video.fps == 25
    assert shown == list(range(shown[0], 100))
    assert 25 <= shown[0] <= 75
    assert numbers_shown(read_part(path, 56, 16, 25, 16, Placement(0.0))) == shown[:16]
