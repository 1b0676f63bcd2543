"""Finds the weights in a checkpoint, and removes the names of training wrappers from the tensors' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError, quoted

__all__ = ["below", "found_in", "unwrapped", "weights_of"]

AVERAGES = ("ema_state_dict", "ema", "model_ema", "params_ema", "g_ema", "ema_model", "shadow")
PLAIN = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params",
    "net",
    "network",
    "generator",
    "weights",
)
"""Keys under which training loops store averages of the weights, and the weights. The first with tensors is used."""

DEPTH = 3
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that do not belong to the network: from DataParallel, torch.compile and FSDP."""
SHOWN = 6
LONG = 100
"""A name of at most this many letters is shown in full in a message."""


def weights_of(loaded: object) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint by name, and a note if there are several sets of weights.

    Averages are preferred to weights if every weight has an average. Both are preferred to tensors at the top level.
    Raises CheckpointError for a checkpoint without tensors; the message says what it contains.
    """
    state, note = _weights(loaded, DEPTH)
    if not state:
        raise CheckpointError(
            f"holds no tensors by name, not even under {', '.join(map(repr, (*PLAIN, *AVERAGES)))}; {_seen(loaded)}"
        )
    return _renamed(state), note


def _weights(loaded: object, depth: int) -> tuple[dict[str, Any], str]:
    if not isinstance(loaded, Mapping) or not depth:
        return {}, ""
    nested = {key: _weights(loaded[key], depth - 1) for key in (*AVERAGES, *PLAIN) if key in loaded}
    nested = {key: found for key, found in nested.items() if found[0]}
    averages = next((key for key in AVERAGES if key in nested), None)
    plain = next((key for key in PLAIN if key in nested), None)
    if plain is None and averages is None:
        tensors = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
        return {name: tensor.detach() for name, tensor in tensors.items() if isinstance(name, str)}, ""
    taken = averages if plain is None else plain
    if plain is not None and averages is not None and _names(nested[plain][0]) <= _names(nested[averages][0]):
        taken = averages
    assert taken is not None
    state, note = nested[taken]
    if others := [key for key in nested if key != taken]:
        note = f"the weights under {taken!r} are used; {', '.join(map(repr, others))} is left out"
    return state, note


def _names(state: Iterable[str]) -> set[str]:
    return {unwrapped(name) for name in state}


def unwrapped(name: str) -> str:
    """A tensor's name without the parts that wrappers around a network add."""
    *parts, leaf = name.split(".")
    return ".".join([*(part for part in parts if part not in _WRAPPERS), leaf])


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (short := unwrapped(name)) in renamed:
            raise CheckpointError(f"two tensors are called {short} without {', '.join(_WRAPPERS)} in their names")
        renamed[short] = tensor
    return renamed


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def found_in(state: Iterable[str]) -> str:
    """The first names of tensors, for a message."""
    names = list(state)
    more = ", ..." if len(names) > SHOWN else ""
    shown = ", ".join(name if len(name) <= LONG else quoted(name) for name in names[:SHOWN])
    return f"it has {len(names)} tensors: {shown}{more}" if names else "it has no tensors"


def _seen(loaded: object) -> str:
    if isinstance(loaded, Mapping):
        keys = [f"{quoted(key)} ({_kind(value)})" for key, value in list(loaded.items())[:SHOWN]]
        return f"it has {', '.join(keys)}{', ...' if len(loaded) > SHOWN else ''}" if keys else "it is empty"
    return f"it is a {_kind(loaded)}"


def _kind(value: object) -> str:
    """The kind of a value, for a message. `pickles._Inert` stands for an object of another library, mostly an array."""
    name = type(value).__name__
    return "an array or object, and no tensor" if name == "_Inert" else name
