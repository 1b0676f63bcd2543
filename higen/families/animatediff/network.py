"""AnimateDiff's stages as PyTorch modules, over one copy of the weights: both loops share a U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from higen.errors import ManifestError
from higen.families import Weights
from higen.families.animatediff import spec
from higen.families.animatediff.unet import motion_unet, still_unet
from higen.families.companion_networks import open_autoencoder, open_text_encoder
from higen.manifest import Manifest
from higen.models.companion_stages import DecoderStage
from higen.models.companions import restore_buffers
from higen.models.solver_step import SolverStep
from higen.models.video_walk import fold, per_frame, time_embedding, unfold, walk

__all__ = ["AnimateDiffNetworks", "ClipPredictor", "open"]


def open(manifest: Manifest, weights: Weights) -> AnimateDiffNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model; nothing is loaded yet. Raises ManifestError."""
    return AnimateDiffNetworks(manifest, weights)


class AnimateDiffNetworks:
    """Each network is loaded when a stage first needs it."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._manifest = manifest
        self._weights = weights
        self._networks = spec.networks(manifest)

    def module(self, stage: str) -> nn.Module:
        """A stage as a module, in evaluation mode."""
        row = self._manifest.stage(stage)
        if row.denoises:
            one = row.input("latents").shape[2] == 1
            return SolverStep(row, ClipPredictor(self._still if one else self._unet)).eval()
        codec = self._networks.codec
        if stage == "text_encoder":
            return open_text_encoder(self._weights, spec.TEXT_ENCODER, self._networks.clip).eval()
        if stage != "vae_decoder":
            raise ManifestError(f"stages.{stage}: {spec.FAMILY} has the steps of its loops, text_encoder, vae_decoder")
        autoencoder = open_autoencoder(self._weights, spec.AUTOENCODER, "AutoencoderKL", codec.arguments)
        return DecoderStage(autoencoder, (codec.shift,), (codec.scale,)).to(self._weights.device).eval()

    @cached_property
    def _unet(self) -> nn.Module:
        with torch.device("meta"):
            unet = motion_unet(self._networks.unet, self._networks.group_norm)
        self._weights.fill(unet, spec.UNET)
        restore_buffers(unet, self._weights.device)
        return unet

    @cached_property
    def _still(self) -> nn.Module:
        return still_unet(self._unet, self._networks.unet)


class ClipPredictor(nn.Module):
    """m of a U-Net with motion modules, or without them, as `SolverStep` asks for it; its one condition is `context`
    [B,L,Dc].
    """

    prefix = "unet."

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet: Any = unet

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor], branches: int
    ) -> Tensor:
        """x [B,C,F,H,W] -> m, the same."""
        unet, frames = self.unet, x.shape[2]
        dtype = unet.conv_in.weight.dtype
        embedding, context = time_embedding(unet, t), conditions["context"].to(dtype)
        first = unet.conv_in(fold(x.to(dtype)))
        m = walk(unet, first, per_frame(embedding, frames), per_frame(context, frames), num_frames=frames)
        return unfold(m, x.shape[0])
