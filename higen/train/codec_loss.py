"""The losses of an autoencoder: the distance of decoded pictures from real ones, and of latents from unit deviation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["picture_loss", "prior_loss"]


def picture_loss(
    decoded: Tensor, real: Tensor, mse_weight: float, edge_weight: float, weight: Tensor | float
) -> Tensor:
    """The distance of decoded pictures and their edges from the real ones, [n,3,Y,X] from -1 to 1; a single number.

    weight  weight of each pixel's error [n,1,Y,X]; errors of edges have the same weight everywhere
    """
    error = decoded - real
    pixels = (weight * (error.abs() + mse_weight * error.square())).mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss: Tensor = pixels + edge_weight * edges
    return loss


def prior_loss(latents: Tensor) -> Tensor:
    """The distance of the channels of latents [n,C,y,x] from mean 0 and deviation 1 over the batch; a single number."""
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    loss: Tensor = (mean.square() + variance.clamp_min(1e-4).log().square()).mean()
    return loss
