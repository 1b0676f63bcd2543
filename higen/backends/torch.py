"""The torch backend: runs the PyTorch modules that the model's family builds."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from higen import families
from higen.backends.base import CLOSED, Choice
from higen.backends.options import PLAIN, Options
from higen.bundle import Bundle
from higen.cpu import SLOW_BF16, has_bf16
from higen.devices import check_no_plugin, check_present
from higen.errors import BackendError, BackendUnavailable, FallbackWarning, UnknownFamily
from higen.forks import Home, inherited
from higen.memory import enough_memory
from higen.models.weights import DTYPES, fill
from higen.precision import precision_named
from higen.stages import check_inputs

__all__ = ["BundleWeights", "TorchBackend"]


class BundleWeights:
    """Fills a family's networks with the weights of a model directory (`families.Weights`)."""

    def __init__(self, bundle: Bundle, device: torch.device, dtype: torch.dtype | None, verify: bool = True) -> None:
        """`dtype`: what the networks compute in; None: as stored. `verify`: check each file's sha256."""
        self.bundle = bundle
        self.device = device
        self.dtype = dtype
        self._verify = verify
        self._loaded: set[str] = set()

    def fill(
        self,
        module: nn.Module,
        file: str,
        dtype: torch.dtype | None = None,
        strip: str = "",
        part: str = "",
        beside: tuple[str, ...] = (),
    ) -> None:
        """See `families.Weights`."""
        path = self.bundle.file(file, self._verify)
        fill(module, path, dtype or self.dtype, self.device, lambda name: name.removeprefix(strip), part, beside)
        self.bundle.file(file, verify=False)  # if changed during the load: checked again
        self._loaded.add(file)

    def check(self) -> None:
        """Check that nobody has written into the files. Tensors loaded in their stored dtype are memory-mapped.

        Raises IntegrityError.
        """
        self.bundle.check_loaded(*self._loaded)


class TorchBackend:
    """Runs every stage in PyTorch. A network is loaded when a stage first needs it."""

    name = "torch"

    def __init__(self, bundle: Bundle, options: Options = PLAIN) -> None:
        """`device`: "cpu", "cuda", "cuda:1", ...; None: the GPU if there is one. `precision`: None means fp32 on a CPU
        and the stored dtype elsewhere; for a quantised precision PyTorch computes in its base, which has at least 16
        bits. `threads`: of one operator on a CPU; in PyTorch this setting applies to the whole process.

        Raises BackendUnavailable for a device that PyTorch cannot use, or if the model's family is not installed.
        """
        self.bundle = bundle
        self.device = _device(options.device)
        self.dtype = torch.float32 if self.device.type == "cpu" else None
        if options.precision is not None:
            self.dtype = DTYPES[precision_named(options.precision).base]
        try:
            self._family = families.network(bundle.manifest.family)
        except UnknownFamily as error:
            raise BackendUnavailable(str(error)) from error
        except ImportError as error:
            raise BackendUnavailable(f"family={bundle.manifest.family!r}: cannot be imported: {error}") from error
        self._weights = BundleWeights(bundle, self.device, self.dtype, options.verify)
        self._networks: families.Networks | None = None
        self._modules: dict[str, nn.Module] = {}
        self._loading = threading.Lock()
        self.options = options
        self._closed = False
        self._home = Home()
        _set_threads(options.threads)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the constructor's arguments: another process creates it again."""
        return type(self), (self.bundle, self.options)

    def prepare(self, stage: str) -> None:
        """Load the network of a stage."""
        self.module(stage)

    def choose(self, *stages: str) -> str:
        """See `Backend.choose`. PyTorch can run every stage, so the first one is taken."""
        self.prepare(stages[0])
        return stages[0]

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; see `Backend.run`."""
        row = self.bundle.manifest.stage(stage)
        check_inputs(row, tensors, self.bundle.manifest.fixed)
        self._home.check()
        self._weights.check()
        ordered = [torch.as_tensor(tensors[t.name], device=self.device) for t in row.inputs]
        run = self._samples if row.batch and self.device.type == "cpu" else _outputs
        with torch.inference_mode(), enough_memory(stage):
            outputs = run(self.module(stage), ordered)
        return dict(zip((t.name for t in row.outputs), outputs, strict=True))

    @staticmethod
    def _samples(module: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Run the samples of a batch one at a time on a CPU, so that no sample's result depends on the others.

        The libraries' order of summation depends on the batch size, and guidance makes the rounding visible. Running
        one sample at a time costs little on a CPU.
        """
        samples = zip(*(tensor.split(1) for tensor in inputs), strict=True)
        outputs = [_outputs(module, sample) for sample in samples]
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)]

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor as a numpy array on the host."""
        return tensor.cpu().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)

    def describe(self, stage: str) -> str:
        """Device and precision of a stage: "cpu, fp32"; with a note if the processor is slow in this precision."""
        return self._details(self.module(stage))

    @property
    def choices(self) -> Mapping[str, Choice]:
        """See `Backend.choices`."""
        loaded = list(self._modules.items())
        return {stage: Choice(stage, self.name, details=self._details(module)) for stage, module in loaded}

    def _details(self, module: nn.Module) -> str:
        dtype = next((p.dtype for p in module.parameters()), torch.float32)
        slow = dtype == torch.bfloat16 and self.device.type == "cpu" and has_bf16() is False
        name = next((name for name, known in DTYPES.items() if known == dtype), str(dtype))
        return f"{self.device}, {name}" + (f" ({SLOW_BF16})" if slow else "")

    def close(self) -> None:
        """Drop the networks. A running network is freed when its run ends."""
        if self._home.here:
            with self._loading:
                self._closed = True
                self._modules.clear()
                self._networks = None

    def module(self, stage: str) -> nn.Module:
        """A stage's module, loaded when it is first used.

        Raises BackendError after `close` and in a forked process, and OutOfMemory.
        """
        self._home.check()
        with self._loading, enough_memory(stage):
            if self._closed:
                raise BackendError(CLOSED)
            if stage not in self._modules:
                if self._networks is None:
                    self._networks = self._family.open(self.bundle.manifest, self._weights)
                self._modules[stage] = self._networks.module(stage)
            return self._modules[stage]


def _outputs(module: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    outputs = module(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _device(device: str | None) -> torch.device:
    check_no_plugin(device, "PyTorch")
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and torch.cuda.is_available():
        check_present(device, torch.cuda.device_count())
    chosen = torch.device(device)
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BackendUnavailable(f"device={device!r}: PyTorch cannot use it here: {error}") from error
    return chosen


def _set_threads(threads: int | None) -> None:
    """Set the threads of an operator on a CPU.

    In a process forked from one that uses PyTorch it is always one thread. The parent's other threads do not exist
    there, and waiting for them would never end.
    """
    if inherited("torch"):
        if (torch.get_num_threads() if threads is None else threads) > 1:
            reason = "PyTorch runs in one thread in a forked process: start processes by 'spawn' for more"
            warnings.warn(reason, FallbackWarning, stacklevel=2)
        torch.set_num_threads(1)
    elif threads is not None:
        torch.set_num_threads(threads)
