"""The ONNX Runtime backend: graphs whose weights lie in the model's safetensors files. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from higen.bundle import Bundle, graph_file, weights_file
from higen.errors import BackendError, BackendUnavailable, IntegrityError
from higen.stages import STAGES, check_inputs, dimensions

__all__ = ["OnnxBackend"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class _Session:
    session: ort.InferenceSession
    device: str


class OnnxBackend:
    """Runs every stage in ONNX Runtime. A session is made when its stage is first used, and freed by `close`."""

    name = "onnx"

    def __init__(
        self, bundle: Bundle, device: str | None = None, threads: int | None = None, verify: bool = True
    ) -> None:
        """`device`: "cpu" or "cuda"; CUDA where ONNX Runtime has it and it works. `threads` of one stage on a CPU;
        None: ONNX Runtime's choice. `verify`: check each file's sha256 when it is first used.

        Raises BackendUnavailable for another device, or one that this build of ONNX Runtime lacks.
        """
        kind = device.partition(":")[0] if device else None
        if kind is not None and kind not in PROVIDERS:
            raise BackendUnavailable(f"device={device!r}: ONNX Runtime is used on {', '.join(map(repr, PROVIDERS))}")
        available = ort.get_available_providers()
        if kind is not None and PROVIDERS[kind] not in available:
            raise BackendUnavailable(f"device={device!r}: this ONNX Runtime has {', '.join(available)}")
        self.bundle = bundle
        self._device = kind or ("cuda" if PROVIDERS["cuda"] in available else "cpu")
        self._required = kind is not None
        self._threads = threads
        self._verify = verify
        self._verified: set[str] = set()
        self._sessions: dict[str, _Session] = {}
        self._fixed = dimensions(bundle.config)

    def prepare(self, stage: str) -> None:
        """Make a stage's session. Raises BackendUnavailable (no graph) or IntegrityError (graph or weights broken)."""
        if stage not in self._sessions:
            self._sessions[stage] = self._session(stage)

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; see `Backend.run`. Tensors are numpy arrays or OrtValues; results are OrtValues."""
        self.prepare(stage)
        spec, made = STAGES[stage], self._sessions[stage]
        values = {name: _ort_value(value) for name, value in tensors.items()}
        check_inputs(spec, {name: _Shaped.of(value) for name, value in values.items()}, self._fixed)
        binding = made.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in spec.graph_outputs:
            binding.bind_output(name, made.device)
        try:
            made.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            raise BackendError(f"{stage}: ONNX Runtime failed: {error}") from error
        return dict(zip((t.name for t in spec.outputs), binding.get_outputs(), strict=True))

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """An OrtValue as a numpy array on the host."""
        return tensor.numpy() if isinstance(tensor, ort.OrtValue) else np.asarray(tensor)

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()

    def _session(self, stage: str) -> _Session:
        name = graph_file(stage)
        if name not in self.bundle.files:
            raise BackendUnavailable(f"no {name} in {self.bundle.path} (make it: higen-export onnx)")
        for file in (name, weights_file(stage)):
            self.bundle.file(file, self._verify and file not in self._verified)
            self._verified.add(file)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        wanted: Sequence[str] = [PROVIDERS[self._device]]
        if self._device != "cpu":
            wanted = [*wanted, PROVIDERS["cpu"]]
        try:
            session = ort.InferenceSession(str(self.bundle.path / name), options, providers=wanted)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            raise IntegrityError(f"{self.bundle.path / name}: ONNX Runtime cannot load it: {error}") from error
        # What a session got, not what the build lists: a provider that cannot load is dropped without a word.
        if PROVIDERS[self._device] not in session.get_providers():
            if self._required:
                raise BackendUnavailable(f"device={self._device!r}: ONNX Runtime could not load {wanted[0]} here")
            self._device = "cpu"
        return _Session(session, self._device)


@dataclass(frozen=True)
class _Shaped:
    """What `check_inputs` looks at."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, value: ort.OrtValue) -> _Shaped:
        kind = value.data_type().removeprefix("tensor(").removesuffix(")")
        return cls(tuple(value.shape()), {"float": "float32", "double": "float64"}.get(kind, kind))


def _ort_value(value: Any) -> ort.OrtValue:
    if isinstance(value, ort.OrtValue):
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
