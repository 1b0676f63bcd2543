"""The networks around the denoiser, filled with a model's weights, whatever the family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from higen.families import Weights
from higen.models.companion_stages import TextEncoderStage
from higen.models.companions import TEXT_PREFIX, autoencoder, restore_buffers, text_encoder

__all__ = ["open_autoencoder", "open_text_encoder"]


def open_text_encoder(weights: Weights, file: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The stage of a CLIP text model with CLIPTextConfig's `arguments`. Raises IntegrityError, ManifestError."""
    with torch.device("meta"):
        encoder = text_encoder(arguments)
    weights.fill(encoder, file, strip=TEXT_PREFIX)
    restore_buffers(encoder, weights.device)
    return TextEncoderStage(encoder)


def open_autoencoder(weights: Weights, file: str, kind: str, arguments: Mapping[str, Any]) -> nn.Module:
    """diffusers' autoencoder `kind`, in float32 whatever the rest computes in, as the reference has it: published ones
    overflow in fp16. Raises IntegrityError, ManifestError.
    """
    with torch.device("meta"):
        built = autoencoder(kind, arguments)
    weights.fill(built, file, torch.float32)
    restore_buffers(built, weights.device)
    return built
