"""Prior preconditioning: turns a network that predicts the residual against the prior into one that predicts v."""

from __future__ import annotations

from collections.abc import Callable

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
    network: Callable[..., Tensor] | None = None,
) -> Tensor:
    """v for latents [B,C,F,H,W]; alpha and sigma [B] belong to t. Prior preconditioning is undone if the U-Net has it.

    The network computes in the dtype of `context` and `frame_embedding`, everything else in the dtype of the latents.

    With a residual r = (z - p) / g against the prior p, g > 0 per frame, the network's input is
    x' = c (x - alpha p), c = 1 / sqrt(alpha^2 g^2 + sigma^2), which is again a unit-variance diffusion of r. Its
    output v' gives v = g c v' + alpha sigma c (1 - g^2) x' - sigma p. At g = 1 this is v' - sigma p.

    `gain_context` determines g in place of `context`. Both branches of guidance need the same g: otherwise their
    difference contains a multiple of x, and strong guidance makes x grow without bounds. `network` is called in place
    of `unet`.

    `known`: in a clip with given frames, the prior of each frame is their blend b, g is 1, and the network predicts
    r = z - b itself: v = (alpha x - b - r) / sigma. With an untrained network, this is the blend at every step.
    """

    def predict(x: Tensor) -> Tensor:
        inside = context.dtype
        more = () if known is None else (known,)
        entering = None if prior is None else prior.to(inside)
        v = (network or unet)(x.to(inside), t, context, frame_embedding, entering, *more)
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
    """The network's input for a clip with given frames: x - alpha b, and 0 (r without noise) in the given frames.

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
    """x' [B,C,F,H,W] as defined in `velocity`, and g and c [B,1,F,1,1]. g comes from `UNet.log_gain`."""
    g = unet.log_gain(context, frame_embedding).to(latents.dtype).exp()[:, None, :, None, None]
    a, s = _per_sample(alpha, latents), _per_sample(sigma, latents)
    c = torch.rsqrt(a**2 * g**2 + s**2)
    return c * (latents - a * prior[:, :, None]), g, c


def enter_known(entered: Tensor, known: Known, prior: Tensor | None = None, g: Tensor | None = None) -> Tensor:
    """The network's input with the known frames put in without noise. With prior preconditioning, these are put in as
    the residual (z - p) / g, which equals x' at sigma = 0."""
    given = known.latents.to(entered.dtype)
    if prior is not None and g is not None:
        given = (given - prior[:, :, None]) / g
    wide = known.wide(entered)
    return wide * given + (1 - wide) * entered


def _per_sample(column: Tensor, like: Tensor) -> Tensor:
    return column.to(like.dtype).reshape(-1, 1, 1, 1, 1)
