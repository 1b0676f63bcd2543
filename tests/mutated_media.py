"""Small media files with changed headers and time stamps, and the allowed outcomes of reading them.

As a script, `python tests/mutated_media.py COUNT [SEED]` runs a campaign. It reads the files in separate processes
with limits on time and memory, and prints every outcome other than a clip or a typed error.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from higen.errors import HigenError
from higen.images import load_clip, load_image
from higen.train.media import IMAGES, Placement, Unusable, is_video, read_image, read_video
from higen.video import Video

INSIDE = re.compile(r"index out of range|NoneType|object has no|\b0x[0-9a-f]{4}|codec can't")
"""Text that must not appear in a message to the user."""

PNG = b"\x89PNG\r\n\x1a\n"
SECONDS, BYTES, BATCH = 60, 4 * 2**30, 250


def originals(folder: Path) -> list[Path]:
    """A small valid file of each kind."""
    ramp = np.arange(48)[:, None, None, None] * 5 + np.arange(32)[None, None, :, None] * 2
    frames = np.broadcast_to(ramp % 256, (48, 24, 32, 3)).astype(np.uint8)[:10]
    clip = Video(frames, 8, {"prompt": "p"})
    made = [clip.save(folder / f"a.{suffix}") for suffix in ("mp4", "webm", "gif", "webp", "npy")]
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(folder / "a.apng", "PNG", save_all=True, append_images=pictures[1:], duration=125)
    pictures[0].save(folder / "a.png")
    pictures[0].convert("P").save(folder / "b.png", transparency=3)
    Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 85).save(folder / "c.png")
    pictures[0].save(folder / "a.jpg")
    pictures[0].save(folder / "a.tif")
    made += [folder / name for name in ("a.apng", "a.png", "b.png", "c.png", "a.jpg", "a.tif")]
    for suffix, codec in (("avi", "mpeg4"), ("mkv", "libx264"), ("ts", "mpeg2video"), ("mov", "mjpeg"), ("flv", "flv")):
        with av.open(str(folder / f"v.{suffix}"), "w") as output:
            stream: Any = output.add_stream(codec, 25 if codec == "mpeg2video" else 8)
            stream.width, stream.height = 32, 24
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
            for frame in frames:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            output.mux(stream.encode(None))
        made.append(folder / f"v.{suffix}")
    return made


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """A copy with a few bytes or numbers changed, mostly near its ends, where headers and time stamps lie."""
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 6))):
        near = int(min(len(changed), 1 + random.exponential(len(changed) / 6)))
        at = near - 1 if random.random() < 0.7 else len(changed) - near
        kind = random.integers(6)
        if kind == 0:
            changed[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            changed[at] = int(random.integers(256))
        elif kind == 2:  # as wide as sizes and stamps
            width = int(random.choice([2, 4, 8]))
            value = int(random.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**16 - 1, 255])) % 256**width
            changed[at : at + width] = value.to_bytes(width, str(random.choice(["little", "big"])))  # type: ignore[arg-type]
        elif kind == 3:
            del changed[at : at + int(random.integers(1, 9))]
        elif kind == 4:
            changed[at:at] = changed[at : at + int(random.integers(1, 33))]
        else:
            del changed[max(at, 16) :]
        if not changed:
            return b"\0"
    whole = bytes(changed)
    return checked(whole) if whole.startswith(PNG) and random.random() < 0.7 else whole


def checked(data: bytes) -> bytes:
    """A PNG file with correct checksums, so that readers do not refuse a changed chunk just for its checksum."""
    made, at = bytearray(PNG), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        made += data[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + length
    return bytes(made + data[at:])


def outcome(path: Path) -> str:
    """The outcome over all readers of such files: "read" if at least one reads it, "refused", or an error."""
    found = "refused"
    for read in _READERS[path.suffix]:
        try:
            read(path)
            found = "read"
        except (HigenError, Unusable) as error:
            if INSIDE.search(str(error)):
                return f"{read.__name__}: not in words: {error}"
        except Exception as error:
            return f"{read.__name__}: {type(error).__name__}: {error}"
    return found


def _opened(path: Path) -> None:
    Video.open(path)


def _as_clip(path: Path) -> None:
    load_clip(path, 4, 16, 16)


def _as_picture(path: Path) -> None:
    load_image(path, 16, 16)


def _trained(path: Path) -> None:
    if path.suffix in IMAGES and not is_video(path):
        read_image(path, 16, 16, Placement())
    else:
        read_video(path, 16, 16, 8, 8, Placement())


_PICTURE, _CLIP = (_as_picture, _trained), (_opened, _as_clip, _trained)
_READERS: dict[str, tuple[Callable[[Path], None], ...]] = {
    **dict.fromkeys((".jpg", ".tif"), _PICTURE),
    **dict.fromkeys((".mp4", ".webm", ".avi", ".mkv", ".ts", ".mov", ".flv"), _CLIP),
    **dict.fromkeys((".gif", ".webp", ".apng", ".png"), (*_CLIP, _as_picture)),
    ".npy": (_opened, _as_clip),
}


def _work(names: list[tuple[str, int, bytes]], folder: str, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    for suffix, number, data in names:
        path = Path(folder, f"mutated_{number}_{suffix}")
        path.write_bytes(data)
        results.put((number, "began"))
        results.put((number, outcome(path)))
        path.unlink()


def campaign(count: int, seed: int) -> Iterator[tuple[str, int, str, bytes]]:
    """(suffix, number, outcome, file) of `count` mutated files; "crashed" and "hung" are outcomes too."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        files = [(path.suffix, path.read_bytes()) for path in originals(Path(folder))]
        todo = []
        for number in range(count):
            suffix, data = files[number % len(files)]
            todo.append((suffix, number, mutated(data, np.random.default_rng([seed, number]))))
        by_number = {number: (suffix, data) for suffix, number, data in todo}
        while todo:
            batch, todo = todo[:BATCH], todo[BATCH:]
            results = context.Queue()
            worker = context.Process(target=_work, args=(batch, folder, results))
            worker.start()
            left, present, since = {number for _, number, _ in batch}, None, time.monotonic()
            while left:
                try:
                    number, what = results.get(timeout=1)
                except Exception:
                    hung = time.monotonic() - since > SECONDS + 20 * (present is None)
                    if not worker.is_alive() or hung:
                        if present is None:
                            break
                        yield by_number[present][0], present, "hung" if hung else "crashed", by_number[present][1]
                        left.discard(present)
                        break
                    continue
                since = time.monotonic()
                if what == "began":
                    present = number
                    continue
                left.discard(number)
                yield by_number[number][0], number, what, by_number[number][1]
            worker.kill()
            worker.join()
            todo = [each for each in batch if each[1] in left] + todo


if __name__ == "__main__":
    total, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    counts: Counter[tuple[str, str]] = Counter()
    for suffix, number, what, data in campaign(total, seed):
        short = what if what in ("read", "refused", "crashed", "hung") else "fault"
        counts[suffix, short] += 1
        if short not in ("read", "refused"):
            Path(tempfile.gettempdir(), f"mutated_{seed}_{number}{suffix}").write_bytes(data)
            print(f"{suffix} {number}: {what}", flush=True)
    for (suffix, what), many in sorted(counts.items()):
        print(f"{suffix:6} {what:8} {many}")
    print(f"{total} files: {sum(many for (_, what), many in counts.items() if what in ('read', 'refused'))} as wanted")
