"""Prior preconditioning: a network that learns the residual against the prior, seen as one that predicts v."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from higen.families.higen.unet import UNet

__all__ = ["precondition", "velocity"]


def velocity(
    unet: UNet,
    latents: Tensor,
    t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    context: Tensor,
    frame_embedding: Tensor,
    prior: Tensor | None,
    gain_context: Tensor | None = None,
    network: Callable[..., Tensor] | None = None,
) -> Tensor:
    """v for latents [B,C,F,H,W]; alpha and sigma [B] are those of t. Undoes prior preconditioning where there is one.

    The network computes in its own precision, that of `context` and `frame_embedding`; all around it, in the latents'.

    With a residual r = (z - p) / g against the prior p, g > 0 per frame, the network sees
    x' = c (x - alpha p), c = 1 / sqrt(alpha^2 g^2 + sigma^2), which is again a unit-variance diffusion of r, and its
    output v' is read out as v = g c v' + alpha sigma c (1 - g^2) x' - sigma p. At g = 1 this is v' - sigma p.

    `gain_context` decides g in place of `context`: two branches of guidance need one g, else their difference holds a
    multiple of x and strong guidance makes x grow without bounds. `network` is called in place of `unet`.
    """

    def predict(x: Tensor) -> Tensor:
        inside = context.dtype
        v = (network or unet)(x.to(inside), t, context, frame_embedding, None if prior is None else prior.to(inside))
        return v.to(latents.dtype)

    if unet.residual_gain is None or prior is None:
        return predict(latents)
    entered, g, c = precondition(
        unet, latents, alpha, sigma, context if gain_context is None else gain_context, frame_embedding, prior
    )
    v = predict(entered)
    a, s = _per_sample(alpha, v), _per_sample(sigma, v)
    return g * c * v + a * s * c * (1 - g**2) * entered - s * prior[:, :, None]


def precondition(
    unet: UNet,
    latents: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    context: Tensor,
    frame_embedding: Tensor,
    prior: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' as `velocity` defines it [B,C,F,H,W], with g and c [B,1,F,1,1]; g is `UNet.log_gain`'s."""
    g = unet.log_gain(context, frame_embedding).to(latents.dtype).exp()[:, None, :, None, None]
    a, s = _per_sample(alpha, latents), _per_sample(sigma, latents)
    c = torch.rsqrt(a**2 * g**2 + s**2)
    return c * (latents - a * prior[:, :, None]), g, c


def _per_sample(column: Tensor, like: Tensor) -> Tensor:
    return column.to(like.dtype).reshape(-1, 1, 1, 1, 1)
