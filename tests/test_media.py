"""Pictures and clips are read as people see them; compared with closed forms, NumPy's turns and the original frames."""

from __future__ import annotations

import json
import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import higen.media.files
from higen.errors import OutputError, RequestError
from higen.images import load_clip, load_image
from higen.media.timing import steady_plan
from higen.train.media import Placement, Unusable, read_image, read_video
from higen.video import Video

HIGH, WIDE = 64, 96
WHITE, BLACK, RED = [255] * 3, [0] * 3, [255, 0, 0]
READERS = ("Video.open", "clip control", "training")


def corner() -> NDArray[np.uint8]:
    """White top left corner and grey bar on the right, on black, so that every turn and mirror looks different."""
    picture = np.zeros((HIGH, WIDE, 3), np.uint8)
    picture[: HIGH // 2, : WIDE // 2] = 255
    picture[:, -16:] = 128
    return picture


def write(path: Path, frames: NDArray[np.uint8], rate: int = 8, codec: str = "libx264", **settings: Any) -> Path:
    """A file as another program writes it: one stream with these `settings`, in 4:4:4 if the codec supports it."""
    options = {"libx264": {"crf": "1"}, "libvpx": {"b": "8M", "auto-alt-ref": "0"}}.get(codec, {"b": "8M"})
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = settings.pop("pix_fmt", "yuv444p" if codec == "libx264" else "yuv420p")
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            output.mux(
                stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[2] == 4 else "rgb24"))
            )
        output.mux(stream.encode(None))
    return path


def seen(reader: str, path: Path, width: int, height: int, frames: int = 4) -> NDArray[np.uint8]:
    """The clip as `reader` returns it at this size, uint8 [F,H,W,3]."""
    if reader == "Video.open":
        video = Video.open(path)
        assert (video.width, video.height) == (width, height)
        return video.frames
    if reader == "training":
        return read_video(path, width, height, 8, frames, Placement())
    pixels = load_clip(path, frames, width, height)
    return ((pixels.transpose(1, 2, 3, 0) + 1) * 127.5).round().astype(np.uint8)


# Turns, mirrors and pixel aspect


def turned(picture: NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """The definition: each stored pixel (x, y) goes to (a x + c y, b x + d y), relative to the smallest coordinates."""
    a, b, c, d = matrix
    height, width, _ = picture.shape
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    made = np.zeros((np.ptp(down) + 1, np.ptp(across) + 1, 3), np.uint8)
    made[down - down.min(), across - across.min()] = picture
    return made


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_turned_and_mirrored_clips_are_shown_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], reader: str
) -> None:
    data = write(tmp_path / "a.mp4", np.stack([corner()] * 8)).read_bytes()
    at = data.find(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (value * 0x10000 for value in matrix)
    numbers = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    (tmp_path / "a.mp4").write_bytes(data[:at] + numbers + data[at + 36 :])
    wanted = turned(corner(), matrix)
    shown = seen(reader, tmp_path / "a.mp4", wanted.shape[1], wanted.shape[0])
    assert np.abs(shown[0].astype(int) - wanted).mean() < 4


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("suffix", "aspect"), [("mp4", Fraction(64, 45)), ("mkv", Fraction(2, 3)), ("ts", Fraction(4, 3))]
)
def test_pixels_that_are_not_square_are_shown_as_they_are_meant(
    tmp_path: Path, suffix: str, aspect: Fraction, reader: str
) -> None:
    frame = np.zeros((72, 90, 3), np.uint8)
    frame[24:48, 36:54] = 255
    path = write(tmp_path / f"a.{suffix}", np.stack([frame] * 8), sample_aspect_ratio=aspect)
    block = seen(reader, path, round(90 * aspect), 72)[0, ..., 1] > 128
    assert abs(block.any(0).sum() - 18 * aspect) <= 1
    assert block.any(1).sum() == 24


def test_an_absurd_pixel_aspect_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", np.stack([corner()] * 2), sample_aspect_ratio=Fraction(40, 1))
    with pytest.raises(OutputError, match="its pixels are 40 as wide as high: 1/16 to 16"):
        Video.open(path)


# Transparency and 16 bits


def disc(index: int) -> Image.Image:
    """A moving red block on a transparent background."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (16 + index, 16, 48 + index, 48))
    return picture


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.apng", "a.png", "vp9.webm", "vp8.webm", "a.mov"])
def test_what_is_transparent_is_white(tmp_path: Path, name: str, reader: str) -> None:
    path, pictures = tmp_path / name, [disc(i) for i in range(8)]
    if path.suffix in (".webm", ".mov"):
        codec = {"vp9.webm": "libvpx-vp9", "vp8.webm": "libvpx", "a.mov": "qtrle"}[name]
        settings = {"pix_fmt": "argb" if path.suffix == ".mov" else "yuva420p"}
        write(path, np.stack([np.asarray(picture) for picture in pictures]), codec=codec, **settings)
    else:
        options: dict[str, Any] = {"disposal": 2} if path.suffix == ".gif" else {"lossless": True}
        form = {".gif": "GIF", ".webp": "WEBP"}.get(path.suffix, "PNG")
        pictures[0].save(path, form, save_all=True, append_images=pictures[1:], duration=125, **options)
    shown = seen(reader, path, 64, 64)
    assert np.abs(shown[:, 2, 2].astype(int) - WHITE).max() <= 2
    assert np.abs(shown[:, 32, 32].astype(int) - RED).max() <= 40  # 4:2:0 and lossy coding
    if reader == "Video.open":
        assert len(shown) == 8
        assert np.abs(shown[7, 32, 18].astype(int) - WHITE).max() <= 40  # nothing of frame 0 is left


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.mark.parametrize(
    ("name", "values", "dtype"),
    [
        ("a.png", 65535, "<u2"),
        ("a.tif", 65535, "<u2"),
        ("b.tif", 65535, ">u2"),
        ("a.png", 255, "u1"),
        ("a.tif", 1, "<f4"),
    ],
)
def test_grey_pictures_of_many_bits_are_scaled(tmp_path: Path, name: str, values: int, dtype: str) -> None:
    Image.fromarray((RAMP * values).astype(dtype)).save(tmp_path / name)
    wanted = np.repeat((RAMP * 255)[..., None], 3, axis=2)
    assert np.abs(read_image(tmp_path / name, 64, 64, Placement())[0] - wanted).max() <= 1
    for given in (tmp_path / name, Image.open(tmp_path / name)):
        assert np.abs((load_image(given, 64, 64) + 1) * 127.5 - wanted.transpose(2, 0, 1)).max() <= 1


def test_samples_of_unknown_range_are_refused() -> None:
    for values in (RAMP.astype(np.float32) * 300, (RAMP * 2**20).astype(np.int32), RAMP.astype(np.float32) - 1):
        with pytest.raises(RequestError, match=r"its samples are .* in Pillow's mode '[FI]': 0 to "):
            load_image(Image.fromarray(values), 8, 8)
    assert load_image(Image.fromarray((RAMP * 255).astype(np.int32)), 64, 64).max() == 1


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGB", "I;16"])
def test_every_way_of_transparency_in_a_png_is_white(tmp_path: Path, mode: str) -> None:
    grey = np.full((16, 16), 70, np.uint8)
    grey[:, 8:] = 200
    options: dict[str, Any] = {"transparency": 70}
    if mode == "LA":
        picture, options = Image.fromarray(np.dstack([grey, (grey > 100) * np.uint8(255)]), "LA"), {}
    elif mode == "I;16":
        picture, options = Image.fromarray(grey.astype(np.uint16) * 257), {"transparency": 70 * 257}
    elif mode == "RGB":
        picture, options = Image.fromarray(np.dstack([grey] * 3)), {"transparency": (70, 70, 70)}
    else:
        picture = Image.fromarray(grey)
    if mode == "P":
        picture = Image.fromarray(grey, "P")
        picture.putpalette([value for value in range(256) for _ in range(3)])
    picture.save(tmp_path / "a.png", **options)
    shown = read_image(tmp_path / "a.png", 16, 16, Placement())[0]
    assert (shown[:, :8] == 255).all()
    assert (shown[:, 8:] == 200).all()
    assert np.array_equal(Video.open(tmp_path / "a.png").frames[0], shown)


# Streams


def test_a_cover_picture_is_not_a_video(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", np.stack([corner()] * 8))
    for name, kinds in (("first.mp4", "cv"), ("alone.mp4", "c"), ("last.mp4", "vc")):
        with av.open(str(tmp_path / name), "w") as output, av.open(str(path)) as source:
            streams = {}
            for kind in kinds:
                if kind == "v":
                    streams[kind] = output.add_stream_from_template(source.streams.video[0])
                else:
                    streams[kind] = output.add_stream("png")
                    streams[kind].width = streams[kind].height = 16
                    streams[kind].pix_fmt = "rgb24"
                    streams[kind].disposition = av.stream.Disposition.attached_pic
            cover = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 255, np.uint8), format="rgb24")
            output.mux([*streams["c"].encode(cover), *streams["c"].encode(None)])
            for packet in source.demux(video=0) if "v" in kinds else ():
                if packet.dts is not None:
                    packet.stream = streams["v"]
                    output.mux(packet)
    for name in ("first.mp4", "last.mp4"):
        assert Video.open(tmp_path / name).frames.shape == (8, HIGH, WIDE, 3)
        assert read_video(tmp_path / name, WIDE, HIGH, 8, 8, Placement()).mean() == pytest.approx(
            corner().mean(), abs=3
        )
    with pytest.raises(OutputError, match=r"no video in it \(only a cover picture\)"):
        Video.open(tmp_path / "alone.mp4")


def woven(count: int) -> NDArray[np.uint8]:
    """Interlaced frames of a moving bar: the even rows show an earlier moment than the odd rows."""
    frames = np.zeros((count, 64, 96, 3), np.uint8)
    for index in range(count):
        for row in range(2):
            frames[index, row::2, 8 * index + 4 * row : 8 * index + 4 * row + 16] = 255
    return frames


@pytest.mark.parametrize("suffix", ["mpg", "ts", "mp4"])
def test_interlaced_frames_are_put_together(tmp_path: Path, suffix: str) -> None:
    """A comb is a row that differs from both its neighbours in the same way. Interlaced frames are full of combs."""

    def combs(frames: NDArray[np.uint8]) -> float:
        grey = frames[..., 1].astype(int)
        over = (grey[:, 1:-1] - grey[:, :-2]) * (grey[:, 1:-1] - grey[:, 2:])
        return float((over > 50**2).mean())

    path, codec = tmp_path / f"a.{suffix}", "libx264" if suffix == "mp4" else "mpeg2video"
    options = {"crf": "1", "flags": "+ilme+ildct", "x264-params": "interlaced=1:tff=1"}
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, 25, options=options if codec == "libx264" else {"flags": "+ilme+ildct"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 8_000_000
        for frame in woven(10):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    with av.open(str(path)) as source:
        stored = list(source.decode(video=0))
    assert all(frame.interlaced_frame for frame in stored)
    before = np.stack([frame.to_ndarray(format="rgb24") for frame in stored])
    video = Video.open(path)
    assert (len(video), video.fps) == (10, 25)
    assert combs(before) > 0.01
    assert combs(video.frames[1:-1]) < combs(before) / 20
    assert combs(read_video(path, 96, 64, 25, 8, Placement())) < combs(before) / 20
    left = (video.frames[..., 1] > 128).any(axis=1).argmax(axis=1)
    assert np.abs(left - 8 * np.arange(10)).max() <= 5  # in order, and none lost


# Time


def shades(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (value,) * 3) for value in values]


def levels(video: Video) -> list[int]:
    """Each frame's shade in steps of 20."""
    return (video.frames.mean(axis=(1, 2, 3)) / 20).round().astype(int).tolist()


@pytest.mark.parametrize("suffix", ["gif", "webp", "apng"])
def test_a_frame_is_shown_as_long_as_the_file_says_the_last_one_too(tmp_path: Path, suffix: str) -> None:
    first, *rest = shades(*range(0, 160, 20))
    lasting = [100] * 7 + [1000]
    form = {"apng": "PNG"}.get(suffix, suffix)
    first.save(tmp_path / f"a.{suffix}", form, save_all=True, append_images=rest, duration=lasting, lossless=True)
    video = Video.open(tmp_path / f"a.{suffix}")
    assert video.fps == 10
    assert video.duration == pytest.approx(1.7)
    assert levels(video) == [*range(7), *[7] * 10]
    assert read_video(tmp_path / f"a.{suffix}", 16, 16, 10, 17, Placement()).mean(axis=(1, 2, 3))[-1] == pytest.approx(
        140, abs=1
    )


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_frame_rate_becomes_a_steady_one(tmp_path: Path, suffix: str) -> None:
    """Frame k is due after times[k] tenths of a second. At each tenth the latest due frame is shown."""
    times = [0, 1, 2, 3, 6, 9, 10, 15]
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as output:
        stream: Any = output.add_stream("libx264", 10, options={"crf": "1"})
        stream.width = stream.height = 16
        stream.pix_fmt, stream.time_base = "yuv444p", Fraction(1, 10)
        stream.codec_context.time_base = Fraction(1, 10)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_image(shades(20 * index)[0])
            frame.pts, frame.time_base = time, Fraction(1, 10)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    video = Video.open(tmp_path / f"a.{suffix}")
    assert video.fps == pytest.approx(10, rel=0.01)
    shown = np.searchsorted(times, np.arange(16) + 0.5, side="right") - 1
    assert levels(video)[:16] == shown.tolist()


@pytest.mark.parametrize(
    ("milliseconds", "shown", "fps"),
    [
        ([125] * 8, list(range(8)), 8.0),
        ([33, 33, 34] * 5, list(range(15)), 30.0),
        ([40, 40, 80] * 4, list(range(12)), 18.75),  # each is within half a frame of 53 ms
        ([100, 100, 100, 900], [0, 1, 2, *[3] * 9], 10.0),
        ([200, 300, 200, 1000], [0, 0, 1, 1, 1, 2, 2, *[3] * 10], 10.0),
        ([5000], [0], 0.2),
        ([0], [0], 0.0),
    ],
)
def test_steady_rates_of_uneven_times(milliseconds: list[int], shown: list[int], fps: float) -> None:
    edges = np.cumsum([0, *milliseconds]) / 1000
    found, rate = steady_plan(edges[:-1], edges[-1])
    assert found.tolist() == shown
    assert rate == pytest.approx(fps, rel=1e-3)


def test_a_png_animation_may_begin_with_a_picture_that_is_not_a_frame(tmp_path: Path) -> None:
    first, *rest = shades(200, 0, 20, 40)
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, duration=100, default_image=True)
    assert levels(Video.open(tmp_path / "a.png")) == [0, 1, 2]


def test_an_animation_is_turned_as_its_exif_data_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    frames = [Image.fromarray(corner()), Image.fromarray(255 - corner())]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, exif=exif)
    assert np.array_equal(Video.open(tmp_path / "a.webp").frames[0], np.rot90(corner(), -1))


def test_an_invalid_duration_is_refused() -> None:
    with pytest.raises(OutputError, match="its 4 frames are spread unevenly over 1000000 s"):
        steady_plan(np.array([0, 0.1, 0.2, 1e6]), 1e6 + 0.1)


def test_frames_without_a_duration_last_a_tenth_as_in_browsers(tmp_path: Path) -> None:
    first, *rest = shades(0, 20, 40)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    assert Video.open(tmp_path / "a.gif").fps == 10


# Our own record


@pytest.fixture
def ours() -> Video:
    return Video(np.stack([np.full((34, 35, 3), 15 * i, np.uint8) for i in range(16)]), 8, {"prompt": "p", "seed": 3})


def test_a_clip_of_ours_that_another_program_changed_is_read_as_it_is_now(tmp_path: Path, ours: Video) -> None:
    ours.save(tmp_path / "a.mp4")
    for name, times, kept in (("slow.mp4", 3, 16), ("cut.mkv", 1, 6), ("fast.webm", 1, 16)):
        codec = "libvpx-vp9" if name == "fast.webm" else "libx264"
        with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / name), "w") as output:
            output.metadata["comment"] = source.metadata["comment"]
            stream: Any = output.add_stream(codec, 8 if name == "cut.mkv" else 24)
            stream.width, stream.height, stream.pix_fmt = 36, 34, "yuv420p"
            for frame in list(source.decode(video=0))[:kept]:
                for _ in range(times):
                    again = av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")
                    output.mux(stream.encode(again))
            output.mux(stream.encode(None))
    found = {name: Video.open(tmp_path / name) for name in ("slow.mp4", "cut.mkv", "fast.webm")}
    assert {name: (len(v), v.fps) for name, v in found.items()} == {
        "slow.mp4": (48, 24),
        "cut.mkv": (6, 8),
        "fast.webm": (16, 24),
    }
    assert all(video.metadata == {"prompt": "p", "seed": 3} for video in found.values())


@pytest.mark.parametrize(("duration", "kept", "fps"), [(40, 16, 25), (120, 8, 1 / 0.12), (250, 8, 8)])
@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_of_ours_that_was_changed(
    tmp_path: Path, ours: Video, suffix: str, duration: int, kept: int, fps: float
) -> None:
    """The last case has half the frames at twice the duration. It is as long as ours, so our frame rate applies."""
    with Image.open(ours.save(tmp_path / f"a.{suffix}")) as image:
        text = {"comment": image.info["comment"]} if suffix == "gif" else {"exif": image.getexif(), "lossless": True}
        pictures = []
        for index in range(kept):
            image.seek(index)
            pictures.append(image.convert("RGB"))
    pictures[0].save(tmp_path / f"b.{suffix}", save_all=True, append_images=pictures[1:], duration=duration, **text)
    video = Video.open(tmp_path / f"b.{suffix}")
    assert video.fps == pytest.approx(fps)
    assert video.duration == pytest.approx(kept * duration / 1000)
    assert video.prompt == "p"


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif", "webp"])
def test_a_clip_of_ours_that_is_cut_off_is_refused(tmp_path: Path, ours: Video, suffix: str) -> None:
    path = ours.save(tmp_path / f"a.{suffix}")
    data = path.read_bytes()
    for part in (0.5, 0.7, 0.9, 0.97):
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(OutputError, match=rf"a\.{suffix}: not a readable"):
            Video.open(path)


# Sequences of pictures


@pytest.mark.parametrize(
    "names",
    [
        [f"f_{i:04d}.png" for i in range(1, 5)],
        [f"f_{i:03d}.png" for i in range(4)],
        [f"f{i}.png" for i in range(8, 12)],
        [f"frame {i:02d}.PNG" for i in range(97, 101)],
        [f"{i:05d}.png" for i in range(240, 244)],
    ],
)
def test_a_sequence_of_any_numbers_opens_whole_from_any_file(tmp_path: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        shades(20 * index)[0].save(tmp_path / name)
    shades(200)[0].save(tmp_path / "other_0001.png")
    (tmp_path / "f_notes.png").write_text("no number")
    for name in names:
        assert levels(Video.open(tmp_path / name)) == [0, 1, 2, 3]


def test_a_sequence_is_distinguished_from_other_files(tmp_path: Path) -> None:
    for name, shade in (("f_0000.png", 0), ("f_0001.png", 20), ("f.png", 100), ("f_1.png", 200)):
        shades(shade)[0].save(tmp_path / name)
    assert levels(Video.open(tmp_path / "f.png")) == [5]  # the picture of that name, because the sequence is not ours
    assert levels(Video.open(tmp_path / "f_0001.png")) == [0, 1]
    assert levels(Video.open(tmp_path / "f_1.png")) == [10]
    (tmp_path / "f.png").unlink()
    assert levels(Video.open(tmp_path / "f.png")) == [0, 1]


def test_a_gap_and_a_second_size_are_named(tmp_path: Path) -> None:
    for number in (3, 4, 6):
        shades(0)[0].save(tmp_path / f"f_{number:03d}.png")
    for name in ("f.png", "f_003.png", "f_006.png"):
        with pytest.raises(OutputError, match=r"f_005\.png is missing: 2 of 4 frames come before it"):
            Video.open(tmp_path / name)
    Image.new("RGB", (16, 18)).save(tmp_path / "f_005.png")
    with pytest.raises(OutputError, match=r"f_005\.png is 16x18 pixels and f_003\.png 16x16: one size is wanted"):
        Video.open(tmp_path / "f.png")


def test_open_reads_every_path_that_save_accepts(tmp_path: Path) -> None:
    for name in ("out.png", "out_0000.png", "out_7.png", "7.png"):
        folder = tmp_path / name.removesuffix(".png")
        folder.mkdir()
        clip = Video(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8), 12, {"seed": 1})
        saved = clip.save(folder / name)
        for path in (folder / name, saved):
            assert np.array_equal(Video.open(path).frames, clip.frames)
            assert (Video.open(path).fps, Video.open(path).metadata) == (12, {"seed": 1})


def test_two_clips_in_one_sequence_are_reported(tmp_path: Path) -> None:
    for name, shade in (("a", 0), ("b", 100)):
        Video(np.full((4, 8, 8, 3), shade, np.uint8), 8).save(tmp_path / f"{name}.png")
    (tmp_path / "b_0002.png").replace(tmp_path / "a_0002.png")
    with pytest.raises(OutputError, match=r"a_0002\.png and a_0000\.png belong to different clips"):
        Video.open(tmp_path / "a.png")


# Files that are not videos


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\nhttp://127.0.0.1/a.ts\n", "it is a playlist"),
        (b"ffconcat version 1.0\nfile a.mp4\n", "not in a supported video format"),
        (b"plain words " * 100, "not in a supported video format"),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "ts", "gif"])
def test_a_file_of_another_kind_is_described_in_words(tmp_path: Path, data: bytes, words: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    with pytest.raises(OutputError, match=words):
        Video.open(path)
    with pytest.raises(Unusable, match=words):
        read_video(path, 8, 8, 8, 1, Placement())
    with pytest.raises(
        RequestError, match=words if b"plain" not in data and b"ffconcat" not in data else "supported picture format"
    ):
        load_image(path, 8, 8)


def test_a_file_with_only_sound_is_described_in_words(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream: Any = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(OutputError, match=r"no video in it \(audio alone\)"):
        Video.open(tmp_path / "a.mp4")


def test_pipes_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    for suffix in ("mp4", "png", "webp", "npy"):
        os.mkfifo(tmp_path / f"a.{suffix}")
        (tmp_path / f"b.{suffix}").mkdir()
        with pytest.raises(OutputError, match="not a regular file"):
            Video.open(tmp_path / f"a.{suffix}")
        with pytest.raises(OutputError, match="a folder"):
            Video.open(tmp_path / f"b.{suffix}")
    with pytest.raises(RequestError, match="not a regular file"):
        load_image(tmp_path / "a.png", 8, 8)


def test_the_suffixes_that_are_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.rm").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"'\.rm' is unknown; known are \.mp4, .*\.ts, .*\.gif, .*\.npy$"):
        Video.open(tmp_path / "a.rm")


@pytest.mark.parametrize(
    "suffix", ["avi", "mkv", "mov", "m4v", "ts", "mts", "m2ts", "mpg", "mpeg", "ogv", "wmv", "flv", "3gp"]
)
def test_other_containers_are_read_too(tmp_path: Path, suffix: str) -> None:
    codec = {"mpg": "mpeg1video", "mpeg": "mpeg2video", "wmv": "wmv2", "flv": "flv", "ogv": "libvpx"}.get(
        suffix, "mpeg4"
    )
    values = np.arange(25, dtype=np.uint8) * 10
    frames = np.broadcast_to(values[:, None, None, None], (25, 64, 96, 3)).copy()
    path = write(tmp_path / f"a.{suffix}", frames, 25, codec)
    video = Video.open(path)
    assert (video.frames.shape, video.fps) == (frames.shape, 25)
    assert np.abs(video.frames.mean(axis=(1, 2, 3)) - values).max() < 4
    clip = read_video(path, 96, 64, 25, 25, Placement())
    assert np.abs(clip.mean(axis=(1, 2, 3)) - values).max() < 4


def test_the_contents_decide_and_not_the_suffix(tmp_path: Path) -> None:
    data = write(tmp_path / "a.mp4", np.stack([corner()] * 4)).read_bytes()
    (tmp_path / "b.gif").write_bytes(data)
    assert Video.open(tmp_path / "b.gif").frames.shape == (4, HIGH, WIDE, 3)
    first, *rest = shades(0, 20)
    first.save(tmp_path / "c.gif", save_all=True, append_images=rest, duration=100)
    (tmp_path / "c.gif").rename(tmp_path / "c.mp4")
    assert levels(Video.open(tmp_path / "c.mp4")) == [0, 1]


def test_tags_that_are_not_utf_8_do_not_make_a_video_unreadable(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as output:
        output.metadata["title"] = "MARKER"
        stream: Any = output.add_stream("mpeg4", 8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 32, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data.replace(b"MARKER", "KÄÖÜ\xff!".encode("latin-1")))
    assert len(Video.open(tmp_path / "a.mkv")) == 1


# Sizes


def test_a_clip_too_large_for_memory_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = Video(np.zeros((8, 16, 16, 3), np.uint8), 8)
    paths = [video.save(tmp_path / f"a.{suffix}") for suffix in ("mp4", "webp", "png", "npy")]
    with (tmp_path / "b.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 999, 999, 3)}
        )
    with pytest.raises(
        OutputError, match=r"1000000000 frames of 999x999 pixels are 2.79e.06 GiB in memory: at most 8 GiB"
    ):
        Video.open(tmp_path / "b.npy")
    monkeypatch.setattr(higen.media.files, "MAX_BYTES", 8 * 16 * 16 * 3 - 1)
    for path in paths:
        with pytest.raises(OutputError, match=r"8 frames of 16x16 pixels are .* cut or shrink it"):
            Video.open(path)
        assert load_clip(path, 4, 16, 16).shape == (3, 4, 16, 16)  # the wanted frames fit into memory


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Video(np.zeros((2, 8, 8, 3), np.uint8), 8).save(tmp_path / "a.webp")
    assert len(Video.open("~/a.webp")) == 2
    assert load_clip("~/a.webp", 2, 8, 8).shape == (3, 2, 8, 8)
    assert load_image(Path("~/a.webp"), 8, 8).shape == (3, 8, 8)


def test_the_record_is_not_trusted_for_types(tmp_path: Path) -> None:
    for record in (
        {"fps": 8, "frames": 2, "height": 8, "width": 8.5},
        {"fps": True, "frames": 1e9, "height": 8, "width": 8},
    ):
        first, *rest = shades(0, 20)
        comment = json.dumps({"higen.video": record, "prompt": "p"}).encode()
        first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=100, comment=comment)
        assert len(Video.open(tmp_path / "a.gif")) == 2
