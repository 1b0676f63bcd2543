"""Reads a single file of Stable Video Diffusion (`svd_xt.safetensors`) under the tensor names of the hub's folder.

The names are derived from the libraries' own module trees: every tensor of the trees must be in the file, and no
other tensor may be. Sources of the layout: generative-models' VideoUNet, VideoDecoder and the embedders of its
svd_xt.yaml.

model.diffusion_model.*                                  the U-Net: as in Stable Diffusion, with time_stack, time_mixer
conditioner.embedders.0.open_clip.model.visual.*         the image encoder, OpenCLIP's ViT-H
conditioner.embedders.3.encoder.{encoder,quant_conv}.*   the autoencoder that reads the picture
first_stage_model.decoder.*                              the decoder whose layers mix the frames
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError
from higen.families.stable_diffusion.ldm_names import PREFIX, ldm_name
from higen.families.svd.parts import CODEC, image_encoder, video_unet
from higen.models.companion_checkpoints import autoencoder_ldm_name, check_tensors, shapes_of
from higen.models.companions import autoencoder
from higen.models.nestings import below

__all__ = ["codec_arguments", "codec_from_ldm", "codec_ldm_name", "unet_arguments", "unet_from_ldm", "unet_ldm_name"]
__all__ += ["vision_arguments", "vision_from_ldm"]

State = Mapping[str, Tensor]

_HEAD_CHANNELS = 64
"""Channels per head in every attention of the U-Net."""

_VISION_HEAD_CHANNELS = 80
"""Channels per head of OpenCLIP's ViT-H. The tensors' shapes do not show it."""

_VISION = re.compile(r"conditioner\.embedders\.\d+\.open_clip\.model\.visual\.")
_READER = re.compile(r"conditioner\.embedders\.\d+\.encoder\.(?=encoder\.|quant_conv\.)")
_DECODER = "first_stage_model.decoder."
_LAYERS = 2
"""Residual blocks in each level of the autoencoder, and in its middle."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
_OUTER = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_PARTS = re.compile(
    r"(?P<block>.+\.resnets\.\d+)\.(?P<part>spatial_res_block|temporal_res_block|time_mixer)\.(?P<rest>.+)"
)
_BLOCK = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2"}
_BLOCK |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


# The U-Net.


def unet_arguments(state: State, frames: int) -> dict[str, Any]:
    """UNetSpatioTemporalConditionModel's arguments, derived from the tensors' shapes. Raises CheckpointError.

    `frames`: clip length in training.
    """
    unet = below(state, PREFIX)
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
        raise CheckpointError("its U-Net has levels without residual blocks, or with different numbers of them")
    widths = [_size(unet, f"input_blocks.{level[0]}.0.out_layers.3.weight", 0) for level in levels]
    attends = ["1" in entries[level[0]] for level in levels]
    if not any(attends):
        raise CheckpointError("no level of its U-Net attends to the picture")
    first = f"input_blocks.{levels[attends.index(True)][0]}.1"
    ids = _size(unet, "label_emb.0.0.weight", 1)
    kinds = ["CrossAttn" if cross else "" for cross in attends]
    return {
        "in_channels": _size(unet, "input_blocks.0.0.weight", 1),
        "out_channels": _size(unet, "out.2.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": [f"{kind}DownBlockSpatioTemporal" for kind in kinds],
        "up_block_types": [f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)],
        "cross_attention_dim": _size(unet, f"{first}.transformer_blocks.0.attn2.to_k.weight", 1),
        "transformer_layers_per_block": 1,
        "num_attention_heads": [max(1, width // _HEAD_CHANNELS) for width in widths],
        "addition_time_embed_dim": ids // 3,
        "projection_class_embeddings_input_dim": ids,
        "num_frames": frames,
    }


def unet_from_ldm(state: State, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The U-Net's tensors under diffusers' names. Raises CheckpointError for missing, extra or wrongly shaped ones."""
    shapes = shapes_of(lambda: video_unet(arguments))
    layers = arguments["layers_per_block"]
    attends = [kind.startswith("Cross") for kind in arguments["up_block_types"]]
    names = {unet_ldm_name(ours, layers, attends): ours for ours in shapes}
    theirs = below(state, PREFIX)
    check_tensors(theirs, {name: shapes[ours] for name, ours in names.items()}, "Stable Video Diffusion's U-Net")
    return {ours: theirs[name] for name, ours in names.items()}


def unet_ldm_name(ours: str, layers: int, up_attends: list[bool]) -> str:
    """The file's name of a diffusers tensor, without `model.diffusion_model.`. Arguments as in `ldm_name`."""
    for new, old in _OUTER.items():
        if ours.startswith(f"{new}."):
            return old + ours.removeprefix(new)
    if found := _PARTS.fullmatch(ours):
        place = ldm_name(f"{found['block']}.norm1.weight", layers, up_attends).removesuffix("in_layers.0.weight")
        if found["part"] == "time_mixer":
            return f"{place}time_mixer.{found['rest']}"
        name = ldm_name(f"{found['block']}.{found['rest']}", layers, up_attends)
        return name if found["part"] == "spatial_res_block" else f"{place}time_stack.{name.removeprefix(place)}"
    name = ldm_name(ours, layers, up_attends).replace("temporal_transformer_blocks.", "time_stack.")
    return name.replace("time_pos_embed.linear_1.", "time_pos_embed.0.").replace(
        "time_pos_embed.linear_2.", "time_pos_embed.2."
    )


# The image encoder.


def vision_arguments(state: State) -> dict[str, Any]:
    """CLIPVisionConfig's arguments, derived from the shapes of OpenCLIP's vision tower. Raises CheckpointError."""
    tower = _without(state, _VISION)
    width, patch = _size(tower, "conv1.weight", 0), _size(tower, "conv1.weight", 2)
    side = math.isqrt(_size(tower, "positional_embedding", 0) - 1)
    return {
        "hidden_size": width,
        "intermediate_size": _size(tower, "transformer.resblocks.0.mlp.c_fc.weight", 0),
        "projection_dim": _size(tower, "proj", 1),
        "num_hidden_layers": len({name.split(".")[2] for name in tower if name.startswith("transformer.resblocks.")}),
        "num_attention_heads": max(1, width // _VISION_HEAD_CHANNELS),
        "num_channels": _size(tower, "conv1.weight", 1),
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def vision_from_ldm(state: State, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """OpenCLIP's vision tower under transformers' names. Raises CheckpointError."""
    tower = _without(state, _VISION)
    found: dict[str, Tensor] = {}
    for name, tensor in tower.items():
        if not (block := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(\w+)", name)):
            found |= _outside_blocks(name, tensor)
            continue
        ours = f"vision_model.encoder.layers.{block[1]}"
        if block[2] == "attn" and block[3].startswith("in_proj_"):
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{ours}.self_attn.{part}_proj.{block[3].removeprefix('in_proj_')}"] = values
        else:
            found[f"{ours}.{_BLOCK.get(block[2], block[2])}.{block[3]}"] = tensor
    check_tensors(found, shapes_of(lambda: image_encoder(arguments)), "OpenCLIP's picture encoder")
    return found


def _outside_blocks(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "proj":
        return {"visual_projection.weight": tensor.T}
    known = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
    }
    known |= {f"ln_pre.{leaf}": f"pre_layrnorm.{leaf}" for leaf in ("weight", "bias")}
    known |= {f"ln_post.{leaf}": f"post_layernorm.{leaf}" for leaf in ("weight", "bias")}
    return {f"vision_model.{known.get(name, name)}": tensor}


# The autoencoder.


def codec_arguments(state: State) -> dict[str, Any]:
    """AutoencoderKLTemporalDecoder's arguments, derived from the tensors' shapes. Raises CheckpointError."""
    theirs = _codec(state)
    found = [re.match(r"encoder\.down\.(\d+)\.", name) for name in theirs]
    levels = 1 + max((int(match[1]) for match in found if match), default=-1)
    return {
        "in_channels": _size(theirs, "encoder.conv_in.weight", 1),
        "out_channels": _size(theirs, "decoder.conv_out.weight", 0),
        "latent_channels": _size(theirs, "decoder.conv_in.weight", 1),
        "block_out_channels": [_size(theirs, f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "layers_per_block": _LAYERS,
        "scaling_factor": 0.18215,
        "force_upcast": True,
    }


def codec_from_ldm(state: State, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The autoencoder under diffusers' names. Its 1x1 convolutions become linear layers. Raises CheckpointError."""
    theirs = _codec(state)
    shapes = shapes_of(lambda: autoencoder(CODEC, arguments))
    levels = len(arguments["block_out_channels"])
    names = {codec_ldm_name(ours, levels): ours for ours in shapes}
    wanted = {
        name: shapes[ours] + ((1, 1) if ".attn_1." in name and len(shapes[ours]) == 2 else ())
        for name, ours in names.items()
    }
    check_tensors(theirs, wanted, "Stable Video Diffusion's autoencoder")
    return {ours: theirs[name].reshape(shapes[ours]) for name, ours in names.items()}


def codec_ldm_name(ours: str, levels: int) -> str:
    """The file's name of a diffusers autoencoder tensor: `encoder.*`, `quant_conv.*` or `decoder.*`."""
    if ours.startswith("decoder.time_conv_out."):
        return ours.replace("time_conv_out", "conv_out.time_mix_conv")
    if not (found := _PARTS.fullmatch(ours)):
        return autoencoder_ldm_name(ours, levels)
    place = autoencoder_ldm_name(f"{found['block']}.norm1.weight", levels).removesuffix("norm1.weight")
    if found["part"] == "time_mixer":
        return f"{place}{found['rest']}"
    if found["part"] == "spatial_res_block":
        return autoencoder_ldm_name(f"{found['block']}.{found['rest']}", levels)
    layer, _, leaf = found["rest"].partition(".")
    return f"{place}time_stack.{_RESNET.get(layer, layer)}.{leaf}"


def _codec(state: State) -> dict[str, Tensor]:
    decoder = {f"decoder.{name}": tensor for name, tensor in below(state, _DECODER).items()}
    return {**_without(state, _READER), **decoder}


def _without(state: State, prefix: re.Pattern[str]) -> dict[str, Tensor]:
    """The tensors whose names begin with the pattern, without what it matches."""
    return {name[found.end() :]: tensor for name, tensor in state.items() if (found := prefix.match(name))}


def _size(state: State, name: str, axis: int) -> int:
    if name not in state or state[name].ndim <= axis:
        raise CheckpointError(f"not Stable Video Diffusion: {name} is missing, or has too few axes")
    return int(state[name].shape[axis])
