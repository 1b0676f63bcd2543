"""Features of a clip without a trained network, for the Frechet distance between any two sets of clips."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["FEATURES", "clip_features"]

SCALES = (1, 2, 4)
"""Scales of the features: the image is averaged over squares with these sides, in pixels."""
FLOOR = 0.25
"""Added to each mean square, in levels of 255: rounding to whole levels causes about this much."""
FEATURES = (
    *(f"mean of {channel}" for channel in ("red", "green", "blue")),
    *(f"deviation of {channel}" for channel in ("red", "green", "blue")),
    *(f"detail at {scale} px" for scale in SCALES),
    *(f"change at {scale} px" for scale in SCALES),
)


def clip_features(clip: NDArray[np.uint8]) -> NDArray[np.float64]:
    """FEATURES of a clip uint8 [F,H,W,3], where H and W are at least 8.

    First the means and deviations of the colours, in levels of 255. Then, at several scales, the logarithm (base 2) of
    the mean squared difference between neighbouring pixels, and of that between neighbouring frames. For a clip of one
    frame, the difference between frames counts as 0.
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
