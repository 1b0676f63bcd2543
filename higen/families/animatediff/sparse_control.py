"""SparseCtrl (Guo et al. 2023): a control network with motion modules, which is shown pictures of single frames."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from higen.errors import CheckpointError
from higen.families.animatediff import spec
from higen.families.animatediff.motion_sources import HEADS, motion_state
from higen.families.animatediff.unet import sparse_control_net
from higen.families.stable_diffusion.control_source import SPARSE, ControlSource, embedding_channels
from higen.models import companion_checkpoints as companions
from higen.models.checkpoint_files import folder_state, naming, read_json, read_state
from higen.models.companions import quiet_import
from higen.models.control_net import ControlledClipPredictor, check_base
from higen.models.diffusers_unet import check_configuration
from higen.models.video_walk import More, down_and_middle, fold, per_frame, time_embedding

__all__ = ["SparselyControlledPredictor", "read_sparse_control"]

_EMBEDDING = "controlnet_cond_embedding"

_POSITIONS = 32
"""Frames in the training of the published networks."""


class SparselyControlledPredictor(ControlledClipPredictor):
    """A video U-Net with a SparseCtrl network.

    The conditions are `context`, `control` (pixels [B,3,F,Y,X] in -1 to 1 or latents [B,C,F,H,W], of the given frames),
    `control_places` ([B,F], 1 at the given frames) and `control_scale` [B,F].
    """

    def terms(self, noisy: Tensor, t: Tensor, context: Tensor, conditions: Mapping[str, Tensor], frames: int) -> More:
        """As in diffusers' SparseControlNetModel. The network does not see the noisy latents, only the pictures."""
        net, first = self.unet.control, self._first(noisy, conditions)
        embedding = per_frame(time_embedding(net, t), frames)
        middle, skips = down_and_middle(net, first, embedding, context, num_frames=frames)
        scale = _scale(noisy, conditions)
        down = (scale * layer(skip) for layer, skip in zip(net.controlnet_down_blocks, skips, strict=True))
        return tuple(down), scale * net.controlnet_mid_block(middle)

    def first_term(self, noisy: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """See ClipPredictor."""
        term: Tensor = self.unet.control.controlnet_down_blocks[0](self._first(noisy, conditions))
        return _scale(noisy, conditions) * term

    def _first(self, noisy: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """What enters the blocks of the control network: [B*f,C',H,W]."""
        net = self.unet.control
        shown = conditions["control"].to(noisy.dtype)
        if not net.use_simplified_condition_embedding:
            shown = (shown + 1) / 2
        if net.concat_conditioning_mask:
            places = conditions["control_places"].to(noisy.dtype)[:, None, :, None, None]
            shown = torch.cat([shown, places.expand(-1, -1, -1, *shown.shape[3:])], dim=1)
        # The first convolution is given zeros, which leaves only its bias.
        first: Tensor = net.controlnet_cond_embedding(fold(shown)) + net.conv_in.bias[None, :, None, None]
        return first


def _scale(noisy: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    return conditions["control_scale"].flatten()[:, None, None, None].to(noisy.dtype)


def read_sparse_control(path: Path, unet: Mapping[str, Any], factor: int, notes: list[str]) -> ControlSource:
    """Read a SparseCtrl network: a folder of diffusers, or one file with the authors' or diffusers' names.

    unet    the arguments of the UNetMotionModel that it controls
    factor  pixels per latent cell

    Raises CheckpointError if it is no SparseCtrl network, or if it is made for another base model.
    """
    with naming(path):
        if path.is_dir():
            arguments = _arguments(read_json(path / "config.json"))
            state = folder_state(path, ("diffusion_pytorch_model",), notes.append)
        else:
            arguments, state = _single_file(path, unet, notes)
        latents = spec.takes_latents(arguments)
        check_base(arguments, unet, None if latents else factor, SPARSE)
        shapes = companions.shapes_of(lambda: sparse_control_net(arguments, spec.CLIP))
        companions.check_tensors(state, shapes, "a SparseCtrl network for this U-Net")
    notes.append(f"{path} is shown pictures {'as latents' if latents else 'as they are'}; it has its own licence")
    return ControlSource(arguments, state, False, path.name if path.is_dir() else path.stem)


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments in a config.json. Raises CheckpointError for what no published network has."""
    check_configuration(config, SPARSE, "control network")
    for name, wanted in (("global_pool_conditions", False), ("controlnet_conditioning_channel_order", "rgb")):
        if config.get(name, wanted) != wanted:
            raise CheckpointError(f"{name}={config[name]!r}: {wanted!r} is wanted")
    channels, wanted_channels = config.get("conditioning_channels", 4), 4 if spec.takes_latents(config) else 3
    if channels != wanted_channels:
        what = "latents" if wanted_channels == 4 else "a picture"
        raise CheckpointError(f"conditioning_channels={channels!r}: {wanted_channels} are wanted, those of {what}")
    known = _known()
    return {name: value for name, value in config.items() if name in known}


def _known() -> set[str]:
    with quiet_import("diffusers", "the control network"):
        from diffusers import SparseControlNetModel
    return set(inspect.signature(SparseControlNetModel.__init__).parameters) - {"self"}


def _single_file(path: Path, unet: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments that follow from the U-Net and from the tensors' shapes, and the tensors."""
    state, frames, depth = motion_state(read_state(path, notes.append), path, _POSITIONS, notes)
    known, first = _known(), state.get(f"{_EMBEDDING}.weight", state.get(f"{_EMBEDDING}.conv_in.weight"))
    if first is None or first.ndim != 4:
        raise CheckpointError(f"not a SparseCtrl network: {_EMBEDDING} is missing or has another shape")
    latents = f"{_EMBEDDING}.weight" in state
    channels = 4 if latents else 3
    if first.shape[1] not in (channels, channels + 1):
        raise CheckpointError(f"{_EMBEDDING} takes {first.shape[1]} channels: {channels}, and one for the mask")
    arguments = {name: value for name, value in unet.items() if name in known}
    arguments |= {
        "conditioning_channels": channels,
        "concat_conditioning_mask": first.shape[1] > channels,
        "use_simplified_condition_embedding": latents,
        "motion_max_seq_length": frames,
        "motion_num_attention_heads": HEADS,
        "temporal_transformer_layers_per_block": depth,
    }
    if not latents:
        arguments["conditioning_embedding_out_channels"] = embedding_channels(state, f"{_EMBEDDING}.{{}}.weight", False)
    return arguments, state
