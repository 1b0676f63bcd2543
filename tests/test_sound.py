"""Sounds: reading files, the two curves of a sound, and the sound of a video file."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from sounds import RATE, beats, write_wav

from higen import Video
from higen.errors import MediaWarning, OutputError
from higen.media.sound import Sound, energy, onsets, read_sound

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_wav_file_of_any_width_has_its_samples(tmp_path: Path, width: int) -> None:
    stereo = np.stack([TONE, -0.5 * TONE], axis=1)
    sound = read_sound(write_wav(tmp_path / "a.wav", stereo, width=width))
    assert (sound.rate, sound.more, sound.samples.dtype) == (RATE, False, np.float32)
    np.testing.assert_allclose(sound.samples, stereo, atol=1.1 / 2 ** (8 * width - 1))


def encoded(path: Path, samples: np.ndarray, codec: str, form: str) -> Path:
    """Samples [n] as a mono file written by FFmpeg."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32).reshape(1, -1), format="flt", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        size = stream.codec_context
        size.open()
        resampler = av.AudioResampler(form, "mono", RATE, size.frame_size or None)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "form", "near"), [("a.flac", "flac", "s16", 1e-4), ("a.wav", "pcm_f32le", "flt", 1e-6)]
)
def test_other_formats_have_theirs(tmp_path: Path, name: str, codec: str, form: str, near: float) -> None:
    sound = read_sound(encoded(tmp_path / name, TONE, codec, form))
    np.testing.assert_allclose(sound.samples[:, 0], TONE, atol=near)


def test_a_part_begins_and_ends_at_the_given_times(tmp_path: Path) -> None:
    wav = write_wav(tmp_path / "a.wav", TONE)
    flac = encoded(tmp_path / "a.flac", TONE, "flac", "s16")
    whole = read_sound(wav).samples
    for path in (wav, flac):
        part = read_sound(path, 0.25, 0.5)
        np.testing.assert_allclose(part.samples, whole[RATE // 4 : RATE * 3 // 4], atol=1e-4)
        assert part.more
        assert not read_sound(path, 0.5, 0.5).more
        assert read_sound(path, 0.75, 1.0).seconds == 0.25


def test_energy_is_the_root_mean_square_of_each_frame() -> None:
    loud = np.repeat([0.1, 0.4, 0.2, 0.0], RATE // 4)
    found = energy(Sound((loud * np.sign(TONE + 1e-9))[:, None].astype(np.float32), RATE), 6, 4)
    np.testing.assert_allclose(found, [0.25, 1, 0.5, 0, 0, 0], atol=1e-5)


def test_onsets_are_where_sounds_begin() -> None:
    at = (0.0, 0.55, 1.3)
    sound = Sound(beats(2, at)[:, None].astype(np.float32), RATE)
    found = onsets(sound, 20, 10)
    assert [int(place) for place in np.flatnonzero(found > 0.3)] == [0, 5, 13]
    steady = Sound(np.tile(TONE, 2)[:, None].astype(np.float32), RATE)
    assert np.flatnonzero(onsets(steady, 20, 10) > 0.1).tolist() == [0]  # one continuous tone


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"RIFF\x00\x00\x00\x00WAVEjunk" * 9, "it is corrupt"),
        (b"no sound at all " * 40, "it is corrupt"),
        (None, "No such file"),
        ("silent", "it is silent"),
        ("short", "there is no sound in it"),
        ("mute", "there is no sound in it"),
    ],
)
def test_a_file_without_sound_is_one_error(tmp_path: Path, content: bytes | str | None, reason: str) -> None:
    path = tmp_path / "a.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content in ("silent", "short"):
        write_wav(path, np.zeros(RATE if content == "silent" else 0))
    elif content == "mute":
        path = Video(np.zeros((2, 16, 16, 3), np.uint8), 8).save(tmp_path / "a.mp4")
    with pytest.raises(OutputError, match=f"cannot be used as a sound: .*{reason}"):
        read_sound(path)


def test_a_sound_ends_or_is_silent_where_a_part_is_wanted(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", np.concatenate([TONE, np.zeros(RATE)]))
    with pytest.raises(OutputError, match="ends before 3 s"):
        read_sound(path, 3, 1)
    with pytest.raises(OutputError, match=r"its 0\.5 s from 1 s on are silent"):
        read_sound(path, 1, 0.5)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_saved_clip_has_the_sound_in_its_own_length(tmp_path: Path, suffix: str) -> None:
    clip = Video(np.random.default_rng(0).integers(0, 255, (12, 18, 16, 3), np.uint8), 8)
    long = write_wav(tmp_path / "long.wav", beats(3, (0.25, 1.0)))
    with pytest.warns(MediaWarning, match=r"longer than the clip and is cut to 1\.50 s"):
        path = clip.save(tmp_path / f"a{suffix}", audio=long)
    assert len(Video.open(path)) == 12
    heard = read_sound(path)
    assert heard.seconds == pytest.approx(1.5, abs=0.03)
    np.testing.assert_allclose(energy(heard, 12, 8), energy(read_sound(long, 0, 1.5), 12, 8), atol=0.05)


def test_a_sound_that_is_too_short_is_followed_by_silence(tmp_path: Path) -> None:
    clip = Video(np.zeros((16, 16, 16, 3), np.uint8), 8)
    with pytest.warns(MediaWarning, match=r"has 1\.00 s: silence follows up to 2\.00 s"):
        path = clip.save(tmp_path / "a.mp4", audio=write_wav(tmp_path / "a.wav", TONE))
    found = energy(read_sound(path), 16, 8)
    assert found[:8].min() > 0.9
    assert found[9:].max() < 0.01


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".npy"])
def test_formats_without_sound_refuse_it_and_write_nothing(tmp_path: Path, suffix: str) -> None:
    wav = write_wav(tmp_path / "a.wav", TONE)
    with pytest.raises(OutputError, match=rf"a {suffix} file has no sound; \.mp4, \.webm have"):
        Video(np.zeros((2, 16, 16, 3), np.uint8), 8).save(tmp_path / f"b{suffix}", audio=wav)
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    with pytest.raises(OutputError, match="is empty"):
        Video(np.zeros((2, 16, 16, 3), np.uint8), 8).save(tmp_path / "b.mp4", audio=empty)
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "empty.wav"}
