"""Reads ControlNets: a diffusers folder, or one file with the authors' or diffusers' tensor names.

Authors' names: control_model.input_hint_block.0.weight, control_model.input_blocks.1.0.in_layers.0.weight
diffusers':     controlnet_cond_embedding.conv_in.weight, down_blocks.0.resnets.0.norm1.weight
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError, quoted
from higen.families.stable_diffusion.ldm_names import ldm_name
from higen.models import companion_checkpoints as companions
from higen.models.checkpoint_files import folder_state, naming, read_json, read_names, read_state
from higen.models.companions import quiet_import
from higen.models.control_net import CONTROL, check_base, control_net, control_net_arguments
from higen.models.nestings import below
from higen.models.weights import joined

__all__ = ["KINDS", "ControlSource", "is_control", "read_control", "with_control", "without_controls"]

KINDS = ("edges", "given")
"""The picture in a request: one from which higen computes edges, or itself a map of the network's kind."""

_PREFIX = "control_model."
_AUTHORS, _DIFFUSERS = "input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"
_CLASS, _SPARSE = "ControlNetModel", "SparseControlNetModel"

_OUTER = {
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
}

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class ControlSource:
    """A control network under diffusers' names. `edges`: its input is the edges of the picture in a request."""

    arguments: dict[str, Any]
    state: dict[str, Tensor]
    edges: bool
    name: str


def is_control(path: Path) -> bool:
    """Whether a folder or file holds a control network of any kind. Only names are read."""
    return _kind(path) is not None


def _kind(path: Path) -> str | None:
    """The class of a control network; None for anything else."""
    if path.is_dir():
        config = path / "config.json"
        found = str(read_json(config).get("_class_name")) if config.is_file() else ""
        return found if "ControlNet" in found else None
    names = read_names(path)
    if not any(name.endswith((_AUTHORS, _DIFFUSERS)) for name in names):
        return None
    return _SPARSE if any(".motion_modules." in name for name in names) else _CLASS


def without_controls(paths: list[Path], kind: object) -> tuple[list[Path], Path | None]:
    """The sources that are not ControlNets, and the ControlNet among them, if any.

    Raises CheckpointError for a control network of another class, for several ControlNets, for a ControlNet if `kind`
    is not one of KINDS, and for a `kind` without a ControlNet.
    """
    found = [path for path in paths if is_control(path)]
    for path in found:
        if (is_a := _kind(path)) != _CLASS:
            what = f"a SparseCtrl model ({is_a})" if is_a == _SPARSE else f"a {is_a}"
            raise CheckpointError(f"{path}: {what}, and no family here runs it; a {_CLASS} is wanted")
    if len(found) > 1:
        raise CheckpointError(f"{', '.join(map(str, found))}: {len(found)} ControlNets: one is wanted")
    wanted = "--control-kind edges (pictures are given) or --control-kind given (maps are given)"
    if not found and kind is not None:
        raise CheckpointError(f"control_kind={quoted(kind)}: no ControlNet is among the sources")
    if found and kind not in KINDS:
        said = (
            "the files do not say what input the ControlNet takes" if kind is None else f"control_kind={quoted(kind)}"
        )
        raise CheckpointError(f"{found[0]}: {said}: {wanted}")
    return [path for path in paths if path not in found], found[0] if found else None


def read_control(path: Path, kind: str, unet: Mapping[str, Any], factor: int, notes: list[str]) -> ControlSource:
    """Read a ControlNet. `unet`: the arguments of its U-Net, a UNet2DConditionModel or UNetMotionModel.

    Raises CheckpointError if it is not a ControlNet, or if it is made for another base model.
    """
    with naming(path):
        if path.is_dir():
            arguments = control_net_arguments(read_json(path / "config.json"))
            state = folder_state(path, ("diffusion_pytorch_model",), notes.append)
        else:
            arguments, state = _single_file(read_state(path, notes.append), unet)
        check_base(arguments, unet, factor)
        shapes = companions.shapes_of(lambda: control_net(arguments))
        companions.check_tensors(state, shapes, "a ControlNet for this U-Net")
    notes.append(f"{path} has its own licence")
    return ControlSource(arguments, state, kind == "edges", path.name if path.is_dir() else path.stem)


def with_control(unet: State, control: ControlSource | None) -> State:
    """The tensors of a U-Net and of its control network, in one file."""
    if control is None:
        return unet
    return joined(unet, {f"{CONTROL}.{name}": tensor for name, tensor in control.state.items()})


def _single_file(state: State, unet: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of a ControlNet, derived from its U-Net as in diffusers, and its tensors."""
    authors = any(name.removeprefix(_PREFIX) == _AUTHORS for name in state)
    own = below(state, _PREFIX) if any(name.startswith(_PREFIX) for name in state) else dict(state)
    with quiet_import("diffusers", "the control network"):
        from diffusers import ControlNetModel
    known = inspect.signature(ControlNetModel.__init__).parameters
    arguments = {name: value for name, value in _of_pictures(unet).items() if name in known}
    hint = "input_hint_block.{}.weight" if authors else "controlnet_cond_embedding.{}.weight"
    arguments["conditioning_embedding_out_channels"] = _embedding(own, hint, authors)
    if not authors:
        return arguments, own
    shapes = companions.shapes_of(lambda: control_net(arguments))
    layers, levels = arguments.get("layers_per_block", 2), len(arguments["conditioning_embedding_out_channels"])
    names = {_authors_name(ours, layers, levels): ours for ours in shapes}
    if missing := [name for name in names if name not in own]:
        raise CheckpointError(f"not a ControlNet for this U-Net: missing {missing[0]}")
    if extra := [name for name in own if name not in names]:
        raise CheckpointError(f"not a ControlNet for this U-Net: it also has {extra[0]}")
    return arguments, {ours: own[name] for name, ours in names.items()}


def _of_pictures(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an image U-Net. If `unet` has motion modules, they are those of its image part."""
    found = dict(unet)
    if "down_block_types" in found:
        found["down_block_types"] = [kind.replace("Motion", "2D") for kind in found["down_block_types"]]
    if found.get("num_attention_heads") is not None:
        found["attention_head_dim"] = found.pop("num_attention_heads")
    return found


def _embedding(state: State, hint: str, authors: bool) -> list[int]:
    """Channels of each level of the network that encodes the control pictures."""
    authors_places = [str(4 * i) for i in range(16)]
    places = authors_places if authors else ["conv_in", *(f"blocks.{2 * i - 1}" for i in range(1, 16))]
    found = [int(state[hint.format(place)].shape[0]) for place in places if hint.format(place) in state]
    if len(found) < 2:
        raise CheckpointError("not a ControlNet: the network that reads its pictures is incomplete")
    return found


def _authors_name(ours: str, layers: int, levels: int) -> str:
    """The authors' name of a tensor. `levels`: of the network that encodes the control pictures."""
    for new, old in _OUTER.items():
        if ours.startswith(f"{new}."):
            return old + ours.removeprefix(new)
    if found := re.match(r"controlnet_down_blocks\.(\d+)\.(.+)", ours):
        return f"zero_convs.{found[1]}.0.{found[2]}"
    if found := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.+)", ours):
        return f"input_hint_block.{2 * int(found[1]) + 2}.{found[2]}"
    if found := re.match(r"controlnet_cond_embedding\.conv_out\.(.+)", ours):
        return f"input_hint_block.{4 * levels - 2}.{found[1]}"
    return ldm_name(ours, layers, [])
