"""Proves a model directory: hashes, every graph against its torch stage, and the whole two-stage loop on both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from higen.backends.onnx import OnnxBackend
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, graph_file
from higen.errors import IntegrityError
from higen.export.model import Parity, check_graph
from higen.pipeline import Pipeline
from higen.stages import STAGES
from higen.video import Video

__all__ = ["LATENT_TOLERANCE", "PIXEL_TOLERANCE", "Verification", "verify"]

LATENT_TOLERANCE = 1e-3
"""Largest absolute difference of the final latents after a whole loop on both backends."""

PIXEL_TOLERANCE = 1
"""Largest difference of a pixel, of 255."""


@dataclass(frozen=True)
class Verification:
    """What was compared. `latents` and `pixels` are the largest differences after the whole loop."""

    model: str
    parities: tuple[Parity, ...]
    latents: float
    pixels: int
    graph_video: Video
    torch_video: Video

    @property
    def passed(self) -> bool:
        """Whether everything is within its tolerance."""
        loop = self.latents <= LATENT_TOLERANCE and self.pixels <= PIXEL_TOLERANCE
        return loop and all(parity.passed for parity in self.parities)

    def as_markdown(self) -> str:
        """The report."""
        lines = [
            f"# {self.model}: {'verified' if self.passed else 'FAILED'}",
            "",
            "| stage | shape | error |",
            "|---|---|---|",
        ]
        lines += [f"| {p.stage} | {p.shape} | {p.error:.1e}{'' if p.passed else ' OVER'} |" for p in self.parities]
        lines += [
            "",
            f"Whole loop, graphs against PyTorch: latents are off by {self.latents:.1e} "
            f"(allowed {LATENT_TOLERANCE:.0e}), pixels by {self.pixels} of 255 (allowed {PIXEL_TOLERANCE}).",
        ]
        return "\n".join(lines) + "\n"

    def sheet(self) -> PIL.Image.Image:
        """Contact sheets of both videos and, below, their difference, 255 levels for one."""
        difference = np.abs(self.graph_video.frames.astype(np.int16) - self.torch_video.frames)
        third = Video((np.minimum(difference, 1) * 255).astype(np.uint8), self.torch_video.fps)
        sheets = [video.contact_sheet(frames=8) for video in (self.graph_video, self.torch_video, third)]
        whole = PIL.Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
        for i, sheet in enumerate(sheets):
            whole.paste(sheet, (0, i * sheets[0].height))
        return whole


def verify(
    bundle: Bundle, steps: int = 10, seed: int = 0, on_parity: Callable[[Parity], None] | None = None
) -> Verification:
    """Compare everything. Raises IntegrityError for a file unlike its sha256 and for a stage without a graph."""
    for name in bundle.files:
        bundle.file(name)
    missing = [name for name in STAGES if graph_file(name) not in bundle.files]
    if missing:
        raise IntegrityError(f"{bundle.path}: no graph of {', '.join(missing)}: higen-export onnx {bundle.path}")
    torch_backend = TorchBackend(bundle, "cpu", "float32", verify=False)
    parities = []
    for name in STAGES:
        for parity in check_graph(bundle, torch_backend, name, bundle.path / graph_file(name)):
            parities.append(parity)
            if on_parity is not None:
                on_parity(parity)
    prompt = bundle.config.prompts[0] if bundle.config.prompts else "a dog runs on the beach"
    ours, graph_video = _generate(Pipeline(bundle, OnnxBackend(bundle, "cpu", verify=False)), prompt, steps, seed)
    theirs, torch_video = _generate(Pipeline(bundle, torch_backend), prompt, steps, seed)
    pixels = int(np.abs(graph_video.frames.astype(np.int16) - torch_video.frames).max())
    latents = float(np.abs(ours - theirs).max())
    return Verification(bundle.config.name, tuple(parities), latents, pixels, graph_video, torch_video)


def _generate(pipeline: Pipeline, prompt: str, steps: int, seed: int) -> tuple[NDArray[np.float32], Video]:
    with pipeline:
        stream = pipeline.stream(prompt, steps=steps, seed=seed)
        latents = None
        for step in stream:
            latents = step.latents
        return pipeline.backend.to_numpy(latents), stream.videos[0]


def write(verification: Verification, folder: Path) -> None:
    """Write report.md and sheet.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(verification.as_markdown(), encoding="utf-8")
    verification.sheet().save(folder / "sheet.png")
