"""Networks that several families share, filled with a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from higen.errors import ManifestError
from higen.families import Weights
from higen.families.preview_rows import WEIGHTS, TinyDecoder, preview_stage
from higen.manifest import Manifest
from higen.models.companion_stages import DecoderStage, EncoderStage, TextEncoderStage
from higen.models.companions import TEXT_PREFIX, autoencoder, restore_buffers, text_encoder
from higen.models.control_net import CONTROL, control_net
from higen.models.solver_step import SolverStep
from higen.models.tiny_decoder import PreviewStage, tiny_decoder
from higen.stages import Stage

__all__ = ["ClipNetworks", "open_autoencoder", "open_control_net", "open_network", "open_preview", "open_text_encoder"]


def open_network(weights: Weights, file: str, make: Callable[[], nn.Module], **how: Any) -> nn.Module:
    """The network that `make` builds, filled from `file`. `how`: see `Weights.fill`. Raises IntegrityError."""
    with torch.device("meta"):
        network = make()
    weights.fill(network, file, **how)
    restore_buffers(network, weights.device)
    return network


def open_text_encoder(weights: Weights, file: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The stage of a CLIP text model with CLIPTextConfig's `arguments`. Raises IntegrityError, ManifestError."""
    return TextEncoderStage(open_network(weights, file, lambda: text_encoder(arguments), strip=TEXT_PREFIX))


def open_autoencoder(weights: Weights, file: str, kind: str, arguments: Mapping[str, Any]) -> nn.Module:
    """diffusers' autoencoder `kind`. It is always in float32, as in the reference code, because published autoencoders
    overflow in fp16. Raises IntegrityError, ManifestError.
    """
    return open_network(weights, file, lambda: autoencoder(kind, arguments), dtype=torch.float32)


def open_control_net(weights: Weights, file: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The control network, whose tensors are in the file of its U-Net. Raises IntegrityError, ManifestError."""
    return open_network(weights, file, lambda: control_net(arguments), part=f"{CONTROL}.")


def open_preview(weights: Weights, decoder: TinyDecoder) -> nn.Module:
    """The stage of a tiny decoder. Raises IntegrityError, ManifestError."""
    return PreviewStage(open_network(weights, WEIGHTS, lambda: tiny_decoder(decoder.arguments)), decoder.scale)


class KlCodec(Protocol):
    """diffusers' AutoencoderKL by its constructor arguments; latents = (encoded - shift) * scale."""

    @property
    def arguments(self) -> dict[str, Any]: ...
    @property
    def shift(self) -> float: ...
    @property
    def scale(self) -> float: ...


class ClipNetworks:
    """The stages of a model with CLIP's text encoder, U-Nets and diffusers' AutoencoderKL (`families.Networks`).

    Each network is loaded when a stage first needs it. A family adds `predictor`.
    """

    def __init__(
        self,
        manifest: Manifest,
        weights: Weights,
        clip: Mapping[str, Any],
        codec: KlCodec,
        preview: TinyDecoder | None = None,
    ) -> None:
        """`clip`: the arguments of CLIPTextConfig."""
        self._manifest = manifest
        self._weights = weights
        self._clip, self._codec, self._preview = clip, codec, preview

    def predictor(self, step: Stage) -> nn.Module:
        """The network that predicts m in this denoising stage, as `SolverStep` calls it."""
        raise NotImplementedError

    def module(self, stage: str) -> nn.Module:
        """A stage as a module, in evaluation mode. Raises ManifestError for a stage that the family does not have."""
        row = self._manifest.stage(stage)
        if row.denoises:
            return SolverStep(row, self.predictor(row)).eval()
        if stage == "text_encoder":
            return open_text_encoder(self._weights, row.weights, self._clip).eval()
        if self._preview is not None and stage == preview_stage(self._manifest):
            return open_preview(self._weights, self._preview).eval()
        kinds = {"vae_decoder": DecoderStage, "vae_encoder": EncoderStage}
        if stage not in kinds:
            family, known = self._manifest.family, ", ".join(kinds)
            raise ManifestError(f"stages.{stage}: unknown; {family} has the steps of its loops, text_encoder, {known}")
        made = kinds[stage](self._autoencoder, (self._codec.shift,), (self._codec.scale,))
        return made.to(self._weights.device).eval()

    @cached_property
    def _autoencoder(self) -> nn.Module:
        file = self._manifest.decoder.weights
        return open_autoencoder(self._weights, file, "AutoencoderKL", self._codec.arguments)
