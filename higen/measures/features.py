"""Features of a clip without a trained network, for the Frechet distance between sets of clips of any kind."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["FEATURES", "clip_features"]

SCALES = (1, 2, 4)
"""Scales of the features: sides, in pixels, of the squares that are averaged."""
FLOOR = 0.25
"""Smallest mean square, in levels of 255: rounding to whole levels leaves this much."""
FEATURES = (
    *(f"mean of {channel}" for channel in ("red", "green", "blue")),
    *(f"deviation of {channel}" for channel in ("red", "green", "blue")),
    *(f"detail at {scale} px" for scale in SCALES),
    *(f"change at {scale} px" for scale in SCALES),
)


def clip_features(clip: NDArray[np.uint8]) -> NDArray[np.float64]:
    """FEATURES of a clip uint8 [F,H,W,3]: colours in levels of 255, then the logarithm (base 2) of the mean square of
    differences between neighbouring pixels, and between neighbouring frames, at several scales.

    A clip of one frame has no change; H and W are 8 or more.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2))).double()
    detail, change = [], []
    for scale in SCALES:
        seen = functional.avg_pool2d(pixels, scale)
        detail.append(_log(torch.cat([seen.diff(dim=2).flatten(), seen.diff(dim=3).flatten()])))
        change.append(_log(seen.diff(dim=0).flatten()))
    colours = [pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))]
    features: NDArray[np.float64] = torch.cat([*colours, torch.tensor([*detail, *change])]).numpy()
    return features


def _log(differences: Tensor) -> float:
    square = float(differences.square().mean()) if len(differences) else 0.0
    return float(np.log2(square + FLOOR))
