"""Verifies a model directory: hashes, every graph against its torch stage, and a whole video on graphs and PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from higen import families
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, graph_file
from higen.errors import BackendUnavailable, IntegrityError, OutputError
from higen.export.interface import graph_sizes
from higen.export.parity import Parity, check_graph, references
from higen.manifest import Manifest
from higen.output_file import check_own
from higen.pipeline import Pipeline
from higen.precision import PRECISIONS
from higen.sampler import Step
from higen.staging import whole_file
from higen.trial import known_prompts, pictures
from higen.video import Video

__all__ = ["Loop", "Verification", "check_folder", "verify", "write"]

TABLE = "| stage | precision | run | shape | error | allowed |"


@dataclass(frozen=True)
class Loop:
    """All loops of a video, run on the graphs of one precision and compared with PyTorch in float32.

    `latents` and `pixels` are the largest differences, and `mean` is the mean difference of the pixels. If the loops
    could not be run here, `video` is None and `note` says why.
    """

    precision: str
    expected: Video
    latents: float = 0.0
    pixels: int = 0
    mean: float = 0.0
    video: Video | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the differences are within their tolerances; also true if they could not be measured."""
        judged = self.pixels if self.precision == "fp32" else self.mean
        allowed = PRECISIONS[self.precision]
        return self.latents <= allowed.latents and judged <= allowed.pixels

    def as_line(self) -> str:
        """The result as a sentence."""
        if self.video is None:
            return f"Whole loop in {self.precision}: not run, {self.note}."
        which = "largest" if self.precision == "fp32" else "mean"
        return (
            f"Whole loop in {self.precision}, graphs against PyTorch in fp32: latents are off by {self.latents:.1e} "
            f"(allowed {PRECISIONS[self.precision].latents:.0e}), pixels by {self.pixels} of 255 at most and "
            f"{self.mean:.2f} in the mean (allowed {PRECISIONS[self.precision].pixels:g}, {which})."
        )

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "ran": self.video is not None,
            **{k: v for k, v in vars(self).items() if k not in ("video", "expected")},
        }


@dataclass(frozen=True)
class Verification:
    """All results of a verification."""

    model: str
    parities: tuple[Parity, ...]
    loops: tuple[Loop, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is within its tolerance."""
        return all(parity.passed for parity in self.parities) and all(loop.passed for loop in self.loops)

    def as_markdown(self) -> str:
        """The text of report.md."""
        lines = [f"# {self.model}: {'verified' if self.passed else 'FAILED'}", ""]
        lines += [TABLE, "|---|---|---|---|---|---|"]
        for p in self.parities:
            error = p.note if p.error is None else f"{p.error:.1e}{'' if p.passed else ' OVER'}"
            lines.append(f"| {p.stage} | {p.precision} | {p.way} | {p.shape} | {error} | {p.tolerance:.0e} |")
        return "\n".join([*lines, "", *(loop.as_line() for loop in self.loops)]) + "\n"

    def sheet(self) -> PIL.Image.Image:
        """For each precision, contact sheets of PyTorch's video, the graphs' video and 10 times their difference."""
        videos = []
        for loop in self.loops:
            if loop.video is not None:
                difference = np.abs(loop.video.frames.astype(np.int16) - loop.expected.frames)
                scaled = np.minimum(10 * difference, 255).astype(np.uint8)
                videos += [loop.expected, loop.video, Video(scaled, loop.expected.fps)]
        sheets = [video.contact_sheet(frames=8) for video in videos]
        size = (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets))
        whole, top = PIL.Image.new("RGB", size, "white"), 0
        for sheet in sheets:
            whole.paste(sheet, (0, top))
            top += sheet.height
        return whole


def verify(
    bundle: Bundle, steps: int = 10, seed: int = 0, on_parity: Callable[[Parity], None] | None = None
) -> Verification:
    """Compare every graph of every precision, and the loops in each precision in which all needed stages have a graph.
    For quantised graphs, only the hashes are checked: their error was measured when they were made.

    Raises IntegrityError for a file that does not match its sha256 and for a stage without a graph, UnknownFamily if
    the code of the networks is not installed, since it is needed for the comparison.
    """
    for name in bundle.files:
        bundle.file(name)
    needed = _needed(bundle.manifest)
    if missing := [name for name in needed if graph_file(name) not in bundle.files]:
        raise IntegrityError(f"{bundle.path}: no graph of {', '.join(missing)}: higen-export onnx {bundle.path}")
    families.network(bundle.manifest.family)
    parities: list[Parity] = []
    for precision in PRECISIONS:
        for parity in _check_graphs(bundle, precision):
            parities.append(parity)
            if on_parity is not None:
                on_parity(parity)
    whole = [p for p in PRECISIONS if all(p in bundle.precisions(name) for name in needed)]
    loops = tuple(_loop(bundle, precision, steps, seed) for precision in whole)
    return Verification(bundle.manifest.name, tuple(parities), loops)


def _needed(manifest: Manifest) -> tuple[str, ...]:
    """The stages that a model needs: all but steps with one guidance branch that only save work in a guided loop."""
    spared = {plain for loop in manifest.loops for guided, plain in loop.pairs if guided is not None}
    return tuple(name for name in manifest.stage_names if name not in spared)


def _check_graphs(bundle: Bundle, precision: str) -> Iterator[Parity]:
    backend = TorchBackend(bundle, Options(device="cpu", precision="fp32", verify=False))
    for name in (s.name for s in bundle.manifest.all_stages if precision in bundle.precisions(s.name)):
        graph = bundle.path / graph_file(name, precision)
        expected = references(backend, name, precision, _static(bundle, name, graph))
        yield from check_graph(bundle, name, graph, expected, precision)


def _static(bundle: Bundle, name: str, graph: Path) -> dict[str, int] | None:
    """The sizes of a graph that was exported with --static, as the exporter takes them; None for other graphs."""
    sizes = graph_sizes(bundle.manifest, name, graph)
    if not {"H", "W"} <= set(sizes):
        return None
    return {"B": 1, "F": bundle.manifest.sizes.frames[1], **sizes}


def _loop(bundle: Bundle, precision: str, steps: int, seed: int) -> Loop:
    """Compare the videos of one prompt, or of as many as static graphs need, in the graphs' size."""
    sizes, options = dict[str, int](), dict[str, int]()
    for loop in bundle.manifest.loops:
        for name in (name for name in loop.stages if precision in bundle.precisions(name)):
            found = graph_sizes(bundle.manifest, name, bundle.path / graph_file(name, precision))
            sizes |= {symbol: size for symbol, size in found.items() if symbol != "F" or loop.frames == "F"}
    factor = bundle.manifest.sizes.factor
    if {"H", "W"} <= set(sizes):
        options |= {"height": sizes["H"] * factor, "width": sizes["W"] * factor}
    if "F" in sizes:
        options["frames"] = sizes["F"]
    prompts = list(known_prompts(bundle.manifest)) * sizes.get("B", 1)
    given = {"steps": steps, "seed": seed, **options, **pictures(bundle.manifest, options)}
    torch_backend = TorchBackend(bundle, Options(device="cpu", precision="fp32", verify=False))
    theirs, expected = _generate(Pipeline(bundle, torch_backend), prompts, given)
    try:
        backend = OnnxBackend(bundle, Options(device="cpu", precision=precision, verify=False))
        ours, video = _generate(Pipeline(bundle, backend), prompts, given)
    except BackendUnavailable as error:
        return Loop(precision, expected, note=str(error))
    off = np.abs(video.frames.astype(np.int16) - expected.frames)
    latents = float(np.abs(ours - theirs).max())
    return Loop(precision, expected, latents, int(off.max()), float(off.mean()), video)


def _generate(pipeline: Pipeline, prompts: list[str], options: dict[str, Any]) -> tuple[NDArray[np.float32], Video]:
    """The last latents, and the first video."""
    with pipeline:
        stream = pipeline.stream(prompts, **options)
        latents = None
        for event in stream:
            latents = event.latents if isinstance(event, Step) else latents
        return pipeline.backend.to_numpy(latents), stream.videos[0]


def check_folder(folder: Path) -> None:
    """Call it before long work. Raises OutputError for a report.md or sheet.png that is not from an earlier report."""
    check_own(folder, ("report.md", "sheet.png"), re.escape(TABLE))


def write(verification: Verification, folder: Path) -> None:
    """Write report.md and sheet.png into `folder`. Raises OutputError."""
    check_folder(folder)
    try:
        _write(verification, folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error}") from error


def _write(verification: Verification, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "report.md") as temporary:
        temporary.write_text(verification.as_markdown(), encoding="utf-8")
    with whole_file(folder / "sheet.png") as temporary:
        verification.sheet().save(temporary)
