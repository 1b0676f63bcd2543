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
from higen.models.video_walk import ClipPredictor, More, fold, per_frame

__all__ = ["CONTROL", "ControlledClipPredictor", "control_net", "control_net_arguments", "with_control"]
__all__ += ["added", "check_base", "first_added"]

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


def check_base(
    control: Mapping[str, Any], unet: Mapping[str, Any], factor: int | None, kind: str = "ControlNetModel"
) -> None:
    """Raise CheckpointError if a control network is made for another U-Net, or for latents with another number of
    pixels per cell than `factor`. `factor`: None for a network that is shown latents. `kind`: its class in diffusers.
    """
    with quiet_import("diffusers", "the control network"):
        import diffusers
        from diffusers import UNet2DConditionModel

        network = getattr(diffusers, kind)
    for name in _SHARED:
        own, wanted = _argument(network, control, name), _argument(UNet2DConditionModel, unet, name)
        if own != wanted:
            raise CheckpointError(f"{name}={own}: the control network is for another base; this base has {wanted}")
    if factor is None:
        return
    embedding = _argument(network, control, "conditioning_embedding_out_channels")
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


def first_added(unet: Any, x: Tensor, pixels: Tensor, scale: Tensor) -> Tensor:
    """The first of the terms in `added`, for which no block of the control network is needed."""
    net, shown = unet.control, ((fold(pixels) + 1) / 2).to(x.dtype)
    if net.config.controlnet_conditioning_channel_order == "bgr":
        shown = shown.flip(1)
    term: Tensor = net.controlnet_down_blocks[0](net.conv_in(x) + net.controlnet_cond_embedding(shown))
    if net.config.global_pool_conditions:
        term = term.mean(dim=(2, 3), keepdim=True)
    return scale.flatten()[:, None, None, None].to(x.dtype) * term


class ControlledClipPredictor(ClipPredictor):
    """A video U-Net with a ControlNet. The conditions are `context`, `control` and `control_scale`."""

    def terms(self, noisy: Tensor, t: Tensor, context: Tensor, conditions: Mapping[str, Tensor], frames: int) -> More:
        """See `added`."""
        return added(
            self.unet, noisy, per_frame(t, frames), context, conditions["control"], conditions["control_scale"]
        )

    def first_term(self, noisy: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """See `first_added`."""
        return first_added(self.unet, noisy, conditions["control"], conditions["control_scale"])
