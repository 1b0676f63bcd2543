"""The U-Nets of ModelScope and SR600 as predictors of m (docs/design.md).

SR600 has other resampling layers and skip connections. Source of its layout: VGen's unet_sr600.py. The filter of the
skip connections is that of FreeU (Si et al. 2023, section 3.2).

down   a convolution of stride 2 pads two rows above and below, one column left and right
up     pixels are doubled, the first row is dropped, and the rest is cropped to the skip connection's size; so the
       output always has the size of the input
first and second skip connection on the way up
       its mean and lowest frequencies are scaled down; half of the channels that it is concatenated with are scaled up
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from higen.models.video_walk import ClipPredictor, More, down_and_middle, ends, last_layers

__all__ = ["UpscalingPredictor", "VideoPredictor", "weakened"]

STRONGER, WEAKER = (1.1, 1.2), (0.6, 0.4)
"""Factors for half of the channels, and for the mean and lowest frequencies of the skip connections."""


class VideoPredictor(ClipPredictor):
    """ModelScope's U-Net. It has a transformer over the frames between the first convolution and the blocks."""

    def enter(self, first: Tensor, frames: int) -> Tensor:
        """Apply that transformer."""
        entered: Tensor = self.unet.transformer_in(first, num_frames=frames, return_dict=False)[0]
        return entered


class UpscalingPredictor(VideoPredictor):
    """SR600's U-Net. H and W may have any size."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__(unet)
        for block in self.unet.down_blocks:
            for sampler in block.downsamplers or ():
                sampler.conv.padding = (2, 1)
        for block in self.unet.up_blocks:
            if block.upsamplers:
                block.upsamplers = nn.ModuleList([_Doubled(sampler.conv) for sampler in block.upsamplers])

    @property
    def deep_channels(self) -> int | None:
        """Channels of the deep features; None if the special lowest block is the only block on the way up."""
        return super().deep_channels if len(self.unet.up_blocks) > 1 else None

    def through(
        self,
        first: Tensor,
        embedding: Tensor,
        context: Tensor,
        frames: int,
        deep: Tensor | None,
        more: More | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The part of the network that follows the first transformer. Returns m and the deep features. `more` is not
        used, because SR600 has no control network.
        """
        if deep is None:
            deep = self._deep(first, embedding, context, frames)
        told = embedding, context, slice(-1, None)
        return ends(self.unet, last_layers(self.unet, deep, (first,), *told, num_frames=frames)), deep

    def _deep(self, first: Tensor, embedding: Tensor, context: Tensor, frames: int) -> Tensor:
        """The features that enter the last layer of the blocks on the way up."""
        x, skips = down_and_middle(self.unet, first, embedding, context, num_frames=frames)
        for level, block in enumerate(self.unet.up_blocks[:-1]):
            count = len(block.resnets)
            own, skips = skips[-count:], skips[:-count]
            size = tuple(skips[-1].shape[-2:]) if skips else None
            if level == 0:
                x = _first_up(block, x, own, embedding, context, frames, size)
            else:
                text = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
                x = block(
                    hidden_states=x,
                    temb=embedding,
                    res_hidden_states_tuple=own,
                    upsample_size=size,
                    num_frames=frames,
                    **text,
                )
        told = embedding, context, slice(None, -1)
        return last_layers(self.unet, x, skips[1:], *told, num_frames=frames)


class _Doubled(nn.Module):
    """Doubles each side, drops the first row, crops to `size`, and convolves."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[N,C,h,w] -> [N,C',H,W]. `size`: (H, W), with H at most 2 h - 1 and W at most 2 w."""
        rows = (torch.arange(size[0], device=x.device) + 1) // 2
        columns = torch.arange(size[1], device=x.device) // 2
        made: Tensor = self.conv(x.index_select(2, rows).index_select(3, columns))
        return made


def _first_up(
    block: Any,
    x: Tensor,
    skips: tuple[Tensor, ...],
    embedding: Tensor,
    context: Tensor,
    frames: int,
    size: tuple[int, ...] | None,
) -> Tensor:
    """The lowest block on the way up. Its first two skip connections are weakened."""
    for i, (resnet, convolution) in enumerate(zip(block.resnets, block.temp_convs, strict=True)):
        skip = skips[-1 - i]
        if i < len(WEAKER):
            half = x.shape[1] // 2
            x = torch.cat([x[:, :half] * STRONGER[i], x[:, half:]], dim=1)
            skip = weakened(skip, WEAKER[i])
        x = convolution(resnet(torch.cat([x, skip], dim=1), embedding), num_frames=frames)
        if getattr(block, "has_cross_attention", False):
            x = block.attentions[i](x, encoder_hidden_states=context, return_dict=False)[0]
            x = block.temp_attentions[i](x, num_frames=frames, return_dict=False)[0]
    for sampler in block.upsamplers or ():
        x = sampler(x, size)
    return x


def weakened(x: Tensor, scale: float) -> Tensor:
    """x [N,C,H,W] with its four lowest frequencies multiplied by `scale`; computed in float32.

    A frequency (k, l) has k waves over H and l over W; k and l are 0 or -1. Each frequency contributes the real part of
    its Fourier term. This part is a sum of products of 1, cos and sin of the angles y = 2 pi i / H and x = 2 pi j / W.
    No Fourier transform is needed, so the filter can be exported, and H and W may have any size.
    """
    rows, columns = (_waves(n, x.device) for n in x.shape[-2:])
    products = rows @ x.float() @ columns.T  # [N,C,3,3]: sums of x times (1, cos y, sin y) times (1, cos x, sin x)
    # The sums for cos(y + x) and sin(y + x): <cos y cos x> - <sin y sin x>, <sin y cos x> + <cos y sin x>.
    turn = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]], device=x.device)
    lowest = rows.T @ (products + turn @ products @ turn) @ columns / (x.shape[-2] * x.shape[-1])
    return (x.float() + (scale - 1.0) * lowest).to(x.dtype)


def _waves(n: int, device: torch.device) -> Tensor:
    """1, cos and sin of one wave over `n` points, float32 [3,n]. For one point, cos and sin are 0."""
    points = torch.arange(n, device=device)
    angle = points.float() * (2.0 * math.pi / n)
    some = points[-1:].clamp(max=1).float()
    return torch.stack([torch.ones_like(angle), some * angle.cos(), some * angle.sin()])
