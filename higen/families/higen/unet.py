"""The denoiser: one U-Net with optional temporal layers, and the conditioner, which runs once per request.

Reference: tools/modules/unet/unet_higen.py; spec sections 2 to 5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from higen.families.higen.spec import UNetConfig
from higen.models.layers import (
    GROUPS,
    RESNET_EPS,
    Downsample,
    ResBlock,
    Sinusoid,
    SpatialTransformer,
    TemporalTransformer,
    TransformerBlock,
    Upsample,
    embedding_mlp,
)

__all__ = ["Conditioner", "Denoiser", "Known", "UNet", "temporal_names"]


class Known(NamedTuple):
    """The known frames of a clip: latents [B,C,F,H,W], and mask [B,F], 1 for known frames and 0 for others. The latents
    of the other frames are ignored."""

    latents: Tensor
    mask: Tensor

    @property
    def given(self) -> Tensor:
        """Whether any frame of a clip is known: bool [B,1,1,1,1]."""
        return (self.mask.amax(dim=1) >= 1)[:, None, None, None, None]

    def blend(self) -> Tensor:
        """Each frame interpolated linearly in time between the nearest known frames. Frames before the first or after
        the last known frame equal that frame. [B,C,F,H,W], 0 for a clip without known frames."""
        frames = self.mask.shape[1]
        place = torch.arange(frames, device=self.mask.device)
        back = place[:, None] - place  # [F,F]: by how much frame j is before frame i
        held = (self.mask >= 1)[:, None]  # [B,1,F]
        before = torch.where(held & (back >= 0), place, -1).amax(dim=-1, keepdim=True)  # [B,F,1]
        after = torch.where(held & (back <= 0), place, frames).amin(dim=-1, keepdim=True)
        first, last = before < 0, after >= frames
        span = (after - before).clamp(min=1).to(self.latents.dtype)
        later = (place[:, None] - before) / span  # the weight of the frame after
        later = torch.where(last, torch.zeros_like(later), torch.where(first, torch.ones_like(later), later))
        weights = (place == before) * (1 - later) + (place == after) * later  # [B,F,F]
        return torch.einsum("bij,bcjhw->bcihw", weights.to(self.latents.dtype), self.latents)

    def wide(self, like: Tensor) -> Tensor:
        """The mask as [B,1,F,1,1], in the dtype of `like`."""
        return (self.mask >= 1).to(like.dtype)[:, None, :, None, None]


class ContextTokens(nn.Module):
    """Learned tokens that attend to the text: [B, L, Dt] -> [B, K, Dc]. The U-Net sees these tokens, never the text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.embedding_dim
        self.tokens = nn.Parameter(torch.randn(1, config.context_tokens, width))
        self.text_in = nn.Linear(config.text_dim, width)
        # Both attentions of each block attend to the text. The tokens never attend to each other.
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.context_heads, width, width) for _ in range(config.context_depth)
        )
        self.out = nn.Linear(width, config.context_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        text = self.text_in(hidden)
        tokens = self.tokens.expand(hidden.shape[0], -1, -1)
        for block in self.blocks:
            tokens = block(tokens, text, text)
        out: Tensor = self.out(tokens)
        return out


class Conditioner(nn.Module):
    """The part of the denoiser that does not depend on the step: context tokens and the embedding of the two cues."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.context = ContextTokens(config)
        self.motion = embedding_mlp(config.base_channels, config.embedding_dim)
        self.appearance = embedding_mlp(config.appearance_columns, config.embedding_dim)

    def forward(self, hidden: Tensor, motion: Tensor, appearance: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B,L,Dt], motion [B,F,D], appearance [B,F,R] -> context [B,K,Dc], frame_embedding [B,F,E]."""
        return self.context(hidden), self.motion(motion) + self.appearance(appearance)


class Block(nn.Module):
    """A residual block and, in levels with attention, a spatial and (optionally) a temporal transformer."""

    def __init__(self, config: UNetConfig, width_in: int, width: int, attends: bool, temporal: bool) -> None:
        super().__init__()
        self.resnet = ResBlock(width_in, width, config.embedding_dim, config.dropout, temporal)
        self.spatial = SpatialTransformer(width, config.head_dim, config.context_dim) if attends else None
        heads = width // config.head_dim
        self.temporal = TemporalTransformer(width, heads, config.head_dim) if attends and temporal else None

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, frames: int) -> Tensor:
        x = self.resnet(x, embedding, frames)
        if self.spatial is not None:
            x = self.spatial(x, context)
        return x if self.temporal is None else self.temporal(x, frames)


class Level(nn.Module):
    """The blocks of one resolution, on the way down or up, and the change of resolution after them."""

    def __init__(self, blocks: list[Block], resample: Downsample | Upsample | None) -> None:
        super().__init__()
        self.blocks = cast("Iterable[Block]", nn.ModuleList(blocks))
        self.resample = resample


class UNet(nn.Module):
    """Predicts v for latents [B, C, F, H, W]. With `temporal=False` it has no temporal layers and is for one frame.

    H and W are multiples of `config.size_multiple`. The number of frames is free.
    """

    def __init__(self, config: UNetConfig, temporal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # in training: do not keep a block's activations; recompute them for the gradient
        base, widths = config.base_channels, config.level_channels
        self.time = nn.Sequential(Sinusoid(base), *embedding_mlp(base, config.embedding_dim))
        self.conv_in = nn.Conv2d(config.in_channels, base, 3, padding=1)
        self.prior = nn.Conv2d(config.in_channels, base, 3, padding=1)
        takes_known = config.known_frames and temporal
        # Without a bias, so that a clip without known frames does not change.
        self.known = nn.Conv2d(config.in_channels + 1, base, 3, padding=1, bias=False) if takes_known else None
        self.temporal_in = TemporalTransformer(base, config.first_temporal_heads, config.head_dim) if temporal else None
        self.context_pool = nn.Linear(config.context_dim, config.embedding_dim) if config.pooled_context else None
        self.residual_gain = nn.Linear(config.embedding_dim, 1) if config.prior_preconditioning and temporal else None

        skips, width_in = [base], base
        levels: list[Level] = []
        for i, width in enumerate(widths):
            blocks = []
            for _ in range(config.blocks_per_level):
                blocks.append(Block(config, width_in, width, config.attention_levels[i], temporal))
                skips.append(width)
                width_in = width
            last = i == len(widths) - 1
            levels.append(Level(blocks, None if last else Downsample(width)))
            if not last:
                skips.append(width)
        self.encoder = cast("Iterable[Level]", nn.ModuleList(levels))

        self.middle = Block(config, width_in, width_in, True, temporal)
        self.middle_out = ResBlock(width_in, width_in, config.embedding_dim, config.dropout, temporal)

        levels = []
        for i in reversed(range(len(widths))):
            blocks = []
            for _ in range(config.blocks_per_level + 1):
                blocks.append(Block(config, width_in + skips.pop(), widths[i], config.attention_levels[i], temporal))
                width_in = widths[i]
            levels.append(Level(blocks, Upsample(width_in) if i else None))
        self.decoder = cast("Iterable[Level]", nn.ModuleList(levels))

        self.norm_out = nn.GroupNorm(GROUPS, width_in, RESNET_EPS)
        self.conv_out = nn.Conv2d(width_in, config.out_channels, 3, padding=1)
        self.known_out = nn.Conv2d(width_in, config.out_channels, 3, padding=1) if takes_known else None
        for parameter in (*self.prior.parameters(), self.conv_out.weight):
            nn.init.zeros_(parameter)
        for layer in (self.known, self.known_out):  # so training starts from the blend
            for parameter in () if layer is None else layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        context: Tensor,
        frame_embedding: Tensor,
        prior: Tensor | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """latents [B,C,F,H,W], t [B], context [B,K,Dc], frame_embedding [B,F,E], prior [B,C,H,W] -> v like latents.

        No prior means a prior of zeros: its convolution's bias still acts. For clips with known frames, the
        output is the difference from `Known.blend` instead of v. Raises TypeError if `known` is given and the network
        takes no known frames.
        """
        return self.with_deep(latents, t, context, frame_embedding, prior, known)[0]

    def with_deep(
        self,
        latents: Tensor,
        t: Tensor,
        context: Tensor,
        frame_embedding: Tensor,
        prior: Tensor | None = None,
        known: Known | None = None,
        deep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output of `forward`, and the deep features [B*F,C0,H,W] that enter the last block from below.

        With `deep`, the deep features of another step, only the first convolution, the first temporal layer, the last
        block and the output layers are run (Ma et al. 2024, DeepCache).
        """
        frames = latents.shape[2]
        if known is not None:
            t = t[:, None] * (1 - (known.mask >= 1).to(t.dtype))  # known frames have no noise
        embedding = self._embedding(t, context, frame_embedding)  # [B*F, E]
        first = self._enter(latents, prior)  # [B*F, C0, H, W]
        if known is not None:
            first = first + self._told(known, first)
        if self.temporal_in is not None:
            first = self.temporal_in(first, frames)
        blocks = [block for level in self.decoder for block in level.blocks]
        if deep is None:
            deep = self._deep(first, embedding, context, frames)
        x = self._run(blocks[-1], torch.cat([deep, first], dim=1), embedding, context, frames)
        x = nn.functional.silu(self.norm_out(x))
        v: Tensor = self.conv_out(x).unflatten(0, (-1, frames)).transpose(1, 2)
        if known is None or self.known_out is None:
            return v, deep
        return torch.where(known.given, self.known_out(x).unflatten(0, (-1, frames)).transpose(1, 2), v), deep

    def _deep(self, first: Tensor, embedding: Tensor, context: Tensor, frames: int) -> Tensor:
        """All blocks except the last one: [B*F,C0,H,W] -> the same."""
        x, skips = first, [first]
        for level in self.encoder:
            for block in level.blocks:
                x = self._run(block, x, embedding, context, frames)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        x = self._run(self.middle, x, embedding, context, frames)
        x = self.middle_out(x, embedding, frames)
        for level in self.decoder:
            for block in level.blocks:
                if len(skips) == 1:  # for the last block
                    return x
                x = self._run(block, torch.cat([x, skips.pop()], dim=1), embedding, context, frames)
            if level.resample is not None:
                x = level.resample(x)
        return x

    def _run(self, block: Block, x: Tensor, embedding: Tensor, context: Tensor, frames: int) -> Tensor:
        out: Tensor
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(block, x, embedding, context, frames, use_reentrant=False)
        else:
            out = block(x, embedding, context, frames)
        return out

    def log_gain(self, context: Tensor, frame_embedding: Tensor) -> Tensor:
        """log g [B,F] of prior preconditioning: how far a frame is expected to be from the prior. It is predicted from
        the cues and, with pooled context, from the text ("standing still" needs no cue).

        Raises TypeError for a network without prior preconditioning.
        """
        if self.residual_gain is None:
            raise TypeError("this network has no prior preconditioning")
        if self.context_pool is not None:
            frame_embedding = frame_embedding + self.context_pool(context.mean(dim=1))[:, None]
        gain: Tensor = self.residual_gain(nn.functional.silu(frame_embedding))
        return gain.squeeze(-1)

    def _embedding(self, t: Tensor, context: Tensor, frame_embedding: Tensor) -> Tensor:
        time = self.time[1:](self.time[0](t).to(frame_embedding.dtype))  # [B, E], or [B, F, E]
        time = time[:, None] if t.ndim == 1 else time
        if self.context_pool is not None:
            time = time + self.context_pool(context.mean(dim=1))[:, None]
        return (time + frame_embedding).flatten(0, 1)

    def _enter(self, latents: Tensor, prior: Tensor | None) -> Tensor:
        x = self.conv_in(latents.transpose(1, 2).flatten(0, 1)).unflatten(0, (latents.shape[0], -1))
        if prior is not None:
            x = x + self.prior(prior)[:, None]
        elif self.prior.bias is not None:  # always true; the declared type is Optional
            x = x + self.prior.bias[:, None, None]
        return x.flatten(0, 1)

    def _told(self, known: Known, like: Tensor) -> Tensor:
        """The term [B*F, C0, H, W] that known frames add to the first convolution's output."""
        if self.known is None:
            raise TypeError("this network takes no known frames")
        latents, wide = known.blend().to(like.dtype), known.wide(like)
        told = torch.cat([latents, wide.expand(-1, -1, -1, *latents.shape[3:])], dim=1)
        out: Tensor = self.known(told.transpose(1, 2).flatten(0, 1))
        return out


def temporal_names(config: UNetConfig) -> list[str]:
    """Parameters of `UNet` that do not affect still pictures: temporal layers, the gain, inputs and output for known
    frames, and the weight of the prior's convolution. (Its bias affects them, because it is added without a prior too.)
    """
    with torch.device("meta"):
        spatial, whole = (dict(UNet(config, temporal=temporal).named_parameters()) for temporal in (False, True))
    return [name for name in whole if name not in spatial or name == "prior.weight"]


class Denoiser(nn.Module):
    """HiGen's unified denoiser: the conditioner, and the U-Net, which is used without temporal layers for one frame.

    With `config.known_layers`, `known` has the temporal layers for clips with known frames (`known_unet`).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.conditioner = Conditioner(config)
        self.unet = UNet(config)
        self.known = None
        if config.known_layers:
            own = with_known_inputs(config)
            self.known = _only(UNet(own), temporal_names(own))

    def spatial_unet(self) -> UNet:
        """The U-Net without temporal layers. It shares the parameter tensors, so there is no second copy."""
        with torch.device("meta"):
            spatial = UNet(self.config, temporal=False)
        return self._shared(spatial)

    def known_unet(self) -> UNet:
        """The U-Net with the layers of `known` in place of its own. It shares all parameter tensors.

        Raises TypeError for a denoiser without these layers.
        """
        if self.known is None:
            raise TypeError("this denoiser has no layers for known frames")
        with torch.device("meta"):
            unet = UNet(with_known_inputs(self.config))
        return self._shared(unet, self.known.state_dict(keep_vars=True))

    def _shared(self, unet: UNet, others: dict[str, Tensor] | None = None) -> UNet:
        """Gives a U-Net on the meta device the tensors of `others`, and for the rest those of `self.unet`."""
        own = {**self.unet.state_dict(keep_vars=True), **(others or {})}
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(own[name].requires_grad)  # load_state_dict copies this flag the other way
        unet.load_state_dict({name: own[name] for name in unet.state_dict()}, assign=True)
        return unet.train(self.training)


def with_known_inputs(config: UNetConfig) -> UNetConfig:
    """The configuration of the network with the layers for known frames."""
    return replace(config, known_layers=False, known_frames=True)


def _only(module: nn.Module, names: Collection[str]) -> nn.Module:
    """The module with only these parameters. It cannot be called."""
    for name, _ in list(module.named_parameters()):
        if name not in names:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_parameter(leaf, None)
    return module
