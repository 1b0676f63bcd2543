"""Prior preconditioning: a network that learns the residual against the prior, seen as one that predicts v."""

from __future__ import annotations

import torch
from torch import Tensor

from higen.families.higen.unet import Known, UNet

__all__ = ["known_residual", "precondition", "velocity"]


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
    known: Known | None = None,
) -> Tensor:
    """v for latents [B,C,F,H,W]; alpha and sigma [B] are those of t. Undoes prior preconditioning where there is one.

    The network computes in its own precision, that of `context` and `frame_embedding`; all around it, in the latents'.

    With a residual r = (z - p) / g against the prior p, g > 0 per frame, the network sees
    x' = c (x - alpha p), c = 1 / sqrt(alpha^2 g^2 + sigma^2), which is again a unit-variance diffusion of r, and its
    output v' is read out as v = g c v' + alpha sigma c (1 - g^2) x' - sigma p. At g = 1 this is v' - sigma p.

    `gain_context` decides g in place of `context`: two branches of guidance need one g, else their difference holds a
    multiple of x and strong guidance makes x grow without bounds.

    `known`: where frames of a clip are given, the prior of each frame is their blend b, g is 1, and the network
    predicts r = z - b itself: v = (alpha x - b - r) / sigma. One that is not trained yet gives the blend at any step.
    """

    def predict(x: Tensor) -> Tensor:
        inside = context.dtype
        more = () if known is None else (known,)
        v = unet(x.to(inside), t, context, frame_embedding, None if prior is None else prior.to(inside), *more)
        return v.to(latents.dtype)

    a, s = _per_sample(alpha, latents), _per_sample(sigma, latents)
    if unet.residual_gain is None or prior is None:
        entered = latents
    else:
        gain = context if gain_context is None else gain_context
        entered, g, c = precondition(unet, latents, alpha, sigma, gain, frame_embedding, prior)
    if known is None:
        out = predict(entered)
    else:
        blend = known.blend().to(latents.dtype)
        out = predict(torch.where(known.given, known_residual(latents, a, blend, known), entered))
    if unet.residual_gain is None or prior is None:
        v = out
    else:
        v = g * c * out + a * s * c * (1 - g**2) * entered - s * prior[:, :, None]
    return v if known is None else torch.where(known.given, (a * latents - blend - out) / s, v)


def known_residual(latents: Tensor, alpha: Tensor, blend: Tensor, known: Known) -> Tensor:
    """x - alpha b, which the network sees of a clip of which frames are given; 0 in those: r without noise.

    alpha [B,1,1,1,1].
    """
    return (latents - alpha * blend) * (1 - known.wide(latents))


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


def enter_known(entered: Tensor, known: Known, prior: Tensor | None = None, g: Tensor | None = None) -> Tensor:
    """What the network sees, with the frames that are known in it without noise; with prior preconditioning their
    residual (z - p) / g, which is x' where sigma is 0."""
    given = known.latents.to(entered.dtype)
    if prior is not None and g is not None:
        given = (given - prior[:, :, None]) / g
    wide = known.wide(entered)
    return wide * given + (1 - wide) * entered


def _per_sample(column: Tensor, like: Tensor) -> Tensor:
    return column.to(like.dtype).reshape(-1, 1, 1, 1, 1)
