"""Video files, compared with other decoders (PyAV and PIL called directly); files on disk after a failed save."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from higen import video_writer
from higen.errors import BackendError, OutputError
from higen.video import Video, check_output, contact_sheet, to_uint8
from higen.video_record import Clip

SUFFIXES = [".mp4", ".webm", ".gif", ".webp", ".png", ".npy"]
WITH_METADATA = SUFFIXES[:-1]
PROMPT = 'a "whale" & <b>café</b> 鯨 🐋; k=v #1 \\ \n two\0\ud800'
METADATA = {"prompt": PROMPT, "seed": 2**63, "cues": {"motion": [1.5, None]}, "versions": {"higen": "0.1"}}


def smooth(frames: int = 8, height: int = 64, width: int = 96, phase: float = 0.0) -> NDArray[np.uint8]:
    """Moving waves of saturated colours, uint8 [F, H, W, 3]."""
    t, y, x = np.meshgrid(np.arange(frames) / 16, np.arange(height) / 96, np.arange(width) / 96, indexing="ij")
    waves = [np.sin(6 * x + 5 * t + phase), np.sin(5 * y - 4 * t + 1), np.cos(4 * (x + y) + 3 * t)]
    return (np.stack(waves, axis=-1) * 127.5 + 127.5).astype(np.uint8)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    assert a.shape == b.shape
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def blurred(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Means of 4 x 4 pixels, which remove dithering."""
    f, h, w, _ = frames.shape
    return frames.reshape(f, h // 4, 4, w // 4, 4, 3).mean(axis=(2, 4)).round().astype(np.uint8)


def decoded(path: Path) -> NDArray[np.uint8]:
    """The frames of a file, read by another program, uint8 [F, H, W, 3]."""
    if path.suffix in (".mp4", ".webm"):
        with av.open(str(path)) as source:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)])
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".png":
        files = sorted(path.parent.glob(path.name.replace("_0000", "_*")))
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Frames


@pytest.mark.parametrize("suffix", [".webp", ".png", ".npy"])
def test_lossless_formats_are_exact(tmp_path: Path, suffix: str) -> None:
    frames = noise(3, 17, 23)
    path = Video(frames, 8).save(tmp_path / f"clip{suffix}")
    assert np.array_equal(decoded(path), frames)
    assert np.array_equal(Video.open(path).frames, frames)


@pytest.mark.parametrize(("suffix", "bound"), [(".mp4", 36.0), (".webm", 36.0), (".gif", 23.0)])
def test_lossy_formats_are_close(tmp_path: Path, suffix: str, bound: float) -> None:
    """For these colours, halving the chroma resolution without an encoder already gives 39 dB."""
    frames = smooth()
    path = Video(frames, 8).save(tmp_path / f"clip{suffix}")
    assert psnr(decoded(path), frames) > bound
    assert psnr(blurred(decoded(path)), blurred(frames)) > bound + 4
    assert np.array_equal(Video.open(path).frames, decoded(path))


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_colours_are_tagged_bt709_and_come_back(tmp_path: Path, suffix: str) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]], dtype=np.uint8)
    frames = np.broadcast_to(colours.repeat(32, axis=0)[None, None], (4, 32, 160, 3))
    path = Video(frames, 8).save(tmp_path / f"clip{suffix}")
    with av.open(str(path)) as source:
        context = source.streams.video[0].codec_context
        tags = context.colorspace, context.color_range, context.color_primaries, context.color_trc
        planes = next(source.decode(video=0))
        assert planes.format.name == "yuv420p"
        assert [int(tag) for tag in tags] == [1, 1, 1, 1]
        # ITU-R BT.709: Y = 0.2126 R + 0.7152 G + 0.0722 B in 16 .. 235
        luma = np.frombuffer(planes.planes[0], np.uint8).reshape(-1, planes.planes[0].line_size)[16, 16:160:32]
    expected = 16 + 219 / 255 * (colours @ [0.2126, 0.7152, 0.0722])
    assert np.abs(luma - expected).max() <= 2
    assert np.abs(decoded(path)[:, 16, 16::32].astype(int) - colours).max() <= 4


def test_mp4_index_comes_first(tmp_path: Path) -> None:
    data = Video(smooth(), 8).save(tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("shape", [(2, 33, 47), (1, 16, 17), (3, 1, 1)])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path: Path, suffix: str, shape: tuple[int, int, int]) -> None:
    f, h, w = shape
    path = Video(np.full((f, h, w, 3), 200, np.uint8), 8).save(tmp_path / f"clip{suffix}")
    assert decoded(path).shape == (f, h + h % 2, w + w % 2, 3)
    assert np.abs(decoded(path).astype(int) - 200).max() <= 3
    assert Video.open(path).frames.shape == (f, h, w, 3)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("count", [1, 5])
def test_the_number_of_equal_frames_is_kept(tmp_path: Path, suffix: str, count: int) -> None:
    frames = np.full((count, 16, 16, 3), 77, np.uint8)
    opened = Video.open(Video(frames, 8).save(tmp_path / f"clip{suffix}"))
    assert opened.frames.shape == frames.shape
    assert np.abs(opened.frames.astype(int) - 77).max() <= 2


def test_a_repeated_frame_inside_a_clip_survives_merging(tmp_path: Path) -> None:
    frames = noise(3, 16, 16)[[0, 1, 1, 1, 2, 2, 0]]
    for fps in (8, 12.5, 29.97):
        assert np.array_equal(Video.open(Video(frames, fps).save(tmp_path / "clip.webp")).frames, frames)
        assert len(Video.open(Video(frames, fps).save(tmp_path / "clip.gif"))) == len(frames)


# Rate and metadata


@pytest.mark.parametrize("suffix", WITH_METADATA)
@pytest.mark.parametrize("fps", [8, 12.5, 29.97, 0.5])
def test_rate_and_metadata_come_back(tmp_path: Path, suffix: str, fps: float) -> None:
    opened = Video.open(Video(smooth(3), fps, METADATA).save(tmp_path / f"clip{suffix}"))
    assert opened.fps == fps
    assert opened.metadata == METADATA
    assert len(opened) == 3


def test_npy_holds_only_frames(tmp_path: Path) -> None:
    opened = Video.open(Video(smooth(), 24, METADATA).save(tmp_path / "clip.npy"))
    assert (opened.fps, opened.metadata) == (8.0, {})


def test_other_programs_find_metadata_and_timing(tmp_path: Path) -> None:
    video = Video(smooth(6), 12, METADATA | {"prompt": 'a "whale" 鯨'})
    texts, seconds = {}, {}
    for suffix in (".mp4", ".webm"):
        with av.open(str(video.save(tmp_path / f"clip{suffix}"))) as source:
            tags = {key.lower(): value for key, value in source.metadata.items()}
            assert tags["title"] == 'a "whale" 鯨'
            texts[suffix], seconds[suffix] = tags["comment"], source.duration / av.time_base
            assert source.streams.video[0].average_rate == 12
    for suffix in (".gif", ".webp"):
        with Image.open(video.save(tmp_path / f"clip{suffix}")) as image:
            assert image.info["loop"] == 0
            texts[suffix] = image.info["comment"] if suffix == ".gif" else image.getexif()[270]
            seconds[suffix] = sum(f.info["duration"] for f in ImageSequence.Iterator(image) if f.convert("RGB")) / 1000
    with Image.open(video.save(tmp_path / "clip.png")) as image:
        assert image.info["Title"] == 'a "whale" 鯨'
        texts[".png"] = image.info["Comment"]
    for suffix, text in texts.items():
        plain = json.loads(text)
        assert plain.pop("higen.video") == {"fps": 12.0, "frames": 6, "height": 64, "width": 96}, suffix
        assert plain == video.metadata, suffix
    assert seconds == pytest.approx(dict.fromkeys(seconds, 0.5), abs=0.001)


def test_long_metadata(tmp_path: Path) -> None:
    metadata = {"prompt": "é" * 5_000, "log": "x" * 100_000}
    for suffix in WITH_METADATA:
        assert Video.open(Video(smooth(1), 8, metadata).save(tmp_path / f"clip{suffix}")).metadata == metadata


def test_files_of_other_programs_open(tmp_path: Path) -> None:
    frames = noise(3, 16, 16)
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, lossless=True, duration=[100, 200, 300])
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=100, comment=b'{"a": 1} or not')
    first.save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        output.metadata["comment"] = '["higen.video"]'
        stream: Any = output.add_stream("libx264", 30)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    opened = {suffix: Video.open(tmp_path / f"a{suffix}") for suffix in (".webp", ".gif", ".png", ".mp4")}
    assert np.array_equal(opened[".webp"].frames, frames)
    assert np.array_equal(opened[".png"].frames, frames[:1])
    assert {suffix: (len(v), v.fps) for suffix, v in opened.items()} == {
        ".webp": (3, 5.0),
        ".gif": (3, 10.0),
        ".png": (1, 8.0),
        ".mp4": (3, 30.0),
    }
    assert all(video.metadata == {} for video in opened.values())


def test_a_clip_with_a_sound_track_opens(tmp_path: Path) -> None:
    """A sound longer than the video must not make the video look truncated."""
    path = Video(smooth(4), 8, {"seed": 1}).save(tmp_path / "clip.mp4")
    with av.open(str(path)) as source, av.open(str(tmp_path / "sound.mp4"), "w") as output:
        output.metadata.update(source.metadata)
        pictures = output.add_stream_from_template(source.streams.video[0])
        sound: Any = output.add_stream("aac", 44100)
        sound.layout = "mono"
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                output.mux(packet)
        for start in range(0, 2 * 44100, 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 44100, start
            output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
    opened = Video.open(tmp_path / "sound.mp4")
    assert (len(opened), opened.metadata) == (4, {"seed": 1})


# The .png sequence


def test_png_sequence_is_named_by_number_and_replaced_whole(tmp_path: Path) -> None:
    first, second = noise(5, 8, 8), smooth(2, 8, 8)
    Image.new("RGB", (4, 4)).save(tmp_path / "clip_0009.png")
    assert Video(first, 8).save(tmp_path / "clip.png") == tmp_path / "clip_0000.png"
    assert files(tmp_path) == [*(f"clip_{i:04d}.png" for i in range(5)), "clip_0009.png"]
    Video(second, 8).save(tmp_path / "clip.png")
    assert files(tmp_path) == ["clip_0000.png", "clip_0001.png", "clip_0009.png"]
    for name in ("clip.png", "clip_0000.png", "clip_0001.png"):
        assert np.array_equal(Video.open(tmp_path / name).frames, second)
    with pytest.raises(OutputError, match=r"clip_0002\.png is missing"):
        Video.open(tmp_path / "clip_0009.png")


def test_png_sequence_with_a_gap_is_truncated(tmp_path: Path) -> None:
    Video(noise(4, 8, 8), 8).save(tmp_path / "clip.png")
    (tmp_path / "clip_0002.png").unlink()
    with pytest.raises(OutputError, match="2 of 4 frames"):
        Video.open(tmp_path / "clip.png")


# What is left on disk


@pytest.fixture(params=["encoder", "interrupt", "rename"])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """Makes every format fail after it has written something; returns what `save` then raises."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt if request.param == "interrupt" else OSError(28, "No space left on device")

    if request.param == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        for suffix, (write, fps) in list(video_writer._WRITERS.items()):

            def broken(clip: Clip, path: Path, write: Any = write) -> None:
                write(clip, path)
                fail()

            monkeypatch.setitem(video_writer._WRITERS, suffix, (broken, fps))
    return KeyboardInterrupt if request.param == "interrupt" else OutputError


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path, suffix: str, failing: type[BaseException]) -> None:
    name = "clip_0000.png" if suffix == ".png" else f"clip{suffix}"
    with pytest.raises(failing):
        Video(smooth(2), 8).save(tmp_path / f"clip{suffix}")
    assert files(tmp_path) == []
    (tmp_path / name).write_bytes(b"old")
    if suffix == ".png":  # `save` replaces only a picture that higen wrote
        video_writer._write_png(Clip(noise(1, 8, 8), 8.0), tmp_path / "clip.png")
    old = (tmp_path / name).read_bytes()
    with pytest.raises(failing):
        Video(smooth(2), 8).save(tmp_path / f"clip{suffix}")
    assert files(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == old


def test_an_encoder_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Iterator[int] = iter(range(100))
    real = av.VideoFrame.from_ndarray

    def third_fails(*args: Any, **kwargs: Any) -> av.VideoFrame:
        if next(calls) == 2:
            raise av.ExternalError(1, "Generic error in an external library")
        return real(*args, **kwargs)

    class Frames:
        from_ndarray = staticmethod(third_fails)

    monkeypatch.setattr(av, "VideoFrame", Frames)
    with pytest.raises(OutputError, match=r"clip\.mp4: cannot be written .*external library"):
        Video(smooth(), 8).save(tmp_path / "clip.mp4")
    assert files(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saving_replaces_the_file_and_keeps_usual_permissions(tmp_path: Path, suffix: str) -> None:
    Video(noise(3, 16, 16), 8).save(tmp_path / f"clip{suffix}")
    path = Video(smooth(2, 16, 16), 8).save(tmp_path / f"clip{suffix}")
    assert len(Video.open(path)) == 2
    (tmp_path / "other").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_relative_paths_capitals_and_odd_names(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Video(smooth(2), 8).save(f"http:100% %03d 鯨{suffix.upper()}")
    assert path.parent == Path()
    assert len(files(tmp_path)) == (2 if suffix == ".png" else 1)
    assert len(Video.open(path)) == 2


# Errors


def test_check_output_says_what_is_wrong_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clip.avi", "clip", ".mp4"):
        with pytest.raises(OutputError, match=re.escape(", ".join(SUFFIXES))):
            check_output(tmp_path / name)
    with pytest.raises(OutputError, match="missing does not exist"):
        check_output(tmp_path / "missing" / "clip.mp4")
    for name in ("folder.mp4", "clip_0000.png"):
        (tmp_path / name).mkdir()
    for name in ("folder.mp4", "clip.png"):
        with pytest.raises(OutputError, match="is a folder"):
            check_output(tmp_path / name)
    assert check_output(str(tmp_path / "clip.MP4")) == tmp_path / "clip.MP4"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # needed because root may write anywhere
    with pytest.raises(OutputError, match="no permission"):
        check_output(tmp_path / "clip.mp4")
    assert files(tmp_path) == ["clip_0000.png", "folder.mp4"]


def test_save_checks_first(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.avi"):
        Video(smooth(1), 8).save(tmp_path / "clip.avi")
    for suffix, fps in ((".gif", 51), (".webp", 1001), (".mp4", 0.001)):
        with pytest.raises(OutputError, match=f"fps={fps}"):
            Video(smooth(1), fps).save(tmp_path / f"clip{suffix}")
    assert files(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_corrupt_and_truncated_files(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(OutputError, match=re.escape(f"clip{suffix}")):
        Video.open(tmp_path / f"clip{suffix}")
    path = Video(noise(6, 16, 16), 8, METADATA).save(tmp_path / f"clip{suffix}")
    whole = path.read_bytes()
    broken = [b"", b"\0" * 1000, bytes(reversed(whole)), *(whole[: len(whole) * k // 10] for k in range(1, 10))]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(OutputError, match=re.escape(path.name)):
            Video.open(path)


def test_open_does_not_run_pickles(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(OutputError, match="allow_pickle"):
        Video.open(tmp_path / "clip.npy")
    np.save(tmp_path / "clip.npy", np.zeros((2, 4, 4, 3)))
    with pytest.raises(OutputError, match="float64"):
        Video.open(tmp_path / "clip.npy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": np.zeros((1, 4, 4, 3))}, "float64"),
        ({"frames": np.zeros((4, 4, 3), np.uint8)}, r"\[4, 4, 3\]"),
        ({"frames": np.zeros((0, 4, 4, 3), np.uint8)}, r"\[0, 4, 4, 3\]"),
        ({"frames": np.zeros((1, 3, 4, 4), np.uint8)}, r"\[1, 3, 4, 4\]"),
        ({"frames": None}, "uint8"),
        ({"fps": 0}, "fps=0"),
        ({"fps": -8.0}, "fps=-8"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": float("inf")}, "fps=inf"),
        ({"fps": "8"}, "fps='8'"),
        ({"metadata": {"a": np.zeros(2)}}, "ndarray"),
        ({"metadata": {"a": float("nan")}}, "nan"),
        ({"metadata": "prompt"}, "'prompt'"),
    ],
)
def test_a_wrong_video_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OutputError, match=message):
        Video(**{"frames": smooth(1), "fps": 8, "metadata": {}} | arguments)


# The Video object


def test_sizes_and_repr() -> None:
    video = Video(smooth(16), 8, {"prompt": "a whale flapping its tail on a blue sky at night"})
    assert (len(video), video.width, video.height, video.duration) == (16, 96, 64, 2.0)
    assert repr(video) == "Video(16 frames, 96x64, 8 fps, 'a whale flapping its tail on a blue s...')"
    assert repr(Video(smooth(1), 29.97)) == "Video(1 frames, 96x64, 29.97 fps, '')"


def test_a_video_owns_its_frames() -> None:
    frames, metadata = smooth(2), {"cues": [1]}
    video = Video(frames, 8, metadata)
    metadata["cues"].append(2)
    assert video.metadata == {"cues": [1]}
    with pytest.raises(ValueError, match="read-only"):
        video.frames[0] = 0
    frames[0] = 0  # the caller's array is still writable
    copy = pickle.loads(pickle.dumps(video))
    assert np.array_equal(copy.frames, video.frames)
    assert (copy.fps, copy.metadata) == (video.fps, video.metadata)


@given(st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12))
def test_pixels_are_scaled_clamped_and_truncated(values: list[float]) -> None:
    pixels = np.array(values, np.float32).reshape(1, 3, 2, 2)
    frames = Video.from_pixels(pixels, 8).frames
    half = np.float32(0.5)
    for y, x, c in np.ndindex(2, 2, 3):
        unit = min(max(np.float32(pixels[0, c, y, x] * half + half), np.float32(0)), np.float32(1))
        assert frames[0, y, x, c] == int(np.float32(unit * np.float32(255)))


def test_known_pixels() -> None:
    pixels = np.zeros((1, 3, 1, 1), np.float32)
    assert to_uint8(pixels).tolist() == [[[[127, 127, 127]]]]  # 127.5, truncated
    pixels[0, :, 0, 0] = [-1.5, 1.5, 0.999]
    assert to_uint8(pixels).tolist() == [[[[0, 255, 254]]]]
    assert to_uint8(pixels.astype(np.float16)).shape == (1, 1, 1, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_overflowed_are_an_error(bad: float) -> None:
    pixels = np.zeros((4, 3, 8, 8), np.float32)
    pixels[2, 1, 3, 3] = bad
    with pytest.raises(BackendError, match="1 of 4 frames"):
        Video.from_pixels(pixels, 8)
    for wrong in (pixels[0], pixels.transpose(0, 2, 3, 1), np.zeros((1, 3, 4, 4), np.uint8)):
        with pytest.raises(BackendError, match=re.escape(str(list(wrong.shape)))):
            Video.from_pixels(wrong, 8)


def test_html_is_self_contained() -> None:
    html = Video(smooth(), 8, {"prompt": '<script>"x"&</script>'})._repr_html_()
    found = re.search(r'src="data:video/mp4;base64,([A-Za-z0-9+/=]+)"', html)
    assert found is not None
    with av.open(io.BytesIO(base64.b64decode(found[1]))) as source:
        assert len(list(source.decode(video=0))) == 8
    assert "&lt;script&gt;&quot;x&quot;&amp;&lt;/script&gt;" in html
    assert "<script" not in html
    assert all(word in html for word in ("autoplay", "loop", "muted", "controls", "width:320px"))


# Contact sheets


def test_contact_sheet_places_evenly_spaced_frames() -> None:
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.uint8(20) + np.zeros((9, 10, 12, 3), np.uint8)
    sheet = np.asarray(Video(frames, 8).contact_sheet(columns=3, frames=5))
    assert sheet.shape == (22, 40, 3)
    places = [(0, 0), (0, 14), (0, 28), (12, 0), (12, 14)]
    for (y, x), index in zip(places, (0, 2, 4, 6, 8), strict=True):
        assert (sheet[y : y + 10, x : x + 12] == index * 20).all()
        sheet = sheet.copy()
        sheet[y : y + 10, x : x + 12] = 255
    assert (sheet == 255).all()
    assert Video(frames, 8).contact_sheet().size == (8 * 14 - 2, 22)
    assert Video(frames, 8).contact_sheet(frames=100, columns=100).size == (9 * 14 - 2, 10)
    assert Video(frames, 8).contact_sheet(frames=1).size == (12, 10)
    for wrong in ({"columns": 0}, {"frames": 0}):
        with pytest.raises(OutputError, match=">= 1"):
            Video(frames, 8).contact_sheet(**wrong)


def test_labels_are_written_below_the_frames() -> None:
    video = Video(np.full((2, 40, 60, 3), 255, np.uint8), 8)
    assert (np.asarray(video.contact_sheet()) == 255).all()
    labelled = np.asarray(video.contact_sheet(labels=True))
    assert labelled.shape == (54, 122, 3)
    assert (labelled[:40] == 255).all()
    assert labelled[40:, :60].min() < 100
    assert labelled[40:, 62:].min() < 100


def test_sheet_of_several_videos_has_captions() -> None:
    long = Video(smooth(12, 16, 24), 8, {"prompt": "a very long prompt " * 30})
    short = Video(smooth(3, 32, 16), 8)
    sheet = np.asarray(contact_sheet([long, short], frames_per_video=4))
    assert sheet.shape == (20 + 16 + 4 + 20 + 32 + 4, 4 * 26 - 2, 3)
    assert sheet[:20].min() < 100
    assert np.array_equal(sheet[20:36, :24], long.frames[0])
    assert np.array_equal(sheet[20:36, -24:], long.frames[-1])
    assert (sheet[36:60] == 255).all()  # no caption without a prompt
    assert np.array_equal(sheet[60:92, 36:52], short.frames[2])
    with pytest.raises(OutputError, match="at least one"):
        contact_sheet([])


def test_importing_needs_neither_pil_nor_av() -> None:
    code = "import sys, higen.video; sys.exit(str([m for m in ('PIL', 'av', 'torch') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
