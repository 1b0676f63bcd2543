"""Writes the default model's card, its contact sheet and the README's picture, from the measures of `higen evaluate`.

higen evaluate MODEL --data FOLDER --output FOLDER
python -m higen.train.emoji.evaluation.card --measures FOLDER/measures.json --output higen/assets

With several presets, `--measures NAME=FILE` once for each (`higen evaluate --preset NAME`).
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import higen
from higen.families.higen import spec
from higen.train.emoji.configuration import DECODER, KNOWN_FRAMES, recipe
from higen.train.emoji.evaluation.figures import KnownFigures, Measures
from higen.train.emoji.evaluation.known import CASES
from higen.train.emoji.evaluation.report import COLUMNS, cell, frechet_lines
from higen.train.emoji.subjects import BACKGROUNDS, SUBJECTS
from higen.typed_json import from_json
from higen.video import Video, contact_sheet

__all__ = ["PROMPTS", "control", "table"]

PROMPTS = (
    "a whale flapping its tail on a blue sky",
    "a penguin waddling in the snow",
    "a red heart beating at night",
    "a chick hatching in the desert",
    "a crab raising its claws by the sea",
    "a smiling sun spinning on green grass",
    "a rocket flying on a pink background, fast",
    "a kangaroo hopping on a yellow background, slowly",
)

CARD = """# The built-in model

Draws {subjects} animated emoji on {backgrounds} backgrounds, and nothing else: 16 frames of 128x128 at 8 fps, on a CPU.
With it, `higen.generate()` works at once and every tool of the project has a real model to run on. `higen prompts`
lists prompts it knows. Words that it does not know give a warning.

![Eight prompts, seed 0, every other frame](contact_sheet.png)

**Architecture** {parameters:.1f} M parameters in half precision ({megabytes:.1f} MB): HiGen's denoiser with two levels
(96 and 128 channels), prior preconditioning, a pooled context, and temporal layers of their own for known frames; a
two-layer CLIP text encoder with a vocabulary of {words} words; an AutoencoderDC with 8x8 latents of 32 channels.

**Prompts** "a whale flapping its tail on a blue sky", followed by ", slowly" / ", in slow motion" or ", fast" / ",
quickly" if wanted; or "a whale on a blue sky, standing still". A `motion` number can be combined with these words, but
"standing still" stays still at any number.

**Data** Microsoft's Fluent emoji (MIT) as animated by LobeHub: npm `@lobehub/fluent-emoji-anim-1` to `-4`, 1.0.0, MIT
by their metadata. Each training clip shows the emoji's loop at some speed over a drawn background. The middle frame
always shows the same pose of the subject. One in ten combinations of subject and background is held out of training.

**Training** `higen train default --work work --output my-model` trains such a model from random weights on two CPU
cores, in four parts:

- the autoencoder: about 45 minutes;
- the denoiser: {steps:,} steps of 12 key frames and 48 frames of clips (0.75 s each on one core of an AMD EPYC with
  AVX-512; 0.5 s with `--bf16`);
- the decoder, on clips that the denoiser draws: {decoder_steps:,} steps (0.5 s each; 0.33 s with `--bf16`);
- the layers for known frames: {known_steps:,} steps of 4 clips (1 s each on one core).

`python -m higen.train.emoji.decoder` and `.known_frames` make the last two parts alone, with `--device cuda` on a GPU.

This recipe was not run as a whole. The shipped weights were trained in stages while the recipe was developed; each
stage continued the one before (`--start`):

1. 6,100 steps on the first 12 subjects, in a network with 160 channels at its lower level.
2. 17 more minutes for the autoencoder with all 48 subjects. A fifth of the lower level's channels was removed, and four
   context tokens were added. Then 3,000 steps on 24 subjects.
3. 13,000 steps on 48 subjects in bfloat16. For the first 5,500, new subjects came twice as often as old ones. From step
   2,060 on, the gain was given the cues as well as the words. In the last 2,000, half the captions of clips with a
   motion cue did not mention the speed.
4. 5,600 steps in float32 with a learning rate of at most 7e-4. Three quarters of those captions did not mention the
   speed.
5. 10,400 steps in bfloat16 with a learning rate of at most 8e-4, and otherwise as in the present recipe: half the clips
   at the highest noise levels, fast clips more often, cues mostly one at a time.
6. The decoder, which was twice as large then: 2,500 steps on clips of the denoiser after a third of stage 5, and 1,200
   on clips of the final denoiser.
7. The present decoder, from random weights: 9,000 steps in bfloat16 (0.28 s each). Half of each batch were latents that
   the denoiser draws, with the preset `full` or `fast`; the targets were the pictures of the decoder before and the
   real pictures. The other half were encoded pictures with noise.
8. The layers for known frames (temporal layers of their own, 2.4 M parameters): 5,400 steps of 4 clips. For the first
   1,500, every clip had known frames.
9. Eight minutes of an NVIDIA H100, in bfloat16 and side by side: the layers for known frames for 3,000 steps of 128
   clips, with a learning rate of at most 1.5e-3; the decoder for 1,700 steps of 96 pictures, half of them drawn, now
   with a loss for the amount of fine detail.

**Measured** with `higen evaluate{quick}`{presets}, against the real clips ({clips}). The last two
columns are the same measures for the real clips of the held-out prompts: through the autoencoder (codec), and as they
are (real).

{table}

{control}

What each figure means: `higen/train/emoji/evaluation/evaluate.py`.

{known}{limits}

**Licence** The weights are under Apache-2.0. The emoji are Microsoft's, under the MIT licence (Copyright (c) Microsoft
Corporation); the animation packages are LobeHub's, under the MIT licence (Copyright (c) LobeHub).
"""


LIMIT = "Poses and places are always the same, so seeds differ little."


def samples(videos: list[Video]) -> Video:
    """Eight videos side by side in one, four by two."""
    rows = [np.concatenate([v.frames for v in videos[i : i + 4]], axis=2) for i in (0, 4)]
    return Video(np.concatenate(rows, axis=1), videos[0].fps)


def table(measures: Mapping[str, Measures]) -> str:
    """A Markdown table with a column for each group of each way of drawing, and the bounds. Its keys are presets, or ""
    for a model that is drawn in one way."""
    groups = {
        f"{group}, `{name}`" if name else group: found
        for name, one in measures.items()
        for group, found in one.groups.items()
    }
    first = next(iter(measures.values())).groups
    bounds = first.get("held-out") or next(iter(first.values()))
    lines = [f"| | {' | '.join(groups)} | codec | real |", "|---" * (len(groups) + 3) + "|"]
    for key, title, form in COLUMNS:
        cells = [cell(c, key, form) for c in (*(g.generated for g in groups.values()), bounds.codec, bounds.real)]
        if all(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    bound = dict(frechet_lines(bounds.frechet))
    for rows in zip(*(frechet_lines(group.frechet) for group in groups.values()), strict=True):
        title = rows[0][0]
        lines.append(f"| {title} | {' | '.join([*(generated for _, (generated, *_) in rows), *bound[title][1:]])} |")
    return "\n".join(lines)


def control(measures: Mapping[str, Measures]) -> str:
    """A Markdown table that says how well the cues are followed. The keys are those of `table`."""
    names = [f"`{name}`" if name else "model" for name in measures]
    lines = [
        "Spearman correlation of requested and measured cue:",
        "",
        f"| | {' | '.join(names)} | codec |",
        "|---" * (len(names) + 2) + "|",
    ]
    all_found = [one.control for one in measures.values()]
    for kind, bound in all_found[0].items():
        rows = (
            (f"{kind} factor, within a subject", "spearman", f"{bound.codec:.2f}"),
            ("the same, without the request for 0", "spearman_moving", ""),
            (f"{kind} factor, over all clips", "spearman_pooled", f"{bound.codec_pooled:.2f}"),
        )
        for title, key, last in rows:
            lines.append(
                f"| {title} | {' | '.join(f'{getattr(found[kind], key):.2f}' for found in all_found)} | {last} |"
            )
    still = [found["motion"].zero_part for found in all_found if "motion" in found]
    parts = [
        f"{part:.1%}{f' ({name})' if len(names) > 1 else ''}"
        for part, name in zip(still, names, strict=False)
        if part is not None
    ]
    if parts:
        lines += [
            "",
            f"Clips with a requested motion of 0 have {' or '.join(parts)} of the frame difference of the median clip.",
        ]
    return "\n".join(lines)


def known_frames(found: KnownFigures) -> str:
    """A Markdown table of the frames that are not given, in clips with known frames."""
    lines = [
        "| given frames | clips | PSNR | best baseline | codec | inside the subject | best baseline | motion |",
        "|---" * 8 + "|",
    ]
    for case in CASES:
        for name, row in found.case(case).items():
            cells = []
            for values in (row.psnr, row.inside):
                best = max((n for n in values if n not in ("model", "codec")), key=lambda n: values[n])
                cells.append(f"{values['model']:.1f} dB | {values[best]:.1f} dB, {best}")
            title = f"{case} | {name}"
            lines.append(f"| {title} | {cells[0]} | {row.psnr['codec']:.1f} dB | {cells[1]} | {row.motion:.2f} |")
    return "\n".join(lines)


def named(text: str) -> tuple[str, Measures]:
    """Name and measures of "NAME=FILE" or "FILE"."""
    name, separator, path = text.rpartition("=")
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return name if separator else "", from_json(Measures, found)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write the default model's card.")
    parser.add_argument(
        "--measures",
        type=named,
        action="append",
        required=True,
        metavar="[PRESET=]FILE",
        help="measures.json of `higen evaluate`; once for each preset",
    )
    parser.add_argument("--model", type=Path, help="model directory; the built-in one if not given")
    parser.add_argument("--limits", default="", help="text about visible faults in the contact sheet")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    measures = dict(arguments.measures)
    first = next(iter(measures.values()))
    with higen.load(arguments.model) as pipeline:
        videos = pipeline(list(PROMPTS), seed=0, progress=False)
        size = sum(record.size for name, record in pipeline.bundle.files.items() if name.endswith(".safetensors"))
        words = int(spec.text_config(pipeline.manifest).clip["vocab_size"]) - 4
    contact_sheet(videos).save(arguments.output / "contact_sheet.png")
    samples(videos).save(arguments.output / "samples.gif")
    card = CARD.format(
        subjects=len(SUBJECTS),
        backgrounds=len(BACKGROUNDS),
        parameters=size / 2e6,
        megabytes=size / 1e6,
        words=words,
        steps=recipe().run.steps,
        decoder_steps=DECODER.steps,
        known_steps=KNOWN_FRAMES.steps,
        quick=" --quick" if first.model["quick"] else "",
        presets=" with the preset " + " and ".join(f"`{name}`" for name in measures) if "" not in measures else "",
        clips=", ".join(f"{name}: {group.clips} clips" for name, group in first.groups.items()),
        table=table(measures),
        control=control(measures),
        known="" if first.known is None else f"**Known frames**\n\n{known_frames(first.known)}\n\n",
        limits=textwrap.fill(f"**Limits** {LIMIT} {arguments.limits}", 120),
    )
    (arguments.output / "MODEL_CARD.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
