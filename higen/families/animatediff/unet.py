"""Changes to diffusers' UNetMotionModel: a choice of group norm statistics, and the U-Net without motion modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from higen.families.animatediff.spec import FRAME
from higen.models.diffusers_unet import diffusers_network

__all__ = ["MOTION", "motion_unet", "sparse_control_net", "still_unet"]

MOTION = "motion_modules"
"""A part of the name of every tensor of a motion module. No other tensor has it in its name."""


def motion_unet(arguments: Mapping[str, Any], group_norm: str) -> nn.Module:
    """diffusers' UNetMotionModel, randomly initialised; `group_norm` is one of `spec.GROUP_NORMS`.

    Raises ManifestError, MissingExtra.
    """
    return _with_norms(diffusers_network("UNetMotionModel", arguments, "unet", "the U-Net"), group_norm)


def sparse_control_net(arguments: Mapping[str, Any], group_norm: str) -> nn.Module:
    """diffusers' SparseControlNetModel, randomly initialised; `group_norm` is one of `spec.GROUP_NORMS`.

    Raises ManifestError, MissingExtra.
    """
    built = diffusers_network("SparseControlNetModel", arguments, "sparse_control", "the control network")
    return _with_norms(built, group_norm)


def _with_norms(built: nn.Module, group_norm: str) -> nn.Module:
    """The network, with these statistics of the group norms of its motion modules."""
    if group_norm == FRAME:
        for module in _motion_modules(built):
            theirs = module.norm
            assert isinstance(theirs, nn.GroupNorm)
            module.norm = FrameNorm(theirs.num_groups, theirs.num_channels, theirs.eps)
    return built


def still_unet(unet: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    """The U-Net of `arguments` without its motion modules, for images. It shares the parameters of `unet`."""
    with torch.device("meta"):
        still = motion_unet(arguments, FRAME)
    for _, modules in _motion_lists(still):
        for i in range(len(modules)):
            modules[i] = Still()
    shared = {name: tensor for name, tensor in unet.state_dict(keep_vars=True).items() if f".{MOTION}." not in name}
    still.load_state_dict(shared, assign=True)
    return still.eval().requires_grad_(False)


def _motion_lists(unet: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    found = [(name, module) for name, module in unet.named_modules() if name.rpartition(".")[2] == MOTION]
    return [(name, module) for name, module in found if isinstance(module, nn.ModuleList)]


def _motion_modules(unet: nn.Module) -> list[nn.Module]:
    return [module for _, modules in _motion_lists(unet) for module in modules]


class FrameNorm(nn.GroupNorm):
    """Group norm of each frame separately: [B,C,F,H,W] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        """As in the authors' TemporalTransformer3DModel, which normalises before it joins the frames."""
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Still(nn.Module):
    """Replaces a motion module by the identity."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states
