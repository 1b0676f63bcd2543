"""The ONNX Runtime backend: graphs whose weights lie in the model's safetensors files. Needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from higen.bundle import ENGINES_ONLY, Bundle, check_precision, graph_file, stand_ins
from higen.errors import BackendError, BackendUnavailable, IntegrityError
from higen.stages import STAGES, check_inputs, dimensions

__all__ = ["OnnxBackend"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

PREFERRED = {"cpu": ("fp32",), "cuda": ("fp16", "fp32")}
"""Precisions by device, the best first: a CPU computes in float32 what a float16 graph says, and casts besides."""


@dataclass(frozen=True)
class _Session:
    """A stage's session; `fixed` are the sizes that its graph takes alone: the model's, and those of a static graph."""

    session: ort.InferenceSession
    device: str
    precision: str
    fixed: Mapping[str, int]


class OnnxBackend:
    """Runs every stage in ONNX Runtime. A session is made when its stage is first used, and freed by `close`."""

    name = "onnx"

    def __init__(
        self,
        bundle: Bundle,
        device: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        verify: bool = True,
    ) -> None:
        """`device`: "cpu" or "cuda"; CUDA where ONNX Runtime has it and it works. `precision` of the graphs; None:
        fp32 on a CPU, on CUDA fp16 where a stage has such a graph. `threads` of one stage on a CPU; None: ONNX
        Runtime's choice. `verify`: check each file's sha256 when it is first used.

        Raises BackendUnavailable for another device, or one that this build of ONNX Runtime lacks, RequestError for
        an unknown precision.
        """
        kind = device.partition(":")[0] if device else None
        if kind is not None and kind not in PROVIDERS:
            raise BackendUnavailable(f"device={device!r}: ONNX Runtime is used on {', '.join(map(repr, PROVIDERS))}")
        available = ort.get_available_providers()
        if kind is not None and PROVIDERS[kind] not in available:
            raise BackendUnavailable(
                f"device={device!r}: this ONNX Runtime has {', '.join(available)} (pip install 'higen[cuda]', "
                "then take onnxruntime away: see the README)"
            )
        self.bundle = bundle
        self._device = kind or ("cuda" if PROVIDERS["cuda"] in available else "cpu")
        self._required = kind is not None
        self._precision = None if precision is None else check_precision(precision)
        self._threads = threads
        self._verify = verify
        self._verified: set[str] = set()
        self._sessions: dict[str, _Session] = {}
        self._making = threading.Lock()

    def prepare(self, stage: str) -> None:
        """Make a stage's session. Raises BackendUnavailable (no graph) or IntegrityError (graph or weights broken)."""
        self._get(stage)

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; see `Backend.run`. Tensors are numpy arrays or OrtValues; results are OrtValues."""
        spec, made = STAGES[stage], self._get(stage)
        values = {name: _ort_value(value) for name, value in tensors.items()}
        check_inputs(spec, {name: _Shaped.of(value) for name, value in values.items()}, made.fixed)
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

    def describe(self, stage: str) -> str:
        """Where and in what precision a prepared stage runs: "cpu, fp32"."""
        made = self._get(stage)
        return f"{made.device}, {made.precision}"

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """An OrtValue as a numpy array on the host."""
        return tensor.numpy() if isinstance(tensor, ort.OrtValue) else np.asarray(tensor)

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()

    def _get(self, stage: str) -> _Session:
        """The stage's session, made once however many requests ask for it."""
        made = self._sessions.get(stage)
        if made is None:
            with self._making:
                made = self._sessions.get(stage) or self._make(stage)
                self._sessions[stage] = made
        return made

    def _make(self, stage: str) -> _Session:
        precision = self._choose(stage)
        name = graph_file(stage, precision)
        for file in (name, self.bundle.weights(stage, precision)):
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
            if "NOT_IMPLEMENTED" in str(error):
                raise BackendUnavailable(
                    f"{name}: this ONNX Runtime cannot run it on {self._device}: {error}"
                ) from error
            raise IntegrityError(f"{self.bundle.path / name}: ONNX Runtime cannot load it: {error}") from error
        # What a session got, not what the build lists: a provider that cannot load is dropped without a word.
        if PROVIDERS[self._device] not in session.get_providers():
            if self._required:
                raise BackendUnavailable(f"device={self._device!r}: ONNX Runtime could not load {wanted[0]} here")
            self._device = "cpu"
            return self._make(stage)
        return _Session(session, self._device, precision, self._fixed(stage, session))

    def _choose(self, stage: str) -> str:
        there = self.bundle.precisions(stage)
        for precision in stand_ins(self._precision) if self._precision else PREFERRED[self._device]:
            if precision in there and precision in ENGINES_ONLY:
                raise BackendUnavailable(f"{graph_file(stage, precision)}: ONNX Runtime does not compute in it")
            if precision in there:
                return precision
        asked = self._precision or "fp32"
        option = "" if asked == "fp32" else f" --precision {asked}"
        raise BackendUnavailable(
            f"no {graph_file(stage, asked)} in {self.bundle.path} "
            f"(make it: higen-export onnx {self.bundle.path}{option})"
        )

    def _fixed(self, stage: str, session: ort.InferenceSession) -> dict[str, int]:
        """The sizes that the model fixes, and those of a graph exported with --static.

        Raises IntegrityError for a graph of another stage or model.
        """
        spec, model = STAGES[stage], dimensions(self.bundle.config)
        given = {tensor.name: tensor.shape for tensor in session.get_inputs()}
        outputs = tuple(tensor.name for tensor in session.get_outputs())
        fixed = dict(model)
        fits = set(given) == {tensor.name for tensor in spec.inputs} and outputs == spec.graph_outputs
        for tensor in spec.inputs if fits else ():
            for symbol, size in zip(tensor.shape, given[tensor.name], strict=True):
                if isinstance(symbol, str) and isinstance(size, int):
                    fixed.setdefault(symbol, size)
                    fits &= fixed[symbol] == size
        if not fits:
            raise IntegrityError(
                f"{self.bundle.path}: the graph of {stage} is another stage's or model's: "
                f"it takes {given} and gives {list(outputs)}, but the model has {model}"
            )
        return fixed


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
