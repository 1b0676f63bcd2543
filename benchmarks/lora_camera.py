"""Teaches the built-in model a camera movement with a LoRA of its temporal layers, and measures it at several scales.

    python benchmarks/lora_camera.py EMOJI WORK [--camera pan|zoom|roll] [--size 0.4] [--steps 2500]
    python benchmarks/lora_camera.py EMOJI WORK --plain [--one-sided]    # `higen train` as it is

EMOJI is the folder of the recipe's WebP loops (`higen train default` fetches them into its work folder). Clips of every
second subject on drawn backgrounds are rendered with a camera that moves at a constant rate, by at most one latent cell
of 16 pixels from the first frame to the last. At the key frame the camera has its usual position. Each clip is rendered
twice: moving one way for the adapter's scale 1, and the other way for -1. `--size` makes the movement smaller. A
background's latents change almost in proportion to a pan of 6 pixels (0.4), but not to one of 15.

camera_pairs.py trains the adapter. With `--plain`, `higen train` does it as WORK/train.toml says; `--one-sided` then
leaves out the scale -1, so that negative scales are extrapolated. `higen convert --lora` adds it at SCALES,
and clips of the other subjects on four backgrounds are drawn at each scale. To measure the camera's movement, the
background of each frame (without the subject) is registered with that of the key frame. Rendered clips are measured in
the same way, both through the autoencoder ("codec") and unchanged. Prints Markdown and writes WORK/result.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import camera_pairs
import numpy as np
import torch
from cameras import CAMERAS, SIDE, Camera, Frames, movement, outside, rendered, smaller
from numpy.typing import NDArray

import higen
from higen.api import default_model
from higen.measures.statistics import spearman
from higen.staging import whole_file
from higen.train.emoji.evaluation.evaluate import PipelineMaker
from higen.train.emoji.packs import load_loop
from higen.train.emoji.subjects import BACKGROUNDS, FPS, SPEEDS, SUBJECTS, caption
from higen.train.latents import encode
from higen.train.networks import build
from higen.train.settings import Settings, read_settings
from higen.video import Video, contact_sheet

SCALES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
DRAWN = tuple(b for b in BACKGROUNDS if not b.name.startswith("plain"))
SHOWN = tuple(b for b in DRAWN if b.name not in ("grass", "desert"))
"""Backgrounds that show a pan next to the subject. The others are flat there, except for one line."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emoji", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--camera", choices=CAMERAS, default="pan")
    parser.add_argument("--size", type=float, default=1.0, help="of the movement, relative to the largest; 0.1 to 1")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rate", type=float, help="learning rate; by default 0.012, or 0.001 with --plain")
    parser.add_argument("--plain", action="store_true", help="train with `higen train`")
    parser.add_argument("--minutes", type=float, help="with --plain: training time, in place of --steps")
    parser.add_argument("--clips", type=int, default=8, help="with --plain: clips per step")
    parser.add_argument("--one-sided", action="store_true", help="with --plain: only one direction")
    parser.add_argument("--subjects", type=int, default=24, help="subjects to train on and to draw")
    parser.add_argument("--prompts", type=int, default=2, help="prompts per subject, each with another background")
    options = parser.parse_args()
    if not 0.1 <= options.size <= 1:
        parser.error(f"--size {options.size}: a number from 0.1 to 1")
    options.work.mkdir(parents=True, exist_ok=True)
    camera = smaller(CAMERAS[options.camera], options.size)
    began = time.monotonic()
    if options.plain:
        listed = render(options.emoji, options.work / "clips", camera, options.subjects, options.one_sided)
        print(f"{listed} clips rendered after {time.monotonic() - began:.0f} s", flush=True)
        steps = train(options)
    else:
        steps = train_pairs(options, camera)
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


def train_pairs(options: argparse.Namespace, camera: Camera) -> int:
    """Train with camera_pairs.py; returns the number of steps."""
    toml = options.work / "train.toml"
    toml.write_text(PAIRED.format(init=default_model()))
    settings = read_settings(toml)
    lora = _lora(options)
    lora.parent.mkdir(exist_ok=True)
    camera_pairs.train(settings, _pairs(options, camera, settings), lora, options.steps, options.rate or 0.012)
    steps: int = options.steps
    return steps


PAIRED = """[model]
init = "{init}"
[data]
path = "none.jsonl"    # the pairs are rendered
images = 0
[optimiser]
layers = "temporal"
[lora]
rank = 8
scales = true
[run]
output = "run"
steps = 1
"""


def _pairs(options: argparse.Namespace, camera: Camera, settings: Settings) -> list[camera_pairs.Pair]:
    """The latents of the pairs, kept in WORK."""
    kept = options.work / "pairs.pt"
    if not kept.exists():
        encoder, rows = build(settings, []).encoder, []
        for s in range(0, 2 * options.subjects, 2):
            loop = load_loop(options.emoji / f"{SUBJECTS[s].codepoint}.webp")
            free = torch.from_numpy(outside(loop).reshape(8, SIDE // 8, 8, SIDE // 8).mean((1, 3))).float()
            for b, background in enumerate(SHOWN):
                speed = SPEEDS[(s // 2 + b) % 3]
                both = [rendered(loop, s, background.name, speed.factor, camera, sign) for sign in (1, -1)]
                latents = torch.stack([encode(encoder, clip, None).mean.half() for clip in both])
                rows.append((latents, free, caption(SUBJECTS[s], background, speed)))
            print(f"{len(rows)} pairs rendered", flush=True)
        with whole_file(kept) as temporary:
            torch.save(rows, temporary)
    return [camera_pairs.Pair(*row) for row in torch.load(kept)]


def _lora(options: argparse.Namespace) -> Path:
    folder: Path = options.work / "run"
    return folder / "lora.safetensors"


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
learning_rate = {options.rate or 1e-3}
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
    lora = _lora(options)
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


def summary(rows: list[list[float]]) -> dict[str, object]:
    """Statistics of the movement at each of SCALES: means, deviations, how often its sign is that of the scale, and
    rank correlations with the scale. `more`: the same of the movement beyond that at scale 0, prompt by prompt.
    """
    table, scales = np.array(rows), np.array(SCALES)
    found = _agreement(table, scales)
    return {
        "mean": table.mean(axis=1).round(4).tolist(),
        "deviation": table.std(axis=1).round(4).tolist(),
        **found,
        "spearman_within": float(np.mean([spearman(scales, column) for column in table.T])),
        "more": _agreement(table - table[scales == 0], scales),
    }


def _agreement(table: NDArray[np.float64], scales: NDArray[np.float64]) -> dict[str, float]:
    moving = table[scales != 0] * np.sign(scales[scales != 0])[:, None]
    return {
        "sign_right": float((moving > 0).mean()),
        "spearman": spearman(np.repeat(scales, table.shape[1]), table.ravel()),
    }


def as_markdown(found: dict[str, object], unit: str) -> str:
    """The table."""
    header = " | ".join(f"scale {scale:g}" for scale in SCALES)
    titles = ("sign right", "Spearman", "within a prompt", "beyond scale 0: sign right", "Spearman")
    lines = [f"{found['camera']}, {unit} over a clip:", "", f"| | {header} | {' | '.join(titles)} |"]
    lines.append("|---" * (len(SCALES) + 1 + len(titles)) + "|")
    for name in ("LoRA", "codec", "rendered"):
        row: Any = found[name]
        cells = [f"{m:.3g} ± {d:.2g}" for m, d in zip(row["mean"], row["deviation"], strict=True)]
        cells += [f"{row['sign_right']:.1%}", f"{row['spearman']:.3f}", f"{row['spearman_within']:.3f}"]
        cells += [f"{row['more']['sign_right']:.1%}", f"{row['more']['spearman']:.3f}"]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _sheet(path: Path, made: Sequence[Frames], real: Sequence[Frames], prompts: Sequence[str]) -> None:
    videos = []
    for i in range(0, min(len(made), 24), 4):
        videos += [Video(real[i], FPS, {"prompt": f"rendered: {prompts[i]}"}), Video(made[i], FPS, {"prompt": "drawn"})]
    contact_sheet(videos).save(path)


if __name__ == "__main__":
    main()
