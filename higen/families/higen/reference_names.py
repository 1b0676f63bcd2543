"""Maps the tensors of a released HiGen state dict to our names. Only this module knows the reference's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from higen.errors import CheckpointError
from higen.families.higen.spec import UNetConfig
from higen.families.higen.unet import Denoiser

__all__ = ["TRANSFORMER", "config_from_reference", "from_reference", "module_paths", "reference_names"]

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
TRANSFORMER = {
    **{f"norm{i}": f"norm{i}" for i in (1, 2, 3)},
    **{f"attention{i}.{ours}": f"attn{i}.{theirs}" for i in (1, 2) for ours, theirs in _ATTENTION.items()},
    "feed_forward.expand": "ff.net.0.proj",
    "feed_forward.contract": "ff.net.2",
}
_RESBLOCK = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
    # conv1 has no dropout, so its convolution has the index 2. "temopral" is the reference's spelling.
    **{f"temporal.norms.{i}": f"temopral_conv.conv{i + 1}.0" for i in range(4)},
    **{f"temporal.convs.{i}": f"temopral_conv.conv{i + 1}.{3 if i else 2}" for i in range(4)},
}


def _transformer(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for name in ("norm", "proj_in", "proj_out"):
        yield f"{ours}.{name}", f"{theirs}.{name}"
    for name, other in TRANSFORMER.items():
        yield f"{ours}.block.{name}", f"{theirs}.transformer_blocks.0.{other}"


def _resblock(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for name, other in _RESBLOCK.items():
        yield f"{ours}.{name}", f"{theirs}.{other}"


def module_paths(config: UNetConfig) -> dict[str, str]:
    """{reference's block: our path}, such as {"input_blocks.1.0": "unet.encoder.0.blocks.0.resnet", ...}."""
    paths = {
        "context_embedding": "conditioner.context",
        "input_blocks.0.0": "unet.conv_in",
        "input_blocks.0.1": "unet.temporal_in",
    }

    def block(theirs: str, ours: str, attends: bool) -> None:
        paths[f"{theirs}.0"] = f"{ours}.resnet"
        if attends:
            paths[f"{theirs}.1"], paths[f"{theirs}.2"] = f"{ours}.spatial", f"{ours}.temporal"

    levels = len(config.channel_multipliers)
    entry = 1
    for i in range(levels):
        for j in range(config.blocks_per_level):
            block(f"input_blocks.{entry}", f"unet.encoder.{i}.blocks.{j}", config.attention_levels[i])
            entry += 1
        if i < levels - 1:
            paths[f"input_blocks.{entry}"] = f"unet.encoder.{i}.resample"
            entry += 1
    block("middle_block", "unet.middle", True)
    paths["middle_block.3"] = "unet.middle_out"
    entry = 0
    for position, i in enumerate(reversed(range(levels))):
        attends = config.attention_levels[i]
        for j in range(config.blocks_per_level + 1):
            block(f"output_blocks.{entry}", f"unet.decoder.{position}.blocks.{j}", attends)
            if i and j == config.blocks_per_level:
                paths[f"output_blocks.{entry}.{3 if attends else 1}"] = f"unet.decoder.{position}.resample"
            entry += 1
    return paths


def _modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(our module, the reference's module) for every module that holds parameters."""
    for i, j in ((0, 0), (2, 2)):
        yield f"unet.time.{i + 1}", f"time_embed.{j}"
        yield f"conditioner.motion.{i}", f"msim_embedding.{j}"
        yield f"conditioner.appearance.{i}", f"asim_embedding.{j}"
    yield "conditioner.context.text_in", "context_embedding.input_mapping"
    yield "conditioner.context.out", "context_embedding.output_mapping"
    for i in range(config.context_depth):
        for name, other in TRANSFORMER.items():
            yield f"conditioner.context.blocks.{i}.{name}", f"context_embedding.context_transformer.{i}.{other}"
    yield "unet.prior", "img_embedding"
    yield "unet.norm_out", "out.0"
    yield "unet.conv_out", "out.2"
    for theirs, ours in module_paths(config).items():
        leaf = ours.rpartition(".")[2]
        if leaf in ("resnet", "middle_out"):
            yield from _resblock(ours, theirs)
        elif leaf in ("spatial", "temporal", "temporal_in"):
            yield from _transformer(ours, theirs)
        elif leaf == "resample":
            # On the way down, higen has a bare convolution. The reference calls it `op`, and `conv` on the way up.
            yield (ours, f"{theirs}.op") if ".encoder." in ours else (f"{ours}.conv", f"{theirs}.conv")
        elif leaf == "conv_in":
            yield ours, theirs


def reference_names(config: UNetConfig) -> dict[str, str]:
    """{our parameter: reference's name}, such as {"unet.conv_in.weight": "input_blocks.0.0.weight", ...}."""
    modules = dict(_modules(config))
    with torch.device("meta"):
        ours = Denoiser(config).state_dict()
    names = {"conditioner.context.tokens": "context_embedding.tokens"}
    for name in ours:
        module, _, leaf = name.rpartition(".")
        if name not in names:
            names[name] = f"{modules[module]}.{leaf}"
    return names


def from_reference(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """A reference state dict under our names and in our shapes. The tensors are views, so nothing is copied.

    A kernel of size 1 or (3, 1, 1) loses its last axes of size 1. Raises CheckpointError listing the first ten
    missing, extra or wrongly shaped tensors.
    """
    names = reference_names(config)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Denoiser(config).state_dict().items()}
    problems = [f"missing {theirs} {list(shapes[ours])}" for ours, theirs in names.items() if theirs not in state]
    problems += [f"extra {name} {list(state[name].shape)}" for name in sorted(set(state) - set(names.values()))]
    converted = {}
    for ours, theirs in names.items():
        if theirs not in state:
            continue
        given, wanted = list(state[theirs].shape), list(shapes[ours])
        if given != wanted and not (given[: len(wanted)] == wanted and set(given[len(wanted) :]) == {1}):
            problems.append(f"{theirs} is {given}, wanted {wanted}")
        else:
            converted[ours] = state[theirs].reshape(wanted)
    if problems:
        listed = "\n  ".join(problems[:10])
        raise CheckpointError(f"{len(problems)} tensors do not fit the architecture, the first of them:\n  {listed}")
    return converted


def config_from_reference(arguments: Mapping[str, object]) -> UNetConfig:
    """The configuration for the keyword arguments of the reference's `UNetSD_HiGen`. Ineffective ones are ignored."""

    def sequence(name: str) -> tuple[float, ...]:
        value = arguments[name]
        if not isinstance(value, (list, tuple)):
            raise CheckpointError(f"{name}={value!r}: a list of numbers is wanted")
        return tuple(float(v) for v in value)

    def number(name: str, default: int) -> int:
        value = arguments.get(name, default)
        if not isinstance(value, int):
            raise CheckpointError(f"{name}={value!r}: a whole number is wanted")
        return value

    multipliers, scales = sequence("dim_mult"), sequence("attn_scales")
    return UNetConfig(
        in_channels=number("in_dim", 4),
        out_channels=number("out_dim", 4),
        base_channels=number("dim", 320),
        channel_multipliers=tuple(int(m) for m in multipliers),
        blocks_per_level=number("num_res_blocks", 2),
        attention_levels=tuple(0.5**i in scales for i in range(len(multipliers))),
        head_dim=number("head_dim", 64),
        first_temporal_heads=number("num_heads", 8),
        text_dim=number("y_dim", 1024),
        context_dim=number("context_dim", 1024),
        context_tokens=number("num_tokens", 16),
        context_depth=number("context_embedding_depth", 4),
    )
