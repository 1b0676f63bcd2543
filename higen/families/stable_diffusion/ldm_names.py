"""Reads the U-Net of a single-file checkpoint (`model.diffusion_model.*`) under diffusers' names.

Names are derived from diffusers' own module tree, so every tensor of the tree must be in the file, and no other may be.
Source of the layout: CompVis' openaimodel.py, which numbers all blocks consecutively.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError
from higen.models.companion_checkpoints import check_tensors, shapes_of
from higen.models.diffusers_unet import check_latent_channels, image_unet
from higen.models.nestings import below

__all__ = ["PREFIX", "ldm_name", "unet_arguments", "unet_from_ldm"]

State = Mapping[str, Tensor]

PREFIX = "model.diffusion_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_HEADS = 8
"""The number of heads of every attention in version 1. Version 2 has linear projections and heads of 64 channels.
"""

_HEAD_CHANNELS = 64


def unet_arguments(state: State) -> dict[str, Any]:
    """UNet2DConditionModel's arguments, derived from the tensors' shapes. Raises CheckpointError."""
    unet = below(state, PREFIX)
    if "label_emb.0.0.weight" in unet:
        raise CheckpointError("a U-Net with a class condition: SDXL or an upscaler, and no family here runs it")
    entries: dict[int, set[str]] = {}
    for name in unet:
        if found := re.match(r"input_blocks\.(\d+)\.(\d)\.(\w+)", name):
            entries.setdefault(int(found[1]), set()).add("down" if found[3] == "op" else found[2])
    levels: list[list[int]] = [[]]
    for entry in sorted(entries.keys() - {0}):
        if "down" in entries[entry]:
            levels.append([])
        else:
            levels[-1].append(entry)
    if not all(levels) or len({len(level) for level in levels}) != 1:
        raise CheckpointError("not a Stable Diffusion U-Net: its levels have no residual blocks, or different numbers")
    check_latent_channels(_size(unet, "input_blocks.0.0.weight", 1))
    widths = [_size(unet, f"input_blocks.{level[0]}.0.out_layers.3.weight", 0) for level in levels]
    attends = ["1" in entries[level[0]] for level in levels]
    if not any(attends):
        raise CheckpointError("not a Stable Diffusion U-Net: no level attends to the text")
    first = f"input_blocks.{levels[attends.index(True)][0]}.1"
    linear = unet[f"{first}.proj_in.weight"].ndim == 2
    return {
        "in_channels": _size(unet, "input_blocks.0.0.weight", 1),
        "out_channels": _size(unet, "out.2.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(attends)],
        "cross_attention_dim": _size(unet, f"{first}.transformer_blocks.0.attn2.to_k.weight", 1),
        "attention_head_dim": [max(1, width // _HEAD_CHANNELS) for width in widths] if linear else _HEADS,
        "use_linear_projection": linear,
    }


def unet_from_ldm(state: State, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The U-Net's tensors under diffusers' names. Raises CheckpointError for missing, extra or wrongly shaped ones."""
    theirs = below(state, PREFIX)
    shapes = shapes_of(lambda: image_unet(arguments))
    layers = arguments["layers_per_block"]
    levels = [kind.startswith("Cross") for kind in arguments["up_block_types"]]
    names = {ldm_name(ours, layers, levels): ours for ours in shapes}
    check_tensors(theirs, {name: shapes[ours] for name, ours in names.items()}, "a Stable Diffusion U-Net")
    return {ours: theirs[name] for name, ours in names.items()}


def ldm_name(ours: str, layers: int, up_attends: list[bool]) -> str:
    """The name of a diffusers tensor in the checkpoint, without PREFIX.

    layers      number of residual blocks in a level on the way down
    up_attends  whether each level on the way up attends, in order

    Raises CheckpointError for a tensor that does not occur in these checkpoints.
    """
    for new, old in _OUTER.items():
        if ours.startswith(f"{new}."):
            return old + ours.removeprefix(new)
    found = re.match(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", ours)
    if found is None:
        raise CheckpointError(f"{ours}: no Stable Diffusion checkpoint has this tensor")
    side, level, part, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if part == "resnets":
        rest = re.sub(r"^\w+", lambda name: _RESNET[name[0]], rest)
    if side == "mid_block":
        return f"middle_block.{1 if part == 'attentions' else 2 * index}.{rest}"
    slot = {"resnets": 0, "attentions": 1}
    if side == "down_blocks":
        if part == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.{rest.replace('conv', 'op', 1)}"
        return f"input_blocks.{1 + level * (layers + 1) + index}.{slot[part]}.{rest}"
    if part == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if up_attends[level] else 1}.{rest}"
    return f"output_blocks.{level * (layers + 1) + index}.{slot[part]}.{rest}"


def _size(state: State, name: str, axis: int) -> int:
    if name not in state or state[name].ndim <= axis:
        raise CheckpointError(f"not a Stable Diffusion U-Net: missing {PREFIX}{name}, or it has too few axes")
    return int(state[name].shape[axis])
