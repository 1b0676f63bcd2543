"""Training data: listings, order, decoding, latents and their cache."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from conftest import write_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from training_run import MODEL, moving_square, numbers_shown, write_clips, write_counted, write_tower

from higen.errors import SettingsError, TrainingError
from higen.families.higen import spec
from higen.models.companion_stages import EncoderStage
from higen.models.companions import load_autoencoder
from higen.train.data import IMAGE, VIDEO, candidates, list_items, summary
from higen.train.latents import Encoded, LatentCache, OpenClip, encode, to_pixels, tower_sha256
from higen.train.media import Placement, Unusable, choose_frames, read_image, read_video, video_length
from higen.train.reader import Frame, Reader
from higen.video import Video

CENTRE = Placement()


# Listings.


def test_a_folder_pairs_files_with_their_captions(tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips")
    (folder / "deep").mkdir()
    Image.new("RGB", (30, 20), "red").save(folder / "deep" / "still.png")
    (folder / "deep" / "still.txt").write_text(" a red ground\n")
    Image.new("RGB", (30, 20)).save(folder / "alone.jpg")
    listing = list_items(folder)
    assert [(item.name, item.caption, item.video) for item in listing.items] == [
        ("clip0.webm", "a blue whale swimming", True),
        ("clip1.webm", "a red heart beating", True),
        ("clip2.webm", "a green star", True),
        (str(Path("deep", "still.png")), "a red ground", False),
    ]
    assert listing.skipped == {"alone.jpg": "no .txt with its caption beside it"}
    assert [item.name for item in listing.of(IMAGE, key_frames=False)] == [str(Path("deep", "still.png"))]
    assert len(listing.of(IMAGE, key_frames=True)) == 4
    assert len(listing.of(VIDEO, key_frames=True)) == 3


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_list_names_paths_and_captions(tmp_path: Path, suffix: str) -> None:
    rows = [("a.mp4", 'says "hi", twice'), ("b.PNG", "é"), ("c.txt", "no")]
    if suffix == ".csv":
        quoted = [f'{path},"{caption.replace(chr(34), chr(34) * 2)}",x\n' for path, caption in rows]
        text = "path,caption,more\n" + "".join(quoted)
    else:
        text = "".join(json.dumps({"path": p, "caption": c, "more": 1}) + "\n" for p, c in rows) + "\n"
    file = tmp_path / f"list{suffix}"
    file.write_text(text, encoding="utf-8")
    listing = list_items(file)
    assert [(i.path, i.caption, i.video) for i in listing.items] == [
        (tmp_path / "a.mp4", 'says "hi", twice', True),
        (tmp_path / "b.PNG", "é", False),
    ]
    assert listing.skipped == {"c.txt": "its suffix '.txt' is unknown"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "file,caption\na.mp4,x\n", r"no column 'path'; it has 'file', 'caption'"),
        ("l.csv", "", r"no column 'path' and no column 'caption'; it has none"),
        ("l.csv", "path,caption\na.mp4\n", r"line 2: no 'caption'; it has 'path'$"),
        ("l.csv", "path,caption\n", "no usable item$"),
        (
            "l.csv",
            "path,caption\na.xyz,b\nb.txt,b\n",
            r"no usable item: 2 files skipped \(1 its suffix '.xyz' is unknown, .*\); a.xyz: its suffix '.xyz' is",
        ),
        ("l.jsonl", '{"path": "a.mp4", "text": "x"}\n', r"line 1: no 'caption'; it has 'path', 'text'$"),
        ("l.jsonl", '{"path": "a.mp4", "caption": "x"}\n{}\n', r"line 2: no 'path'; it has nothing$"),
        ("l.jsonl", '{"path": "a.mp4", "caption": 3}\n', r"line 1: caption=3: a text is wanted$"),
        ("l.jsonl", "[1]\n", r"line 1: \[1\]: an object with the texts 'path' and 'caption' is wanted$"),
        ("l.jsonl", "{\n", "line 1: not JSON"),
        (
            "l.jsonl",
            '{"path": "a.mp4", "caption": "x", "caption": "y"}',
            "line 1: the key 'caption' appears twice",
        ),
        (
            "l.jsonl",
            '{"path": "a.mp4", "caption": "x\\u0000"}',
            r"line 1: caption='x\\x00': line 1: the character U\+0000",
        ),
        ("l.jsonl", '{"path": "a.mp4", "caption": "\\ud800"}', r"line 1: caption=.*U\+D800"),
        ("l.jsonl", '{"path": "a.mp4", "caption": "' + "x" * 100_001 + '"}', "line 1: .*100001 characters: at most"),
        ("l.jsonl", "x\n\ny\n" * 4, "line 1: not JSON.*; line 3: not JSON.*; 8 malformed rows in all$"),
        ("l.csv", "path,caption\na.mp4,a dog, a cat\n", "line 2: 3 values for 2 columns: .* in double quotes$"),
        ("l.csv", "path,caption\na.mp4,x\nb.mp4,a,b\nc.mp4,d,e\n", "line 3: 3 values .*; line 4: 3 values"),
        ("l.csv", 'path,caption\na.mp4,"a dog\nb.mp4,a cat\n', "line 2: unexpected end .*a double quote is not closed"),
        ("l.csv", 'path,caption\na.mp4,"a dog\nb.mp4,a cat"\n', "line 2: a double quote is not closed, and the next"),
        ("l.csv", 'path,caption\na.mp4,"a" dog\n', "line 2: ',' expected after '\"'"),
        ("l.csv", 'path,caption\na.mp4, "a dog"\n', "line 2: white space before a double quote"),
        ("l.csv", 'path,caption\n"a\nb.png",x\n', "line 2: "),
        ("l.csv", "path;caption\na.mp4;x\n", "it has 'path;caption': its columns are separated by ';', not by commas"),
        ("l.csv", "path\tcaption\na.mp4\tx\n", r"separated by '\\t', not by commas$"),
        ("l.csv", "a.mp4,x\nb.mp4,y\n", "the first line is already a row, but must be path,caption$"),
        ("l.csv", "Path, Caption\na.mp4,x\n", "write path,caption in lower case and without spaces$"),
        ("l.csv", "path,caption,caption\na.mp4,x,y\n", "the column 'caption' appears twice$"),
        ("l.parquet", "x", r"a folder, or a \.jsonl or \.csv file"),
    ],
)
def test_a_malformed_list_is_one_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=message):
        list_items(tmp_path / name)


def test_a_list_of_a_spreadsheet_loses_nothing(tmp_path: Path) -> None:
    """Quoted commas, doubled quotes, lines within a caption, empty columns at the end, empty rows."""
    file = tmp_path / "l.csv"
    text = 'path,caption,,\r\na.mp4,"a dog, ""Rex""",,\r\n\r\nb.mp4,"two\r\nlines",,\r\n._a.mp4,x,,\r\n'
    file.write_bytes(text.encode("utf-8-sig"))
    listing = list_items(file)
    assert [(item.name, item.caption) for item in listing.items] == [("a.mp4", 'a dog, "Rex"'), ("b.mp4", "two\nlines")]
    assert listing.skipped == {"._a.mp4": "macOS keeps a file's attributes in it"}


def test_hidden_files_are_not_items_and_case_does_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / ".clips"  # the folder itself is hidden
    files = ("a.mp4", "B.MP4", "c.webm", "._a.mp4", ".trash/d.mp4", "deep/e.mp4", "deep/.f.mp4", "odd.m2v", "alone.txt")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" if "._" in name else b"x")
    for name in ("a.txt", "a.caption", "B.TXT", "c.Caption", ".trash/d.txt", "deep/e.txt", "odd.txt"):
        (folder / name).write_text(name)
    (folder / "link").symlink_to(folder / "deep", target_is_directory=True)
    listing = list_items(folder)
    assert [(item.name, item.caption) for item in listing.items] == [
        ("B.MP4", "B.TXT"),
        ("a.mp4", "a.txt"),
        ("c.webm", "c.Caption"),
        ("deep/e.mp4", "deep/e.txt"),
    ]
    assert listing.skipped == {
        "alone.txt": "no picture or video of its name beside it",
        "link": "a link to a folder is not followed",
        "odd.m2v": "its suffix '.m2v' is unknown",
    }


def test_a_broken_caption_is_found_as_the_data_set_is_listed(tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips", captions=("fine", *"abcd"))
    for i, text in enumerate((b"caf\xe9", b"a\0b", b"x" * 2**20, b"x" * 100_001), 1):
        (folder / f"clip{i}.txt").write_bytes(text)
    listing = list_items(folder)
    assert [item.caption for item in listing.items] == ["fine"]
    assert listing.skipped == {
        f"clip{i}.webm": f"its caption cannot be used: clip{i}.txt: {reason}"
        for i, reason in enumerate(
            (
                "line 1: not UTF-8 (byte 0xe9): save it as UTF-8",
                "line 1: the character U+0000 is not allowed: remove it",
                "1048576 bytes: at most 400000",
                "100001 characters: at most 100000",
            ),
            1,
        )
    }


def test_a_folder_without_items_or_no_folder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no usable item"):
        list_items(tmp_path)
    with pytest.raises(SettingsError, match="that exists"):
        list_items(tmp_path / "absent")
    (tmp_path / "latin.csv").write_bytes(b"path,caption\na.mp4,\xe9\n")
    with pytest.raises(SettingsError, match="cannot be read"):
        list_items(tmp_path / "latin.csv")


def test_a_caption_that_is_not_utf_8_costs_its_own_file(tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips")
    (folder / "clip1.txt").write_bytes("un cœur rouge".encode("utf-16"))
    (folder / "clip2.txt").unlink()
    (folder / "clip2.txt").mkdir()
    listing = list_items(folder)
    assert [item.name for item in listing.items] == ["clip0.webm"]
    assert listing.skipped == {
        "clip1.webm": "its caption cannot be used: clip1.txt: UTF-16: save it as UTF-8",
        "clip2.webm": "its caption cannot be read: Is a directory",
    }


def test_the_fingerprint_is_of_names_and_captions(tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips")
    before = list_items(folder).fingerprint()
    assert list_items(write_clips(tmp_path / "copy")).fingerprint() == before
    (folder / "clip1.txt").write_text("another caption")
    assert list_items(folder).fingerprint() != before


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 3))
def test_each_epoch_is_a_permutation_and_replacements_cover_all_items(seed: int, count: int, epoch: int) -> None:
    drawn = [next(candidates(seed, VIDEO, epoch * count + i, count)) for i in range(count)]
    assert sorted(drawn) == list(range(count))
    assert sorted(candidates(seed, VIDEO, epoch * count, count)) == list(range(count))


def test_epochs_kinds_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, kind: int, epoch: int) -> list[int]:
        return [next(candidates(seed, kind, epoch * 50 + i, 50)) for i in range(50)]

    assert order(0, VIDEO, 0) == order(0, VIDEO, 0)
    assert len({tuple(order(s, k, e)) for s in (0, 1) for k in (IMAGE, VIDEO) for e in (0, 1)}) == 8


def test_the_summary_counts_by_reason() -> None:
    assert summary({}) == ""
    skipped = {"a": "cannot be read: x", "b": "cannot be read: y", "c": "shorter than 4 frames"}
    assert summary(skipped) == "3 files skipped (2 cannot be read, 1 shorter than 4 frames)"


# Decoding.


def test_frames_are_those_shown_at_the_wanted_rate() -> None:
    source = np.arange(30) / 24.0
    assert choose_frames(source, 8.0, 4, 0.0).tolist() == [0, 3, 6, 9]
    assert choose_frames(source, 8.0, 4, 1.0).tolist() == [18, 21, 24, 27]
    assert choose_frames(source, 24.0, 30, 0.5).tolist() == list(range(30))
    assert choose_frames(source + 5.0, 10.0, 5, 0.0).tolist() == [0, 2, 4, 6, 8]  # whole strides, so 12 frames a second
    assert choose_frames(source + 5.0, 7.0, 5, 0.0).tolist() == [0, 3, 7, 10, 14]  # rounded from 3.4 6.9 10.3 13.7
    with pytest.raises(Unusable, match="shorter than 11 frames at 8 frames a second"):
        choose_frames(source, 8.0, 11, 0.0)
    with pytest.raises(Unusable, match="slower than 30 frames a second"):
        choose_frames(source, 30.0, 4, 0.0)
    assert choose_frames(np.array([0.0, 0.5, 0.6]), 10.0, 7, 0.0).tolist() == [0, 0, 0, 0, 0, 1, 2]  # one frame is held
    assert choose_frames(np.array([3.0]), 8.0, 1, 0.5).tolist() == [0]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_clip_is_cut_out_of_a_video(tmp_path: Path, suffix: str) -> None:
    shades = np.arange(12, dtype=np.uint8) * 20
    frames = np.broadcast_to(shades[:, None, None, None], (12, 32, 32, 3))
    path = Video(frames, 10).save(tmp_path / f"steps{suffix}")
    assert video_length(path, 10) == 12
    assert video_length(path, 5) == 6

    def means(fps: float, length: int, start: float, wanted: list[int] | None = None) -> list[float]:
        clip = read_video(path, 16, 16, fps, length, Placement(start), wanted)
        assert clip.dtype == np.uint8
        assert clip.shape[1:] == (16, 16, 3)
        return clip.mean(axis=(1, 2, 3)).tolist()

    near = pytest.approx
    assert means(10, 12, 0.5) == near(shades.astype(float).tolist(), abs=4)
    assert means(5, 4, 0.0) == near([0, 40, 80, 120], abs=4)
    assert means(5, 4, 1.0) == near([80, 120, 160, 200], abs=4)  # reading seeks
    assert means(5, 4, 1.0, [2]) == near([160], abs=4)


@pytest.mark.parametrize("form", ["avi", "mp4", "m4v"])
def test_every_start_is_found_where_frames_are_reordered(tmp_path: Path, form: str) -> None:
    """AVI and MPEG-4 part 2 in MP4 are indexed by decoding time. A bare stream has no index."""
    path = write_counted(tmp_path / f"counted.{form}")
    for first in range(93):
        clip = read_video(path, 56, 16, 8, 4, Placement((first + 0.5) / 93))
        assert numbers_shown(clip) == list(range(first, first + 4))


@pytest.mark.parametrize("form", ["mp4", "mov"])
def test_what_was_trimmed_off_is_not_part_of_a_video(tmp_path: Path, form: str) -> None:
    """An edit list starts at frame 19. The frames from the previous key frame on are in the file but hidden."""
    path = write_counted(tmp_path / f"trimmed.{form}", frames=64, cut=19)
    with av.open(str(path)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) > 1
    assert video_length(path, 8) == 45
    assert numbers_shown(read_video(path, 56, 16, 8, 45, CENTRE)) == list(range(19, 64))
    assert numbers_shown(read_video(path, 56, 16, 8, 5, CENTRE)) == list(range(39, 44))
    for first in range(42):
        clip = read_video(path, 56, 16, 8, 4, Placement((first + 0.5) / 42))
        assert numbers_shown(clip) == list(range(19 + first, 23 + first))
    with pytest.raises(Unusable, match="shorter than 46 frames"):
        read_video(path, 56, 16, 8, 46, CENTRE)


def test_pictures_are_scaled_to_cover_and_cropped_where_asked(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20, 0] = wide[:, 20:40, 1] = wide[:, 40:, 2] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for x, channel in ((0.0, 0), (0.5, 1), (1.0, 2)):
        picture = read_image(tmp_path / "wide.png", 10, 10, Placement(x=x))
        assert picture.shape == (1, 10, 10, 3)
        assert picture.mean(axis=(0, 1, 2)).argmax() == channel
        assert picture[..., channel].min() == 255
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 10, 10, CENTRE).min() == 255


def test_what_cannot_be_read_is_named_and_never_black(tmp_path: Path) -> None:
    whole = Video(moving_square(0, 12, 64, 64), 8).save(tmp_path / "whole.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("cut.webm", "noise.mp4", "empty.mp4", "absent.mp4"):
        with pytest.raises(Unusable):
            read_video(tmp_path / name, 16, 16, 8, 12, CENTRE)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(Unusable, match="cannot be read"):
        read_image(tmp_path / "text.png", 8, 8, CENTRE)
    stills = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    stills[0].save(tmp_path / "moving.webp", save_all=True, append_images=stills[1:])
    with pytest.raises(Unusable, match="an animation"):
        read_image(tmp_path / "moving.webp", 8, 8, CENTRE)


# Latents.


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderStage:
    model = write_tiny_model(tmp_path_factory.mktemp("encoder") / "tiny", MODEL)
    autoencoder = load_autoencoder(
        model.file(spec.AUTOENCODER), MODEL.autoencoder.kind, MODEL.autoencoder.arguments, torch.float32
    )
    return EncoderStage(autoencoder, MODEL.autoencoder.shift, MODEL.autoencoder.scale).eval()


def test_latents_are_the_scaled_posterior(encoder: EncoderStage) -> None:
    frames = moving_square(30, 10, 16, 24)  # more than one chunk
    encoded = encode(encoder, frames)
    with torch.no_grad():
        mode = encoder(to_pixels(frames))
        posterior = encoder.autoencoder.encode(to_pixels(frames)).latent_dist  # type: ignore[operator]
    torch.testing.assert_close(encoded.mean.transpose(0, 1), mode)
    assert encoded.std is not None
    torch.testing.assert_close(encoded.std.transpose(0, 1), posterior.std * MODEL.autoencoder.scale[0])
    random = torch.Generator().manual_seed(1)
    drawn = torch.stack([encoded.sample(random) for _ in range(400)])
    torch.testing.assert_close(drawn.std(dim=0) / encoded.std, torch.ones_like(encoded.std), atol=0.2, rtol=0)
    torch.testing.assert_close(Encoded(encoded.mean).sample(random), encoded.mean)


def test_the_cache_gives_back_what_it_was_given_and_survives_a_broken_file(tmp_path: Path) -> None:
    source = tmp_path / "clip.mp4"
    source.write_bytes(b"1")
    cache = LatentCache(str(tmp_path / "cache"), {"fps": 8})
    path = cache.path(source, "clip.mp4", VIDEO)
    assert cache.load(path) is None
    kept = Encoded(torch.randn(4, 3, 2, 2), torch.rand(4, 3, 2, 2), torch.randn(3, 5))
    cache.save(path, kept)
    found = cache.load(path)
    assert found is not None
    assert found.std is not None
    assert torch.equal(found.mean, kept.mean)
    assert torch.equal(found.std, kept.std)  # type: ignore[arg-type]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    keys = {cache.path(source, "clip.mp4", IMAGE), LatentCache(str(cache.folder), {"fps": 9}).path(source, "c", VIDEO)}
    source.write_bytes(b"12")
    assert path not in keys | {cache.path(source, "clip.mp4", VIDEO)}
    path.write_bytes(path.read_bytes()[:50])
    assert cache.load(path) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"data\.cache: .* cannot be written"):
        LatentCache(str(tmp_path / "file"), {}).save(tmp_path / "file" / "x", kept)


def reader(folder: Path, encoder: EncoderStage, **options: Any) -> Reader:
    listing = list_items(folder)
    per_step = {IMAGE: 2, VIDEO: 2}
    frame = Frame(4, 24, 16, 8)
    return Reader(listing, frame, encoder, None, seed=5, per_step=per_step, key_frames=True, **options)


def test_samples_depend_only_on_the_step(tmp_path: Path, encoder: EncoderStage) -> None:
    folder = write_clips(tmp_path / "clips")
    cache = LatentCache(str(tmp_path / "cache"), {})
    (folder / "clip9.mp4").write_bytes(b"broken")
    (folder / "clip9.txt").write_text("a star")
    steps = [(kind, step) for step in range(3) for kind in (IMAGE, VIDEO)]
    plain = reader(folder, encoder)
    wanted = {key: plain.samples(*key, range(2)) for key in steps}
    ways = [
        [reader(folder, encoder)],
        [reader(folder, encoder, workers=2)],
        [reader(folder, encoder, cache=cache), reader(folder, encoder, cache=cache)],
    ]
    for readers in ways:
        for each in readers:
            for kind, step in reversed(steps) if each.cache else steps:
                # Sample by sample, as two processes would.
                found = [*each.samples(kind, step, range(1)), *each.samples(kind, step, range(1, 2))]
                for ours, theirs in zip(found, wanted[kind, step], strict=True):
                    assert ours.caption == theirs.caption
                    assert torch.equal(ours.encoded.mean, theirs.encoded.mean)
            each.close()
            assert list(each.listing.skipped) == ["clip9.mp4"]
    key_frame = next(s for s in wanted[IMAGE, 0])
    clips = {s.caption: s for key in steps if key[0] == VIDEO for s in wanted[key]}
    torch.testing.assert_close(key_frame.encoded.mean[:, 0], clips[key_frame.caption].encoded.mean[:, 2])


def write_damaged(path: Path, frames: int, intact: int) -> None:
    """A video with independently coded frames. Only the first `intact` frames can be decoded."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 28, 20, "yuvj420p"
        pictures = [av.VideoFrame.from_ndarray(picture) for picture in moving_square(200, frames)]
        for i, packet in enumerate([*(p for f in pictures for p in stream.encode(f)), *stream.encode()]):
            if i >= intact:
                junk = av.Packet(bytes(bytes(packet)[:2]) + b"junk" * 30)
                junk.stream, junk.pts, junk.dts, junk.time_base = stream, packet.pts, packet.dts, packet.time_base
                packet = junk
            container.mux(packet)


def test_what_was_read_before_changes_no_sample(tmp_path: Path, encoder: EncoderStage) -> None:
    """A video damaged at its end. Some of its clips and more of its key frames are usable, whatever was read before."""
    folder = write_clips(tmp_path / "clips")
    write_damaged(folder / "clip9.avi", frames=14, intact=8)
    (folder / "clip9.txt").write_text("damaged")
    steps = [(kind, step) for step in range(8) for kind in (IMAGE, VIDEO)]
    going = reader(folder, encoder, random_start=True)
    used = dict.fromkeys((IMAGE, VIDEO), 0)
    for kind, step in steps:
        found = going.samples(kind, step, range(2))
        resumed = reader(folder, encoder, random_start=True)
        for ours, theirs in zip(found, resumed.samples(kind, step, range(2)), strict=True):
            assert ours.caption == theirs.caption
            assert torch.equal(ours.encoded.mean, theirs.encoded.mean)
            used[kind] += ours.caption == "damaged"
    # Each of the 4 items is due 4 times in 16 samples. Of the 11 starts, 5 give a whole clip and 6 give a key frame.
    assert list(going.listing.skipped) == ["clip9.avi"]
    assert 0 < used[VIDEO] < 4
    assert used[IMAGE] > 0


def test_a_file_that_cannot_serve_is_tried_once(
    tmp_path: Path, encoder: EncoderStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_clips(tmp_path / "clips")
    (folder / "broken.mp4").write_bytes(b"nothing")
    write_damaged(folder / "damaged.avi", frames=4, intact=1)
    for name in ("broken", "damaged"):
        (folder / f"{name}.txt").write_text(name)
    tried: Counter[str] = Counter()

    def counted(path: Path, *arguments: Any) -> NDArray[np.uint8]:
        tried[path.name] += 1
        return read_video(path, *arguments)

    monkeypatch.setattr("higen.train.reader.read_video", counted)
    for random_start in (False, True):
        tried.clear()
        many = reader(folder, encoder, random_start=random_start)
        for step in range(10):
            many.samples(VIDEO, step, range(2))
        assert tried["broken.mp4"] == 1
        # With a random start for each sample, the file is tried again for each start.
        assert (tried["damaged.avi"] > 1) == random_start
        assert tried["clip0.webm"] > 2


def test_a_data_set_of_unusable_files_is_one_error(tmp_path: Path, encoder: EncoderStage) -> None:
    folder = write_clips(tmp_path / "clips", fps=3)  # slower than the wanted 8
    with pytest.raises(SettingsError, match=r"no usable item for data\.videos: 3 files skipped \(3 slower than 8"):
        reader(folder, encoder).samples(VIDEO, 0, range(2))
    (tmp_path / "absent.csv").write_text("path,caption\na.mp4,x\nb.mp4,x\nc.xyz,x\n")
    with pytest.raises(SettingsError, match=r"data\.videos: 2 files skipped \(2 cannot .*\); a\.mp4: .*No such file"):
        reader(tmp_path / "absent.csv", encoder).samples(VIDEO, 0, range(2))
    (tmp_path / "stills").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "stills" / "a.png")
    (tmp_path / "stills" / "a.txt").write_text("a")
    with pytest.raises(SettingsError, match=r"data\.videos=2: the data set has no videos; set it to 0"):
        reader(tmp_path / "stills", encoder)


def test_what_is_sampled_at_another_rate_is_noted(tmp_path: Path, encoder: EncoderStage) -> None:
    folder = write_clips(tmp_path / "clips", fps=10)
    going = reader(folder, encoder)
    for step in range(3):
        going.samples(VIDEO, step, range(2))
    line = "sampled at another rate: every frame, 10 a second for 8"
    assert going.listing.notes == {f"clip{i}.webm": line for i in range(3)}
    assert summary(going.listing.notes, "read differently") == "3 files read differently (3 sampled at another rate)"


def test_openclip_features_come_from_a_transformers_folder(tmp_path: Path) -> None:
    for read in (tower_sha256, lambda folder: OpenClip(folder, torch.device("cpu"))):
        with pytest.raises(SettingsError, match=r"cues\.openclip=.*: no CLIP picture tower"):
            read(str(tmp_path))
    tower = write_tower(tmp_path / "tower")
    ours = OpenClip(str(tmp_path / "tower"), torch.device("cpu"))
    pixels = torch.rand(3, 3, 16, 40) * 2 - 1
    # Every second pixel of the central 16x16 square, which is nearest-neighbour resizing to 8.
    square = (pixels[:, :, ::2, 12:28:2] + 1) / 2
    mean, std = (torch.tensor(v)[:, None, None] for v in (OpenClip.MEAN, OpenClip.STD))
    with torch.no_grad():
        theirs = tower(pixel_values=(square - mean) / std).image_embeds
    torch.testing.assert_close(ours(pixels), theirs)


def test_a_tower_is_known_by_its_configuration_and_weights(tmp_path: Path) -> None:
    first = write_tower(tmp_path / "first")
    first.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    (tmp_path / "shards" / "notes.md").write_text("not read by transformers")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    known = {name: tower_sha256(str(tmp_path / name)) for name in ("first", "shards")}
    write_tower(tmp_path / "twin")
    assert tower_sha256(str(tmp_path / "twin")) == known["first"]
    (tmp_path / "shards").rename(tmp_path / "moved")
    assert tower_sha256(str(tmp_path / "moved")) == known["shards"]
    (tmp_path / "moved" / "notes.md").unlink()
    assert tower_sha256(str(tmp_path / "moved")) == known["shards"]
    last = max((tmp_path / "moved").glob("model-*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1] + b"!")
    config = tmp_path / "twin" / "config.json"
    config.write_text(config.read_text().replace("quick_gelu", "gelu"))
    write_tower(tmp_path / "other", seed=1)
    changed = {tower_sha256(str(tmp_path / name)) for name in ("moved", "twin", "other")}
    assert len(changed | set(known.values())) == 5


def test_rows_of_commas_are_skipped_and_a_long_value_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,caption\na.png,x\n,\n,,\n")
    assert [item.name for item in list_items(tmp_path / "a.csv").items] == ["a.png"]
    assert list_items(tmp_path / "a.csv").skipped == {}
    (tmp_path / "b.csv").write_text(f"path,caption\na.png,{'x' * 200_000}\n")
    with pytest.raises(SettingsError, match="line 2: a value of more than"):
        list_items(tmp_path / "b.csv")
