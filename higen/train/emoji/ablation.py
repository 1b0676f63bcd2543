"""Tests the paper's claims at a small scale: trains with everything, without the prior, and without each cue.

    python -m higen.train.emoji.ablation --data FOLDER --work FOLDER --table table.md

The data are six moving subjects on ten backgrounds. All variants have the same budget, the same network (smaller than
the built-in model's), the same initial weights, and the same batches from the same random numbers. The differences:

everything      the unchanged recipe
no prior        one stage: the network with temporal layers draws the clip from the text, with both cues. Noise levels
                of clips are drawn like those of pictures. The sampler takes as many steps as both stages together, all
                with the guidance of the spatial stage
no motion       the motion cue is never given; only the text tells the speed
no appearance   the appearance cue is never given (the network still knows a frame's place in the clip)

The folder of --work is that of `higen train default`; its codec and latents are used. Every part resumes. A variant
that was trained with other settings is refused. A variant is measured again if its weights or the seeds have changed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from higen.api import load
from higen.bundle import Bundle
from higen.locks import claimed
from higen.output_file import output_file
from higen.pipeline import Pipeline
from higen.request import Request
from higen.sampler import Step
from higen.sources import Sources
from higen.tables import Loop
from higen.train.denormals import flushed_denormals
from higen.train.emoji.assemble import assemble
from higen.train.emoji.clips import Clips, Selection
from higen.train.emoji.configuration import architecture, recipe
from higen.train.emoji.denoiser import train
from higen.train.emoji.evaluation.evaluate import PipelineMaker, evaluate
from higen.train.emoji.evaluation.figures import Measures
from higen.train.emoji.evaluation.journal import digest, meaning
from higen.train.emoji.evaluation.judges import Judges
from higen.train.emoji.evaluation.plan import plan
from higen.train.emoji.evaluation.real_clips import RealClips
from higen.train.emoji.evaluation.report import as_text, cell, write
from higen.train.emoji.packs import fetch
from higen.train.emoji.subjects import SUBJECTS
from higen.train.settings import Settings
from higen.typed_json import from_json

__all__ = ["LIVELY", "VARIANTS", "OneStage", "Variant", "fit", "measure", "table"]

LIVELY = tuple(
    i
    for i, subject in enumerate(SUBJECTS)
    if subject.name in ("whale", "penguin", "monkey", "red heart", "butterfly", "kangaroo")
)
NETWORK = replace(architecture().unet, channel_multipliers=(2, 3))


@dataclass(frozen=True)
class Variant:
    """One way to train: which inputs a network has besides the text."""

    name: str
    prior: bool = True
    motion: bool = True
    appearance: bool = True


VARIANTS = (
    Variant("everything"),
    Variant("no prior", prior=False),
    Variant("no motion", motion=False),
    Variant("no appearance", appearance=False),
)


def fit(variant: Variant, work: Path, settings: Settings) -> Path:
    """Train a variant with the recipe's `settings`, and resume where it stopped. Returns its model directory.

    Raises SettingsError if the variant was trained with other settings, and TrainingError.
    """
    state = work / "ablation" / variant.name.replace(" ", "-")
    model = state / "model"
    network = replace(NETWORK, prior_preconditioning=variant.prior)
    selection = Selection(LIVELY, variant.motion, variant.appearance)
    with claimed(state):
        train(state, Clips(work / "latents.safetensors", network, selection, settings))
        assemble(work, model, overwrite=True, trained=state, unet=network)
    return model


class OneStage(Pipeline):
    """A pipeline without a spatial stage. The prior is zero: the temporal network was trained without a prior."""

    def _steps(self, request: Request, sources: Sources, loop: Loop, steps: int) -> Iterator[Step]:
        if loop.name != "spatial":
            yield from super()._steps(request, sources, loop, steps)
            return
        zeros = np.zeros_like(sources.initial_noise(loop)[0])
        yield Step(loop.name, loop.stages[0], 0, 1, 0.0, zeros, zeros)


def measure(variant: Variant, model: Path, real: RealClips, judges: Judges, seeds: int) -> Measures:
    """The measures of `higen evaluate` for a trained variant. They are kept with the model, for these `seeds`."""
    path = model.parent / "measures.json"
    measured = {
        "files": {name: record.sha256 for name, record in sorted(Bundle.open(model).files.items())},
        "seeds": seeds,
        "measures": digest({**judges.key, **meaning()}),
    }
    if not path.exists() or json.loads(path.read_text(encoding="utf-8")).get("model") != measured:
        with load(model, "torch") as pipeline:
            defaults = architecture().defaults
            make = PipelineMaker(pipeline, {"steps": defaults.steps, "guidance": defaults.guidance})
            if not variant.prior:
                options = {"steps": (1, sum(defaults.steps)), "guidance": (1.0, defaults.guidance[0])}
                make = PipelineMaker(OneStage(pipeline.bundle, pipeline.backend), options)
            result = evaluate(make, make, real, judges, plan(LIVELY, seeds), shown=True)
            result = replace(result, measures=replace(result.measures, model=measured))
            write(result, real, make, model.parent)
        print(variant.name, as_text(result.measures), sep="\n", flush=True)
    return from_json(Measures, json.loads(path.read_text(encoding="utf-8")))


ROWS = (
    ("identity", "subject right, by a classifier", "{:.0%}"),
    ("template", "subject right, by its real frames", "{:.0%}"),
    ("background", "background right", "{:.0%}"),
    ("psnr", "PSNR, clip, dB", "{:.1f}"),
    ("psnr_copy", "PSNR, its key frame repeated, dB", "{:.1f}"),
    ("beats_copy", "closer than its key frame repeated", "{:.0%}"),
    ("beats_mean", "closer than its mean frame repeated", "{:.0%}"),
    ("motion_ratio", "motion / the real clip's motion", "{:.2f}"),
    ("flicker", "flicker of the background, of 255", "{:.2f}"),
    ("speckle", "speckle, of 255", "{:.2f}"),
    ("still", "difference where it stands still, of 255", "{:.2f}"),
)


def table(found: Mapping[str, Measures]) -> str:
    """The held-out measures of each variant as a Markdown table. The last column is the bound: the codec's figures.

    The Frechet distance is left out, because a few dozen clips are too few for a covariance in 32 dimensions.
    """
    groups = {name: measures.groups["held-out"] for name, measures in found.items()}
    bound = next(iter(groups.values())).codec
    lines = [f"| held-out combinations | {' | '.join(groups)} | codec's bound |", "|---" * (len(groups) + 2) + "|"]
    for key, title, form in ROWS:
        cells = [cell(column, key, form) for column in (*(group.generated for group in groups.values()), bound)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for kind in ("motion", "appearance"):
        cues = [measures.control[kind] for measures in found.values()]
        for title, followed, codec in (
            ("within a subject", [cue.spearman for cue in cues], cues[0].codec),
            ("over all clips", [cue.spearman_pooled for cue in cues], cues[0].codec_pooled),
        ):
            cells = [f"{value:.2f}" for value in (*followed, codec)]
            lines.append(f"| Spearman, {kind} factor, {title} | {' | '.join(cells)} |")
    parts = [measures.control["motion"].zero_part or 0.0 for measures in found.values()]
    lines.append(f"| difference at motion 0, of the median clip's | {' | '.join(f'{x:.0%}' for x in parts)} | |")
    return "\n".join(lines)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train and measure the ablation's variants.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the WebP loops; filled if empty")
    parser.add_argument("--work", type=Path, required=True, help="folder of the recipe's codec and latents")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each variant")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    parser.add_argument("--seeds", type=int, default=4, help="clips of each held-out prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--table", type=Path, help="Markdown file to write the table into")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fetch(arguments.data)
    settings = recipe()
    precision: Literal["bf16", "fp32"] = "bf16" if arguments.bf16 else "fp32"
    settings = replace(settings, run=replace(settings.run, steps=arguments.steps, precision=precision))
    models = [(variant, fit(variant, arguments.work, settings)) for variant in VARIANTS]
    real = RealClips.read(arguments.data)
    kept = arguments.work / "ablation" / "judges"
    kept.mkdir(exist_ok=True)
    with flushed_denormals():
        judges = Judges(real, kept, shown=True)
        found = {v.name: measure(v, model, real, judges, arguments.seeds) for v, model in models}
    print(table(found))
    if arguments.table is not None:
        with output_file(arguments.table) as temporary:
            temporary.write_text(table(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
