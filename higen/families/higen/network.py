"""HiGen's stages as modules. Both denoising loops share one U-Net, so its weights are in memory once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from higen.errors import ManifestError
from higen.families import Weights
from higen.families.companion_networks import open_autoencoder, open_preview, open_text_encoder
from higen.families.higen import spec
from higen.families.higen.preconditioning import velocity
from higen.families.higen.unet import Conditioner, Denoiser, Known, UNet
from higen.families.preview_rows import preview_stage
from higen.manifest import Manifest
from higen.models.companion_stages import DecoderStage, EncoderStage
from higen.models.solver_step import SolverStep
from higen.models.video_walk import fold, unfold
from higen.models.weights import fill
from higen.stages import Stage

__all__ = ["ConditionerStage", "HigenNetworks", "VelocityPredictor", "load_denoiser", "open"]


def open(manifest: Manifest, weights: Weights) -> HigenNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model; nothing is loaded yet."""
    return HigenNetworks(manifest, weights)


class HigenNetworks:
    """Builds the module of a stage on request. Networks that several stages share are loaded once."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._manifest = manifest
        self._weights = weights

    def module(self, stage: str) -> nn.Module:
        """A stage as a module, in evaluation mode. Raises ManifestError for an unknown stage, IntegrityError."""
        row = self._manifest.stage(stage)
        if row.denoises:
            return SolverStep(row, self._predictor(row)).eval()
        makers: dict[str, Callable[[], nn.Module]] = {
            "text_encoder": self._text_encoder,
            "conditioner": self._conditioner,
            "vae_decoder": self._decoder,
            "vae_encoder": self._encoder,
        }
        if (preview := spec.preview(self._manifest)) is not None:
            makers[preview_stage(self._manifest)] = lambda: open_preview(self._weights, preview)
        if stage not in makers:
            raise ManifestError(
                f"stages.{stage}: unknown; {spec.FAMILY} has the steps of its loops, {', '.join(makers)}"
            )
        return makers[stage]().eval()

    def _predictor(self, step: Stage) -> VelocityPredictor:
        if step.input("latents").shape[2] == 1:
            return self._spatial
        own = self._denoiser.known is not None and any(tensor.name == "known" for tensor in step.inputs)
        return self._known if own else self._temporal

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
        """The U-Net without its temporal layers. It shares the parameters of `_temporal`."""
        return VelocityPredictor(self._denoiser.spatial_unet())

    @cached_property
    def _known(self) -> VelocityPredictor:
        """The U-Net with the layers for known frames. It shares the parameters of the other layers with `_temporal`."""
        return VelocityPredictor(self._denoiser.known_unet(), _KNOWN)

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


_KNOWN = "known."
"""Prefix of the layers for known frames in the weights file, beside `unet.`."""


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
    """Predicts v with a U-Net, as `SolverStep` calls it. The conditions are `context`, `frame_embedding` and, for a
    clip, `prior`; also `known` and `known_mask` if the U-Net was trained for known frames."""

    def __init__(self, unet: UNet, own: str = "") -> None:
        """`own`: prefix in the weights file of tensors that replace tensors of the prefix `unet.`."""
        super().__init__()
        self.unet = unet
        self.replaced = {own: "unet."} if own else {}

    @property
    def deep_channels(self) -> int:
        """Channels of the deep features."""
        return self.unet.config.level_channels[0]

    def forward(self, *told: Any) -> Tensor:
        """x [B,C,F,H,W] and the other arguments of `with_deep` -> v of the same shape."""
        return self.with_deep(*told)[0]

    def with_deep(
        self,
        x: Tensor,
        t: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        conditions: Mapping[str, Tensor],
        branches: int,
        deep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """v, shaped like x [B,C,F,H,W], and the deep features [B,K,F,H,W], which are `deep` if it is given."""
        dtype = self.unet.conv_in.weight.dtype
        context, embedding = conditions["context"].to(dtype), conditions["frame_embedding"].to(dtype)
        gain = None  # the same for both branches: from the one with the prompt
        if self.unet.residual_gain is not None and branches > 1:
            gain = torch.cat([context.unflatten(0, (branches, -1))[0]] * branches)
        known = Known(conditions["known"], conditions["known_mask"]) if "known" in conditions else None
        kept = None if deep is None else fold(deep.to(dtype))

        def network(
            x: Tensor,
            t: Tensor,
            context: Tensor,
            embedding: Tensor,
            prior: Tensor | None,
            known: Known | None = None,
        ) -> Tensor:
            nonlocal kept
            v, kept = self.unet.with_deep(x, t, context, embedding, prior, known, kept)
            return v

        prior = conditions.get("prior")
        v = velocity(self.unet, x, t, alpha, sigma, context, embedding, prior, gain, known, network)
        assert kept is not None
        return v, unfold(kept, x.shape[0])


def load_denoiser(
    path: str | os.PathLike[str],
    config: spec.UNetConfig,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """The denoiser of a safetensors file, in `dtype` (None: as stored). Its weights are in memory once.

    Raises IntegrityError for a file that holds other tensors than the architecture.
    """
    with torch.device("meta"):
        denoiser = Denoiser(config)
    fill(denoiser, path, dtype, device)
    return denoiser
