"""Writes the default model's card, its contact sheet and the picture of the README, from `evaluate`'s measures.

python -m higen.train.recipes.default.card --measures FOLDER/measures.json --output higen/assets
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import higen
from higen.train.recipes.default.subjects import BACKGROUNDS, SUBJECTS
from higen.video import Video, contact_sheet

__all__ = ["PROMPTS"]

PROMPTS = (
    "a whale flapping its tail on a blue sky",
    "a penguin waddling in the snow",
    "a red heart beating at night",
    "a butterfly flapping its wings on green grass",
    "a ferris wheel turning by the sea",
    "a ghost floating on a pink background",
    "a hand waving on a yellow background, fast",
    "a kangaroo hopping in the desert, slowly",
)

COLUMNS = (
    ("identity", "subject right", "{:.0%}"),
    ("background", "background right", "{:.0%}"),
    ("clip", "PSNR, clip", "{:.1f} dB"),
    ("copy", "PSNR, key frame repeated", "{:.1f} dB"),
    ("codec", "PSNR, real clip through the codec", "{:.1f} dB"),
    ("beats_copy", "closer than the repeated key frame", "{:.0%}"),
    ("still", 'mean frame difference, "standing still"', "{:.2f} / 255"),
)

CARD = """# The built-in model

Draws {subjects} animated emoji on {backgrounds} backgrounds: 16 frames of 128x128 at 8 fps, on a CPU. It exists so that
`higen.generate()` works at once and every tool of the project has a real model to work on; it knows nothing else.
`higen prompts` lists prompts it knows; other words give a warning.

![Eight prompts, seed 0, every other frame](contact_sheet.png)

**Architecture** {parameters:.1f} M parameters in half precision ({megabytes:.1f} MB): HiGen's denoiser with two levels
(96 and 160 channels), prior preconditioning and a pooled context; a two-layer CLIP text encoder over {words} words; an
AutoencoderDC that makes 8x8 latents of 32 channels.

**Prompts** "a whale flapping its tail on a blue sky", then ", slowly" / ", in slow motion", ", fast" / ", quickly",
or "a whale on a blue sky, standing still". A `motion` number overrides the words; without one they decide.

**Data** Microsoft's Fluent emoji (MIT) as animated by LobeHub: npm `@lobehub/fluent-emoji-anim-1` to `-4`, 1.0.0, MIT
by their metadata. Each clip shows the loop at some speed over a drawn background; the middle frame is always the same
pose of the subject. One in ten combinations of subject and background is held out.

**Training** `higen train default --work work --output my-model` on two CPU cores: about 40 minutes for the
autoencoder, 75 for the denoiser (5,500 steps of 12 key frames and 48 frames of clips, then 600 with more key frames at
the highest noise levels, because the background did not follow the text yet). The shipped weights come from such a
run in which its length and the windows were settled on the way (windows of 4, 8 and 16 frames alike up to step 2,100;
the learning rate fell to zero at 5,500 as now), so the command makes their like, not their bytes.

**Measured** on {clips} clips a row (`python -m higen.train.recipes.default.evaluate`), against the real clips:

{table}

"Subject right" and "background right": the nearest of all 120 real key frames, in mean squared error, is the prompt's.

**Limits** Poses and places are always the same, so seeds differ little. {limits}

**Licence** The weights are under Apache-2.0. The emoji are Microsoft's, under the MIT licence (Copyright (c) Microsoft
Corporation); the animation packages are LobeHub's, under the MIT licence (Copyright (c) LobeHub).
"""


def samples(videos: list[Video]) -> Video:
    """Eight videos as one, four by two."""
    rows = [np.concatenate([v.frames for v in videos[i : i + 4]], axis=2) for i in (0, 4)]
    return Video(np.concatenate(rows, axis=1), videos[0].fps)


def table(measures: dict[str, dict[str, Any]]) -> str:
    """The measures as a Markdown table, one row per group."""
    lines = [
        "| combinations | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in measures.items():
        lines.append(f"| {name} | " + " | ".join(form.format(row[key]) for key, _, form in COLUMNS) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write the default model's card.")
    parser.add_argument("--measures", type=Path, required=True, help="measures.json of `evaluate`")
    parser.add_argument("--model", type=Path, help="model directory; the built-in one if not given")
    parser.add_argument("--limits", default="", help="what the contact sheet shows to be wrong")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    measures = json.loads(arguments.measures.read_text(encoding="utf-8"))
    with higen.load(arguments.model) as pipeline:
        videos = pipeline(list(PROMPTS), seed=0, progress=False)
        size = sum(record.size for name, record in pipeline.bundle.files.items() if name.endswith(".safetensors"))
        words = int(pipeline.config.text.clip["vocab_size"]) - 4
    contact_sheet(videos).save(arguments.output / "contact_sheet.png")
    samples(videos).save(arguments.output / "samples.gif")
    card = CARD.format(
        subjects=len(SUBJECTS),
        backgrounds=len(BACKGROUNDS),
        parameters=size / 2e6,
        megabytes=size / 1e6,
        words=words,
        clips=next(iter(measures.values()))["clips"],
        table=table(measures),
        limits=arguments.limits,
    )
    (arguments.output / "MODEL_CARD.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
