"""Puts a personalised Stable Diffusion 2.1 into HiGen's spatial layers, as in Video LDM (Blattmann et al. 2023): only
the temporal layers belong to the video model, so the spatial layers can be exchanged.

Without its temporal layers, HiGen's U-Net has the shape of Stable Diffusion 2.1's. Its spatial weights were trained
further from there. So the difference between a fine-tune and its base is added; HiGen's weights are not replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from higen.errors import CheckpointError
from higen.families.higen.configuration import UNetConfig
from higen.families.higen.reference_names import TRANSFORMER
from higen.families.higen.unet import UNet
from higen.families.stable_diffusion.unet_source import read_unet
from higen.models.checkpoint_files import naming
from higen.models.companion_checkpoints import check_tensors
from higen.models.lora import Lora, merged
from higen.models.weights import Made, Maker, let_go, unmade

__all__ = ["diffusers_names", "with_difference", "with_loras"]

State = Mapping[str, Tensor]

_PREFIX = "unet."
_OWN = ("prior.", "context_pool.")
"""Layers of HiGen's spatial network that Stable Diffusion does not have."""

_RESNET = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embedding": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}
_OUTER = {
    "conv_in": "conv_in",
    "time.1": "time_embedding.linear_1",
    "time.3": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_MIDDLE = {".resnet": "resnets.0", ".spatial": "attentions.0", "_out": "resnets.1"}
_WHY = "HiGen predicts v, and both of its loops share these weights"


def diffusers_names(config: UNetConfig) -> dict[str, str]:
    """{our name: name in diffusers' UNet2DConditionModel} of HiGen's spatial tensors that Stable Diffusion has too."""
    return {_PREFIX + ours: _diffusers_name(ours) for ours in _spatial_shapes(config)}


def _spatial_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        spatial = UNet(config, temporal=False).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in spatial.items() if not name.startswith(_OWN)}


def _diffusers_name(ours: str) -> str:
    module, _, leaf = ours.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    if middle := re.match(r"middle(_out|\.resnet|\.spatial)\.(.+)", module):
        part = _MIDDLE[middle[1]]
        return f"mid_block.{part}.{_inner(part, middle[2])}.{leaf}"
    found = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(?:blocks\.(\d+)\.(\w+)\.(.+)|resample(?:\.conv)?)", module)
    assert found is not None, ours
    side, level, block, kind, rest = found.groups()
    place = f"{'down' if side == 'encoder' else 'up'}_blocks.{level}"
    if block is None:
        return f"{place}.{'down' if side == 'encoder' else 'up'}samplers.0.conv.{leaf}"
    part = "attentions" if kind == "spatial" else "resnets"
    return f"{place}.{part}.{block}.{_inner(part, rest)}.{leaf}"


def _inner(part: str, rest: str) -> str:
    """The diffusers name of a layer within a residual block or a transformer."""
    if part.startswith("resnets"):
        return _RESNET[rest]
    block = rest.removeprefix("block.")
    return rest if block == rest else f"transformer_blocks.0.{TRANSFORMER[block]}"


def with_difference(
    state: State, config: UNetConfig, finetune: Path, base: Path, prediction: str | None, notes: list[str]
) -> State:
    """HiGen's denoiser with finetune - base added to its spatial tensors, in float32; the dtypes do not change.

    finetune, base   Stable Diffusion 2.1 models, each a folder of the hub's layout or a single file
    prediction       what the models predict; needed for single files, which do not say it

    Raises CheckpointError for a U-Net of another shape or one that predicts epsilon, for values that are not finite,
    and if the two models are equal.
    """
    names, shapes = diffusers_names(config), _spatial_shapes(config)
    wanted = {names[_PREFIX + ours]: shape for ours, shape in shapes.items()}
    fine, plain = (_read(source, prediction, wanted, notes) for source in (finetune, base))
    types = [" and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in s.values()})) for s in (fine, plain)]
    if types[0] != types[1]:
        notes.append(
            f"{finetune.name} is stored as {types[0]}, {base.name} as {types[1]}: the difference includes rounding "
            "errors"
        )

    def difference(name: str) -> Tensor:
        made = fine[name].float() - plain[name].float()
        let_go(fine[name])
        let_go(plain[name])
        return made

    def adding(name: str) -> Maker:
        return lambda tensor: (tensor.float() + difference(name)).to(tensor.dtype)

    makers = dict[str, Maker]()
    for ours, theirs in names.items():
        added = difference(theirs)
        if not added.isfinite().all():
            raise CheckpointError(f"{finetune}: {theirs} minus that of {base} is infinite or not a number")
        if added.count_nonzero():
            # Computed again when it is written, because all differences together are as large as the network.
            makers[ours] = adding(theirs)
    changed = list(makers)
    if not changed:
        raise CheckpointError(f"{finetune}: its U-Net equals that of {base}, so it changes nothing")
    notes.append(
        f"{finetune.name} minus {base.name}: {len(changed)} of {len(names)} spatial tensors {_listed(changed)}"
    )
    notes.append(f"the text encoder and the autoencoder of {finetune.name} are left out")
    notes.append(_unverified(config))
    return Made(state, makers)


def _read(source: Path, prediction: str | None, wanted: Mapping[str, tuple[int, ...]], notes: list[str]) -> State:
    with naming(source):
        state, own = read_unet(source, notes.append)
        check_tensors(state, wanted, "a Stable Diffusion 2.1 U-Net, whose shape HiGen's spatial layers have")
        if own is not None and prediction not in (None, own):
            raise CheckpointError(f"prediction={prediction!r}: its scheduler says {own!r}")
        if own is None and prediction is None:
            raise CheckpointError("a single file does not say what it predicts: give --prediction v if it is v")
        if (own or prediction) != "v":
            raise CheckpointError(f"it predicts {own or prediction}: {_WHY}")
    return state


def with_loras(
    state: State, config: UNetConfig, loras: Sequence[Lora], prediction: str | None, notes: list[str]
) -> State:
    """HiGen's denoiser with adapters of Stable Diffusion 2.1 added to its spatial tensors.

    Raises CheckpointError for an adapter of another model, and if its file or `prediction` says that its model predicts
    epsilon.
    """
    for lora in loras:
        own = prediction or _prediction_of(lora.path)
        if own not in (None, "v"):
            raise CheckpointError(f"{lora.path}: an adapter of a model that predicts {own}: {_WHY}")
    names = diffusers_names(config)
    held = unmade(state)
    unet = merged({"unet": {theirs: held[ours] for ours, theirs in names.items()}}, loras, notes)["unet"]
    makers = {ours: unet.makers[theirs] for ours, theirs in names.items() if theirs in unet.makers}
    changed = list(makers)
    notes.append(f"adapters: {len(changed)} of {len(names)} spatial tensors {_listed(changed)}")
    notes.append(_unverified(config))
    return Made(state, makers)


def _prediction_of(path: Path) -> str | None:
    """What an adapter's model predicts, from the adapter's metadata (modelspec.prediction_type); None: unknown."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("modelspec.prediction_type")
    except (SafetensorError, OSError, json.JSONDecodeError):
        return None


def _listed(changed: Sequence[str]) -> str:
    """The number of changed tensors in each part of the U-Net, as text."""
    counts: dict[str, int] = {}
    for name in changed:
        found = re.match(r"unet\.((?:encoder|decoder)\.\d+|\w+)", name)
        part = found[1] if found else name
        counts[part] = counts.get(part, 0) + 1
    return "changed: " + ", ".join(f"{part} {count}" for part, count in counts.items())


def _unverified(config: UNetConfig) -> str:
    return (
        "the quality of what it draws was not verified: HiGen was fine-tuned from Stable Diffusion's weights, and "
        f"reads {config.context_tokens} learned tokens where Stable Diffusion reads the text"
    )
