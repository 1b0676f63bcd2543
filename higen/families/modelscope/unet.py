"""Checks configurations of diffusers' UNet3DConditionModel, and builds the network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from higen.errors import CheckpointError
from higen.models.companions import quiet_import
from higen.models.diffusers_unet import check_configuration, diffusers_network

__all__ = ["CLASS", "video_unet", "video_unet_arguments"]

CLASS = "UNet3DConditionModel"


def video_unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments in a U-Net's config.json. Raises CheckpointError for another kind of model,
    MissingExtra.
    """
    check_configuration(config, CLASS)
    if config.get("num_attention_heads") is not None:
        heads = config["num_attention_heads"]
        raise CheckpointError(
            f"num_attention_heads={heads!r}: leave it out; attention_head_dim gives the channels of a head"
        )
    with quiet_import("diffusers", "the U-Net"):
        from diffusers import UNet3DConditionModel
    parameters = inspect.signature(UNet3DConditionModel.__init__).parameters
    known = {name: row.default for name, row in parameters.items() if name not in ("self", "sample_size")}
    return {name: config.get(name, default) for name, default in known.items()}


def video_unet(arguments: Mapping[str, Any]) -> nn.Module:
    """The network, randomly initialised. Raises ManifestError, MissingExtra."""
    return diffusers_network("UNet3DConditionModel", arguments, "unet", "the U-Net")
