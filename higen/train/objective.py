"""The training objective: v-prediction (Salimans and Ho 2022) on a zero-terminal-SNR schedule.

x_t = alpha x0 + sigma noise,   v = alpha noise - sigma x0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from higen.families.higen.preconditioning import enter_known, precondition
from higen.families.higen.unet import Known, UNet

__all__ = ["diffuse", "gain_loss", "residual_square", "residual_v_loss", "v_loss", "v_target"]


def diffuse(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t for clean latents and noise [B,C,F,H,W] and per-sample alpha and sigma [B]."""
    return _column(alpha) * x0 + _column(sigma) * noise


def v_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is to predict; shapes as in `diffuse`."""
    return _column(alpha) * noise - _column(sigma) * x0


def v_loss(
    unet: UNet,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    context: Tensor,
    frame_embedding: Tensor,
    prior: Tensor | None,
    known: Known | None = None,
) -> Tensor:
    """Mean squared error of v, one number per sample [B] (reference: plain MSE, equal weights).

    `known`: the network is given these frames, and the error is that of the others.
    """
    entered = diffuse(x0, noise, alpha, sigma)
    if known is None:
        v = unet(entered, t, context, frame_embedding, prior)
    else:
        v = unet(enter_known(entered, known), t, context, frame_embedding, prior, known)
    return _mean(v - v_target(x0, noise, alpha, sigma), known)


def residual_v_loss(
    unet: UNet,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    context: Tensor,
    frame_embedding: Tensor,
    prior: Tensor,
    known: Known | None = None,
) -> Tensor:
    """The same for a network with prior preconditioning: the error of v' (`preconditioning.velocity`), [B].

    x' = alpha' r + sigma' noise with alpha' = alpha g c and sigma' = sigma c, so v' = alpha' noise - sigma' r: every
    frame counts the same whatever its motion, because r has unit variance. The gain is trained by `gain_loss` alone.
    """
    # In float32, as at inference. Under autocast, older versions of torch would also keep the gain's weights, cast here
    # without a gradient, for `gain_loss`, which then trains nothing.
    with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
        x = diffuse(x0, noise, alpha, sigma)
        entered, g, c = precondition(unet, x, alpha, sigma, context.float(), frame_embedding.float(), prior)
        residual = (x0 - prior[:, :, None]) / g
        target = _column(alpha) * g * c * noise - _column(sigma) * c * residual
        if known is not None:
            entered = enter_known(entered, known, prior, g)
    more = () if known is None else (known,)
    return _mean(unet(entered, t, context, frame_embedding, prior, *more) - target, known)


def _mean(error: Tensor, known: Known | None) -> Tensor:
    """Mean square of [B,C,F,H,W] over the frames that are not given; [B]."""
    frames = error.pow(2).mean(dim=(1, 3, 4))
    if known is None:
        return frames.mean(dim=1)
    drawn = 1 - known.mask
    return (frames * drawn).sum(dim=1) / drawn.sum(dim=1).clamp(min=1)


def gain_loss(unet: UNet, context: Tensor, frame_embedding: Tensor, square: Tensor) -> Tensor:
    """Gaussian likelihood that makes g^2 the expected mean square of z - p given cues and text; a number.

    `square` [B,F] is what `residual_square` measures. Cues are not moved by this loss (detached); the text is, as
    nothing else teaches it how much a subject moves.
    """
    log_gain = unet.log_gain(context, frame_embedding.detach())
    return (log_gain + 0.5 * square * (-2 * log_gain).exp()).mean()


def residual_square(x0: Tensor, prior: Tensor) -> Tensor:
    """Mean square [B,F] of z - p, plus a floor that keeps g above 0.03 for frames that equal the prior."""
    return (x0 - prior[:, :, None]).pow(2).mean(dim=(1, 3, 4)) + 1e-3


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1, 1)
