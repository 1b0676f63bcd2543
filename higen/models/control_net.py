"""Control networks of diffusers, which add terms to the skip connections and to the middle of a U-Net.

ControlNet (Zhang et al. 2023): a copy of the U-Net's first half that also takes pictures, frame by frame.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from higen.errors import CheckpointError
from higen.models.companions import quiet_import
from higen.models.diffusers_unet import check_configuration, diffusers_network
from higen.models.video_walk import ClipPredictor, More, fold, per_frame, time_embedding, unfold, walk

__all__ = ["CONTROL", "ControlledClipPredictor", "control_net", "control_net_arguments", "with_control"]
__all__ += ["added", "check_base"]

CONTROL = "control"
"""The control network's module name in a U-Net, and its prefix in the U-Net's file: `control.conv_in.weight`."""

_SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim")
"""Arguments that a control network and its U-Net must have in common."""

_COLOURS = 3


def control_net(arguments: Mapping[str, Any]) -> nn.Module:
    """diffusers' ControlNetModel, randomly initialised. Raises ManifestError, MissingExtra."""
    return diffusers_network("ControlNetModel", arguments, "control", "the control network")


def control_net_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments in a ControlNet's config.json. Raises CheckpointError if it takes more inputs than
    latents, time, text and pictures, MissingExtra.
    """
    check_configuration(config, "ControlNetModel", "control network")
    channels = config.get("conditioning_channels", _COLOURS)
    if channels != _COLOURS:
        raise CheckpointError(f"conditioning_channels={channels!r}: {_COLOURS} are wanted, those of a picture")
    with quiet_import("diffusers", "the control network"):
        from diffusers import ControlNetModel
    known = inspect.signature(ControlNetModel.__init__).parameters
    return {name: value for name, value in config.items() if name in known and name != "self"}


def check_base(control: Mapping[str, Any], unet: Mapping[str, Any], factor: int) -> None:
    """Raise CheckpointError if a control network is made for another U-Net, or for latents with another number of
    pixels per cell than `factor`.
    """
    with quiet_import("diffusers", "the control network"):
        from diffusers import ControlNetModel, UNet2DConditionModel
    for name in _SHARED:
        own, wanted = _argument(ControlNetModel, control, name), _argument(UNet2DConditionModel, unet, name)
        if own != wanted:
            raise CheckpointError(f"{name}={own}: the control network is for another base; this base has {wanted}")
    embedding = _argument(ControlNetModel, control, "conditioning_embedding_out_channels")
    pixels = 2 ** (len(embedding) - 1)
    if pixels != factor:
        raise CheckpointError(
            f"conditioning_embedding_out_channels={list(embedding)}: for {pixels} pixels per latent cell, but this "
            "model "
            f"has {factor}"
        )


def _argument(of: type, given: Mapping[str, Any], name: str) -> Any:
    value = given.get(name, inspect.signature(of.__init__).parameters[name].default)  # type: ignore[misc]
    return tuple(value) if isinstance(value, list) else value


def with_control(unet: nn.Module, control: nn.Module) -> nn.Module:
    """A U-Net that shares the modules of `unet` and has the control network as an additional module `control`."""
    twin = copy.copy(unet)
    twin._modules = dict(unet._modules)
    twin.add_module(CONTROL, control)
    return twin


def added(unet: Any, x: Tensor, t: Tensor, context: Tensor, pixels: Tensor, scale: Tensor) -> More:
    """The terms that a U-Net's control network (`with_control`) adds to the skip connections and to the middle.

    x [B*f,C,H,W], t [B*f], context [B*f,T,Dc]; pixels [B,3,f,Y,X] in -1 to 1; scale [B,f]
    """
    shown = ((fold(pixels) + 1) / 2).to(x.dtype)
    down, middle = unet.control(x, t, encoder_hidden_states=context, controlnet_cond=shown, return_dict=False)
    factor = scale.flatten()[:, None, None, None].to(x.dtype)
    return tuple(factor * one for one in down), factor * middle


class ControlledClipPredictor(ClipPredictor):
    """A video U-Net with a control network. The conditions are `context`, `control` and `control_scale`."""

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor], branches: int
    ) -> Tensor:
        """x [B,C,F,H,W] -> m of the same shape."""
        unet, frames = self.unet, x.shape[2]
        noisy = fold(x.to(unet.conv_in.weight.dtype))
        context = per_frame(conditions["context"].to(noisy.dtype), frames)
        more = added(unet, noisy, per_frame(t, frames), context, conditions["control"], conditions["control_scale"])
        embedding = per_frame(time_embedding(unet, t), frames)
        return unfold(walk(unet, unet.conv_in(noisy), embedding, context, more, num_frames=frames), x.shape[0])
