"""Stable Diffusion's stages as PyTorch modules: diffusers' U-Net and autoencoder, transformers' text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from higen.families import Weights
from higen.families.companion_networks import ClipNetworks, open_control_net, open_network
from higen.families.stable_diffusion import spec
from higen.manifest import Manifest
from higen.models.control_net import CONTROL, added, first_added, with_control
from higen.models.diffusers_unet import image_unet
from higen.models.video_walk import time_embedding, walk_with_deep
from higen.stages import Stage

__all__ = ["ImagePredictor", "StableDiffusionNetworks", "open"]


def open(manifest: Manifest, weights: Weights) -> StableDiffusionNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model; nothing is loaded yet. Raises ManifestError."""
    return StableDiffusionNetworks(manifest, weights)


class StableDiffusionNetworks(ClipNetworks):
    """One image U-Net."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._networks = spec.networks(manifest)
        made_of = self._networks
        super().__init__(manifest, weights, made_of.clip, made_of.codec, made_of.preview)

    def predictor(self, step: Stage) -> nn.Module:
        """The U-Net, with its control network if the stage takes a control map."""
        return self._controlled if any(tensor.name == CONTROL for tensor in step.inputs) else self._predictor

    @cached_property
    def _predictor(self) -> ImagePredictor:
        make = lambda: image_unet(self._networks.unet)  # noqa: E731
        return ImagePredictor(open_network(self._weights, spec.UNET, make, beside=(f"{CONTROL}.",)))

    @cached_property
    def _controlled(self) -> ImagePredictor:
        control = open_control_net(self._weights, spec.UNET, self._networks.control or {})
        return ImagePredictor(with_control(self._predictor.unet, control))


class ImagePredictor(nn.Module):
    """Predicts m with an image U-Net, as `SolverStep` calls it.

    The conditions are `context` [B,T,Dc] and, with a control network, `control` [B,3,1,Y,X] and `control_scale` [B,1].
    """

    prefix = "unet."

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @property
    def deep_channels(self) -> int:
        """Channels of the deep features."""
        unet: Any = self.unet
        return int(unet.conv_in.out_channels)

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor], branches: int
    ) -> Tensor:
        """x [B,C,1,H,W] -> m of the same shape."""
        dtype = next(self.unet.parameters()).dtype
        noisy, context = x.squeeze(2).to(dtype), conditions["context"].to(dtype)
        more: dict[str, Any] = {}
        if CONTROL in conditions:
            down, middle = added(self.unet, noisy, t, context, conditions[CONTROL], conditions[f"{CONTROL}_scale"])
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        predicted: Tensor = self.unet(noisy, t, encoder_hidden_states=context, return_dict=False, **more)[0]
        return predicted[:, :, None]

    def with_deep(
        self,
        x: Tensor,
        t: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        conditions: Mapping[str, Tensor],
        branches: int,
        deep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """m, shaped like x [B,C,1,H,W], and the deep features [B,K,1,H,W], which are `deep` if it is given."""
        unet: Any = self.unet
        noisy = x.squeeze(2).to(unet.conv_in.weight.dtype)
        first, context, more = unet.conv_in(noisy), conditions["context"].to(noisy.dtype), None
        given = None if deep is None else deep.squeeze(2).to(noisy.dtype)
        if CONTROL in conditions:
            shown = conditions[CONTROL], conditions[f"{CONTROL}_scale"]
            if given is None:
                more = added(unet, noisy, t, context, *shown)
            else:  # the deep features contain the other terms
                first = first + first_added(unet, noisy, *shown)
        m, kept = walk_with_deep(unet, first, time_embedding(unet, t), context, given, more)
        return m[:, :, None], kept[:, :, None]
