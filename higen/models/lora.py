"""Merges low-rank adapters (Hu et al. 2021) into weights: W + scale (alpha / r) up down.

Three naming schemes are in use:

    kohya       lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha; lora_te_text_model_...
    PEFT        unet.down_blocks.0...to_q.lora_A.weight, .lora_B.weight; text_encoder.text_model...
    diffusers   unet.down_blocks.0...attn1.processor.to_q_lora.down.weight, .up.weight (before PEFT)

A family with other layer names than diffusers passes a function that translates them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from higen.errors import CheckpointError
from higen.models.checkpoint_files import naming, read_state
from higen.models.weights import Made, Maker, unmade
from higen.paths import given_path

__all__ = ["Lora", "merged", "parse_lora"]

State = Mapping[str, Tensor]

_PART = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<kohya>down|up)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.default)?\.weight"
    r"|(?:_lora|\.lora_linear_layer|\.lora)\.(?P<old>down|up)\.weight"
    r"|\.(?P<alpha>alpha))"
)
_DOWN = ("down", "A")
_OTHER = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lora_mid": "LoCon with a core tensor",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "on_input": "IA3",
}
"""Parts of tensor names of other kinds of adapters, which are computed differently."""


@dataclass(frozen=True)
class Lora:
    """A file and its factor: 0 changes nothing, a negative factor subtracts the adapter. Raises CheckpointError."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", given_path(self.path, "lora"))
        if not math.isfinite(self.scale):
            raise CheckpointError(f"{self.path}: scale={self.scale}: a finite number")


@dataclass
class _Factors:
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    names: list[str] = field(default_factory=list)


def parse_lora(text: str) -> Lora:
    """Read FILE or FILE:SCALE. Raises CheckpointError."""
    path, colon, scale = text.rpartition(":")
    try:
        return Lora(Path(path), float(scale)) if colon else Lora(Path(text))
    except ValueError:
        return Lora(Path(text))


def merged(
    states: Mapping[str, State],
    loras: Sequence[Lora],
    notes: list[str],
    nested: Mapping[str, str] | None = None,
    renamed: Callable[[str], str] = lambda name: name,
) -> dict[str, Made]:
    """The weights with all adapters added, in the given order. A weight is computed when it is accessed.

    states  {"unet": tensors by diffusers' names, "text_encoder": tensors by transformers' names}
    nested  {network: prefix that its names have only in adapters}; transformers before 5 has "text_model."
    renamed returns the name in `states` of a layer for its name in an adapter, with dots or underscores
    notes   gets a line for each adapter: how many layers it changes, and which of its tensors are not used

    Raises CheckpointError for a file that is not an adapter, another kind of adapter, an adapter that fits none of the
    networks, factors that do not fit the layer's shape, and values that are not finite.
    """
    shapes = {network: unmade(state) for network, state in states.items()}
    makers: dict[str, dict[str, Maker]] = {network: {} for network in states}
    for lora in loras:
        with naming(lora.path):
            notes.append(_merge(shapes, makers, lora, nested or {}, renamed))
    return {network: Made(state, makers[network]) for network, state in states.items()}


def _merge(
    states: Mapping[str, State],
    makers: Mapping[str, dict[str, Maker]],
    lora: Lora,
    nested: Mapping[str, str],
    renamed: Callable[[str], str],
) -> str:
    """Check an adapter and add its makers after those of the previous adapters. Returns its note."""
    given = read_state(lora.path)
    for word, kind in _OTHER.items():
        if named := next((name for name in given if word in name), None):
            raise CheckpointError(f"a {kind} adapter ({named}): only LoRA, with one product of two matrices, is read")
    layers, unused = _layers(given)
    if not layers:
        raise CheckpointError(
            f"not a LoRA: no tensor name ends like a LoRA's; one of its names is {next(iter(given), 'none')!r}"
        )
    alphas = _alphas(lora.path)
    places = {network: _places(state, nested.get(network, "")) for network, state in states.items()}
    changed = 0
    for module, factors in layers.items():
        target = _target(renamed(module), places)
        if target is None:
            unused += factors.names
            continue
        network, name = target
        product = _product(module, states[network][name].shape, factors, lora.scale, alphas)
        makers[network][name] = _after(makers[network].get(name), product)
        changed += 1
    if not changed:
        raise CheckpointError(f"does not fit any layer of the model; its first layer is {next(iter(layers))!r}")
    left = f"; not used: {', '.join(unused)}" if unused else ""
    return f"{lora.path.name}: {changed} layers changed, scale {lora.scale:g}{left}"


def _layers(given: State) -> tuple[dict[str, _Factors], list[str]]:
    """{layer's name in the adapter: its factors}, and the names of the tensors that are not factors."""
    layers: dict[str, _Factors] = {}
    unused = []
    for name, tensor in given.items():
        part = _PART.fullmatch(name)
        if part is None:
            unused.append(name)
            continue
        factors = layers.setdefault(part["module"].replace(".processor.", "."), _Factors())
        factors.names.append(name)
        if part["alpha"]:
            factors.alpha = float(tensor)
        elif (part["kohya"] or part["peft"] or part["old"]) in _DOWN:
            factors.down = tensor
        else:
            factors.up = tensor
    return layers, unused


def _alphas(path: Path) -> dict[str, float]:
    """PEFT's alpha for each network ("" for all), from the metadata that diffusers writes into the file."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    found = {}
    for name, value in stored.items() if isinstance(stored, dict) else ():
        network, _, key = name.rpartition(".")
        if key == "lora_alpha" and isinstance(value, (int, float)):
            found[network] = float(value)
    return found


def _places(state: State, nested: str) -> dict[str, str]:
    """{layer's name: name of its weight}, for the layer's name with dots and, as in kohya's files, with underscores."""
    places: dict[str, str] = {}
    for name, tensor in state.items():
        if name.endswith(".weight") and tensor.ndim in (2, 4):
            for module in (name.removesuffix(".weight"), nested + name.removesuffix(".weight")):
                places[module] = places[module.replace(".", "_")] = name
    return places


_PREFIXES = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
    "base_model.model.": "unet",
}


def _target(module: str, places: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """The network and the name of the weight to which a layer of an adapter is added; None if there is none."""
    prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), "")
    network = _PREFIXES.get(prefix, "unet")
    inner = module.removeprefix(prefix)
    own = places.get(network, {})
    # Before PEFT, diffusers called the output projection to_out, and a text encoder's projections to_q, ...
    renamed = re.sub(r"\bto_([qkv])$", r"\1_proj", inner)
    renamed = re.sub(r"\bto_out$", "out_proj", renamed)
    for name in (inner, f"{inner}.0", renamed):
        if name in own:
            return network, own[name]
    return None


def _after(before: Maker | None, added: Maker) -> Maker:
    return added if before is None else lambda weight: added(before(weight))


def _product(module: str, shape: torch.Size, factors: _Factors, scale: float, alphas: Mapping[str, float]) -> Maker:
    """The function that adds the product of a layer's factors to its weight, in float32; the dtype does not change."""
    down, up = factors.down, factors.up
    if down is None or up is None:
        raise CheckpointError(f"{module}: has only one of a LoRA's two factors")
    rank = down.shape[0]
    fits = (
        up.flatten(1).shape == (shape[0], rank)
        and down.flatten(1).shape[1] == shape[1:].numel()
        and (down.ndim == 2 or len(shape) == 2 or down.shape[2:] == shape[2:])
    )
    if not fits:
        raise CheckpointError(
            f"{module}: its factors {list(up.shape)} and {list(down.shape)} do not fit the model's layer "
            f"{list(shape)}: the adapter is for another model"
        )
    if not (down.isfinite().all() and up.isfinite().all()):
        raise CheckpointError(f"{module}: has values that are infinite or not a number")
    network = next((name for name in alphas if module.startswith(f"{name}.")), "")
    alpha = factors.alpha if factors.alpha is not None else alphas.get(network, float(rank))

    def added(weight: Tensor) -> Tensor:
        product = (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape)
        return torch.add(weight.float(), product, alpha=scale * alpha / rank).to(weight.dtype)

    return added
