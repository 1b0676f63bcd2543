"""Makes clips to measure with a model, and takes clips through its autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from higen.pipeline import Pipeline
from higen.train.cues import appearance_factor, appearance_similarity, motion_of

__all__ = ["PipelineMaker", "measured_cues"]

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class PipelineMaker:
    """Makes clips from prompts, and takes clips through the autoencoder. `options`: those of every request."""

    pipeline: Pipeline
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, prompt: str, seed: int, motion: float | None, appearance: float | None) -> Frames:
        """A clip uint8 [F,H,W,3]. A cue that is None has the model's default."""
        cues = {name: cue for name, cue in (("motion", motion), ("appearance", appearance)) if cue is not None}
        made: Frames = self.pipeline(prompt, seed=seed, progress=False, **{**self.options, **cues}).frames
        return made

    def encode(self, clip: Frames) -> NDArray[np.float32]:
        """Latents [C,F,h,w] of a clip uint8 [F,H,W,3]."""
        backend, pixels = self.pipeline.backend, clip.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1.0
        parts = [
            backend.to_numpy(backend.run("vae_encoder", pixels=np.ascontiguousarray(pixels[i : i + 4]))["latents"])
            for i in range(0, len(pixels), 4)
        ]
        latents: NDArray[np.float32] = np.concatenate(parts).transpose(1, 0, 2, 3)
        return latents

    def decode(self, latents: NDArray[np.float32]) -> Frames:
        """The clip uint8 [F,H,W,3] of latents [C,F,h,w]."""
        return self.pipeline.decode(latents[None], self.pipeline.request("a"))[0]


def measured_cues(latents: NDArray[np.float32]) -> tuple[float, float]:
    """Motion (mean over the pairs of frames) and appearance factor of latents [C,F,h,w], as training measures them."""
    z = torch.from_numpy(np.ascontiguousarray(latents))
    similarity = appearance_similarity(z.transpose(0, 1).flatten(1)[None])
    return float(motion_of(z[None]).double().mean()), float(appearance_factor(similarity))
