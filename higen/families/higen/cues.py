"""HiGen's two cues as inputs of the conditioner (reference: unet_higen.py, spec section 3).

The motion cue of a pair of frames is 10 times the L2 distance of their latents. The appearance cue of frame i is its
similarity to 32 relative positions of the clip.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from higen.conditioning import Curve, curve_values, similarity_rows, sinusoid_rows

__all__ = ["appearance_cue", "motion_cue", "motion_values"]

Array = NDArray[np.float32]


def motion_values(motion: Curve, frames: int) -> Array:
    """The motion cue as one number per pair of frames ([frames - 1]) or per frame ([frames]), float32, 0 or more."""
    return curve_values("motion", motion, frames, low=0.0)


def motion_cue(motion: Curve, frames: int, dim: int) -> Array:
    """The conditioner's motion input, float32 [frames, dim]; None is "unspecified"."""
    return sinusoid_rows(None if motion is None else motion_values(motion, frames), frames, dim)


def appearance_cue(appearance: Curve, frames: int, columns: int) -> Array:
    """The conditioner's appearance input, float32 [frames, columns]; None is "unspecified"."""
    return similarity_rows("appearance", appearance, frames, columns)
