"""The stages as modules: `forward` takes a stage's inputs in the order of `higen.stages` and returns its outputs.

The torch backend runs these and the export traces them, so the two agree by construction. Inputs and outputs are
float32 whatever the weights' precision; prior preconditioning, the guidance mix and the solver's update are computed
in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from higen.config import AutoencoderConfig
from higen.models.unet import Conditioner, UNet

__all__ = ["ConditionerStage", "DecoderStage", "DenoisingStage", "EncoderStage", "TextEncoderStage", "velocity"]


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
) -> Tensor:
    """v for latents [B,C,F,H,W]; alpha and sigma [B] are those of t. Undoes prior preconditioning where there is one.

    The network computes in its own precision, that of `context` and `frame_embedding`; all around it, in the latents'.

    With a residual r = (z - p) / g against the prior p, g > 0 per frame, the network sees
    x' = c (x - alpha p), c = 1 / sqrt(alpha^2 g^2 + sigma^2), which is again a unit-variance diffusion of r, and its
    output v' is read out as v = g c v' + alpha sigma c (1 - g^2) x' - sigma p. At g = 1 this is v' - sigma p.

    `gain_context` decides g in place of `context`: two branches of guidance need one g, else their difference holds a
    multiple of x and strong guidance makes x grow without bounds.
    """

    def predict(x: Tensor) -> Tensor:
        inside = context.dtype
        v = unet(x.to(inside), t, context, frame_embedding, None if prior is None else prior.to(inside))
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


class TextEncoderStage(nn.Module):
    """tokens [B,L] -> hidden [B,L,Dt]: the last hidden state, after the final norm."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids=tokens).last_hidden_state
        return hidden.float()


class ConditionerStage(nn.Module):
    """hidden, motion, appearance -> context, frame_embedding."""

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, hidden: Tensor, motion: Tensor, appearance: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.conditioner.context.tokens.dtype
        context, embedding = self.conditioner(hidden.to(dtype), motion.to(dtype), appearance.to(dtype))
        return context.float(), embedding.float()


class DenoisingStage(nn.Module):
    """One whole solver step: both guidance branches as one batch, the guidance mix, the solver's update."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latents: Tensor,
        previous: Tensor,
        t: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        guidance: Tensor,
        context: Tensor,
        empty_context: Tensor,
        frame_embedding: Tensor,
        prior: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        dtype = self.unet.conv_in.weight.dtype
        both = velocity(
            self.unet,
            _twice(latents),
            _twice(t),
            _twice(alpha),
            _twice(sigma),
            torch.cat([context, empty_context]).to(dtype),
            _twice(frame_embedding.to(dtype)),
            None if prior is None else _twice(prior),
            _twice(context.to(dtype)),
        )
        branches = both.unflatten(0, (2, -1))  # not chunked: a chunk exports as a sequence
        v = branches[1] + _per_sample(guidance, latents) * (branches[0] - branches[1])
        x0 = _per_sample(alpha, latents) * latents - _per_sample(sigma, latents) * v
        stepped = _per_sample(A, latents) * latents + _per_sample(B, latents) * v + _per_sample(C, latents) * previous
        return stepped, x0


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])


class _AutoencoderStage(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self, autoencoder: nn.Module, config: AutoencoderConfig) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.register_buffer("shift", torch.tensor(config.shift).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(config.scale).reshape(1, -1, 1, 1), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype


class DecoderStage(_AutoencoderStage):
    """latents [N,C,H,W] -> pixels [N,3,Y,X], about -1 to 1 (not clamped)."""

    def forward(self, latents: Tensor) -> Tensor:
        encoded = (latents / self.scale + self.shift).to(self.dtype)
        decoded: Tensor = self.autoencoder.decode(encoded, return_dict=False)[0]  # type: ignore[operator]
        return decoded.float()


class EncoderStage(_AutoencoderStage):
    """pixels [N,3,Y,X] in -1 to 1 -> latents [N,C,H,W]; the mode of the posterior where the encoder has one."""

    def forward(self, pixels: Tensor) -> Tensor:
        encoded = self.autoencoder.encode(pixels.to(self.dtype), return_dict=False)[0]  # type: ignore[operator]
        # AutoencoderKL gives a distribution, AutoencoderDC the latents themselves.
        latents: Tensor = encoded if isinstance(encoded, Tensor) else encoded.mode()
        return (latents.float() - self.shift) * self.scale
