"""ModelScope's stages as PyTorch modules: diffusers' U-Net and autoencoder, transformers' text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from higen.errors import ManifestError
from higen.families import Weights
from higen.families.companion_networks import open_autoencoder, open_text_encoder
from higen.families.modelscope import spec
from higen.families.modelscope.unet import video_unet
from higen.manifest import Manifest
from higen.models.companion_stages import DecoderStage, EncoderStage
from higen.models.companions import restore_buffers
from higen.models.solver_step import SolverStep
from higen.models.video_walk import fold, per_frame, time_embedding, unfold, walk

__all__ = ["ModelScopeNetworks", "VideoPredictor", "open"]


def open(manifest: Manifest, weights: Weights) -> ModelScopeNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model; nothing is loaded yet. Raises ManifestError."""
    return ModelScopeNetworks(manifest, weights)


class ModelScopeNetworks:
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
    def _predictor(self) -> VideoPredictor:
        with torch.device("meta"):
            unet = video_unet(self._networks.unet)
        self._weights.fill(unet, spec.UNET)
        restore_buffers(unet, self._weights.device)
        return VideoPredictor(unet)

    @cached_property
    def _autoencoder(self) -> nn.Module:
        return open_autoencoder(self._weights, spec.AUTOENCODER, "AutoencoderKL", self._networks.codec.arguments)


class VideoPredictor(nn.Module):
    """m of a U-Net for video, as `SolverStep` asks for it; its one condition is `context` [B,L,Dc].

    A transformer over the frames stands between the first convolution and the blocks.
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
        first = unet.transformer_in(first, num_frames=frames, return_dict=False)[0]
        m = walk(unet, first, per_frame(embedding, frames), per_frame(context, frames), num_frames=frames)
        return unfold(m, x.shape[0])
