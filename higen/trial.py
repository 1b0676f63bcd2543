"""Requests that run every stage of any model, for calibration, comparison and verification.

A model may need a picture, may read no text, and may have stages that its default options do not run: the step with one
branch of guidance, or the encoder of a picture. The tables tell which options run which stage.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from higen.backends.recorder import CallRecorder
from higen.bundle import Bundle, graph_file
from higen.manifest import Manifest
from higen.pipeline import Pipeline
from higen.request_values import checked_sizes
from higen.sampler import Step
from higen.tables import Loop

__all__ = ["known_prompts", "pictures", "record", "ways"]

SCALE = 3.0
"""The guidance that runs the stage with both branches, for a loop with the default 1."""

Calls = list[dict[str, NDArray[Any]]]


def known_prompts(manifest: Manifest, count: int = 1) -> tuple[str, ...]:
    """`count` texts that the model draws well, taken evenly from its list; "" for a model that reads no text."""
    if manifest.text is None:
        return ("",)
    known = manifest.prompts or ("a dog runs on the beach", "a red flower opens", "a blue bird flies")
    return known[:: max(len(known) // count, 1)][:count]


def pictures(manifest: Manifest, sizes: Mapping[str, int], every: bool = False) -> dict[str, NDArray[np.uint8]]:
    """Synthetic pictures and clips, uint8 [Y,X,3] and [F,Y,X,3], for the controls that a video needs.
    `every`: for all picture and clip controls. `sizes`: frames, height and width, if not the model's defaults.
    """
    known = manifest.sizes
    frames = sizes.get("frames", known.frames[1])
    height, width = sizes.get("height", known.height), sizes.get("width", known.width)
    needed = {name for loop in manifest.loops for name in manifest.needed_by(loop)}
    shades = np.random.default_rng(0).integers(0, 256, (4, 4, 3))
    small = np.stack([np.roll(shades, shift, axis=1) for shift in range(frames)])
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    clip = small[:, rows][:, :, columns].astype(np.uint8)
    return {
        control.name: clip if control.kind == "clip" else clip[0]
        for control in manifest.controls
        if control.kind in ("picture", "clip") and (every or control.name in needed)
    }


def ways(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Options of requests that together run every stage that any request can run: a default video, both branches of
    guidance in all loops, one branch in all loops that allow it, a video from every picture, and maps. The same follows
    for other numbers of frames that run other loops.
    """
    for frames in _lengths(manifest, sizes.get("frames", manifest.sizes.frames[1])):
        length = {**sizes, **frames}
        given = pictures(manifest, length) | frames
        yield given
        yield {**given, "guidance": [_above_one(loop) for loop in manifest.loops]}
        yield {**given, "guidance": [1.0 if loop.plain else _above_one(loop) for loop in manifest.loops]}
        yield pictures(manifest, length, every=True) | frames
        if maps := _maps(manifest, length):
            for guidance in (_above_one, lambda loop: 1.0 if loop.plain else _above_one(loop)):
                yield {**given, **maps, "guidance": [guidance(loop) for loop in manifest.loops]}


def _maps(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A synthetic map, or first frame, for each control that selects other stages in a video of these sizes."""
    frames = sizes.get("frames", manifest.sizes.frames[1])
    height, width = sizes.get("height", manifest.sizes.height), sizes.get("width", manifest.sizes.width)
    taken = {loop.variant.control for loop in manifest.wanted(frames) if loop.variant is not None}
    shades = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    shown = shades[np.arange(height) * 8 // height][:, np.arange(width) * 8 // width]
    kinds = {control.name: control.kind for control in manifest.controls}
    return {name: {0: shown} if kinds[name] == "frames" else shown for name in sorted(taken)}


def _lengths(manifest: Manifest, usual: int) -> Iterator[dict[str, int]]:
    """Options for the number of frames: first {} (the usual number), then others that run further loops."""
    seen = {loop.name for loop in manifest.wanted(usual)}
    yield {}
    fewest, _, most = manifest.sizes.frames
    starts = {max(fewest, loop.least_frames) for loop in manifest.loops}
    for frames in sorted(starts | {fewest}):
        loops = {loop.name for loop in manifest.wanted(frames)} if frames <= most else set[str]()
        if loops - seen:
            seen |= loops
            yield {"frames": frames}


def _above_one(loop: Loop) -> float | None:
    """Guidance that needs both branches; None if the loop's default needs both, or if the loop has only one."""
    scales = loop.guidance if isinstance(loop.guidance, tuple) else (loop.guidance,)
    return SCALE if loop.guided is not None and all(scale == 1 for scale in scales) else None


def record(
    bundle: Bundle,
    stages: Collection[str],
    prompts: Sequence[str],
    shown: bool = False,
    seconds: float | None = None,
    **options: Any,
) -> dict[str, Calls]:
    """The inputs of all calls of `stages` while making videos of `prompts`, on the float32 graphs.

    For each prompt, one of `ways` is run only if it calls a stage that has no call yet. A stage that no request runs
    has no calls. `shown`: show a progress bar. After `seconds`, recording ends as soon as every stage has a call.
    `options`: for each request. Raises what a request raises.
    """
    until = float("inf") if seconds is None else time.monotonic() + seconds
    calls: dict[str, Calls] = {stage: [] for stage in stages}
    checked_sizes(bundle.manifest, *(options.get(name) for name in ("frames", "height", "width")))
    sizes: dict[str, int] = {name: options[name] for name in options.keys() & {"frames", "height", "width"}}
    recorder = CallRecorder(bundle, ())
    own = [None] * len(bundle.manifest.loops)  # the loops' own steps: a usual preset has too few calls to calibrate on
    total = 0
    with Pipeline(bundle, recorder) as pipeline, tqdm(desc="calibration", total=0, disable=not shown) as bar:
        for seed, prompt in enumerate(prompts):
            missing = set(stages)
            for way in ways(bundle.manifest, sizes):
                given = {"steps": own, **options, **way}
                wanted = missing & _called(pipeline, prompt, given)
                if not wanted:
                    continue
                recorder.calls = {stage: [] for stage in wanted}
                stream = pipeline.stream(prompt, seed=seed, **given)
                total += sum(rows for name, rows in stream.loops if name != "decode")
                bar.total = total
                late = False
                for event in stream:
                    bar.update(isinstance(event, Step))
                    late = time.monotonic() > until and all(calls[s] or recorder.calls.get(s) for s in stages)
                    if late:
                        break
                for stage, made in recorder.calls.items():
                    calls[stage] += made
                missing -= wanted
                if late:
                    return calls
    return calls


def _called(pipeline: Pipeline, prompt: str, options: Mapping[str, Any]) -> set[str]:
    """The stages that a request would run on the existing float32 graphs."""
    bundle = pipeline.bundle
    alike = pipeline.stages(pipeline.request(prompt, **options))
    return {next((name for name in names if graph_file(name) in bundle.files), names[0]) for names in alike}
