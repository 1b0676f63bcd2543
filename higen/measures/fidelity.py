"""Measures on the pixels of a clip, uint8 [F,H,W,3]. Most compare it with the real clip of the same prompt.

The unit is levels of 255 unless stated otherwise.
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
"""Largest PSNR in dB, given for two equal clips."""


def psnr(clip: NDArray[np.generic], real: Frames) -> float:
    """Peak signal-to-noise ratio in dB, at most BEST. `clip`: in levels of 255, of any dtype."""
    error = float(np.square(clip.astype(np.float32) - real).mean(dtype=np.float64))
    return min(BEST, 10 * float(np.log10(255**2 / max(error, 1e-12))))


def difference(clip: Frames) -> float:
    """Mean absolute difference of neighbouring frames."""
    return float(np.abs(np.diff(clip.astype(np.float32), axis=0)).mean())


def flicker(clip: Frames, still: Mask) -> float:
    """How much the region `still` ([H,W]) flickers.

    The value is the standard deviation of independent noise per frame that would cause the same second difference in
    time. Slow changes do not count."""
    second = np.diff(clip[:, still].astype(np.float32), n=2, axis=0)
    return float(np.sqrt(np.square(second).mean() / 6)) if second.size else 0.0  # 6: squares of (1, -2, 1)


def sharpness(clip: Frames, real: Frames) -> float:
    """Standard deviation of the finest detail, divided by that of the real clip. Below 1 the clip is blurred."""
    found, wanted = (float(_detail(_tensor(x)).square().mean()) for x in (clip, real))
    return float(np.sqrt(found / max(wanted, 1e-12)))


def speckle(clip: Frames, real: Frames) -> float:
    """Structure that the real clip does not have nearby, as a standard deviation.

    Detail at three scales and the second difference in time are compared. Energy counts only where it exceeds the
    largest energy of the real clip in the neighbourhood: four pixels of the scale, and one frame. An edge that is a few
    pixels off does not count, and neither does blur. The real clip itself has 0.
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
    """Index of the prototype (uint8 [H,W,3] each) that is closest to the mean frame where `outside` [H,W] is true."""
    shown = clip[:, outside].astype(np.float32).mean(axis=0)
    errors = [float(np.square(shown - picture[outside]).mean()) for picture in prototypes]
    return int(np.argmin(errors))


def _tensor(clip: Frames) -> Tensor:
    return torch.from_numpy(clip.astype(np.float32).transpose(0, 3, 1, 2))  # [F, 3, H, W]


def _detail(x: Tensor) -> Tensor:
    """x minus its mean over 3x3 pixels."""
    return x - functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _excess(found: Tensor, wanted: Tensor) -> float:
    """Mean of the energy that exceeds the largest wanted energy within four pixels and one frame."""
    energy, allowed = (x.square().mean(dim=1) for x in (found, wanted))  # [F, H, W]
    for size in ((1, 9), (9, 1)):
        allowed = functional.max_pool2d(allowed, size, 1, (size[0] // 2, size[1] // 2))
    allowed = functional.max_pool2d(allowed.flatten(1).T[None], (1, 3), 1, (0, 1))[0].T.reshape(energy.shape)
    return float((energy - allowed).clamp_min(0).mean())
