"""One interface to three libraries: `tensorrt` 10, `tensorrt` 11 and `tensorrt_rtx`.

Their modules use the same names, but not every module has every name. Code checks for optional names with hasattr and
never compares version numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from higen.backends.plans import EXTRAS, PlanTensor
from higen.errors import EngineError, HigenError, MissingExtra

__all__ = ["SEVERE", "engine_tensors", "installed", "library", "make_logger", "network_tensors", "versions"]

SEVERE = ("INTERNAL_ERROR", "ERROR")
"""Severities of messages that make a result unusable."""


def installed(flavour: str) -> bool:
    """Whether a flavour's package is installed. It is not imported."""
    return importlib.util.find_spec(EXTRAS[flavour][0]) is not None


def library(flavour: str, purpose: str) -> Any:
    """A flavour's Python module. Raises MissingExtra if it is not installed, EngineError if it does not load."""
    package, extra = EXTRAS[flavour]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise MissingExtra(package, extra, purpose) from error
        raise _broken(package, purpose, error) from error
    except (ImportError, OSError, RuntimeError) as error:  # PyPI's stub, without its libraries, raises any of these
        raise _broken(package, purpose, error) from error


def _broken(package: str, purpose: str, error: Exception) -> EngineError:
    return EngineError(
        f"{purpose} needs the package {package!r}, which is installed but does not load: "
        f"{type(error).__name__}: {error}"
    )


def versions(flavours: Mapping[str, str]) -> dict[str, str | HigenError]:
    """Version of each flavour, or the error why it cannot be imported. `flavours`: what needs each one."""
    found: dict[str, str | HigenError] = {}
    for flavour, purpose in flavours.items():
        try:
            found[flavour] = str(library(flavour, purpose).__version__)
        except (MissingExtra, EngineError) as error:
            found[flavour] = error
    return found


def make_logger(trt: Any, on_line: Callable[[str, str], None]) -> Any:
    """A TensorRT logger that calls `on_line` with severity and text."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            on_line(severity.name, message)

    return Logger()


def network_tensors(trt: Any, network: Any) -> tuple[PlanTensor, ...]:
    """Inputs and outputs of an INetworkDefinition."""
    inputs = [("input", network.get_input(i)) for i in range(network.num_inputs)]
    outputs = [("output", network.get_output(i)) for i in range(network.num_outputs)]
    return tuple(_tensor(trt, kind, t.name, t.dtype, t.shape) for kind, t in [*inputs, *outputs])


def engine_tensors(trt: Any, engine: Any) -> tuple[PlanTensor, ...]:
    """Inputs and outputs of an ICudaEngine."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    kinds = {trt.TensorIOMode.INPUT: "input", trt.TensorIOMode.OUTPUT: "output"}
    return tuple(
        _tensor(trt, kinds[engine.get_tensor_mode(n)], n, engine.get_tensor_dtype(n), engine.get_tensor_shape(n))
        for n in names
    )


def _tensor(trt: Any, kind: Any, name: str, dtype: Any, shape: Any) -> PlanTensor:
    types = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.BOOL: "bool",
    }
    return PlanTensor(name, kind, types.get(dtype, str(dtype)), tuple(int(n) for n in shape))
