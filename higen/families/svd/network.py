"""Stable Video Diffusion's stages as PyTorch modules: diffusers' U-Net and autoencoder, transformers' CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from higen.errors import ManifestError
from higen.families import Weights
from higen.families.companion_networks import open_autoencoder, open_network
from higen.families.svd import spec
from higen.families.svd.parts import image_encoder, video_unet
from higen.manifest import Manifest
from higen.models.solver_step import SolverStep
from higen.models.video_walk import fold, per_frame, time_embedding, unfold, walk_with_deep

__all__ = ["Conditioner", "Decoder", "Encoder", "ImageEncoder", "SvdNetworks", "VideoPredictor", "open"]


def open(manifest: Manifest, weights: Weights) -> SvdNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model; nothing is loaded yet. Raises ManifestError."""
    return SvdNetworks(manifest, weights)


class SvdNetworks:
    """Each network is loaded when a stage first needs it."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._manifest = manifest
        self._weights = weights
        self._networks = spec.networks(manifest)

    def module(self, stage: str) -> nn.Module:
        """A stage as a module, in evaluation mode. Raises ManifestError for a stage that this family does not have."""
        row = self._manifest.stage(stage)
        if row.denoises:
            return SolverStep(row, VideoPredictor(self._unet)).eval()
        makers: dict[str, Callable[[], nn.Module]] = {
            "image_encoder": self._image_encoder,
            "conditioner": lambda: Conditioner(self._unet),
            "vae_encoder": lambda: Encoder(self._autoencoder),
            "vae_decoder": lambda: Decoder(self._autoencoder, self._networks.scale),
        }
        if stage not in makers:
            raise ManifestError(
                f"stages.{stage}: unknown; {spec.FAMILY} has the steps of its loop, {', '.join(makers)}"
            )
        return makers[stage]().eval()

    @cached_property
    def _unet(self) -> nn.Module:
        return open_network(self._weights, spec.UNET, lambda: video_unet(self._networks.unet))

    @cached_property
    def _autoencoder(self) -> nn.Module:
        return open_autoencoder(self._weights, spec.AUTOENCODER, "AutoencoderKLTemporalDecoder", self._networks.codec)

    def _image_encoder(self) -> nn.Module:
        vision = self._networks.vision
        encoder = open_network(self._weights, spec.IMAGE_ENCODER, lambda: image_encoder(vision.arguments))
        return ImageEncoder(encoder, vision).to(self._weights.device)


class VideoPredictor(nn.Module):
    """Predicts v with the U-Net, as `SolverStep` calls it.

    Conditions: `context` [B,K,Dc], `prior` [B,C,H,W] and `frame_embedding` [B,F,E]. In the branch without the picture,
    the first two are zeros.
    """

    prefix = "unet."

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    @property
    def deep_channels(self) -> int:
        """Channels of the deep features."""
        return int(self.unet.conv_in.out_channels)

    def forward(self, *told: Any) -> Tensor:
        """x [B,C,F,H,W] and the other arguments of `with_deep` -> m of the same shape."""
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
        """m, shaped like x [B,C,F,H,W], and the deep features [B,K,F,H,W], which are `deep` if it is given."""
        unet: Any = self.unet
        frames = x.shape[2]
        dtype = unet.conv_in.weight.dtype
        context, prior = (_given(conditions[name].to(dtype), branches) for name in ("context", "prior"))
        embedding = (time_embedding(unet, t)[:, None] + conditions["frame_embedding"].to(dtype)).flatten(0, 1)
        entered = unet.conv_in(torch.cat([fold(x.to(dtype)), per_frame(prior, frames)], dim=1))
        no_pictures = x.new_zeros(x.shape[0], frames, dtype=dtype)  # every frame belongs to a clip
        given = None if deep is None else fold(deep.to(dtype))
        told = embedding, per_frame(context, frames), given
        m, kept = walk_with_deep(unet, entered, *told, image_only_indicator=no_pictures)
        return unfold(m, x.shape[0]), unfold(kept, x.shape[0])


def _given(condition: Tensor, branches: int) -> Tensor:
    """A condition with zeros in place of the second branch, if there are two."""
    if branches == 1:
        return condition
    stacked = condition.unflatten(0, (2, -1))
    return torch.cat([stacked[0], torch.zeros_like(stacked[1])])


class ImageEncoder(nn.Module):
    """pixels [B,3,S,S] in -1 to 1 -> CLIP's projected embedding [B,1,Dc]. CLIP's normalisation is included."""

    prefix = "encoder."
    mean: Tensor
    deviation: Tensor

    def __init__(self, encoder: nn.Module, vision: spec.Vision) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(vision.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(vision.deviation).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        dtype = next(self.encoder.parameters()).dtype
        normal = ((pixels + 1.0) / 2.0 - self.mean) / self.deviation
        embedding: Tensor = self.encoder(pixel_values=normal.to(dtype)).image_embeds
        return embedding[:, None].float()


class Encoder(nn.Module):
    """pixels and noise [B,3,Y,X], augmentation [B,F] -> prior [B,C,H,W], which is not scaled.

    Noise is added to the picture's pixels, times the first frame's augmentation. The result is the posterior's mode.
    """

    prefix = "autoencoder."

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pixels: Tensor, noise: Tensor, augmentation: Tensor) -> Tensor:
        noised = pixels + augmentation[:, 0, None, None, None] * noise
        dtype = next(self.autoencoder.parameters()).dtype
        prior: Tensor = self.autoencoder.encode(noised.to(dtype), return_dict=False)[0].mode()
        return prior.float()


class Conditioner(nn.Module):
    """fps [B], motion and augmentation [B,F] -> frame_embedding [B,F,E], which is added to the timestep embedding."""

    prefix = "unet."

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, fps: Tensor, motion: Tensor, augmentation: Tensor) -> Tensor:
        # The network was trained with the clip's frames per second minus 1.
        numbers = torch.stack([(fps[:, None] - 1.0).expand_as(motion), motion, augmentation], dim=-1)  # [B,F,3]
        waves = self.unet.add_time_proj(numbers.flatten()).unflatten(0, (-1, 3)).flatten(1)  # [BF,3D]
        embedding = self.unet.add_embedding(waves.to(self.unet.conv_in.weight.dtype))
        return embedding.unflatten(0, (fps.shape[0], -1)).float()


class Decoder(nn.Module):
    """latents [B,C,F,H,W] -> pixels [B,3,F,Y,X], about -1 to 1 (not clamped). Its layers mix frames."""

    prefix = "autoencoder."

    def __init__(self, autoencoder: Any, scale: float) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.scale = scale

    def forward(self, latents: Tensor) -> Tensor:
        batch, frames = latents.shape[0], latents.shape[2]
        dtype = next(self.autoencoder.parameters()).dtype
        encoded = fold(latents / self.scale).to(dtype)
        no_pictures = encoded.new_zeros(batch, frames)
        pixels = self.autoencoder.decoder(encoded, num_frames=frames, image_only_indicator=no_pictures)
        return unfold(pixels, batch).float()
