"""The training objective: v-prediction (Salimans and Ho 2022) on a zero-terminal-SNR schedule.

x_t = alpha x0 + sigma noise,   v = alpha noise - sigma x0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from higen.families.higen.preconditioning import known_residual, precondition
from higen.families.higen.unet import Known, UNet

__all__ = ["diffuse", "gain_loss", "residual_square", "residual_v_loss", "v_loss", "v_target"]


def diffuse(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t for clean latents and noise [B,C,F,H,W] and per-sample alpha and sigma [B]."""
    return _column(alpha) * x0 + _column(sigma) * noise


def v_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The value that the network has to predict; shapes as in `diffuse`."""
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

    `known`: for a clip with given frames, the error of r, over its other frames (`preconditioning.velocity`).
    """
    x, target = diffuse(x0, noise, alpha, sigma), v_target(x0, noise, alpha, sigma)
    return _error(unet, x, x, target, x0, t, alpha, context, frame_embedding, prior, known)


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
    """Mean squared error [B] of v' for a network with prior preconditioning (`preconditioning.velocity`).

    x' = alpha' r + sigma' noise with alpha' = alpha g c and sigma' = sigma c, so v' = alpha' noise - sigma' r. All
    frames have the same weight, whatever their motion, because r has unit variance. Only `gain_loss` trains the gain.
    """
    # In float32, as at inference. Moreover, under autocast older versions of torch would cache the gain's weights that
    # are cast here without a gradient. `gain_loss` would use them too, and would train nothing.
    with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
        x = diffuse(x0, noise, alpha, sigma)
        entered, g, c = precondition(unet, x, alpha, sigma, context.float(), frame_embedding.float(), prior)
        residual = (x0 - prior[:, :, None]) / g
        target = _column(alpha) * g * c * noise - _column(sigma) * c * residual
    return _error(unet, x, entered, target, x0, t, alpha, context, frame_embedding, prior, known)


def _error(
    unet: UNet,
    x: Tensor,
    entered: Tensor,
    target: Tensor,
    x0: Tensor,
    t: Tensor,
    alpha: Tensor,
    context: Tensor,
    frame_embedding: Tensor,
    prior: Tensor | None,
    known: Known | None,
) -> Tensor:
    """Mean squared error [B] of the network's output for `entered` against `target`. For a clip with given frames, the
    input is `known_residual` of x, the target is r = x0 - blend, and only the other frames count."""
    if known is None:
        return (unet(entered, t, context, frame_embedding, prior) - target).pow(2).mean(dim=(1, 2, 3, 4))
    with torch.no_grad():
        blend = known.blend()
        entered = torch.where(known.given, known_residual(x, _column(alpha), blend, known), entered)
        target = torch.where(known.given, x0 - blend, target)
        drawn = 1 - known.mask
    frames = (unet(entered, t, context, frame_embedding, prior, known) - target).pow(2).mean(dim=(1, 3, 4))
    return (frames * drawn).sum(dim=1) / drawn.sum(dim=1).clamp(min=1)


def gain_loss(unet: UNet, context: Tensor, frame_embedding: Tensor, square: Tensor) -> Tensor:
    """Gaussian likelihood that makes g^2 the expected mean square of z - p for given cues and text; a single number.

    `square` [B,F] is the result of `residual_square`. This loss does not train the embeddings of the cues (detached).
    It trains the text encoder, because nothing else teaches it how much a subject moves.
    """
    log_gain = unet.log_gain(context, frame_embedding.detach())
    return (log_gain + 0.5 * square * (-2 * log_gain).exp()).mean()


def residual_square(x0: Tensor, prior: Tensor) -> Tensor:
    """Mean square [B,F] of z - p, plus a floor that keeps g above 0.03 for frames that equal the prior."""
    return (x0 - prior[:, :, None]).pow(2).mean(dim=(1, 3, 4)) + 1e-3


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1, 1)
