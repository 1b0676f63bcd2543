"""Cues measured from a clip (reference: the training recipe, spec section 8)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["appearance_factor", "appearance_similarity", "motion_of"]


def motion_of(latents: Tensor) -> Tensor:
    """Motion cue of clips, latents [B,C,F,H,W] -> int64 [B,F-1]: 10 times the L2 distance of consecutive frames."""
    step = latents.diff(dim=2)
    return (10 * step.pow(2).sum(dim=(1, 3, 4)).sqrt()).long()


def appearance_similarity(features: Tensor) -> Tensor:
    """Appearance cue of clips, features [B,F,D] -> [B,F,F]: 5 cos - 4 (1 for equal frames, 0 for a cosine of 0.8)."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    return 5 * (unit @ unit.transpose(1, 2)) - 4


def appearance_factor(similarity: Tensor) -> Tensor:
    """The factor a [B] for which the matrix 1 - a |i-j|/(F-1) is closest to `similarity` [B,F,F] in least squares."""
    frames = similarity.shape[-1]
    place = torch.linspace(0, 1, frames, dtype=similarity.dtype)
    distance = (place[:, None] - place[None, :]).abs()
    return ((1 - similarity) * distance).sum(dim=(1, 2)) / distance.pow(2).sum()
