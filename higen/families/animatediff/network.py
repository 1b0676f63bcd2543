"""AnimateDiff's stages as PyTorch modules. Both loops share one U-Net, so its weights are in memory once."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from higen.families import Weights
from higen.families.animatediff import spec
from higen.families.animatediff.sparse_control import SparselyControlledPredictor
from higen.families.animatediff.unet import motion_unet, sparse_control_net, still_unet
from higen.families.companion_networks import ClipNetworks, open_control_net, open_network
from higen.manifest import Manifest
from higen.models.control_net import CONTROL, ControlledClipPredictor, with_control
from higen.models.video_walk import ClipPredictor
from higen.stages import Stage

__all__ = ["AnimateDiffNetworks", "open"]


def open(manifest: Manifest, weights: Weights) -> AnimateDiffNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model; nothing is loaded yet. Raises ManifestError."""
    return AnimateDiffNetworks(manifest, weights)


class AnimateDiffNetworks(ClipNetworks):
    """A U-Net with motion modules for clips, and without them for one frame."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._networks = spec.networks(manifest)
        made_of = self._networks
        super().__init__(manifest, weights, made_of.clip, made_of.codec, made_of.preview)

    def predictor(self, step: Stage) -> nn.Module:
        """The U-Net for the stage's number of frames, with its control network if the stage takes a control map."""
        unet = self._still if step.input("latents").shape[2] == 1 else self._unet
        if not any(tensor.name == CONTROL for tensor in step.inputs):
            return ClipPredictor(unet)
        sparse = self._networks.sparse_control is not None
        predictor = SparselyControlledPredictor if sparse else ControlledClipPredictor
        return predictor(with_control(unet, self._control))

    @cached_property
    def _control(self) -> nn.Module:
        arguments, norm = self._networks.sparse_control, self._networks.group_norm
        if arguments is None:
            return open_control_net(self._weights, spec.UNET, self._networks.control or {})
        make = lambda: sparse_control_net(arguments, norm)  # noqa: E731
        return open_network(self._weights, spec.UNET, make, part=f"{CONTROL}.")

    @cached_property
    def _unet(self) -> nn.Module:
        made_of = self._networks
        make = lambda: motion_unet(made_of.unet, made_of.group_norm)  # noqa: E731
        return open_network(self._weights, spec.UNET, make, beside=(f"{CONTROL}.",))

    @cached_property
    def _still(self) -> nn.Module:
        return still_unet(self._unet, self._networks.unet)
