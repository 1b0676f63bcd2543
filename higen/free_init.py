"""FreeInit (Wu et al. 2023): a clip is denoised again, from its own low frequencies and fresh high frequencies.

After a pass, the clean latents z are noised to the last timestep with the noise e that the pass began with. Of the
result, only the low frequencies in time, height and width are kept:

    z_T = alpha_T z + sigma_T e,    next noise = fresh + L(z_T - fresh)

L multiplies the discrete Fourier transform over (F, H, W) by a mask of the distance d from frequency 0,

    d^2 = (s/t (2 f/F - 1))^2 + (2 h/H - 1)^2 + (2 w/W - 1)^2     at the shifted index (f, h, w)

with the stop frequencies s in space and t in time. A stop frequency of 0 keeps nothing. The C++ twin of this file is
engines/cpp/src/free_init.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FILTERS", "FreeInit", "low_pass", "renewed"]

Array = NDArray[np.float32]

FILTERS = ("butterworth", "gaussian", "ideal")


@dataclass(frozen=True)
class FreeInit:
    """How often a loop is run (`iterations`; 1 means without FreeInit), and the low-pass filter.

    spatial, temporal  stop frequencies, as fractions of the highest frequency
    order              order of the Butterworth filter
    """

    iterations: int
    spatial: float = 0.25
    temporal: float = 0.25
    order: int = 4
    filter: str = "butterworth"


def low_pass(shape: tuple[int, int, int], settings: FreeInit) -> NDArray[np.float64]:
    """The filter's mask, 0 to 1, over the frequencies of (F, H, W), with frequency 0 at index 0."""
    if settings.spatial == 0.0 or settings.temporal == 0.0:
        return np.zeros(shape)
    scales = (settings.spatial / settings.temporal, 1.0, 1.0)
    f, h, w = ((scale * (2 * np.arange(n) / n - 1)) ** 2 for scale, n in zip(scales, shape, strict=True))
    d2 = f[:, None, None] + h[None, :, None] + w[None, None, :]
    if settings.filter == "butterworth":
        mask = 1.0 / (1.0 + (d2 / settings.spatial**2) ** settings.order)
    elif settings.filter == "gaussian":
        mask = np.exp(-d2 / (2.0 * settings.spatial**2))
    else:
        mask = (d2 <= 2.0 * settings.spatial).astype(np.float64)
    return np.fft.ifftshift(mask)


def renewed(noisy: Array, fresh: Array, settings: FreeInit) -> Array:
    """`fresh` noise [B,C,F,H,W] with its low frequencies replaced by those of the `noisy` latents."""
    _, _, frames, height, width = fresh.shape
    mask = low_pass((frames, height, width), settings)
    change = noisy.astype(np.float64) - fresh
    low = np.fft.ifftn(np.fft.fftn(change, axes=(2, 3, 4)) * mask, axes=(2, 3, 4)).real
    return (fresh + low).astype(np.float32)
