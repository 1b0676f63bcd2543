"""Reads the U-Net of the authors' own file (`text2video_pytorch_model.pth`) under diffusers' names.

Names are derived from diffusers' own module tree, so every tensor of the tree must be in the file, and no other may be.
Source of the layout: unet_sd.py of ModelScope and unet_t2v.py of VGen. They number all blocks consecutively and spell
the temporal convolution `temopral_conv`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError
from higen.families.modelscope.unet import video_unet
from higen.models.companion_checkpoints import check_tensors, shapes_of
from higen.models.diffusers_unet import check_latent_channels
from higen.models.nestings import found_in

__all__ = ["MARKS", "check_others", "unet_arguments", "unet_from_vgen"]

State = Mapping[str, Tensor]

MARKS = frozenset({"input_blocks.0.1.proj_in.weight", "input_blocks.1.0.temopral_conv.conv1.0.weight"})
"""Tensors in every video U-Net of these authors: of the first transformer and of a temporal convolution."""

_OTHERS = {
    "context_embedding.tokens": "HiGen's denoiser: give it with its text encoder and autoencoder, --family higen",
    "local_image_concat.": "I2VGen-XL",
    "depth_embedding.": "VideoComposer",
    "local_image_embedding.": "VideoComposer",
    "fps_embedding.": "a model with the frame rate as an input",
    "to_q_lora.": "InstructVideo, whose LoRA is not merged",
}
"""Parts of names that do not occur in ModelScope's text-to-video models, each with the model that has it."""

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
    "transformer_in": "input_blocks.0.1",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_SLOTS = {"resnets": "0", "temp_convs": "0.temopral_conv", "attentions": "1", "temp_attentions": "2"}
_FIRST_HEADS = 8
"""Heads of the transformer after the first convolution, in the file and in diffusers."""


def check_others(state: State) -> None:
    """Raise CheckpointError if the tensors' names show a U-Net that takes other inputs than a text."""
    for part, whose in _OTHERS.items():
        if named := next((name for name in state if part in name), None):
            raise CheckpointError(
                f"{named}: {whose}; ModelScope's text to video, ZeroScope, TF-T2V, VideoLCM and SR600 are read here"
            )


def unet_arguments(state: State) -> dict[str, Any]:
    """UNet3DConditionModel's arguments, derived from the tensors' shapes. Raises CheckpointError."""
    entries: dict[int, set[str]] = {}
    for name in state:
        if found := re.match(r"input_blocks\.(\d+)\.(\w+)\.", name):
            entries.setdefault(int(found[1]), set()).add(found[2])
    levels: list[list[int]] = [[]]
    for entry in sorted(entries.keys() - {0}):
        if "op" in entries[entry]:
            levels.append([])
        else:
            levels[-1].append(entry)
    if not all(levels) or len({len(level) for level in levels}) != 1:
        raise CheckpointError(
            "not ModelScope's U-Net: its levels have no residual blocks, or different numbers of them"
        )
    channels = _size(state, "input_blocks.0.0.weight", 1)
    check_latent_channels(channels)
    attends = ["1" in entries[level[0]] for level in levels]
    if not any(attends):
        raise CheckpointError("not ModelScope's U-Net: no level attends to the text")
    first = f"input_blocks.{levels[attends.index(True)][0]}.1"
    inner = _size(state, "input_blocks.0.1.proj_in.weight", 0)
    return {
        "in_channels": channels,
        "out_channels": _size(state, "out.2.weight", 0),
        "block_out_channels": [_size(state, f"input_blocks.{level[0]}.0.out_layers.3.weight", 0) for level in levels],
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock3D" if cross else "DownBlock3D" for cross in attends],
        "up_block_types": ["CrossAttnUpBlock3D" if cross else "UpBlock3D" for cross in reversed(attends)],
        "cross_attention_dim": _size(state, f"{first}.transformer_blocks.0.attn2.to_k.weight", 1),
        "attention_head_dim": max(1, inner // _FIRST_HEADS),
    }


def unet_from_vgen(state: State, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The U-Net's tensors under diffusers' names and in its shapes. A kernel of size 1 loses its axis.

    Raises CheckpointError for missing, extra or wrongly shaped tensors.
    """
    shapes = shapes_of(lambda: video_unet(arguments))
    layers = arguments["layers_per_block"]
    attends = [kind.startswith("Cross") for kind in arguments["up_block_types"]]
    names = {vgen_name(ours, layers, attends): ours for ours in shapes}
    wanted = {name: _with_kernel(shapes[ours], state.get(name)) for name, ours in names.items()}
    check_tensors(state, wanted, "ModelScope's U-Net")
    return {ours: state[name].reshape(shapes[ours]) for name, ours in names.items()}


def _with_kernel(shape: tuple[int, ...], given: Tensor | None) -> tuple[int, ...]:
    """The expected shape. If the file has a convolution in place of a linear layer, its axes of size 1 are added."""
    behind = () if given is None else tuple(given.shape[len(shape) :])
    return shape + behind if set(behind) == {1} else shape


def vgen_name(ours: str, layers: int, up_attends: list[bool]) -> str:
    """The file's name of a diffusers tensor. `up_attends`: whether each level on the way up attends, in order."""
    for new, old in _OUTER.items():
        if ours.startswith(f"{new}."):
            return old + ours.removeprefix(new)
    found = re.match(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", ours)
    if found is None:
        raise CheckpointError(f"{ours}: no ModelScope file has this tensor")
    side, level, part, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if part == "resnets":
        rest = re.sub(r"^\w+", lambda name: _RESNET[name[0]], rest)
    if side == "mid_block":
        # 0 resnet, 1 and 2 transformers, 3 resnet
        slot = _SLOTS[part] if "attentions" in part else f"{3 * index}{_SLOTS[part][1:]}"
        return f"middle_block.{slot}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.{rest.replace('conv', 'op', 1)}"
    if part == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.{3 if up_attends[level] else 1}.{rest}"
    first = 1 + level * (layers + 1) if side == "down_blocks" else level * (layers + 1)
    return f"{'input' if side == 'down_blocks' else 'output'}_blocks.{first + index}.{_SLOTS[part]}.{rest}"


def _size(state: State, name: str, axis: int) -> int:
    if name not in state or state[name].ndim <= axis:
        raise CheckpointError(f"not ModelScope's U-Net: missing {name}, or it has too few axes; {found_in(state)}")
    return int(state[name].shape[axis])
