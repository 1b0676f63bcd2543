"""The networks around the denoiser as stages: text encoder and autoencoder, for all families.

Inputs and outputs are float32, in whatever precision the networks compute. In a stage's module, the names of the
weights begin with `prefix`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["DecoderStage", "EncoderStage", "TextEncoderStage"]


class TextEncoderStage(nn.Module):
    """tokens [B,L] -> hidden [B,L,Dt]: the last hidden state, after the final norm."""

    prefix = "encoder."

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids=tokens).last_hidden_state
        return hidden.float()


class _AutoencoderStage(nn.Module):
    """latents = (encoded - shift) * scale, per channel; a single entry is for all channels."""

    prefix = "autoencoder."
    shift: Tensor
    scale: Tensor

    def __init__(self, autoencoder: nn.Module, shift: Sequence[float], scale: Sequence[float]) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.register_buffer("shift", torch.tensor(tuple(shift)).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(tuple(scale)).reshape(1, -1, 1, 1), persistent=False)

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
    """pixels [N,3,Y,X] in -1 to 1 -> latents [N,C,H,W]; the mode of the posterior if the encoder gives a posterior."""

    def forward(self, pixels: Tensor) -> Tensor:
        encoded = self.autoencoder.encode(pixels.to(self.dtype), return_dict=False)[0]  # type: ignore[operator]
        # AutoencoderKL returns a distribution, AutoencoderDC returns latents.
        latents: Tensor = encoded if isinstance(encoded, Tensor) else encoded.mode()
        return (latents.float() - self.shift) * self.scale
