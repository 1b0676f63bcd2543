"""Trains an autoencoder on your own videos, and compares it with the built-in model's on held-out parts.

    python benchmarks/own_codec.py WORK VIDEO... [--steps 6000] [--start new|built-in] [--factor 16|8]

Each video is cut into clips of 16 frames at 8 frames per second: the whole picture, and four parts of half its size.
The last quarter of each video is held out. `higen train` trains as WORK/train.toml says, from random weights or from
those of the built-in model. With --factor 8, latents have 16 channels and doubled width and height. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from higen.api import default_model
from higen.bundle import Bundle
from higen.families.higen import spec
from higen.measures.fidelity import psnr
from higen.models.companion_stages import DecoderStage, EncoderStage
from higen.models.companions import load_autoencoder
from higen.train.latents import to_pixels
from higen.video import Video

SIDE, FRAMES, FPS, HELD_OUT = 128, 16, 8.0, 0.25
Frames = NDArray[np.uint8]

ARCHITECTURE = """
max_frames = 64
optional_cues = true
[unet]
in_channels = {channels}
out_channels = {channels}
base_channels = 32
channel_multipliers = [3, 4]
blocks_per_level = 1
attention_levels = [true, false]
head_dim = 32
first_temporal_heads = 1
text_dim = 128
context_dim = 128
context_tokens = 12
context_depth = 1
context_heads = 4
prior_preconditioning = true
pooled_context = true
[autoencoder]
kind = "AutoencoderDC"
factor = {factor}
shift = [0.0]
scale = [1.0]
[autoencoder.arguments]
latent_channels = {channels}
encoder_block_types = "ResBlock"
decoder_block_types = "ResBlock"
encoder_block_out_channels = {encoder}
decoder_block_out_channels = {decoder}
encoder_layers_per_block = {encoder_layers}
decoder_layers_per_block = {decoder_layers}
encoder_qkv_multiscales = {none}
decoder_qkv_multiscales = {none}
[defaults]
frames = 16
width = 128
height = 128
fps = 8
"""
SHAPES = {
    16: {
        "channels": 32,
        "encoder": [16, 24, 48, 96, 96],
        "decoder": [16, 32, 64, 128, 128],
        "encoder_layers": [0, 1, 1, 1, 1],
        "decoder_layers": [0, 2, 2, 1, 1],
        "none": [[]] * 5,
    },
    8: {
        "channels": 16,
        "encoder": [24, 48, 96, 96],
        "decoder": [32, 64, 128, 128],
        "encoder_layers": [0, 1, 1, 1],
        "decoder_layers": [0, 2, 2, 1],
        "none": [[]] * 4,
    },
}


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, help="training time, in place of --steps")
    parser.add_argument("--clips", type=int, default=8, help="clips per step; four frames of each are used")
    parser.add_argument("--start", choices=("new", "built-in"), default="new")
    parser.add_argument("--factor", type=int, choices=SHAPES, default=16)
    options = parser.parse_args()
    work: Path = options.work
    began = time.monotonic()
    counts = cut(options.videos, work)
    print(f"{counts[0]} clips to train on, {counts[1]} held out, after {time.monotonic() - began:.0f} s", flush=True)
    steps = train(options)
    print(f"{steps} steps after {time.monotonic() - began:.0f} s")
    held = [np.stack(list(read(work / "held_out" / row["path"]))) for row in _rows(work / "held_out" / "clips.jsonl")]
    table = {name: shown(path, held) for name, path in {"built-in": default_model(), "own": work / "run/model"}.items()}
    found = {name: float(np.mean(values)) for name, values in table.items()}
    print(f"| autoencoder | PSNR of {len(held)} held-out clips | worst | least gain |\n|---|---|---|---|")
    gain = np.array(table["own"]) - np.array(table["built-in"])
    for name, values in table.items():
        print(f"| {name} | {found[name]:.2f} dB | {min(values):.2f} dB | {gain.min() if name == 'own' else 0:.2f} dB |")
    print(f"\ngain {found['own'] - found['built-in']:.2f} dB; {time.monotonic() - began:.0f} s in all")
    (work / "result.json").write_text(json.dumps({"found": found, "table": table}, indent=1) + "\n")


def cut(videos: list[Path], work: Path) -> tuple[int, int]:
    """Write the clips of both data sets; returns how many each has."""
    rows: dict[str, list[str]] = {"clips": [], "held_out": []}
    for name in rows:
        (work / name).mkdir(parents=True, exist_ok=True)
    for video in videos:
        pictures = list(read(video, FPS))
        whole = len(pictures) // FRAMES
        for k in range(whole):
            kind = "held_out" if k >= whole - max(1, round(HELD_OUT * whole)) else "clips"
            for part, clip in enumerate(parts(pictures[k * FRAMES : (k + 1) * FRAMES])):
                file = f"{video.stem}-{k:03d}-{part}.webm"
                if not (work / kind / file).exists():
                    Video(clip, FPS).save(work / kind / file)
                rows[kind].append(file)
    for kind, files in rows.items():
        lines = (json.dumps({"path": file, "caption": file.partition("-")[0]}) + "\n" for file in files)
        (work / kind / "clips.jsonl").write_text("".join(lines))
    return len(rows["clips"]), len(rows["held_out"])


def read(video: Path, fps: float | None = None) -> Iterator[Frames]:
    """The frames of a video: all, or those at a rate of `fps` frames per second."""
    import av

    with av.open(str(video)) as container:
        following = 0.0
        for frame in container.decode(video=0):
            if fps is None or float(frame.time or 0) >= following - 1e-3:
                following += 1 / (fps or 1)
                yield frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def parts(pictures: list[Frames]) -> Iterator[Frames]:
    """The central square of a clip, and its four quarters if they have at least 128x128 pixels; each at 128x128."""
    height, width = pictures[0].shape[:2]
    side = min(height, width)
    left, top, half = (width - side) // 2, (height - side) // 2, side // 2
    boxes = [(left, top, left + side, top + side)]
    boxes += [(left + x, top + y, left + x + half, top + y + half) for x in (0, half) for y in (0, half)]
    for box in boxes if half >= SIDE else boxes[:1]:
        size, how = (SIDE, SIDE), Image.Resampling.BOX
        yield np.stack([np.asarray(Image.fromarray(p).resize(size, how, box, reducing_gap=None)) for p in pictures])


def train(options: argparse.Namespace) -> int:
    """Run `higen train`; returns the number of steps."""
    steps: int = options.steps
    if options.minutes is not None:
        began = time.monotonic()
        _train(options, 50)
        made = sorted((options.work / "run" / "checkpoints").glob("step-*.pt"))[-2:]
        pace = (made[1].stat().st_mtime - made[0].stat().st_mtime) / 25
        steps = 50 + int(max(60 * options.minutes - 1.5 * (time.monotonic() - began), 0) / pace)
    _train(options, steps)
    return steps


def _train(options: argparse.Namespace, steps: int) -> None:
    write_settings(options, steps)
    subprocess.run([sys.executable, "-m", "higen", "train", str(options.work / "train.toml")], check=True)


def write_settings(options: argparse.Namespace, steps: int) -> None:
    """Write WORK/train.toml and WORK/architecture.toml."""
    work: Path = options.work
    listed = {name: json.dumps(value) for name, value in SHAPES[options.factor].items()}
    (work / "architecture.toml").write_text(ARCHITECTURE.format(factor=options.factor, **listed))
    model = f'init = "{default_model()}"'
    if options.start == "new":
        model = f'architecture = "architecture.toml"\ncompanions = "{default_model()}"'
    (work / "train.toml").write_text(f"""[model]
{model}
[data]
path = "clips/clips.jsonl"
held_out = "held_out/clips.jsonl"
images = 0
videos = {options.clips}
[codec]
layers = "all"
[optimiser]
learning_rate = 2e-3
betas = [0.9, 0.99]
weight_decay = 1e-3
warm_up = {min(100, steps // 10)}
last_rate = 0.01
ema = 0.999
[run]
output = "run"
steps = {steps}
save_every = {25 if steps <= 50 else 100}
held_out_every = {max(steps // 6, 1)}
log_every = 100
tensorboard = false
""")


@torch.no_grad()
def shown(model: Path, clips: list[Frames]) -> list[float]:
    """PSNR in dB of each clip through a model's autoencoder, on the host."""
    bundle = Bundle.open(model)
    config = spec.config(bundle.manifest).autoencoder
    network = load_autoencoder(bundle.file(spec.AUTOENCODER), config.kind, config.arguments, torch.float32)
    encoder, decoder = (stage(network, config.shift, config.scale).eval() for stage in (EncoderStage, DecoderStage))
    found = []
    for clip in clips:
        pixels = decoder(encoder(to_pixels(clip))).clamp(-1, 1).numpy().transpose(0, 2, 3, 1)
        found.append(psnr(np.rint((pixels + 1) * 127.5), clip))
    return found


def _rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
