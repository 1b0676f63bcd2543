"""config.pbtxt of every model of a repository: those of the stages from the stage table alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from higen.engines.triton.interface import INPUTS, OUTPUTS, Field
from higen.engines.triton.service import Limits
from higen.stages import Stage

__all__ = ["KINDS", "orchestrator_config", "stage_config"]

KINDS = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}
"""Devices, and Triton's names for them."""

_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


class _Word(str):
    """An enumeration's value or a truth value: no quotes."""


def stage_config(
    stage: Stage,
    fixed: Mapping[str, int],
    *,
    backend: str,
    device: str,
    max_batch: int,
    instances: int,
    threads: int | None,
    profiles: Sequence[int] = (),
) -> str:
    """The configuration of a stage as a Triton model; `fixed` comes from `higen.stages.dimensions`.

    Axes that the model does not fix are -1. `profiles` of an engine that may be used, by index. Requests of one shape
    are batched as they come, without delay: a delay would be paid at every denoising step.
    """
    inputs = [_tensor(tensor.name, tensor.dtype, tensor.shape[1:], fixed) for tensor in stage.inputs]
    outputs = [
        _tensor(name, tensor.dtype, tensor.shape[1:], fixed)
        for name, tensor in zip(stage.graph_outputs, stage.outputs, strict=True)
    ]
    group: dict[str, Any] = {"kind": _Word(KINDS[device]), "count": instances}
    if profiles:
        group["profile"] = [str(index) for index in profiles]
    config: dict[str, Any] = {
        "name": stage.name,
        "backend": backend,
        "max_batch_size": max_batch,
        "input": inputs,
        "output": outputs,
        "instance_group": [group],
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
    }
    if threads is not None:
        config["parameters"] = [_parameter("intra_op_thread_count", str(threads))]
    return _message(config)


def orchestrator_config(limits: Limits) -> str:
    """The configuration of `higen`: decoupled, so that one request has many answers."""
    inputs = [_field(field) | {"optional": _Word("true")} for field in INPUTS]
    del inputs[0]["optional"]  # the prompt
    return _message(
        {
            "name": "higen",
            "backend": "python",
            "max_batch_size": 0,
            "input": inputs,
            "output": [_field(field) for field in OUTPUTS],
            "model_transaction_policy": {"decoupled": _Word("true")},
            "instance_group": [{"kind": _Word("KIND_CPU"), "count": 1}],  # batches are formed within one instance
            "parameters": [_parameter("limits", limits.to_json())],
        }
    )


def _tensor(name: str, dtype: str, shape: tuple[str | int, ...], fixed: Mapping[str, int]) -> dict[str, Any]:
    """A tensor without its batch axis. One that has no other axis is [1] outside and [] inside."""
    dims = [n if isinstance(n, int) else fixed.get(n, -1) for n in shape]
    tensor = {"name": name, "data_type": _Word(_TYPES[dtype]), "dims": dims or [1]}
    return tensor if dims else {**tensor, "reshape": {"shape": []}}


def _field(field: Field) -> dict[str, Any]:
    return {"name": field.name, "data_type": _Word(f"TYPE_{field.kind}"), "dims": list(field.dims)}


def _parameter(key: str, value: str) -> dict[str, Any]:
    return {"key": key, "value": {"string_value": value}}


def _message(fields: Mapping[str, Any], indent: str = "") -> str:
    """A protobuf message in text format."""
    lines = []
    for name, value in fields.items():
        several = isinstance(value, list) and value and isinstance(value[0], dict)
        for item in value if several else [value]:
            if isinstance(item, dict):
                lines.append(f"{indent}{name} {{\n{_message(item, indent + '  ')}{indent}}}")
            else:
                lines.append(f"{indent}{name}: {item if isinstance(item, _Word) else json.dumps(item)}")
    return "".join(f"{line}\n" for line in lines)
