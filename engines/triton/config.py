"""config.pbtxt of every model of a repository. For a stage it follows from the stage table only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from higen.devices import device_index
from higen.engines.triton.interface import OUTPUTS, Field, inputs
from higen.engines.triton.service import Limits
from higen.manifest import Manifest
from higen.stages import Stage

__all__ = ["orchestrator_config", "stage_config"]

_KINDS = {"cpu": "KIND_CPU", "gpu": "KIND_GPU", "cuda": "KIND_GPU"}
"""Triton's names for devices. On "gpu" and "cuda" Triton uses every GPU, on "gpu:N" and "cuda:N" one GPU."""

_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


class _Word(str):
    """An enumeration's value or a boolean, written without quotes."""


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
    """The configuration of a stage as a Triton model. `fixed` has the sizes of fixed symbols.

    All other axes are -1. `profiles`: the indices of an engine's profiles that may be used. Requests of one shape are
    batched as they arrive, without delay: a delay would add to every denoising step. If a stage's first axis cannot
    hold several samples, its model does not batch: requests are never put together, and the first axis is listed like
    the others.
    """
    most = max_batch if stage.batch else 0
    inputs = [_tensor(tensor.name, tensor.dtype, tensor.shape, fixed, most > 0) for tensor in stage.inputs]
    outputs = [
        _tensor(name, tensor.dtype, tensor.shape, fixed, most > 0)
        for name, tensor in zip(stage.graph_outputs, stage.outputs, strict=True)
    ]
    group: dict[str, Any] = {"kind": _Word(_KINDS[device.partition(":")[0]]), "count": instances}
    if ":" in device:
        group["gpus"] = [device_index(device)]
    if profiles:
        group["profile"] = [str(index) for index in profiles]
    config: dict[str, Any] = {
        "name": stage.name,
        "backend": backend,
        "max_batch_size": most,
        "input": inputs,
        "output": outputs,
        "instance_group": [group],
    }
    if most:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": 0}
    if threads is not None:
        config["parameters"] = [_parameter("intra_op_thread_count", str(threads))]
    return _message(config)


def orchestrator_config(manifest: Manifest, limits: Limits, stages: Mapping[str, str]) -> str:
    """The configuration of `higen`. It is decoupled: one request has many answers.

    `stages`: the Triton backend of each stage that the repository has.
    """
    optional = {"optional": _Word("true")}
    needed = ("prompt",) if manifest.text else ()
    return _message(
        {
            "name": "higen",
            "backend": "python",
            "max_batch_size": 0,
            "input": [_field(field) | ({} if field.name in needed else optional) for field in inputs(manifest)],
            "output": [_field(field) for field in OUTPUTS],
            "model_transaction_policy": {"decoupled": _Word("true")},
            "instance_group": [{"kind": _Word("KIND_CPU"), "count": 1}],  # batches are formed within one instance
            "parameters": [_parameter("limits", limits.to_json()), _parameter("stages", json.dumps(dict(stages)))],
        }
    )


def _tensor(
    name: str, dtype: str, shape: tuple[str | int, ...], fixed: Mapping[str, int], batched: bool
) -> dict[str, Any]:
    """A tensor's configuration, without the first axis if Triton batches. A tensor without other axes is [1] for
    clients and [] for the stage.
    """
    dims = [n if isinstance(n, int) else fixed.get(n, -1) for n in shape[batched:]]
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
