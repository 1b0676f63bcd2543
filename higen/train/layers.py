"""Which parameters of a denoiser are trained: all, those of some layers, or low-rank adapters of layers (LoRA).

An adapter (Hu et al. 2021) belongs to a linear layer or a convolution with the weight W. Its factors up and down are
trained, and the layer computes with W + alpha / rank * up down, as PEFT defines it. The file has PEFT's names:
`unet.<layer>.lora_A.weight` (down) and `unet.<layer>.lora_B.weight` (up), with the layer's name in unet.safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from higen.errors import TrainingError
from higen.families.higen import unet
from higen.families.higen.spec import UNetConfig
from higen.staging import whole_file
from higen.train.checkpoints import reason
from higen.train.networks import Networks, Objective, spatial_names
from higen.train.settings import LoraSettings, Settings

__all__ = [
    "LORA",
    "denoiser_weights",
    "set_strength",
    "temporal_names",
    "trained_parameters",
    "whole_weights",
    "write_lora",
]

LORA = "lora.safetensors"
DOWN, UP = "lora_A.weight", "lora_B.weight"


def temporal_names(config: UNetConfig) -> list[str]:
    """Parameters of `Denoiser` that only clips use (`higen.families.higen.unet.temporal_names`)."""
    return [f"unet.{name}" for name in unet.temporal_names(config)]


def trained_parameters(objective: Objective, settings: Settings) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name. Freezes the others, and puts adapters into the networks if wanted."""
    config, layers = objective.denoiser.unet.config, settings.optimiser.layers
    if layers == "all" and not settings.lora.rank:
        return {name: p for name, p in objective.named_parameters() if p.requires_grad}
    if layers in ("all", "known"):
        prefix = "unet." if layers == "all" else "known."
        chosen = [name for name, _ in objective.denoiser.named_parameters() if name.startswith(prefix)]
    else:
        chosen = spatial_names(config) if layers == "spatial" else temporal_names(config)
    objective.denoiser.requires_grad_(False)
    if settings.lora.rank:
        return _adapted(objective, chosen, settings.lora, settings.run.seed)
    found = {f"denoiser.{name}": objective.denoiser.get_parameter(name) for name in chosen}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


class _Adapter(nn.Module):
    """A weight with its low-rank product added."""

    def __init__(self, weight: Tensor, rank: int, scale: float, random: torch.Generator) -> None:
        super().__init__()
        self.scale, self.strength = scale, 1.0
        # Initialised as in PEFT: down uniform in +-1 / sqrt(inputs), up zero.
        bound = 1 / math.sqrt(weight[0].numel())
        down = (2 * torch.rand((rank, *weight.shape[1:]), generator=random) - 1) * bound
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(weight.new_zeros((weight.shape[0], rank, *([1] * (weight.ndim - 2)))))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        return weight + _product(self.up, self.down, weight) * (self.scale * self.strength)


def set_strength(objective: Objective, strength: float) -> None:
    """Set the strength of the adapters in the networks, if there are any."""
    for module in objective.modules():
        if isinstance(module, _Adapter):
            module.strength = strength


def _product(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def _adapted(objective: Objective, chosen: list[str], lora: LoraSettings, seed: int) -> dict[str, nn.Parameter]:
    random, found = torch.Generator().manual_seed(seed), {}
    weights = {name.removesuffix(".weight") for name in chosen if name.endswith(".weight")}
    unets = [{f"unet.{name}": m for name, m in unet.named_modules()} for unet in objective.unets]
    for name, layer in unets[0].items():
        if name not in weights or not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        adapter = _Adapter(layer.weight.detach(), lora.rank, _scale(lora), random)
        for modules in unets:  # the still-picture network shares the weight
            if name in modules:
                register_parametrization(modules[name], "weight", adapter)
        found[f"denoiser.{name}.{DOWN}"], found[f"denoiser.{name}.{UP}"] = adapter.down, adapter.up
    return found


def _scale(lora: LoraSettings) -> float:
    return (lora.rank if lora.alpha is None else lora.alpha) / lora.rank


def denoiser_weights(networks: Networks) -> dict[str, nn.Parameter]:
    """The denoiser's weights under the objective's names."""
    return {f"denoiser.{name}": p for name, p in networks.denoiser.named_parameters()}


def whole_weights(base: Mapping[str, Tensor], trained: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """All weights by name: those of `base`, either replaced by the trained weights or with the adapters added."""
    found = {name: tensor.detach() for name, tensor in base.items()}
    if not settings.lora.rank:
        return {**found, **trained}
    for name, down in trained.items():
        if name.endswith(f".{DOWN}"):
            layer = name.removesuffix(f".{DOWN}")
            weight, up = found[f"{layer}.weight"], trained[f"{layer}.{UP}"].to(down)
            found[f"{layer}.weight"] = weight + _product(up, down, weight).to(weight) * _scale(settings.lora)
    return found


def write_lora(path: Path, trained: Mapping[str, Tensor], lora: LoraSettings) -> None:
    """Write the adapters in float32. Raises TrainingError if the file cannot be written."""
    tensors = {f"unet.{name.removeprefix('denoiser.')}": t.detach().cpu().contiguous() for name, t in trained.items()}
    known = {"unet.r": lora.rank, "unet.lora_alpha": _scale(lora) * lora.rank}
    try:
        with whole_file(path) as temporary:
            # A single metadata entry, because safetensors writes several entries in random order.
            save_file(tensors, temporary, {"lora_adapter_metadata": json.dumps(known)})
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be written: {reason(error)}") from error
