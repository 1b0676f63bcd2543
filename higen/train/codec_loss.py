"""The losses of an autoencoder: the distance of decoded pictures from real ones, and of latents from unit deviation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["detail_loss", "picture_loss", "prior_loss"]

DETAIL_FLOOR = 1e-3
"""Deviations of detail that are much smaller than this count as equal."""


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


def detail_loss(decoded: Tensor, real: Tensor) -> Tensor:
    """The distance of the deviation of fine detail in blocks of 8x8 pixels, of pictures [n,3,Y,X]; a single number.

    The other losses prefer a soft edge where its place is uncertain. This one asks only for as much detail as the real
    picture has there. Detail is a picture without its mean over 3x3 pixels. Rows and columns after the last whole block
    do not count.
    """
    found, wanted = (
        functional.avg_pool2d((x - functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).square(), 8)
        for x in (decoded, real)
    )
    loss: Tensor = ((found + DETAIL_FLOOR**2).sqrt() - (wanted + DETAIL_FLOOR**2).sqrt()).abs().mean()
    return loss


def prior_loss(latents: Tensor) -> Tensor:
    """The distance of the channels of latents [n,C,y,x] from mean 0 and deviation 1 over the batch; a single number."""
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    loss: Tensor = (mean.square() + variance.clamp_min(1e-4).log().square()).mean()
    return loss
