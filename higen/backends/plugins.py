"""Processors that ONNX Runtime reaches through a plugin: a package with one library, an execution provider.

The environment variable HIGEN_OPENVINO_LIBRARY or HIGEN_WEBGPU_LIBRARY gives the path of another build of the library.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from higen.errors import BackendUnavailable, MissingExtra, RequestError, is_of_a_handler, quoted

__all__ = ["PLUGINS", "Placement", "Plugin"]

MOST_OPERATORS = 3
"""How many kinds of operators on the CPU a report names."""

_REGISTERING = threading.Lock()


@dataclass(frozen=True)
class Plugin:
    """A plugin's package, and what a session needs to run on its processor in float32.

    device      name in `Options.device` and of the extra in pyproject.toml
    package     distribution with the library; its module has the same name with underscores
    provider    ONNX Runtime's name of the execution provider
    metadata    entries that the provider's device must have
    wanted      what the provider needs, for the error if it offers no such device
    """

    device: str
    package: str
    provider: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    wanted: str = ""

    @property
    def variable(self) -> str:
        """The environment variable with the path of another library."""
        return f"HIGEN_{self.device.upper()}_LIBRARY"

    def library(self) -> str:
        """The path of the library.

        Raises MissingExtra without the package, and RequestError for an environment variable that names no file.
        """
        given = os.environ.get(self.variable, "")
        if given:
            if not Path(given).is_absolute() or not Path(given).is_file():
                raise RequestError(f"{self.variable}={quoted(given)}: the absolute path of the plugin's library")
            return given
        try:
            module = importlib.import_module(self.package.replace("-", "_"))
        except ImportError as error:
            raise MissingExtra(self.package, self.device, f"device={self.device!r}") from error
        try:
            return str(module.get_library_path())
        except (AttributeError, OSError, RuntimeError) as error:
            raise BackendUnavailable(f"device={self.device!r}: {self.package} has no library: {error}") from error

    def ep_device(self) -> Any:
        """The provider's device (OrtEpDevice). The library is registered once per process.

        Raises MissingExtra, RequestError (see `library`), and BackendUnavailable if ONNX Runtime is too old, if the
        library does not load, or if the provider offers no device on this machine.
        """
        if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
            raise BackendUnavailable(
                f"device={self.device!r}: ONNX Runtime {ort.__version__} is too old for it: "
                f"pip install --upgrade 'higen[{self.device}]'"
            )
        with _REGISTERING:
            offered = self._offered()
            if not offered:
                library = self.library()
                try:
                    ort.register_execution_provider_library(f"higen.{self.device}", library)
                except Exception as error:  # ONNX Runtime's errors have no other common base
                    if is_of_a_handler(error):
                        raise
                    # The library stays registered if it offered no device the first time.
                    if "already registered" not in str(error):
                        raise BackendUnavailable(f"device={self.device!r}: {library} does not load: {error}") from error
                offered = self._offered()
        for device in offered:
            if self.metadata.items() <= dict(device.ep_metadata).items():
                return device
        raise BackendUnavailable(f"device={self.device!r}: its plugin offers no device here. {self.wanted}")

    def _offered(self) -> list[Any]:
        return [device for device in ort.get_ep_devices() if device.ep_name == self.provider]

    def session(self, graph: str, options: ort.SessionOptions, threads: int | None) -> ort.InferenceSession:
        """A session of a graph. What the provider does not run, ONNX Runtime runs on the CPU: see `Placement`.

        Raises what `ep_device` and ONNX Runtime raise, and BackendUnavailable if the provider fails or runs nothing.
        """
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_provider_for_devices([self.ep_device()], self._options(threads))
        try:
            session = ort.InferenceSession(graph, options)
        except Exception as error:  # ONNX Runtime's errors have no other common base
            broken = {"InvalidGraph", "InvalidProtobuf", "NoSuchFile"}  # classes of ONNX Runtime's compiled module
            if is_of_a_handler(error) or type(error).__name__ in broken:
                raise
            raise BackendUnavailable(f"device={self.device!r}: {Path(graph).name} cannot run there: {error}") from error
        if not Placement.of(session, self.provider).placed:
            raise BackendUnavailable(f"device={self.device!r}: {Path(graph).name} has no node that can run there")
        return session

    def _options(self, threads: int | None) -> dict[str, str]:
        """The provider's options. OpenVINO by itself computes in bfloat16 or float16 where the processor can."""
        if self.device != "openvino":
            return {}
        chosen: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            chosen["INFERENCE_NUM_THREADS"] = threads
        return {"load_config": json.dumps({"CPU": chosen})}


@dataclass(frozen=True)
class Placement:
    """Where a session's nodes run. `placed`: nodes on the provider; `elsewhere`: operators of the nodes on the CPU."""

    placed: int
    elsewhere: Counter[str]

    @classmethod
    def of(cls, session: ort.InferenceSession, provider: str) -> Placement:
        """The placement of a session that was made with `Plugin.session`."""
        placed, elsewhere = 0, Counter[str]()
        for part in session.get_provider_graph_assignment_info():
            if part.ep_name == provider:
                placed += len(part.get_nodes())
            else:
                elsewhere.update(node.op_type for node in part.get_nodes())
        return cls(placed, elsewhere)

    def __str__(self) -> str:
        """For reports: "" if everything runs on the provider."""
        if not self.elsewhere:
            return ""
        named = ", ".join(f"{count} {name}" for name, count in self.elsewhere.most_common(MOST_OPERATORS))
        more = ", ..." if len(self.elsewhere) > MOST_OPERATORS else ""
        total = self.elsewhere.total()
        return f"{total} of {total + self.placed} nodes on the CPU: {named}{more}"


PLUGINS = {
    plugin.device: plugin
    for plugin in (
        Plugin(
            "openvino",
            "onnxruntime-ep-openvino",
            "OpenVINOExecutionProvider",
            {"ov_device": "CPU"},
            "It runs on Intel processors only",
        ),
        Plugin(
            "webgpu",
            "onnxruntime-ep-webgpu",
            "WebGpuExecutionProvider",
            {},
            "It needs a GPU and its driver, on Linux for Vulkan (libvulkan.so.1). "
            "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 in the environment also allows a driver that computes on the CPU",
        ),
    )
}
"""The plugins by the name of their device."""
