"""Measures the default model against the real clips it was trained on.

    python -m higen.train.recipes.default.evaluate --data FOLDER --model DIR --output FOLDER

Poses and backgrounds are fixed, so the real clip of a prompt is known pixel by pixel. Measured apart for combinations
of subject and background that were trained and that were held out:

identity, background   the nearest real key frame (mean squared error, all 120) shows the prompt's subject, background
clip, copy             PSNR against the real clip, of the generated clip and of its own key frame repeated
beats copy             part of the clips that are closer to the real clip than that repetition
still                  mean difference of neighbouring frames where the text says "standing still", in levels of 255
real, codec            the real clip through the codec: the bound on `clip`
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import higen
from higen.pipeline import Pipeline
from higen.train.recipes.default.data import background, clip_indices, compose, load_loop, loop_step
from higen.train.recipes.default.subjects import (
    BACKGROUNDS,
    KEY_INDEX,
    SPEEDS,
    SUBJECTS,
    Speed,
    caption,
    is_held_out,
)
from higen.video import Video, contact_sheet

__all__ = ["Measures", "evaluate"]

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Measures:
    """Means over a set of clips; PSNR in dB."""

    clips: int
    identity: float
    background: float
    clip: float
    copy: float
    codec: float
    beats_copy: float
    still: float


class RealClips:
    """The clips of the data set as pixels."""

    def __init__(self, data: Path) -> None:
        paths = [data / f"{subject.codepoint}.webp" for subject in SUBJECTS]
        self.loops = [load_loop(path) for path in paths]
        self.steps = [loop_step(path) for path in paths]
        self.pictures = [background(b.name) for b in BACKGROUNDS]
        self.keys = np.stack([self.clip(s, b, SPEEDS[3])[KEY_INDEX] for s, b in self.pairs()]).astype(np.float32)

    def pairs(self) -> list[tuple[int, int]]:
        """Every (subject, background)."""
        return [(s, b) for s in range(len(SUBJECTS)) for b in range(len(BACKGROUNDS))]

    def clip(self, s: int, b: int, speed: Speed) -> Frames:
        """uint8 [16, 128, 128, 3]."""
        loop = self.loops[s]
        indices = clip_indices(len(loop), SUBJECTS[s].key_frame, speed.factor, step=self.steps[s])
        return compose(loop[indices], self.pictures[b])

    def nearest(self, frame: Frames) -> tuple[int, int]:
        """(subject, background) of the key frame that is nearest to `frame`."""
        errors = ((self.keys - frame.astype(np.float32)) ** 2).mean(axis=(1, 2, 3))
        return self.pairs()[int(errors.argmin())]


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(255**2 / max(1e-6, ((a.astype(np.float32) - b.astype(np.float32)) ** 2).mean())))


def evaluate(
    pipeline: Pipeline, real: RealClips, pairs: list[tuple[int, int]], seeds: range
) -> tuple[Measures, list[Video]]:
    """Generate each pair at normal and fast speed and standing still, for every seed."""
    rows, still, videos = [], [], []
    for s, b in pairs:
        for seed in seeds:
            for speed in (SPEEDS[1], SPEEDS[2]):
                video = pipeline(caption(SUBJECTS[s], BACKGROUNDS[b], speed), seed=seed, progress=False)
                clip, key = real.clip(s, b, speed), video.frames[KEY_INDEX]
                found = real.nearest(key)
                score, copy = psnr(video.frames, clip), psnr(np.broadcast_to(key, clip.shape), clip)
                codec = psnr(_through_codec(pipeline, clip), clip)
                rows.append((found[0] == s, found[1] == b, score, copy, codec, score > copy))
                videos.append(video)
            frames = pipeline(caption(SUBJECTS[s], BACKGROUNDS[b], SPEEDS[3]), seed=seed, progress=False).frames
            still.append(float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean()))
    identity, scene, score, copy, codec, beats = (float(np.mean(column)) for column in zip(*rows, strict=True))
    return Measures(len(rows), identity, scene, score, copy, codec, beats, float(np.mean(still))), videos


def _through_codec(pipeline: Pipeline, clip: Frames) -> Frames:
    pixels = clip.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1.0
    encoded = pipeline.backend.run("vae_encoder", pixels=np.ascontiguousarray(pixels))["latents"]
    latents = pipeline.backend.to_numpy(encoded)
    return pipeline.decode(latents.transpose(1, 0, 2, 3)[None])[0]


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure the default model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the WebP loops")
    parser.add_argument("--model", type=Path, help="model directory; the built-in one if not given")
    parser.add_argument("--output", type=Path, required=True, help="folder for measures.json and the contact sheets")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    real, measures = RealClips(arguments.data), {}
    groups = {
        "held-out": [(s, b) for s, b in real.pairs() if is_held_out(s, b)],
        "trained": [(s, b) for s, b in real.pairs() if (3 * s + b) % 10 == 2],
    }
    with higen.load(arguments.model) as pipeline:
        for name, pairs in groups.items():
            found, videos = evaluate(pipeline, real, pairs, range(arguments.seeds))
            measures[name] = asdict(found)
            print(name, json.dumps({k: round(v, 3) for k, v in measures[name].items()}), flush=True)
            contact_sheet(videos[:: 2 * arguments.seeds]).save(arguments.output / f"{name}.png")
    (arguments.output / "measures.json").write_text(json.dumps(measures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
