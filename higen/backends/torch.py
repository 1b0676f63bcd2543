"""The torch backend: the modules themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from higen import bundle as files
from higen.bundle import Bundle
from higen.errors import BackendError, BackendUnavailable
from higen.models.companions import load_autoencoder, load_text_encoder
from higen.models.stage_modules import (
    ConditionerStage,
    DecoderStage,
    DenoisingStage,
    EncoderStage,
    TextEncoderStage,
)
from higen.models.unet import Denoiser
from higen.models.weights import fill
from higen.stages import STAGES, check_inputs, dimensions

__all__ = ["TorchBackend", "load_denoiser"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchBackend:
    """Runs every stage in PyTorch. A network is loaded when a stage first needs it."""

    name = "torch"

    def __init__(
        self,
        bundle: Bundle,
        device: str | None = None,
        dtype: str | None = None,
        verify: bool = True,
        threads: int | None = None,
    ) -> None:
        """`device`: "cpu", "cuda", "cuda:1", ...; the GPU if there is one. `dtype`: "float32", "float16", "bfloat16";
        float32 on a CPU, as stored elsewhere. `verify`: check each file's sha256 as it is loaded. `threads` of one
        operator on a CPU, for the whole process (PyTorch has no other way); None: as it is.
        """
        self.bundle = bundle
        self.device = _device(device)
        if dtype is not None and dtype not in DTYPES:
            raise BackendUnavailable(f"dtype={dtype!r}: one of {', '.join(map(repr, DTYPES))}")
        self.dtype = DTYPES[dtype] if dtype else (torch.float32 if self.device.type == "cpu" else None)
        self._verify = verify
        self._fixed = dimensions(bundle.config)
        if threads is not None:
            torch.set_num_threads(threads)

    def prepare(self, stage: str) -> None:
        """Load the network of a stage."""
        self.module(stage)

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; see `Backend.run`."""
        spec = STAGES[stage]
        check_inputs(spec, tensors, self._fixed)
        ordered = [torch.as_tensor(tensors[t.name], device=self.device) for t in spec.inputs]
        with torch.inference_mode():
            outputs = self._samples(self.module(stage), ordered)
        return dict(zip((t.name for t in spec.outputs), outputs, strict=True))

    def _samples(self, module: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """A CPU takes the samples of a batch one at a time: the libraries' order of summation depends on the batch's
        size, and guidance makes that rounding visible. Only so is a sample's result its own; it costs little there.
        """
        if self.device.type != "cpu":
            return _tuple(module(*inputs))
        samples = zip(*(tensor.split(1) for tensor in inputs), strict=True)
        outputs = [_tuple(module(*sample)) for sample in samples]
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)]

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor as a numpy array on the host."""
        return tensor.cpu().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)

    def describe(self, stage: str) -> str:
        """Where and in what precision a stage runs: "cpu, fp32"."""
        dtype = next(self.module(stage).parameters()).dtype
        return f"{self.device}, {next(name for name, known in PRECISIONS.items() if known == dtype)}"

    def close(self) -> None:
        """Drop the networks."""
        for name in ("text_encoder", "_denoiser", "conditioner", "spatial_unet", "temporal_unet", "_autoencoder"):
            self.__dict__.pop(name, None)
        self.__dict__.pop("vae_decoder", None)
        self.__dict__.pop("vae_encoder", None)

    def module(self, stage: str) -> nn.Module:
        """A stage as a module, loaded when first asked for."""
        module: nn.Module = getattr(self, stage)
        return module

    @cached_property
    def text_encoder(self) -> nn.Module:
        """The text encoder as a stage."""
        path = self.bundle.file(files.TEXT_ENCODER, self._verify)
        encoder = load_text_encoder(path, self.bundle.config.text, self.dtype, self.device)
        return TextEncoderStage(encoder).eval()

    @cached_property
    def _denoiser(self) -> Denoiser:
        return load_denoiser(self.bundle, self.device, self.dtype, self._verify)

    @cached_property
    def conditioner(self) -> nn.Module:
        """The conditioner as a stage."""
        return ConditionerStage(self._denoiser.conditioner).eval()

    @cached_property
    def spatial_unet(self) -> nn.Module:
        """The spatial network, over the temporal one's parameters."""
        return DenoisingStage(self._denoiser.spatial_unet()).eval()

    @cached_property
    def temporal_unet(self) -> nn.Module:
        """The temporal network."""
        return DenoisingStage(self._denoiser.unet).eval()

    @cached_property
    def _autoencoder(self) -> nn.Module:
        path = self.bundle.file(files.AUTOENCODER, self._verify)
        # As the reference, in float32 whatever the rest computes in.
        return load_autoencoder(path, self.bundle.config.autoencoder, torch.float32, self.device)

    @cached_property
    def vae_decoder(self) -> nn.Module:
        """Latents to pixels."""
        return DecoderStage(self._autoencoder, self.bundle.config.autoencoder).eval().to(self.device)

    @cached_property
    def vae_encoder(self) -> nn.Module:
        """Pixels to latents."""
        return EncoderStage(self._autoencoder, self.bundle.config.autoencoder).eval().to(self.device)


def _tuple(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def load_denoiser(
    bundle: Bundle, device: torch.device, dtype: torch.dtype | None = None, verify: bool = True
) -> Denoiser:
    """The denoiser of a model directory, in `dtype` (None: as stored); its weights are in memory once.

    Raises IntegrityError for a file that is altered or holds other tensors than the architecture.
    """
    path = bundle.file(files.UNET, verify)
    with torch.device("meta"):
        denoiser = Denoiser(bundle.config.unet)
    fill(denoiser, path, dtype, device)
    return denoiser


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BackendUnavailable(f"device={device!r}: PyTorch cannot use it here: {error}") from error
    if chosen.type == "meta":
        raise BackendError("device='meta' holds no values")
    return chosen
