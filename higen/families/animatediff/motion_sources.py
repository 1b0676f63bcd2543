"""Reads motion modules: a diffusers MotionAdapter folder, or one file with the authors' or diffusers' tensor names.

Authors' names: down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight
diffusers':     down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from higen.errors import CheckpointError
from higen.families.animatediff.spec import CLIP, FRAME
from higen.families.animatediff.unet import MOTION
from higen.models.checkpoint_files import folder_state, read_json, read_names, read_state
from higen.models.companions import quiet_import
from higen.models.nestings import found_in

__all__ = ["ADAPTER", "Motion", "diffusers_name", "is_motion", "read_motion"]

State = Mapping[str, Tensor]

ADAPTER = "MotionAdapter"

_HEADS = 8
"""The number of heads in the authors' motion modules. The tensors' shapes do not show it."""

_POSITIONS = {True: 32, False: 24}
"""Fewest training frames of any published motion module with (True) and without (False) a middle block."""

_PE = "pos_embed.pe"


@dataclass(frozen=True)
class Motion:
    """Motion modules under diffusers' names.

    widths      channels of each level on the way down
    layers      number of motion modules in each of these levels
    arguments   the arguments of UNetMotionModel that depend on the motion modules
    group_norm  one of `spec.GROUP_NORMS`, as in the code that the modules were made for
    """

    widths: tuple[int, ...]
    layers: tuple[int, ...]
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    group_norm: str


def is_motion(path: Path) -> bool:
    """Whether a folder or file holds motion modules or adapters trained on them. Only names are read."""
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and read_json(config).get("_class_name") == ADAPTER
    return any(f".{MOTION}." in name for name in read_names(path))


def read_motion(path: Path, notes: list[str]) -> Motion:
    """Read motion modules. Raises CheckpointError for anything else, and for modules with other inputs than text."""
    return _of_folder(path, notes) if path.is_dir() else _of_file(path, notes)


def _of_folder(folder: Path, notes: list[str]) -> Motion:
    given = read_json(folder / "config.json")
    if given.get("_class_name") != ADAPTER:
        raise CheckpointError(f"a {given.get('_class_name')}; a {ADAPTER} is wanted")
    with quiet_import("diffusers", "the motion modules"):
        from diffusers import MotionAdapter
    known = inspect.signature(MotionAdapter.__init__).parameters.values()
    config = {row.name: row.default for row in known if row.name != "self"} | given
    if config["conv_in_channels"] is not None:
        raise CheckpointError(f"conv_in_channels={config['conv_in_channels']!r}: {_PIA}")
    if config["motion_mid_block_layers_per_block"] != 1:
        many = config["motion_mid_block_layers_per_block"]
        raise CheckpointError(f"motion_mid_block_layers_per_block={many!r}: 1 is wanted, as in the published ones")
    widths = tuple(config["block_out_channels"])
    layers = config["motion_layers_per_block"]
    arguments = {
        "motion_num_attention_heads": config["motion_num_attention_heads"],
        "motion_max_seq_length": config["motion_max_seq_length"],
        "use_motion_mid_block": config["use_motion_mid_block"],
        "temporal_transformer_layers_per_block": config["motion_transformer_layers_per_block"],
        "temporal_transformer_layers_per_mid_block": config["motion_transformer_layers_per_mid_block"],
    }
    state = folder_state(folder, ("diffusion_pytorch_model",), notes.append)
    of_levels = (layers,) * len(widths) if isinstance(layers, int) else tuple(layers)
    return Motion(widths, of_levels, arguments, state, CLIP)


_PIA = "its first convolution takes a picture too, as PIA's does, and no family here runs it"


def _of_file(path: Path, notes: list[str]) -> Motion:
    given = read_state(path, notes.append)
    _refuse_others(given)
    authors = any(".temporal_transformer." in name or ".attention_blocks." in name for name in given)
    state = _with_one_table({diffusers_name(name): tensor for name, tensor in given.items()})
    layers = _counts(state, rf"down_blocks\.(\d+)\.{MOTION}\.(\d+)\.")
    widths = tuple(_width(state, f"down_blocks.{i}.{MOTION}.0.norm.weight") for i in range(len(layers)))
    blocks = rf"down_blocks\.(\d+)\.{MOTION}\.\d+\.transformer_blocks\.(\d+)\."
    depth = max(_counts(state, blocks), default=1)
    middle = any(name.startswith("mid_block.") for name in state)
    positions = next((tensor for name, tensor in state.items() if name.endswith(_PE)), None)
    if positions is not None and positions.ndim != 3:
        raise CheckpointError(f"its table of positions is {list(positions.shape)}: 3 axes are wanted")
    frames = _POSITIONS[middle] if positions is None else int(positions.shape[1])
    if positions is None:
        state = _with_positions(state, frames)
        notes.append(f"{path}: has no table of positions; positions are computed for at most {frames} frames")
    arguments = {
        "motion_num_attention_heads": _HEADS,
        "motion_max_seq_length": frames,
        "use_motion_mid_block": middle,
        "temporal_transformer_layers_per_block": depth,
        "temporal_transformer_layers_per_mid_block": depth,
    }
    return Motion(widths, layers, arguments, state, FRAME if authors else CLIP)


def _refuse_others(state: State) -> None:
    """Raise CheckpointError for an adapter and for another kind of model that contains motion modules."""
    if lora := next((name for name in state if "lora" in name), None):
        raise CheckpointError(f"a LoRA ({lora}): give it as --lora FILE:SCALE, after a motion module")
    if any("controlnet_cond_embedding" in name or "input_hint_block" in name for name in state):
        raise CheckpointError("a SparseCtrl model, a control network with motion modules: no family here runs it")
    if any(re.fullmatch(r"(unet\.)?conv_in\.weight", name) for name in state):
        tensor = next(tensor for name, tensor in state.items() if name.endswith("conv_in.weight"))
        what = _PIA if tensor.ndim > 1 and tensor.shape[1] != 4 else "it holds U-Net layers besides the motion modules"
        raise CheckpointError(f"conv_in.weight {list(tensor.shape)}: {what}")
    others = [name for name in state if f".{MOTION}." not in name]
    if others:
        raise CheckpointError(f"{len(others)} tensors are not part of a motion module, for example {others[0]}")


def diffusers_name(name: str) -> str:
    """The diffusers name of a tensor or layer of a motion module. Other names are returned unchanged.

    The parts of a name may be separated by dots, or by underscores as in kohya's LoRA files.
    """
    if MOTION not in name:
        return name
    name = re.sub(r"[._]temporal_transformer(?=[._])", "", name)
    name = re.sub(r"(?<=[._])attention_blocks[._](\d+)", lambda found: f"attn{int(found[1]) + 1}", name)
    name = re.sub(r"(?<=[._])norms[._](\d+)", lambda found: f"norm{int(found[1]) + 1}", name)
    return re.sub(r"(?<=[._])ff_norm(?=[._])", "norm3", name)


def _with_one_table(state: State) -> dict[str, Tensor]:
    """Keep one table of positions per block. The authors' files have one for each of a block's two attentions."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = re.sub(r"\.attn\d+\.pos_encoder\.pe$", f".{_PE}", name)
        if own in found and not (found[own].shape == tensor.shape and found[own].equal(tensor)):
            raise CheckpointError(
                f"{name}: its table of positions differs from that of the attention before it; they must be equal"
            )
        found[own] = tensor
    return found


def _with_positions(state: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    with quiet_import("diffusers", "the motion modules"):
        from diffusers.models.embeddings import SinusoidalPositionalEmbedding
    found = dict(state)
    for name, tensor in state.items():
        if name.endswith(".norm1.weight"):
            table = SinusoidalPositionalEmbedding(tensor.shape[0], frames).pe
            assert isinstance(table, torch.Tensor)
            found[f"{name.removesuffix('norm1.weight')}{_PE}"] = table
    return found


def _counts(names: Collection[str], pattern: str) -> tuple[int, ...]:
    """For each value 0, 1, ... of the pattern's first group: 1 + the largest value of its second group."""
    found: dict[int, int] = {}
    for name in names:
        if match := re.match(pattern, name):
            found[int(match[1])] = max(found.get(int(match[1]), 0), int(match[2]) + 1)
    if sorted(found) != list(range(len(found))) or not found:
        raise CheckpointError(f"no motion modules for every level; {found_in(names)}")
    return tuple(found[i] for i in range(len(found)))


def _width(state: State, name: str) -> int:
    if name not in state:
        raise CheckpointError(f"missing {name}, which every motion module has; {found_in(state)}")
    return int(state[name].shape[0])
