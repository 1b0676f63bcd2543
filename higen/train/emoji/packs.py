"""Pictures for the default model: loops of animated emoji (npm packages, MIT) over drawn backgrounds."""

import gzip
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageSequence

from higen.train.checkpoints import reason
from higen.train.emoji.subjects import FPS, FRAMES, KEY_INDEX, SUBJECTS
from higen.train.emoji.tensor_files import aside

PACKAGES: tuple[str, ...] = tuple(f"@lobehub/fluent-emoji-anim-{i}@1.0.0" for i in (1, 2, 3, 4))
DOWNLOAD = "about 700 MB in all four"
FILL = 0.875
"""Side of the emoji's canvas relative to the frame. Drawings fill about 92 % of the canvas, so 80 % of the frame."""

Image8 = npt.NDArray[np.uint8]
FloatImage = npt.NDArray[np.floating[Any]]


def to_fetch(folder: Path) -> list[str]:
    """The npm packages that `fetch` would download into `folder`."""
    if all((folder / f"{subject.codepoint}.webp").exists() for subject in SUBJECTS):
        return []
    return [package for package in PACKAGES if not (folder / _archive(package)).exists()]


def fetch(folder: Path, download: bool = True) -> None:
    """Put every subject's WebP file into `folder`. Downloads the missing ones of four npm packages into `folder`.

    Raises RuntimeError if a download is necessary and `download` is False (the message has its size), if npm is missing
    or fails, if a package's archive is broken (it is removed, so that the next call fetches it again), and if the
    packages lack a subject. Raises TrainingError or OSError if a file cannot be written.
    """
    if not download and (packages := to_fetch(folder)):
        raise RuntimeError(
            f"the emoji are not there, and {len(packages)} npm packages ({DOWNLOAD}) are needed: "
            "`higen evaluate --fetch` downloads them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    missing = {f"{subject.codepoint}.webp" for subject in SUBJECTS}
    missing -= {path.name for path in folder.glob("*.webp")}
    for package in PACKAGES:
        if not missing:
            return
        archive = folder / _archive(package)
        if not archive.exists():
            _npm_pack(package, folder)
        try:
            missing -= _extract(archive, missing, folder)
        except (EOFError, tarfile.TarError, gzip.BadGzipFile, zlib.error) as error:
            archive.unlink()
            raise RuntimeError(
                f"{archive}: is broken and was removed; run again to download it: {reason(error)}"
            ) from error
    if missing:
        raise RuntimeError(f"{', '.join(sorted(missing))}: not in the packages {', '.join(PACKAGES)}")


def _archive(package: str) -> str:
    """The name of a package's archive, as npm forms it."""
    return package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"


def _npm_pack(package: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm is not installed: install Node.js, or put the archive of {package} into {folder}")
    result = subprocess.run([npm, "pack", package], cwd=folder, capture_output=True, check=False)
    if result.returncode != 0:
        said = result.stderr.decode("utf-8", "replace").strip()  # independent of this process's own encoding
        raise RuntimeError(f"npm pack {package} failed with status {result.returncode}: {said}")


def _extract(archive: Path, names: set[str], folder: Path) -> set[str]:
    """Write the members of `archive` with a base name in `names` into `folder`; returns the names that were found."""
    found: set[str] = set()
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).name
            source = tar.extractfile(member) if name in names else None
            if source is not None:
                content = source.read()
                with aside(folder / name) as path:
                    path.write_bytes(content)
                found.add(name)
    return found


def load_loop(path: Path, size: int = 128) -> Image8:
    """The loop's frames, centred on a transparent square: uint8 [n, size, size, 4], straight (not premultiplied) RGBA.

    PIL premultiplies RGBA before resizing, so transparent pixels do not colour the edges.
    """
    inner = round(size * FILL)
    corner = (size - inner) // 2
    frames: list[Image8] = []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            canvas = Image.new("RGBA", (size, size))
            canvas.paste(frame.convert("RGBA").resize((inner, inner), Image.Resampling.LANCZOS), (corner, corner))
            frames.append(np.asarray(canvas))
    return np.stack(frames)


def loop_step(path: Path) -> int:
    """Number of loop frames from one clip frame to the next at real time (speed 1.0).

    The files have 42 ms per frame: 24 frames per second, rounded to whole milliseconds. A whole number of loop frames
    keeps the motion of clips even.
    """
    durations: list[float] = []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()  # PIL knows a WebP frame's duration only after decoding the frame
            durations.append(float(frame.info["duration"]))
    return max(1, round(1000.0 / FPS / (sum(durations) / len(durations))))


def clip_indices(
    n_frames: int,
    key_frame: int,
    speed: float,
    frames: int = FRAMES,
    step: int = 3,
    warp: float = 0.0,
    turn: float = 0.0,
) -> npt.NDArray[np.int64]:
    """Indices of the loop frames in a clip: int64 [frames], each in 0..n_frames-1. Clip frame 8 is always `key_frame`.

    Halves are rounded up, so that half speed alternates evenly between one and two loop frames. With `warp`, the speed
    rises and falls once during the clip, by a factor of up to e^warp; the mean speed does not change. `turn` (0 to 1)
    is the phase of this cycle at the start of the clip.
    """
    places = np.arange(frames) - float(KEY_INDEX)
    if warp:
        steps = np.exp(warp * np.sin(2 * np.pi * ((np.arange(frames - 1) + 0.5) / (frames - 1) + turn)))
        places = np.concatenate([[0.0], np.cumsum(steps / steps.mean())])
        places -= places[min(KEY_INDEX, frames - 1)]
    offsets = speed * step * places
    indices: npt.NDArray[np.int64] = (key_frame + np.floor(offsets + 0.5).astype(np.int64)) % n_frames
    return indices


def compose(loop: Image8, picture: Image8) -> Image8:
    """`loop` (uint8 [n, h, w, 4]) over `picture` (uint8 [h, w, 3]): uint8 [n, h, w, 3]."""
    alpha = loop[..., 3:].astype(np.float32) / 255.0
    mixed: FloatImage = loop[..., :3] * alpha + picture * (1.0 - alpha)
    return np.rint(mixed).astype(np.uint8)


def background(name: str, size: int = 128) -> Image8:
    """The background `name` of `subjects.BACKGROUNDS`: uint8 [size, size, 3], always the same picture.

    Raises KeyError for another name.
    """
    if name in _PLAIN:
        return np.broadcast_to(np.array(_PLAIN[name], np.uint8), (size, size, 3)).copy()
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size)
    return np.rint(scene(name, x, y)).astype(np.uint8)


def scene(name: str, x: FloatImage, y: FloatImage) -> FloatImage:
    """The colours of a drawn background at `x` and `y` [h, w], 0 to 1 in the frame: float32 [h, w, 3], from 0 to 255.

    Raises KeyError for another name, and for a plain background.
    """
    found: FloatImage = np.clip(_SCENES[name](x, y), 0, 255)
    return found


Colour = tuple[int, int, int]


def _gradient(t: FloatImage, first: Colour, last: Colour) -> FloatImage:
    """Colours from `first` at t <= 0 to `last` at t >= 1: float32 [h, w, 3]."""
    weight = np.clip(t, 0, 1)[..., None]
    mixed: FloatImage = np.array(first, np.float32) * (1 - weight) + np.array(last, np.float32) * weight
    return mixed


def _over(image: FloatImage, alpha: FloatImage, colour: Colour | FloatImage) -> FloatImage:
    """`colour` laid over `image` with the opacity `alpha` (float32 [h, w], 0..1)."""
    weight = np.clip(alpha, 0, 1)[..., None]
    mixed: FloatImage = image * (1 - weight) + np.asarray(colour, np.float32) * weight
    return mixed


def _edge(signed: FloatImage) -> FloatImage:
    """An anti-aliased mask, 1 where `signed` (in frame heights) is positive; the ramp is about one pixel at 128."""
    mask: FloatImage = np.clip(signed * 128 + 0.5, 0, 1)
    return mask


def _sky(x: FloatImage, y: FloatImage) -> FloatImage:
    image = _gradient(y, (70, 160, 240), (185, 225, 252))
    puffs = ((0.10, 0.14, 0.13), (0.24, 0.11, 0.10), (0.84, 0.20, 0.13), (0.97, 0.16, 0.12), (0.05, 0.82, 0.14),
             (0.92, 0.88, 0.15), (0.78, 0.93, 0.10))  # fmt: skip
    for centre_x, centre_y, radius in puffs:
        distance = ((x - centre_x) / radius) ** 2 + ((y - centre_y) / (0.5 * radius)) ** 2
        image = _over(image, 0.8 * np.exp(-distance), (255, 255, 255))
    return image


def _grass(x: FloatImage, y: FloatImage) -> FloatImage:
    image = _gradient(y / 0.4, (190, 232, 250), (225, 244, 250))
    field = _gradient((y - 0.4) / 0.6, (140, 205, 85), (70, 150, 50))
    return _over(image, _edge(y - 0.40 + 0.03 * np.sin(2 * np.pi * (x + 0.1))), field)


def _night(x: FloatImage, y: FloatImage) -> FloatImage:
    image = _gradient(y, (14, 18, 60), (62, 60, 130))
    # Positions of stars are an additive recurrence with the plastic number. It spreads them evenly without a seed.
    for k in range(1, 25):
        centre_x, centre_y = (0.7548776662 * k) % 1.0, (0.5698402910 * k) % 1.0
        radius = (0.009, 0.012, 0.016)[k % 3]
        distance = ((x - centre_x) ** 2 + (y - centre_y) ** 2) / radius**2
        image = _over(image, 0.9 * np.exp(-distance), (255, 250, 220))
    return image


def _snow(x: FloatImage, y: FloatImage) -> FloatImage:
    image = _gradient(y / 0.5, (140, 175, 205), (190, 213, 230))
    image = _over(image, _edge(y - 0.48 - 0.06 * np.cos(2 * np.pi * (0.8 * x + 0.1))), (222, 232, 243))
    ground = _gradient((y - 0.6) / 0.4, (244, 248, 253), (226, 235, 247))
    image = _over(image, _edge(y - 0.60 - 0.05 * np.sin(2 * np.pi * (0.7 * x + 0.2))), ground)
    for k in range(1, 15):
        centre_x, centre_y = (0.7548776662 * k + 0.3) % 1.0, 0.5 * ((0.5698402910 * k) % 1.0)
        distance = ((x - centre_x) ** 2 + (y - centre_y) ** 2) / 0.016**2
        image = _over(image, 0.9 * np.exp(-distance), (255, 255, 255))
    return image


def _desert(x: FloatImage, y: FloatImage) -> FloatImage:
    image = _gradient(y / 0.5, (250, 190, 130), (255, 226, 180))
    image = _over(image, _edge(y - 0.46 - 0.07 * np.sin(2 * np.pi * (0.6 * x + 0.15))), (226, 160, 92))
    ground = _gradient((y - 0.6) / 0.4, (240, 190, 120), (205, 145, 80))
    return _over(image, _edge(y - 0.62 + 0.06 * np.sin(2 * np.pi * (0.8 * x + 0.05))), ground)


def _sea(x: FloatImage, y: FloatImage) -> FloatImage:
    image = _gradient(y / 0.35, (205, 235, 250), (240, 248, 250))
    water = _gradient((y - 0.35) / 0.45, (20, 120, 175), (50, 185, 205))
    crests = 0.5 + 0.5 * np.sin(2 * np.pi * (9 * y + 0.3 * np.sin(2 * np.pi * 2 * x)))
    water = _over(water, 0.22 * crests**4, (255, 255, 255))
    image = _over(image, _edge(y - 0.35), water)
    shore = y - 0.86 + 0.015 * np.sin(2 * np.pi * 1.5 * x)
    image = _over(image, _edge(shore + 0.025), (245, 252, 252))
    return _over(image, _edge(shore), (238, 214, 160))


_PLAIN: dict[str, Colour] = {
    "plain white": (255, 255, 255),
    "plain red": (190, 38, 48),
    "plain yellow": (255, 236, 140),
    "plain pink": (252, 190, 214),
}

_SCENES: dict[str, Callable[[FloatImage, FloatImage], FloatImage]] = {
    "blue sky": _sky,
    "grass": _grass,
    "night": _night,
    "snow": _snow,
    "desert": _desert,
    "sea": _sea,
}
