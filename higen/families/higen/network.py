"""HiGen's stages as modules, over one copy of the weights: both denoising loops share a U-Net."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from higen.errors import ManifestError
from higen.families import Weights
from higen.families.companion_networks import open_autoencoder, open_text_encoder
from higen.families.higen import spec
from higen.families.higen.preconditioning import velocity
from higen.families.higen.unet import Conditioner, Denoiser, Known, UNet
from higen.manifest import Manifest
from higen.models.companion_stages import DecoderStage, EncoderStage
from higen.models.solver_step import SolverStep
from higen.models.weights import fill

__all__ = ["ConditionerStage", "HigenNetworks", "VelocityPredictor", "load_denoiser", "open"]


def open(manifest: Manifest, weights: Weights) -> HigenNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model; nothing is loaded yet."""
    return HigenNetworks(manifest, weights)


class HigenNetworks:
    """Makes each stage's module when it is first asked for; what two stages share is loaded once."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._manifest = manifest
        self._weights = weights

    def module(self, stage: str) -> nn.Module:
        """A stage as a module, in evaluation mode. Raises ManifestError for one that HiGen has not, IntegrityError."""
        row = self._manifest.stage(stage)
        if row.denoises:
            return SolverStep(row, self._spatial if row.input("latents").shape[2] == 1 else self._temporal).eval()
        makers: dict[str, Callable[[], nn.Module]] = {
            "text_encoder": self._text_encoder,
            "conditioner": self._conditioner,
            "vae_decoder": self._decoder,
            "vae_encoder": self._encoder,
        }
        if stage not in makers:
            raise ManifestError(f"stages.{stage}: {spec.FAMILY} has the steps of its loops, and {', '.join(makers)}")
        return makers[stage]().eval()

    @cached_property
    def _denoiser(self) -> Denoiser:
        with torch.device("meta"):
            denoiser = Denoiser(spec.unet_config(self._manifest))
        self._weights.fill(denoiser, spec.UNET)
        return denoiser

    @cached_property
    def _temporal(self) -> VelocityPredictor:
        return VelocityPredictor(self._denoiser.unet)

    @cached_property
    def _spatial(self) -> VelocityPredictor:
        """Without the temporal layers, over the very same parameters."""
        return VelocityPredictor(self._denoiser.spatial_unet())

    @cached_property
    def _autoencoder(self) -> nn.Module:
        config = spec.autoencoder_config(self._manifest)
        return open_autoencoder(self._weights, spec.AUTOENCODER, config.kind, config.arguments)

    def _text_encoder(self) -> nn.Module:
        return open_text_encoder(self._weights, spec.TEXT_ENCODER, spec.text_config(self._manifest).clip)

    def _conditioner(self) -> nn.Module:
        return ConditionerStage(self._denoiser.conditioner)

    def _decoder(self) -> nn.Module:
        config = spec.autoencoder_config(self._manifest)
        return DecoderStage(self._autoencoder, config.shift, config.scale).to(self._weights.device)

    def _encoder(self) -> nn.Module:
        config = spec.autoencoder_config(self._manifest)
        return EncoderStage(self._autoencoder, config.shift, config.scale).to(self._weights.device)


class ConditionerStage(nn.Module):
    """hidden [B,L,Dt], motion [B,F,D], appearance [B,F,R] -> context [B,K,Dc], frame_embedding [B,F,E], float32."""

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, hidden: Tensor, motion: Tensor, appearance: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.conditioner.context.tokens.dtype
        context, embedding = self.conditioner(hidden.to(dtype), motion.to(dtype), appearance.to(dtype))
        return context.float(), embedding.float()


class VelocityPredictor(nn.Module):
    """v of a U-Net as `SolverStep` asks for it: conditions `context`, `frame_embedding` and, for a clip, `prior`, and
    `known` and `known_mask` where it was trained for known frames."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor], branches: int
    ) -> Tensor:
        dtype = self.unet.conv_in.weight.dtype
        context, embedding = conditions["context"].to(dtype), conditions["frame_embedding"].to(dtype)
        gain = None  # of both branches: the one with the prompt decides
        if self.unet.residual_gain is not None and branches > 1:
            gain = torch.cat([context.unflatten(0, (branches, -1))[0]] * branches)
        known = Known(conditions["known"], conditions["known_mask"]) if "known" in conditions else None
        return velocity(self.unet, x, t, alpha, sigma, context, embedding, conditions.get("prior"), gain, known)


def load_denoiser(
    path: str | os.PathLike[str],
    config: spec.UNetConfig,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """The denoiser of a safetensors file, in `dtype` (None: as stored); its weights are in memory once.

    Raises IntegrityError for a file that holds other tensors than the architecture.
    """
    with torch.device("meta"):
        denoiser = Denoiser(config)
    fill(denoiser, path, dtype, device)
    return denoiser
