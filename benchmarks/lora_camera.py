"""Teaches the built-in model a camera movement with a LoRA of its temporal layers, and measures it at several scales.

    python benchmarks/lora_camera.py EMOJI WORK [--camera pan|zoom|roll] [--size 0.4] [--steps 2000] [--one-sided]

EMOJI is the folder of the recipe's WebP loops (`higen train default` fetches them into its work folder). Clips of every
second subject on the six drawn backgrounds are rendered with a camera that moves at a constant rate, by at most one
latent cell of 16 pixels from the first frame to the last. At the key frame the camera has its usual position. Each clip
is rendered twice: moving one way for the adapter's scale 1, and the other way for -1. `--one-sided` leaves out the
latter, so that negative scales are extrapolated. `--size` makes the movement smaller. A background's latents change
almost in proportion to a pan of 6 pixels (0.4), but not to one of 15.

`higen train` trains the adapter as WORK/train.toml says. `higen convert --lora` adds it at scales from -1 to 1, and
clips of the other subjects on four backgrounds are drawn at each scale. To measure the camera's movement, the
background of each frame (without the subject) is registered with that of the key frame. Rendered clips are measured in
the same way, both through the autoencoder ("codec") and unchanged. Prints Markdown and writes WORK/result.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

import higen
from higen.api import default_model
from higen.measures.statistics import spearman
from higen.train.emoji.evaluation.evaluate import PipelineMaker
from higen.train.emoji.packs import clip_indices, load_loop, scene
from higen.train.emoji.subjects import BACKGROUNDS, FPS, FRAMES, KEY_INDEX, SPEEDS, SUBJECTS, caption
from higen.video import Video, contact_sheet

SIDE = 128
SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0)
DRAWN = tuple(b for b in BACKGROUNDS if not b.name.startswith("plain"))
SHOWN = tuple(b for b in DRAWN if b.name not in ("grass", "desert"))
"""Backgrounds that show a pan next to the subject. The others are flat there, except for one line."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Frames = NDArray[np.uint8]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Camera:
    """A camera movement.

    matrix  the map [2,3] for an amount of movement, from a pixel of the frame to the scene's pixel that it shows, both
            relative to the centre
    step    amount from one frame to the next at scale 1
    reach   largest amount, relative to the key frame, that the measurement looks for
    unit    unit of the amount over a whole clip
    """

    matrix: Callable[[float], Matrix]
    step: float
    reach: float
    unit: str


def _pan(amount: float) -> Matrix:
    return np.array([[1, 0, -amount], [0, 1, 0]], dtype=np.float64)


def _zoom(amount: float) -> Matrix:
    scale = np.exp(-amount)
    return np.array([[scale, 0, 0], [0, scale, 0]], dtype=np.float64)


def _roll(amount: float) -> Matrix:
    cosine, sine = np.cos(amount), np.sin(amount)
    return np.array([[cosine, sine, 0], [-sine, cosine, 0]], dtype=np.float64)


CAMERAS = {
    "pan": Camera(_pan, 1.0, 14.0, "pixels"),
    "zoom": Camera(_zoom, 0.015, 0.2, "natural logarithm of the size"),
    "roll": Camera(_roll, 0.018, 0.25, "radians"),
}


def smaller(camera: Camera, size: float) -> Camera:
    """The same movement, `size` times as far. The measurement looks at least for a third of the largest movement."""
    return replace(camera, step=camera.step * size, reach=camera.reach * max(size, 1 / 3))


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emoji", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--camera", choices=CAMERAS, default="pan")
    parser.add_argument("--size", type=float, default=1.0, help="of the movement, relative to the largest; 0.1 to 1")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, help="training time, in place of --steps")
    parser.add_argument("--clips", type=int, default=8, help="clips per step")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--one-sided", action="store_true")
    parser.add_argument("--subjects", type=int, default=24, help="subjects to train on and to draw")
    parser.add_argument("--prompts", type=int, default=2, help="prompts per subject, each with another background")
    options = parser.parse_args()
    if not 0.1 <= options.size <= 1:
        parser.error(f"--size {options.size}: a number from 0.1 to 1")
    options.work.mkdir(parents=True, exist_ok=True)
    camera = smaller(CAMERAS[options.camera], options.size)
    began = time.monotonic()
    listed = render(options.emoji, options.work / "clips", camera, options.subjects, options.one_sided)
    print(f"{listed} clips rendered after {time.monotonic() - began:.0f} s", flush=True)
    steps = train(options)
    print(f"{steps} steps after {time.monotonic() - began:.0f} s", flush=True)
    found = {"steps": steps, **measured(options, camera)}
    (options.work / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    print(as_markdown(found, camera.unit), flush=True)
    print(f"\n{time.monotonic() - began:.0f} s in all")


def render(emoji: Path, folder: Path, camera: Camera, subjects: int, one_sided: bool) -> int:
    """Write the clips and their list; returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    signs = (1,) if one_sided else (1, -1)

    def write(s: int) -> list[dict[str, object]]:
        loop = load_loop(emoji / f"{SUBJECTS[s].codepoint}.webp")
        rows: list[dict[str, object]] = []
        for b, background in enumerate(DRAWN):
            speed = SPEEDS[(s // 2 + b) % 2]
            for sign in signs:
                name = f"{s:02d}-{b}-{sign * camera.step:+g}.webm"
                if not (folder / name).exists():
                    Video(rendered(loop, s, background.name, speed.factor, camera, sign), FPS).save(folder / name)
                row: dict[str, object] = {"path": name, "caption": caption(SUBJECTS[s], background, speed)}
                rows.append(row if one_sided else {**row, "scale": sign})
        return rows

    with ThreadPoolExecutor() as pool:
        rows = [row for part in pool.map(write, range(0, 2 * subjects, 2)) for row in part]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def rendered(loop: Frames, s: int, background: str, speed: float, camera: Camera, scale: float) -> Frames:
    """A clip uint8 [16,128,128,3] of a subject's loop, with a moving camera."""
    places = clip_indices(len(loop), SUBJECTS[s].key_frame, speed)
    clip = []
    for i, place in enumerate(places):
        matrix = camera.matrix((i - KEY_INDEX) * camera.step * scale)
        row, column = np.mgrid[0:SIDE, 0:SIDE] + 0.5 - SIDE / 2
        x, y = (matrix[k, 0] * column + matrix[k, 1] * row + matrix[k, 2] + SIDE / 2 - 0.5 for k in (0, 1))
        behind = scene(background, (x / SIDE).astype(np.float32), (y / SIDE).astype(np.float32))
        # Premultiplied colours do not bleed into transparent pixels.
        centred = matrix[:, 2] + SIDE / 2 - matrix[:, :2] @ np.full(2, SIDE / 2)
        coefficients = tuple(np.column_stack([matrix[:, :2], centred]).ravel())
        moved = Image.fromarray(loop[place]).convert("RGBa")
        subject = np.asarray(
            moved.transform((SIDE, SIDE), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
        )
        alpha = subject[..., 3:].astype(np.float32) / 255
        clip.append(np.rint(np.clip(subject[..., :3] + behind * (1 - alpha), 0, 255)).astype(np.uint8))
    return np.stack(clip)


def train(options: argparse.Namespace) -> int:
    """Run `higen train`; returns the number of steps."""
    steps: int = options.steps
    if options.minutes is not None:
        began = time.monotonic()
        _train(options, 60)
        made = sorted((options.work / "run" / "checkpoints").glob("step-*.pt"))[-2:]
        pace = (made[1].stat().st_mtime - made[0].stat().st_mtime) / 30
        steps = 60 + int(max(60 * options.minutes - 1.5 * (time.monotonic() - began), 0) / pace)
    _train(options, steps)
    return steps


def _train(options: argparse.Namespace, steps: int) -> None:
    settings = f"""
[model]
init = "{default_model()}"
[data]
path = "clips/clips.jsonl"
images = 0
videos = {options.clips}
cache = "latents"
workers = 4
[cues]
given = [1.0, 0.0, 0.0, 0.0]    # drawn with no cue
[objective]
offset_noise = 0.0
gain_weight = 0.0
high_part = 0.3
clip_levels = "high"
prior_noise = 0.05
[optimiser]
layers = "temporal"
learning_rate = {options.rate}
warm_up = 50
decay_part = 0.5
ema = 0.99
[lora]
rank = 8
{"" if options.one_sided else "scales = true"}
[run]
output = "run"
steps = {steps}
save_every = {30 if steps <= 60 else 100}
log_every = 50
tensorboard = false
"""
    file = options.work / "train.toml"
    file.write_text(settings.lstrip())
    _command("train", str(file))


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "higen", *arguments], check=True)


def measured(options: argparse.Namespace, camera: Camera) -> dict[str, object]:
    """The movement at each scale, in drawn clips of the other subjects and rendered clips (with and without codec)."""
    subjects = range(1, 2 * options.subjects, 2)
    asked = [(s, (s // 2 + k) % len(SHOWN)) for s in subjects for k in range(options.prompts)]
    loops = {s: load_loop(options.emoji / f"{SUBJECTS[s].codepoint}.webp") for s in subjects}
    masks = {s: outside(loop) for s, loop in loops.items()}
    lora = options.work / "run" / "lora.safetensors"
    table: dict[str, list[list[float]]] = {"LoRA": [], "codec": [], "rendered": []}
    for scale in SCALES:
        model = options.work / f"model{scale:+g}"
        _command("convert", str(default_model()), str(model), "--lora", f"{lora}:{scale:g}", "--overwrite")
        real = [rendered(loops[s], s, SHOWN[b].name, 1.0, camera, scale) for s, b in asked]
        with higen.load(model, "torch", device=DEVICE) as pipe:
            prompts = [caption(SUBJECTS[s], SHOWN[b], SPEEDS[1]) for s, b in asked]
            made = [
                video.frames
                for i in range(0, len(prompts), 8)
                for video in pipe(prompts[i : i + 8], seed=0, progress=False)
            ]
            codec = PipelineMaker(pipe)
            shown = [codec.decode(codec.encode(clip)) for clip in real]
        clips = {"LoRA": made, "codec": shown, "rendered": real}
        for name, videos in clips.items():
            with ThreadPoolExecutor() as pool:
                table[name].append(list(pool.map(lambda v, a: movement(v, masks[a[0]], camera), videos, asked)))
        if scale == SCALES[-1]:
            _sheet(options.work / "sheet.png", made, real, prompts)
    return {
        "camera": options.camera,
        "size": options.size,
        "one_sided": options.one_sided,
        "device": DEVICE,
        "asked": [caption(SUBJECTS[s], SHOWN[b], SPEEDS[1]) for s, b in asked],
        "movement": table,
        **{name: summary(rows) for name, rows in table.items()},
    }


def outside(loop: Frames) -> NDArray[np.bool_]:
    """Pixels that are outside the subject in every frame of the loop, even if it has moved a little: bool [H,W]."""
    shown = torch.from_numpy((loop[..., 3] > 8).any(axis=0)).float()[None, None]
    grown: NDArray[np.bool_] = functional.max_pool2d(shown, 13, 1, 6)[0, 0].numpy() == 0
    return grown


def movement(clip: Frames, mask: NDArray[np.bool_], camera: Camera) -> float:
    """The movement from the first to the last frame, from the slope of a straight line through the frames' amounts."""
    x = torch.from_numpy(clip.transpose(0, 3, 1, 2).astype(np.float32))
    amounts = np.linspace(-camera.reach, camera.reach, 113)
    moved = torch.stack([warped(x[KEY_INDEX], camera.matrix(amount)) for amount in amounts])
    inside = torch.from_numpy(mask).float()
    weights = torch.stack([warped(inside[None], camera.matrix(amount))[0] for amount in amounts]) * inside
    weights = weights * (weights > 0.99)
    found = []
    for i, frame in enumerate(x):
        errors = 1 - _alike(moved, frame, weights)
        found.append((i - KEY_INDEX, _least(errors.double().numpy(), amounts)))
    places, values = np.array(found).T
    return float(places @ values / (places @ places) * (FRAMES - 1))


def warped(picture: Tensor, matrix: Matrix) -> Tensor:
    """A picture [C,H,W] as a camera at `matrix` sees it; 0 outside the picture."""
    theta = torch.from_numpy(np.column_stack([matrix[:, :2], matrix[:, 2] / (SIDE / 2)])).float()[None]
    grid = functional.affine_grid(theta, [1, *picture.shape], align_corners=False)
    return functional.grid_sample(picture[None], grid, "bilinear", "zeros", align_corners=False)[0]


def _alike(moved: Tensor, frame: Tensor, weights: Tensor) -> Tensor:
    """Normalised correlation [N] of pictures [N,3,H,W] with one [3,H,W], weighted by `weights` [N,H,W]. For flat
    pictures it is close to 0.
    """
    weights = weights[:, None] / weights.sum(dim=(1, 2)).clamp_min(1)[:, None, None, None]

    def centred(picture: Tensor) -> Tensor:
        return picture - (weights * picture).sum(dim=(2, 3), keepdim=True)

    def mean(product: Tensor) -> Tensor:
        return (weights * product).sum(dim=(1, 2, 3))

    a, b = centred(moved), centred(frame[None])
    return mean(a * b) / (mean(a.square()) * mean(b.square())).sqrt().clamp_min(3.0)


def _least(errors: NDArray[np.float64], amounts: NDArray[np.float64]) -> float:
    """The amount at the minimum of the parabola through the smallest error and its neighbours."""
    i = int(np.clip(errors.argmin(), 1, len(errors) - 2))
    left, here, right = errors[i - 1 : i + 2]
    bend = left - 2 * here + right
    shift = 0.5 * (left - right) / bend if bend > 0 else 0.0
    return float(amounts[i] + np.clip(shift, -1, 1) * (amounts[1] - amounts[0]))


def summary(rows: list[list[float]]) -> dict[str, object]:
    """Statistics of the movement at each of SCALES: means, deviations, how often its sign is that of the scale, and
    rank correlations with the scale.
    """
    table, scales = np.array(rows), np.array(SCALES)
    moving = table[scales != 0] * np.sign(scales[scales != 0])[:, None]
    return {
        "mean": table.mean(axis=1).round(4).tolist(),
        "deviation": table.std(axis=1).round(4).tolist(),
        "sign_right": float((moving > 0).mean()),
        "spearman": spearman(np.repeat(scales, table.shape[1]), table.ravel()),
        "spearman_within": float(np.mean([spearman(scales, column) for column in table.T])),
    }


def as_markdown(found: dict[str, object], unit: str) -> str:
    """The table."""
    header = " | ".join(f"scale {scale:g}" for scale in SCALES)
    lines = [f"{found['camera']}, {unit} over a clip:", "", f"| | {header} | sign right | Spearman | within a prompt |"]
    lines.append("|---" * (len(SCALES) + 4) + "|")
    for name in ("LoRA", "codec", "rendered"):
        row: dict[str, object] = found[name]  # type: ignore[assignment]
        cells = " | ".join(f"{m:.3g} ± {d:.2g}" for m, d in zip(row["mean"], row["deviation"], strict=True))  # type: ignore[call-overload]
        lines.append(
            f"| {name} | {cells} | {row['sign_right']:.1%} | {row['spearman']:.3f} | {row['spearman_within']:.3f} |"
        )
    return "\n".join(lines)


def _sheet(path: Path, made: Sequence[Frames], real: Sequence[Frames], prompts: Sequence[str]) -> None:
    videos = []
    for i in range(0, min(len(made), 24), 4):
        videos += [Video(real[i], FPS, {"prompt": f"rendered: {prompts[i]}"}), Video(made[i], FPS, {"prompt": "drawn"})]
    contact_sheet(videos).save(path)


if __name__ == "__main__":
    main()
