"""ModelScope's stages as PyTorch modules: diffusers' U-Net and autoencoder, transformers' text encoder."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from higen.families import Weights
from higen.families.companion_networks import ClipNetworks, open_network
from higen.families.modelscope import spec
from higen.families.modelscope.predictors import UpscalingPredictor, VideoPredictor
from higen.families.modelscope.unet import video_unet
from higen.manifest import Manifest
from higen.stages import Stage

__all__ = ["ModelScopeNetworks", "open"]


def open(manifest: Manifest, weights: Weights) -> ModelScopeNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model; nothing is loaded yet. Raises ManifestError."""
    return ModelScopeNetworks(manifest, weights)


class ModelScopeNetworks(ClipNetworks):
    """One U-Net for clips."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._networks = spec.networks(manifest)
        made_of = self._networks
        super().__init__(manifest, weights, made_of.clip, made_of.codec, made_of.preview)

    def predictor(self, step: Stage) -> nn.Module:
        """The U-Net, in both denoising stages."""
        return self._predictor

    @cached_property
    def _predictor(self) -> VideoPredictor:
        kind = UpscalingPredictor if self._networks.upscales else VideoPredictor
        return kind(open_network(self._weights, spec.UNET, lambda: video_unet(self._networks.unet)))
