"""Where a clip may be written. Only files that higen wrote are replaced or removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from higen.errors import HigenError, OutputError
from higen.video import Video, check_output

SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png", ".npy")


def clip(frames: int = 2, level: int = 10) -> Video:
    return Video(np.full((frames, 16, 16, 3), level, np.uint8), 8, {"prompt": f"level {level}"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Sequences


def test_pictures_after_a_sequence_stay_if_higen_did_not_write_them(tmp_path: Path) -> None:
    for number in (2, 3):
        (tmp_path / f"shot_{number:04d}.png").write_bytes(b"a photo of mine")
    clip(2).save(tmp_path / "shot.png")
    assert (tmp_path / "shot_0002.png").read_bytes() == (tmp_path / "shot_0003.png").read_bytes() == b"a photo of mine"


def test_frames_after_a_shorter_clip_are_removed_and_a_picture_among_them_stays(tmp_path: Path) -> None:
    clip(6).save(tmp_path / "shot.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "shot_0003.png")
    clip(2, 200).save(tmp_path / "shot.png")
    assert names(tmp_path) == ["shot_0000.png", "shot_0001.png", "shot_0003.png"]


def test_frames_of_another_clip_after_the_new_one_stay(tmp_path: Path) -> None:
    clip(6, 90).save(tmp_path / "other.png")
    (tmp_path / "other_0004.png").rename(tmp_path / "shot_0004.png")
    clip(3).save(tmp_path / "shot.png")
    clip(2, 200).save(tmp_path / "shot.png")
    assert [name for name in names(tmp_path) if name.startswith("shot")] == [
        "shot_0000.png",
        "shot_0001.png",
        "shot_0004.png",
    ]


def foreign_text(path: Path) -> None:
    path.write_bytes(b"a photo of mine")


def foreign_picture(path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", '{"prompt": "of another program"}')
    Image.new("RGB", (4, 4)).save(path, pnginfo=text)


def foreign_link(path: Path) -> None:
    (path.parent / "target").write_bytes(b"a photo of mine")
    path.symlink_to(path.parent / "target")


def another_frame(path: Path) -> None:
    """A frame that higen wrote and a user renamed. It belongs to the user."""
    clip(4, 90).save(path.parent / "other.png")
    (path.parent / "other_0003.png").rename(path)


@pytest.mark.parametrize("make", [foreign_text, foreign_picture, foreign_link, another_frame, os.mkfifo, Path.mkdir])
def test_a_foreign_file_in_place_of_a_frame_is_refused_before_anything_is_written(tmp_path: Path, make: object) -> None:
    make(tmp_path / "shot_0001.png")  # type: ignore[operator]
    before = contents(tmp_path) if make is not os.mkfifo else {}
    check_output(tmp_path / "shot.png", 1)
    for write in (lambda: check_output(tmp_path / "shot.png", 2), lambda: clip(2).save(tmp_path / "shot.png")):
        with pytest.raises(
            OutputError, match=r"shot_0001\.png: is in the place of frame 1 of shot\.png, .* move it away"
        ):
            write()
    assert not (tmp_path / "shot_0000.png").exists()
    if make is not os.mkfifo:
        assert contents(tmp_path) == before


def test_a_sequence_from_before_the_marks_is_replaced(tmp_path: Path) -> None:
    payload = '{"prompt": "p", "higen.video": {"fps": 8.0, "frames": 3, "height": 4, "width": 4}}'
    for number in range(4):
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", payload)
        Image.new("RGB", (4, 4)).save(tmp_path / f"shot_{number:04d}.png", pnginfo=text)
    clip(1).save(tmp_path / "shot.png")
    assert names(tmp_path) == ["shot_0000.png", "shot_0003.png"]  # the last file was not a frame of that clip


def test_frames_of_two_clips_are_not_shown_as_one(tmp_path: Path) -> None:
    clip(3, 10).save(tmp_path / "a.png")
    clip(3, 200).save(tmp_path / "b.png")
    (tmp_path / "b_0001.png").replace(tmp_path / "a_0001.png")
    with pytest.raises(OutputError, match="different clips"):
        Video.open(tmp_path / "a.png")


SAVE = """
import os, signal, sys
import numpy as np
from higen.video import Video
path, frames, level, kill, times = sys.argv[1], *map(int, sys.argv[2:])
count = 0
def hook(event, arguments):
    global count
    if event == 'os.rename':
        count += 1
        if count == kill:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
for _ in range(times):
    Video(np.full((frames, 16, 16, 3), level, np.uint8), 8, {'prompt': f'level {level}'}).save(path)
"""


def saving(path: Path, frames: int, level: int, kill: int = 0, times: int = 1) -> subprocess.Popen[bytes]:
    words = [str(path), *map(str, (frames, level, kill, times))]
    return subprocess.Popen([sys.executable, "-c", SAVE, *words])


@pytest.mark.parametrize("kill", [1, 2, 5, 9])
def test_a_killed_save_of_a_sequence_leaves_the_old_clip_or_the_new_one(tmp_path: Path, kill: int) -> None:
    clip(16).save(tmp_path / "shot.png")
    assert saving(tmp_path / "shot.png", 8, 200, kill).wait(60) == -signal.SIGKILL
    found = Video.open(tmp_path / "shot.png")
    assert (len(found), set(np.unique(found.frames))) == ((16, {10}) if kill == 1 else (8, {200}))
    clip(3, 90).save(tmp_path / "shot.png")
    assert names(tmp_path) == [f"shot_{i:04d}.png" for i in range(3)]


def test_two_processes_that_save_one_sequence_leave_one_clip(tmp_path: Path) -> None:
    writers = [saving(tmp_path / "shot.png", frames, level, times=15) for frames, level in ((9, 10), (4, 200))]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    found = Video.open(tmp_path / "shot.png")
    assert (len(found), set(np.unique(found.frames))) in ((9, {10}), (4, {200}))
    assert names(tmp_path) == [f"shot_{i:04d}.png" for i in range(len(found))]


# One file


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_killed_saves_are_removed_by_the_next(tmp_path: Path, suffix: str) -> None:
    for _ in range(2):
        assert saving(tmp_path / f"a{suffix}", 2, 10, kill=1).wait(60) == -signal.SIGKILL
    assert len(names(tmp_path)) == (2 if suffix == ".png" else 1)  # the second save removed the first one's leftovers
    clip().save(tmp_path / f"a{suffix}")
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_name_that_no_file_system_takes_is_one_error_before_the_work(tmp_path: Path, suffix: str) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * ((4060 - len(str(tmp_path))) // 201))
    for name in ("x" * 252 + suffix, "a\0b" + suffix, "\ud800" + suffix, str(deep / ("y" * 30 + suffix))):
        with pytest.raises(
            OutputError, match=r"does not take this name|cannot contain the character NUL|does not exist"
        ) as caught:
            check_output(f"{tmp_path}/{name}")
        assert len(str(caught.value)) < 2100
    assert names(tmp_path) == []


def test_numbers_make_a_name_longer(tmp_path: Path) -> None:
    """out.png stands for out_0000.png. From the ten thousandth frame on, the numbers and names are longer."""
    check_output(tmp_path / ("x" * 246 + ".png"), 10_000)
    for stem, frames in ((247, 1), (246, 10_001)):
        with pytest.raises(OutputError, match="does not take this name"):
            check_output(tmp_path / ("x" * stem + ".png"), frames)


def test_a_nul_character_does_not_truncate_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"another file")
    with pytest.raises(HigenError, match="NUL"):
        clip().save(f"{tmp_path}/a.mp4\0.mp4")
    assert contents(tmp_path) == {"a.mp4": b"another file"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_read_only_file_is_kept(tmp_path: Path, suffix: str) -> None:
    written = clip().save(tmp_path / f"a{suffix}")
    before = contents(tmp_path)
    written.chmod(0o444)
    with pytest.raises(OutputError, match=f"{written.name}: is read-only"):
        clip(2, 200).save(tmp_path / f"a{suffix}")
    assert contents(tmp_path) == before


def test_a_read_only_frame_beyond_the_end_is_kept(tmp_path: Path) -> None:
    clip(3).save(tmp_path / "a.png")
    (tmp_path / "a_0002.png").chmod(0o444)
    with pytest.raises(OutputError, match=r"a_0002\.png: is read-only"):
        clip(2).save(tmp_path / "a.png")
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, there: bool, relative: bool) -> None:
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / "target.npy"
    if there:
        target.write_bytes(b"old")
    link = tmp_path / "link.npy"
    link.symlink_to(Path("store", "target.npy") if relative else target)
    clip().save(link)
    assert link.is_symlink()
    assert np.load(target).shape == (2, 16, 16, 3)
    assert (names(tmp_path), names(tmp_path / "store")) == (["link.npy", "store"], ["target.npy"])


def test_a_link_that_leads_nowhere_or_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "lost.npy").symlink_to(tmp_path / "nowhere" / "a.npy")
    (tmp_path / "circle.npy").symlink_to("circle.npy")
    for name, message in (("lost.npy", "nowhere, which does not exist"), ("circle.npy", "symbolic links")):
        with pytest.raises(OutputError, match=message):
            clip().save(tmp_path / name)


def test_a_pipe_and_a_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "device.npy").symlink_to("/dev/null")
    for name in ("pipe.npy", "device.npy"):
        with pytest.raises(OutputError, match="is a pipe or a device, not a regular file"):
            clip().save(tmp_path / name)


def test_permissions_of_a_replaced_file_stay(tmp_path: Path) -> None:
    path = clip().save(tmp_path / "a.npy")
    path.chmod(0o600)
    clip(3).save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(np.load(path)) == 3


def test_a_rate_that_the_format_cannot_have_is_found_before_the_work(tmp_path: Path) -> None:
    check_output(tmp_path / "a.gif", 1, 50)
    with pytest.raises(OutputError, match=r"fps=60: a \.gif file plays 0\.01 to 50 frames a second"):
        check_output(tmp_path / "a.gif", 1, 60)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp", ".npy"])
@pytest.mark.parametrize("target", ["blob", "other.gif", "other.MP4"])
def test_the_name_given_decides_the_format_not_a_links_target(tmp_path: Path, suffix: str, target: str) -> None:
    (tmp_path / target).write_bytes(b"old")
    (tmp_path / f"a{suffix}").symlink_to(target)
    clip = Video(np.full((3, 16, 16, 3), 90, np.uint8), 8)
    clip.save(tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").is_symlink()
    clip.save(tmp_path / f"plain{suffix}")
    assert (tmp_path / target).read_bytes()[:4] == (tmp_path / f"plain{suffix}").read_bytes()[:4]
    assert len(Video.open(tmp_path / f"a{suffix}")) == 3


def test_a_sequence_keeps_its_permissions(tmp_path: Path) -> None:
    clip = Video(np.zeros((2, 8, 8, 3), np.uint8), 8)
    first = clip.save(tmp_path / "a.png")
    first.chmod(0o600)
    clip.save(tmp_path / "a.png")
    assert first.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("frames", [1e999, 2_000_000_000, 2.5, "many", None])
def test_a_record_of_any_length_costs_nothing(tmp_path: Path, frames: Any) -> None:
    """The record in a picture is read only if it is short enough, and used only if it fits the picture."""
    clip = Video(np.zeros((2, 8, 8, 3), np.uint8), 8)
    first = clip.save(tmp_path / "o.png")
    with Image.open(first) as picture:
        info, pixels = dict(picture.info), picture.copy()
    payload = json.loads(info["Comment"])
    payload["higen.video"]["frames"] = frames
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", json.dumps(payload))
    text.add_text("higen.frame", info["higen.frame"])
    pixels.save(first, pnginfo=text)
    if frames == 2_000_000_000:
        clip.save(tmp_path / "o.png")
        assert len(Video.open(first)) == 2
    else:
        with pytest.raises(OutputError, match="higen did not write it as that"):
            clip.save(tmp_path / "o.png")
