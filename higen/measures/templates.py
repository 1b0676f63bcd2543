"""Finds which of several known subjects a picture shows, by correlation with reference pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["Match", "Templates"]

SIDE = 64
RING = 2


@dataclass(frozen=True)
class Match:
    """The result for one clip. `score`: correlation of the asked subject. `winner`: subject with the highest one."""

    score: float
    winner: int


class Templates:
    """Templates: pictures of every subject on one background, at 64x64 pixels.

    A picture is compared with a template by normalised correlation, -1 to 1, with all channels as one vector. Only
    pixels in the template's mask and a ring of two pixels around it count. Brightness and contrast do not change the
    correlation; colour does.
    """

    def __init__(self, loops: Sequence[NDArray[np.uint8]], picture: NDArray[np.uint8], stride: int = 2) -> None:
        """`loops`: each subject's frames, RGBA [n,H,W,4], not premultiplied; every `stride`-th frame is used.
        `picture`: the background [H,W,3]. H and W are multiples of 64.
        """
        weights, templates = list[Tensor](), list[Tensor]()
        behind = _reduced(torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None])
        for loop in loops:
            frames = torch.from_numpy(loop[::stride].astype(np.float32)).permute(0, 3, 1, 2)
            alpha = frames[:, 3:] / 255
            alpha, colour = _reduced(alpha), _reduced(frames[:, :3] * alpha)
            mask = functional.max_pool2d(alpha, 2 * RING + 1, 1, RING).flatten(2)
            weight = mask / (3 * mask.sum(dim=2, keepdim=True)).clamp_min(1e-6)
            t = (colour + behind * (1 - alpha)).flatten(2)
            t = t - (weight * t).sum(dim=(1, 2), keepdim=True)
            t = t / (weight * t.square()).sum(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-3)
            weights.append(weight[:, 0])
            templates.append((weight * t).flatten(1))
        self._counts = [len(part) for part in weights]
        self._weight = torch.cat(weights)  # [T, 64*64]; sums to 1/3
        self._weighted = torch.cat(templates)  # [T, 3*64*64]; sums to 0

    def scores(self, clip: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Correlation of each frame of a clip (uint8 [F,H,W,3]) with each subject's best template: [F, subjects]."""
        x = _reduced(torch.from_numpy(clip.astype(np.float32)).permute(0, 3, 1, 2)).flatten(2)
        mean, square = x.sum(dim=1) @ self._weight.T, x.square().sum(dim=1) @ self._weight.T
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        # The lower bound of the deviation keeps the correlation small for a region without contrast.
        correlation = (x.flatten(1) @ self._weighted.T) / deviation.clamp_min(2.0)  # [F, T]
        best = [part.amax(dim=1) for part in correlation.split(self._counts, dim=1)]
        scores: NDArray[np.float64] = torch.stack(best, dim=1).double().numpy()
        return scores

    def match(self, clip: NDArray[np.uint8], subject: int) -> Match:
        """The result for a clip, from correlations averaged over its frames."""
        means = self.scores(clip).mean(axis=0)
        return Match(float(means[subject]), int(means.argmax()))


def _reduced(x: Tensor) -> Tensor:
    """[n,C,H,W] -> [n,C,64,64], averaged by area."""
    return functional.adaptive_avg_pool2d(x, SIDE)
