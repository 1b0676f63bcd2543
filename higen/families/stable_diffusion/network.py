"""Stable Diffusion's stages as PyTorch modules: diffusers' U-Net and autoencoder, transformers' text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from higen.errors import ManifestError
from higen.families import Weights
from higen.families.companion_networks import open_autoencoder, open_text_encoder
from higen.families.stable_diffusion import spec
from higen.manifest import Manifest
from higen.models.companion_stages import DecoderStage, EncoderStage
from higen.models.companions import restore_buffers
from higen.models.diffusers_unet import image_unet
from higen.models.solver_step import SolverStep

__all__ = ["ImagePredictor", "StableDiffusionNetworks", "open"]


def open(manifest: Manifest, weights: Weights) -> StableDiffusionNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model; nothing is loaded yet. Raises ManifestError."""
    return StableDiffusionNetworks(manifest, weights)


class StableDiffusionNetworks:
    """Each network is loaded when a stage first needs it."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._manifest = manifest
        self._weights = weights
        self._networks = spec.networks(manifest)

    def module(self, stage: str) -> nn.Module:
        """A stage as a module, in evaluation mode."""
        row = self._manifest.stage(stage)
        if row.denoises:
            return SolverStep(row, self._predictor).eval()
        codec = self._networks.codec
        if stage == "text_encoder":
            return open_text_encoder(self._weights, spec.TEXT_ENCODER, self._networks.clip).eval()
        kinds = {"vae_decoder": DecoderStage, "vae_encoder": EncoderStage}
        if stage not in kinds:
            raise ManifestError(f"stages.{stage}: {spec.FAMILY} has a loop's steps, text_encoder, {', '.join(kinds)}")
        made = kinds[stage](self._autoencoder, (codec.shift,), (codec.scale,))
        return made.to(self._weights.device).eval()

    @cached_property
    def _predictor(self) -> ImagePredictor:
        with torch.device("meta"):
            unet = image_unet(self._networks.unet)
        self._weights.fill(unet, spec.UNET)
        restore_buffers(unet, self._weights.device)
        return ImagePredictor(unet)

    @cached_property
    def _autoencoder(self) -> nn.Module:
        return open_autoencoder(self._weights, spec.AUTOENCODER, "AutoencoderKL", self._networks.codec.arguments)


class ImagePredictor(nn.Module):
    """m of a U-Net for pictures, as `SolverStep` asks for it; its one condition is `context` [B,T,Dc]."""

    prefix = "unet."

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor], branches: int
    ) -> Tensor:
        """x [B,C,1,H,W] -> m, the same."""
        dtype = next(self.unet.parameters()).dtype
        predicted: Tensor = self.unet(
            x.squeeze(2).to(dtype), t, encoder_hidden_states=conditions["context"].to(dtype), return_dict=False
        )[0]
        return predicted[:, :, None]
