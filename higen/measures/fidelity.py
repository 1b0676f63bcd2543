"""Measures on the pixels of a clip, uint8 [F,H,W,3], most of them against the real clip of the same prompt.

Everything is in levels of 255 where nothing else is said.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["difference", "flicker", "nearest", "psnr", "sharpness", "speckle"]

Frames = NDArray[np.uint8]
Mask = NDArray[np.bool_]
BEST = 100.0
"""PSNR of two equal clips."""


def psnr(clip: NDArray[np.generic], real: Frames) -> float:
    """Peak signal-to-noise ratio in dB, at most BEST; `clip` in levels of 255, of any type."""
    error = float(np.square(clip.astype(np.float32) - real).mean(dtype=np.float64))
    return min(BEST, 10 * float(np.log10(255**2 / max(error, 1e-12))))


def difference(clip: Frames) -> float:
    """Mean absolute difference of neighbouring frames."""
    return float(np.abs(np.diff(clip.astype(np.float32), axis=0)).mean())


def flicker(clip: Frames, still: Mask) -> float:
    """How much the part `still` ([H,W]) flickers: the standard deviation that independent noise in each frame would
    need for the same second difference in time. Slow changes do not count."""
    second = np.diff(clip[:, still].astype(np.float32), n=2, axis=0)
    return float(np.sqrt(np.square(second).mean() / 6)) if second.size else 0.0  # 1 + 4 + 1


def sharpness(clip: Frames, real: Frames) -> float:
    """Energy of the finest detail over the real clip's, as a ratio of standard deviations: below 1 is blurred."""
    found, wanted = (float(_detail(_tensor(x)).square().mean()) for x in (clip, real))
    return float(np.sqrt(found / max(wanted, 1e-12)))


def speckle(clip: Frames, real: Frames) -> float:
    """Structure that the real clip has nowhere near, as a standard deviation: of detail at three scales and of the
    second difference in time.

    Energy counts as far as it exceeds the greatest of the real clip's in the neighbourhood (four pixels of its scale,
    and a frame), so that an edge a few pixels off is none, and neither is blur. 0 for the real clip itself.
    """
    a, b = _tensor(clip), _tensor(real)
    total = 0.0
    if len(a) > 2:
        total += _excess(*(functional.avg_pool2d(x.diff(n=2, dim=0), 2) / 6**0.5 for x in (a, b)))
    for scale in range(3):
        a, b = (functional.avg_pool2d(x, 2) if scale else x for x in (a, b))
        total += _excess(_detail(a), _detail(b))
    return float(np.sqrt(total))


def nearest(clip: Frames, prototypes: list[Frames] | Frames, outside: Mask) -> int:
    """Index of the picture of `prototypes` (uint8 [H,W,3] each) closest to all frames where `outside` [H,W] is true."""
    shown = clip[:, outside].astype(np.float32).mean(axis=0)
    errors = [float(np.square(shown - picture[outside]).mean()) for picture in prototypes]
    return int(np.argmin(errors))


def _tensor(clip: Frames) -> Tensor:
    return torch.from_numpy(clip.astype(np.float32).transpose(0, 3, 1, 2))  # [F, 3, H, W]


def _detail(x: Tensor) -> Tensor:
    """x without its mean over 3x3 pixels."""
    return x - functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _excess(found: Tensor, wanted: Tensor) -> float:
    """Mean energy above the greatest within four pixels and a frame."""
    energy, allowed = (x.square().mean(dim=1) for x in (found, wanted))  # [F, H, W]
    for size in ((1, 9), (9, 1)):
        allowed = functional.max_pool2d(allowed, size, 1, (size[0] // 2, size[1] // 2))
    allowed = functional.max_pool2d(allowed.flatten(1).T[None], (1, 3), 1, (0, 1))[0].T.reshape(energy.shape)
    return float((energy - allowed).clamp_min(0).mean())
