"""The ONNX Runtime backend. Graphs take their weights from the model's safetensors files. Needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from higen.backends.ahead import Ahead
from higen.backends.base import CLOSED, Choice
from higen.backends.cuda import gpu_count
from higen.backends.external_data import graph_files
from higen.backends.graph_cache import GraphCache
from higen.backends.older import as_before, is_older
from higen.backends.options import PLAIN, Options
from higen.backends.plugins import PLUGINS, Placement
from higen.backends.sessions import load_cuda, session_options
from higen.bundle import Bundle, FileRecord, graph_file
from higen.devices import check_present, device_index
from higen.errors import BackendError, BackendUnavailable, IntegrityError, is_of_a_handler
from higen.forks import Home, outlives_forks
from higen.memory import enough_memory, return_freed
from higen.precision import precision_named
from higen.stages import check_inputs

__all__ = ["OnnxBackend"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

LARGEST_AHEAD = 128 << 20
"""Maximum size in bytes of a model's weights for loading two stages at once."""

PREFERRED = {"cpu": ("fp32",), "cuda": ("fp16", "fp32")}
"""Precisions by device, the best first; only fp32 for a plugin's device. A CPU runs a float16 graph in float32, with
extra casts."""


@dataclass(frozen=True)
class _Session:
    """A stage's session.

    `fixed`: sizes that the graph fixes: those of the model, and those of a graph with static shapes. `older`: inputs
    that the graph takes as in manifest version 1: `t` int64, `guidance` [B].
    """

    session: ort.InferenceSession
    kind: str
    index: int
    precision: str
    fixed: Mapping[str, int]
    older: frozenset[str]
    files: tuple[str, ...]

    @property
    def details(self) -> str:
        """Device and precision: "cpu, fp32"; for a plugin's device also what runs on the CPU instead."""
        said = f"{self.kind}:{self.index}, {self.precision}" if self.index else f"{self.kind}, {self.precision}"
        if self.kind not in PLUGINS:
            return said
        return ", ".join(filter(None, (said, str(Placement.of(self.session, PLUGINS[self.kind].provider)))))

    @property
    def results_on(self) -> tuple[str, int]:
        """Device and index of the memory for results: the host's for a plugin, which has no name for its own."""
        return ("cpu", 0) if self.kind in PLUGINS else (self.kind, self.index)


class OnnxBackend:
    """Runs every stage in ONNX Runtime. A session is made when its stage is first used, and freed by `close`."""

    name = "onnx"

    def __init__(self, bundle: Bundle, options: Options = PLAIN) -> None:
        """`device`: "cpu", "cuda", "cuda:N", "openvino" or "webgpu"; None: CUDA if this ONNX Runtime has it and it
        works, else the CPU. `precision`: None means fp32; on CUDA, fp16 if the stage has such a graph, else fp32.
        `threads` applies to a CPU.

        Raises BackendUnavailable for a device that is missing here or in this build of ONNX Runtime, and for a plugin's
        device with another precision than fp32. Raises MissingExtra for a plugin that is not installed.
        """
        device = options.device
        kind = device.partition(":")[0] if device is not None else None
        available = ort.get_available_providers()
        if kind in PLUGINS:
            if options.precision not in (None, "fp32"):
                raise BackendUnavailable(
                    f"precision={options.precision!r} with device={device!r}: only fp32 runs there"
                )
            PLUGINS[kind].ep_device()
        elif kind is not None and PROVIDERS[kind] not in available:
            raise BackendUnavailable(
                f"device={device!r}: this ONNX Runtime has {', '.join(available)} (pip install 'higen[cuda]', "
                "then uninstall onnxruntime: see the README)"
            )
        self.bundle = bundle
        self.options = options
        self._device = kind or ("cuda" if PROVIDERS["cuda"] in available else "cpu")
        self._index = device_index(device)
        if device is not None and self._index and (gpus := gpu_count()) is not None:
            check_present(device, gpus)
        self._required = kind is not None
        self._verified: set[str] = set()
        # The cache's key uses the sha256 in the manifest: it is right only if the files were checked.
        self._cache = GraphCache.of_user() if self.options.verify else None
        self._sessions: dict[str, _Session] = {}
        self._ahead: Ahead[_Session] | None = None
        self._making = threading.Lock()
        self._checking = threading.Lock()
        self._closed = False
        self._home = Home()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the constructor's arguments: another process creates it again."""
        return type(self), (self.bundle, self.options)

    def prepare(self, stage: str) -> None:
        """Make a stage's session. Raises BackendUnavailable (no graph) or IntegrityError (damaged graph or weights)."""
        self._get(stage)

    def load_ahead(self, ways: Sequence[tuple[str, ...]]) -> None:
        """See `LoadsAhead`. Only small models on a CPU: two large sessions made at once would need more memory."""
        self._home.check()
        with self._making:
            busy = self._ahead is not None and self._ahead.running
            if busy or self._closed or self._device != "cpu" or sum(r.size for r in self._weights()) > LARGEST_AHEAD:
                return
            first = (next((name for name in names if self._has_graph(name)), None) for names in ways)
            wanted = dict.fromkeys(name for name in first if name is not None and name not in self._sessions)
            # The caller begins at the front. The longest work is begun first here, so both end at about the same time.
            sizes = {name: self.bundle.files[graph_file(name, self._choose(name))].size for name in wanted}
            self._ahead = Ahead(self._make, sorted(sizes, key=lambda name: -sizes[name]))

    def _weights(self) -> list[FileRecord]:
        return [self.bundle.files[name] for name in {stage.weights for stage in self.bundle.manifest.stages}]

    def _has_graph(self, stage: str) -> bool:
        try:
            self._choose(stage)
        except BackendUnavailable:
            return False
        return True

    def choose(self, *stages: str) -> str:
        """See `Backend.choose`: a stage without a graph is passed over."""
        for stage in stages[:-1]:
            try:
                self.prepare(stage)
            except BackendUnavailable:
                continue
            return stage
        self.prepare(stages[-1])
        return stages[-1]

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; see `Backend.run`. Tensors are numpy arrays or OrtValues; results are OrtValues."""
        spec, made = self.bundle.manifest.stage(stage), self._get(stage)
        self.bundle.check_loaded(*made.files)
        values = {name: _ort_value(value) for name, value in tensors.items()}
        check_inputs(spec, {name: _Shaped.of(value) for name, value in values.items()}, made.fixed)
        for name in made.older:
            values[name] = _ort_value(self._as_declared(stage, name, values[name].numpy()))
        binding = made.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in spec.graph_outputs:
            binding.bind_output(name, *made.results_on)
        try:
            with enough_memory(stage):
                made.session.run_with_iobinding(binding)
        except BackendError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no other common base
            if is_of_a_handler(error):
                raise
            raise BackendError(f"{stage}: ONNX Runtime failed: {error}") from error
        return dict(zip((t.name for t in spec.outputs), binding.get_outputs(), strict=True))

    def describe(self, stage: str) -> str:
        """Device and precision of a prepared stage: "cpu, fp32"."""
        return self._get(stage).details

    @property
    def choices(self) -> Mapping[str, Choice]:
        """See `Backend.choices`."""
        return {stage: Choice(stage, self.name, details=made.details) for stage, made in list(self._sessions.items())}

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """An OrtValue as a numpy array on the host."""
        return tensor.numpy() if isinstance(tensor, ort.OrtValue) else np.asarray(tensor)

    def close(self) -> None:
        """Free the sessions. A running session is freed when its run ends."""
        if self._home.here:
            with self._making:
                self._closed = True
                self._sessions.clear()
                if self._ahead is not None:
                    self._ahead.stop()

    def _get(self, stage: str) -> _Session:
        """The stage's session. It is made once, even if several threads ask for it.

        Raises BackendError after `close` and in a forked process.
        """
        self._home.check()
        made = self._sessions.get(stage)
        if made is None:
            with self._making:
                if self._closed:
                    raise BackendError(CLOSED)
                made = self._sessions.get(stage) or self._begun(stage) or self._make(stage)
                self._sessions[stage] = made
        return made

    def _begun(self, stage: str) -> _Session | None:
        """The session of a stage whose loading has begun in the background."""
        return None if self._ahead is None else self._ahead.take(stage)

    def _make(self, stage: str) -> _Session:
        precision = self._choose(stage)
        name = graph_file(stage, precision)
        files = graph_files(self.bundle, self._file(name).name)
        for file in files[1:]:
            self._file(file)
        missing = ""
        wanted: Sequence[Any] = [PROVIDERS["cpu"]]
        if self._device == "cuda":
            if gpu_count():
                missing = load_cuda()
            # ONNX Runtime warns for every session that names its device. Without a name it takes the first device.
            wanted = [(PROVIDERS[self._device], {"device_id": self._index} if self._index else {}), *wanted]
        try:
            with enough_memory(name):
                session = self._session(files, wanted)
        except BackendError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no other common base
            if is_of_a_handler(error):
                raise
            if "NOT_IMPLEMENTED" in str(error):
                raise BackendUnavailable(
                    f"{name}: this ONNX Runtime cannot run it on {self._device}: {error}"
                ) from error
            raise IntegrityError(f"{self.bundle.path / name}: ONNX Runtime cannot load it: {error}") from error
        # Ask the session, not the build: ONNX Runtime silently drops a provider that cannot load.
        if self._device not in PLUGINS and PROVIDERS[self._device] not in session.get_providers():
            if self._required:
                why = f": {missing.splitlines()[0]}" if missing else ""
                raise BackendUnavailable(
                    f"device={self.options.device!r}: ONNX Runtime could not load {PROVIDERS[self._device]} here{why}"
                )
            self._device = "cpu"
            return self._make(stage)
        outlives_forks(session)
        if precision_named(precision).quantized:
            return_freed()
        for file in files:
            self.bundle.file(file, verify=False)  # if changed during the load: checked again
        return self._checked(stage, session, precision, files)

    def _session(self, files: tuple[str, ...], providers: Sequence[Any]) -> ort.InferenceSession:
        """A session of a graph; the graph's file is the first of `files`. On a CPU the user's cache is used, if any.

        `providers` is not used for a plugin's device.
        """
        options = partial(session_options, self.options.threads)
        if self._device in PLUGINS:
            graph = str(self.bundle.path / files[0])
            return PLUGINS[self._device].session(graph, options(), self.options.threads)
        if self._cache is None or self._device != "cpu":
            return ort.InferenceSession(str(self.bundle.path / files[0]), options(), providers=providers)
        return self._cache.session(self.bundle, files, options, providers)

    def _file(self, name: str) -> Path:
        with self._checking:  # two threads may need the same weights: their sha256 is computed once
            path = self.bundle.file(name, self.options.verify and name not in self._verified)
            self._verified.add(name)
        return path

    def _choose(self, stage: str) -> str:
        there, asked = self.bundle.precisions(stage), self.options.precision
        for name in precision_named(asked).stand_ins if asked else PREFERRED.get(self._device, ("fp32",)):
            if name in there and precision_named(name).engines_only:
                raise BackendUnavailable(f"{graph_file(stage, name)}: ONNX Runtime does not compute in this precision")
            if name in there:
                return name
        option = f" --precision {asked}" if asked not in (None, "fp32") else ""
        option += " --reuse" if stage in self.bundle.manifest.variants else ""
        raise BackendUnavailable(
            f"no {graph_file(stage, asked or 'fp32')} in {self.bundle.path} "
            f"(make it: higen-export onnx {self.bundle.path}{option})"
        )

    def _checked(self, stage: str, session: ort.InferenceSession, precision: str, files: tuple[str, ...]) -> _Session:
        """Check that a session's graph is the stage's; find the sizes it fixes and its inputs in the form of version 1.

        Raises IntegrityError for a graph of another stage or model.
        """
        spec = self.bundle.manifest.stage(stage)
        given = {tensor.name: (tensor.type, list(tensor.shape)) for tensor in session.get_inputs()}
        outputs = tuple(tensor.name for tensor in session.get_outputs())
        fixed, older = dict(self.bundle.manifest.fixed), set[str]()
        fits = set(given) == {tensor.name for tensor in spec.inputs} and outputs == spec.graph_outputs
        for tensor in spec.inputs if fits else ():
            kind, shape = given[tensor.name]
            if is_older(tensor, kind.removeprefix("tensor(").removesuffix(")"), len(shape)):
                older.add(tensor.name)
            fits &= len(shape) == len(tensor.shape) or tensor.name in older
            for symbol, size in zip(tensor.shape, shape, strict=False):
                if isinstance(symbol, str) and isinstance(size, int):
                    fixed.setdefault(symbol, size)
                    fits &= fixed[symbol] == size
        if not fits:
            shapes = {name: shape for name, (_, shape) in given.items()}
            raise IntegrityError(
                f"{self.bundle.path}: the graph of {stage} belongs to another stage or model: "
                f"it takes {shapes} and gives {list(outputs)}, but the model has {self.bundle.manifest.fixed}"
            )
        return _Session(session, self._device, self._index, precision, fixed, frozenset(older), files)

    def _as_declared(self, stage: str, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """An input in the form of version 1. Raises BackendUnavailable for a value that this form cannot express."""
        found = as_before(value)
        if found is None:
            raise BackendUnavailable(
                f"{stage}: its graph was made before {name} could be {value.ravel()[:4].tolist()}... "
                f"(make it again: higen-export onnx {self.bundle.path} --stage {stage})"
            )
        return found


@dataclass(frozen=True)
class _Shaped:
    """Shape and dtype of a tensor, for `check_inputs`."""

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
