"""Reads the released networks around the denoiser: OpenCLIP's text tower and Stable Diffusion's autoencoder.

Configurations are derived from the tensors' shapes, so the same code reads a tiny model and the released one.
Nothing is copied: every result is a view of its source. Only this module knows the names in these files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from higen.errors import CheckpointError
from higen.models.companions import autoencoder, text_encoder
from higen.models.nestings import below, found_in
from higen.tokenizer import build_clip_tokenizer

__all__ = [
    "autoencoder_arguments_from_ldm",
    "autoencoder_from_diffusers",
    "autoencoder_from_ldm",
    "autoencoder_ldm_name",
    "check_parts",
    "check_tensors",
    "kl_numbers",
    "shapes_of",
    "text_arguments_from_ldm",
    "text_arguments_from_openclip",
    "text_from_ldm",
    "text_from_openclip",
    "text_from_transformers",
]

State = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

_TEXT_PREFIX = "cond_stage_model.model."  # of OpenCLIP in a Stable Diffusion 2 checkpoint
_LDM_TEXT_PREFIX = "cond_stage_model.transformer."  # of OpenAI's CLIP in a Stable Diffusion 1 checkpoint
_AUTOENCODER_PREFIX = "first_stage_model."
_TEXT_HEAD_DIM = 64  # in every OpenCLIP text tower; the shapes do not show it
_LDM_SCALE = 0.18215

_TEXT_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT_UNUSED = re.compile(r"visual\.|logit_scale$|logit_bias$|text_projection$|attn_mask$")


def text_from_openclip(state: State) -> dict[str, Tensor]:
    """OpenCLIP's text tower as a CLIPTextModel without its last block, because HiGen reads the penultimate tokens.

    The visual tower, the projection and the logit scale are left out. `state` may also be a Stable Diffusion 2
    checkpoint. Raises CheckpointError listing the first ten missing, extra or wrongly shaped tensors.
    """
    tower = _text_tower(state)
    sizes = _text_sizes(tower)
    check_tensors(tower, _text_shapes(**sizes), "an OpenCLIP text tower")
    text = {
        "embeddings.token_embedding.weight": tower["token_embedding.weight"],
        "embeddings.position_embedding.weight": tower["positional_embedding"],
        "final_layer_norm.weight": tower["ln_final.weight"],
        "final_layer_norm.bias": tower["ln_final.bias"],
    }
    for i in range(sizes["blocks"] - 1):
        theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            for name, other in _TEXT_BLOCK.items():
                text[f"{ours}.{other}.{leaf}"] = tower[f"{theirs}.{name}.{leaf}"]
            for name, part in zip("qkv", tower[f"{theirs}.attn.in_proj_{leaf}"].chunk(3), strict=True):
                text[f"{ours}.self_attn.{name}_proj.{leaf}"] = part
    return text


def text_arguments_from_openclip(state: State) -> dict[str, Any]:
    """CLIPTextConfig's arguments for the result of `text_from_openclip` on the same tensors."""
    sizes = _text_sizes(_text_tower(state))
    return {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["inner"],
        "num_hidden_layers": sizes["blocks"] - 1,
        "num_attention_heads": max(1, sizes["width"] // _TEXT_HEAD_DIM),
        "max_position_embeddings": sizes["positions"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": sizes["vocabulary"] - 2,
        "eos_token_id": sizes["vocabulary"] - 1,
        "pad_token_id": 0,
    }


def text_from_transformers(state: State) -> dict[str, Tensor]:
    """A CLIPTextModel of any transformers version under our names: without `text_model.`, buffers and projection."""
    names = {name: name.removeprefix("text_model.") for name in state}
    unused = ("embeddings.position_ids", "text_projection.weight")
    return {ours: state[name] for name, ours in names.items() if ours not in unused}


def text_from_ldm(state: State) -> dict[str, Tensor]:
    """OpenAI's CLIP text model of a Stable Diffusion 1 checkpoint as a CLIPTextModel. Raises CheckpointError."""
    arguments = text_arguments_from_ldm(state)
    text = _ldm_text(state)
    check_tensors(text, shapes_of(lambda: text_encoder(arguments)), "CLIP's text model")
    return text


def text_arguments_from_ldm(state: State) -> dict[str, Any]:
    """CLIPTextConfig's arguments for the result of `text_from_ldm` on the same tensors. Raises CheckpointError."""
    text, what = _ldm_text(state), "CLIP's text model"
    vocabulary, width = _shape(text, "embeddings.token_embedding.weight", 2, what)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(text, "encoder.layers.0.mlp.fc1.weight", 2, what)[0],
        "num_hidden_layers": _count(text, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // _TEXT_HEAD_DIM),
        "max_position_embeddings": _shape(text, "embeddings.position_embedding.weight", 2, what)[0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _ldm_text(state: State) -> dict[str, Tensor]:
    found = below(state, _LDM_TEXT_PREFIX)
    if not found:
        raise CheckpointError(f"not CLIP's text model: no {_LDM_TEXT_PREFIX}*; {found_in(state)}")
    return text_from_transformers(found)


def _text_tower(state: State) -> dict[str, Tensor]:
    tower = _under(state, _TEXT_PREFIX)
    return {name: tensor for name, tensor in tower.items() if not _TEXT_UNUSED.match(name)}


def _text_sizes(tower: State) -> dict[str, int]:
    what = "an OpenCLIP text tower"
    vocabulary, width = _shape(tower, "token_embedding.weight", 2, what)
    inner, _ = _shape(tower, "transformer.resblocks.0.mlp.c_fc.weight", 2, what)
    blocks = _count(tower, r"transformer\.resblocks\.(\d+)\.")
    if blocks < 2:
        raise CheckpointError(
            f"{what} of {blocks} block: HiGen reads the output of the penultimate block, so it needs at least 2"
        )
    positions, _ = _shape(tower, "positional_embedding", 2, what)
    return {"vocabulary": vocabulary, "width": width, "inner": inner, "blocks": blocks, "positions": positions}


def _text_shapes(vocabulary: int, width: int, inner: int, blocks: int, positions: int) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (vocabulary, width),
        "positional_embedding": (positions, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    linears = {"attn.out_proj": (width, width), "mlp.c_fc": (inner, width), "mlp.c_proj": (width, inner)}
    for i in range(blocks):
        block = f"transformer.resblocks.{i}"
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
    return shapes


_MID = {
    "block_1": "resnets.0",
    "block_2": "resnets.1",
    "attn_1.norm": "attentions.0.group_norm",
    "attn_1.q": "attentions.0.to_q",
    "attn_1.k": "attentions.0.to_k",
    "attn_1.v": "attentions.0.to_v",
    "attn_1.proj_out": "attentions.0.to_out.0",
}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def autoencoder_from_ldm(state: State) -> dict[str, Tensor]:
    """Latent diffusion's AutoencoderKL (`first_stage_model.*`) as diffusers' AutoencoderKL.

    The attention's 1x1 convolutions become linear layers. Tensors of other networks in the checkpoint are left out.
    Raises CheckpointError listing the first ten missing, extra or wrongly shaped tensors.
    """
    theirs = _autoencoder(state)
    arguments = autoencoder_arguments_from_ldm(state)
    shapes = shapes_of(lambda: autoencoder("AutoencoderKL", arguments))
    names = {autoencoder_ldm_name(ours, len(arguments["block_out_channels"])): ours for ours in shapes}
    wanted = {
        name: shapes[ours] + ((1, 1) if ".attn_1." in name and len(shapes[ours]) == 2 else ())
        for name, ours in names.items()
    }
    check_tensors(theirs, wanted, "a latent-diffusion autoencoder")
    return {ours: theirs[name].reshape(shapes[ours]) for name, ours in names.items()}


def autoencoder_arguments_from_ldm(state: State) -> dict[str, Any]:
    """AutoencoderKL's arguments for the result of `autoencoder_from_ldm` on the same tensors."""
    theirs, what = _autoencoder(state), "a latent-diffusion autoencoder"
    levels = _count(theirs, r"encoder\.down\.(\d+)\.")
    widths = [_shape(theirs, f"encoder.down.{i}.block.0.conv1.weight", 4, what)[0] for i in range(levels)]
    if not widths:
        raise CheckpointError(f"not {what}: missing encoder.down.0.block.0.conv1.weight; {found_in(state)}")
    return {
        "in_channels": _shape(theirs, "encoder.conv_in.weight", 4, what)[1],
        "out_channels": _shape(theirs, "decoder.conv_out.weight", 4, what)[0],
        "latent_channels": _shape(theirs, "decoder.conv_in.weight", 4, what)[1],
        "block_out_channels": widths,
        "layers_per_block": _count(theirs, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in theirs,
        "use_post_quant_conv": "post_quant_conv.weight" in theirs,
        "scaling_factor": _LDM_SCALE,
    }


def autoencoder_from_diffusers(state: State) -> dict[str, Tensor]:
    """An AutoencoderKL of any diffusers version under its current names. Older versions name attention differently."""

    def today(name: str) -> str:
        head, _, rest = name.partition(".attentions.0.")
        part, _, leaf = rest.partition(".")
        return f"{head}.attentions.0.{_OLD_ATTENTION[part]}.{leaf}" if part in _OLD_ATTENTION else name

    # A checkpoint from latent diffusion's own code may have 1x1 convolutions in place of linear layers.
    return {
        today(name): tensor.flatten(1) if tensor.ndim == 4 and ".attentions.0." in name else tensor
        for name, tensor in state.items()
    }


def kl_numbers(arguments: Mapping[str, Any]) -> tuple[int, float, float]:
    """Pixels per latent cell, shift and scale of an AutoencoderKL: latents = (encoded - shift) * scale."""
    factor = 2 ** (len(arguments.get("block_out_channels", ())) - 1)
    return factor, float(arguments.get("shift_factor") or 0.0), float(arguments.get("scaling_factor", _LDM_SCALE))


def check_parts(
    network: str, clip: Mapping[str, Any], codec: Mapping[str, Any], text_width: object, channels: object
) -> None:
    """Raise CheckpointError if the text encoder or the autoencoder does not fit `network`, a denoiser that takes texts
    of width `text_width` and latents with `channels` channels.
    """
    for what, given, wanted in (
        ("text encoder's width", clip.get("hidden_size"), text_width),
        ("text encoder's vocabulary", clip.get("vocab_size"), build_clip_tokenizer().get_vocab_size()),
        ("autoencoder's latent channels", codec.get("latent_channels"), channels),
    ):
        if given != wanted:
            raise CheckpointError(f"the {what}: {given}, but {network} and CLIP's tokenizer want {wanted}")


def _autoencoder(state: State) -> dict[str, Tensor]:
    inner = _under(state, _AUTOENCODER_PREFIX)
    return {name: tensor for name, tensor in inner.items() if not name.startswith("loss.")}


def shapes_of(build: Callable[[], nn.Module]) -> Shapes:
    """The shapes of a network's tensors by higen's names. `build` runs on the meta device, so no memory is needed."""
    with torch.device("meta"):
        return {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def autoencoder_ldm_name(ours: str, levels: int) -> str:
    """Latent diffusion's name of a diffusers tensor. In its decoder, level 0 is the finest."""
    module, _, leaf = ours.rpartition(".")

    def level(match: re.Match[str]) -> str:
        return f"up.{levels - 1 - int(match[1])}."

    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"down_blocks\.(\d+)\.", r"down.\1."),
        (r"up_blocks\.(\d+)\.", level),
        *((rf"mid_block\.{re.escape(new)}(?=\.|$)", f"mid.{old}") for old, new in _MID.items()),
        (r"resnets\.(\d+)", r"block.\1"),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    for pattern, replacement in rules:
        module = re.sub(pattern, replacement, module)
    return f"{module}.{leaf}"


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it; all tensors if there are none."""
    return below(state, prefix) or dict(state)


def _count(state: State, pattern: str) -> int:
    """The length of a list of modules: one more than its largest index. The pattern's group is the index."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _shape(state: State, name: str, axes: int, what: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"not {what}: missing {name}; {found_in(state)}")
    if state[name].ndim != axes:
        raise CheckpointError(f"not {what}: {name} is {list(state[name].shape)}, {axes} axes are wanted")
    return tuple(state[name].shape)


def check_tensors(state: State, wanted: Shapes, what: str) -> None:
    """Raise CheckpointError listing the first ten missing, extra or wrongly shaped tensors, if there are any."""
    problems = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in state]
    problems += [f"extra {name} {list(state[name].shape)}" for name in sorted(set(state) - set(wanted))]
    problems += [
        f"{name} is {list(state[name].shape)}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        listed = "\n  ".join(problems[:10])
        raise CheckpointError(f"not {what}: {len(problems)} tensors do not fit, the first of them:\n  {listed}")
