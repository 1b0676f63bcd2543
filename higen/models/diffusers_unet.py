"""Checks configurations of diffusers' U-Nets, and builds image U-Nets."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from higen.errors import CheckpointError, ManifestError
from higen.models.companions import quiet, quiet_import

__all__ = ["check_configuration", "check_latent_channels", "diffusers_network", "image_unet", "image_unet_arguments"]

LATENT_CHANNELS = 4

_OTHER = {
    "addition_embed_type": "it has SDXL's size and crop conditions, and no family here has those",
    "class_embed_type": "it has a class condition, as the x4 upscaler and unCLIP have; no family here has one",
    "encoder_hid_dim": "it projects its text, as Kandinsky and IP-Adapter models do; no family here does",
    "time_cond_proj_dim": "it takes the guidance scale as an input, as LCM's full models do; take the LCM LoRA",
    "num_class_embeds": "it has a class condition, as the x4 upscaler has; no family here has one",
}
"""Arguments of unsupported models of the same class, each with the reason for the error message."""


def image_unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments in a U-Net's config.json. Raises CheckpointError for another kind of model,
    MissingExtra.
    """
    check_configuration(config, "UNet2DConditionModel")
    with quiet_import("diffusers", "the U-Net"):
        from diffusers import UNet2DConditionModel
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    ignored = {"self", "sample_size"}
    return {name: value for name, value in config.items() if name in known and name not in ignored}


def check_configuration(config: Mapping[str, Any], wanted: str, what: str = "U-Net") -> None:
    """Raise CheckpointError for a config.json of another class than `wanted`, or of a model that takes more inputs than
    latents, time and text. `what`: its name in messages.
    """
    kind = config.get("_class_name", wanted)
    if kind != wanted:
        raise CheckpointError(f"its {what} is a {kind}; a {wanted} is wanted")
    for name, why in _OTHER.items():
        if config.get(name) is not None:
            raise CheckpointError(f"{name}={config[name]!r}: {why}")
    check_latent_channels(config.get("in_channels", LATENT_CHANNELS))


def check_latent_channels(channels: int) -> None:
    """Raise CheckpointError for the input channels of another kind of model, such as inpainting, depth or upscaling."""
    others = {9: "an inpainting model", 5: "a depth model", 7: "the x4 upscaler", 8: "a model that edits pictures"}
    if channels != LATENT_CHANNELS:
        what = f" is {others[channels]}," if channels in others else ""
        raise CheckpointError(
            f"a U-Net with {channels} input channels{what} and no family here runs it; {LATENT_CHANNELS} are wanted"
        )


def diffusers_network(name: str, arguments: Mapping[str, Any], key: str, what: str) -> nn.Module:
    """The network of a class of diffusers, randomly initialised.

    key   the entry of the manifest's `architecture` with these arguments
    what  the name of the network in messages

    Raises ManifestError, MissingExtra.
    """
    with quiet_import("diffusers", what):
        import diffusers

        network = getattr(diffusers, name)  # diffusers imports the class here
    with quiet("diffusers"):
        try:
            built: nn.Module = network(**arguments)
        except Exception as error:  # its checks and its arithmetic raise errors of many types
            raise ManifestError(f"architecture.{key}: diffusers refuses it: {error}") from error
    return built


def image_unet(arguments: Mapping[str, Any]) -> nn.Module:
    """diffusers' UNet2DConditionModel, randomly initialised. Raises ManifestError, MissingExtra."""
    return diffusers_network("UNet2DConditionModel", arguments, "unet", "the U-Net")
