"""Building blocks of the denoiser (reference: tools/modules/unet/util.py; spec sections 3 and 4).

Frames are folded into the batch, sample-major: images are [B*F, C, H, W] with row b*F + f. The temporal part of a block
is optional, so the same code also builds the network without temporal layers.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higen.conditioning import frequencies

__all__ = [
    "Attention",
    "Downsample",
    "ResBlock",
    "Sinusoid",
    "SpatialTransformer",
    "TemporalConv",
    "TemporalTransformer",
    "TransformerBlock",
    "Upsample",
    "embedding_mlp",
]

M = TypeVar("M", bound=nn.Module)

GROUPS = 32
RESNET_EPS = 1e-5
TRANSFORMER_EPS = 1e-6


class Sinusoid(nn.Module):
    """Sinusoidal embedding [...] -> [..., dim], float32, as in `higen.conditioning.sinusoid`. No parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.frequencies: list[float] = frequencies(dim).tolist()

    def forward(self, values: Tensor) -> Tensor:
        angles = values.float()[..., None] * torch.tensor(self.frequencies, dtype=torch.float32, device=values.device)
        return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, self.dim % 2))


def embedding_mlp(width_in: int, width: int) -> nn.Sequential:
    """The two-layer perceptron after each embedding."""
    return nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width))


class Attention(nn.Module):
    """Multi-head attention. Heads are contiguous chunks of the channels; the scale is 1/sqrt(head_dim)."""

    def __init__(self, dim: int, heads: int, memory_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(memory_dim, dim, bias=False)
        self.value = nn.Linear(memory_dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        # x: [B*F, T, C], memory: [B, M, Cm] or [B*F, M, Cm]. If the frames of a sample attend to the same memory,
        # they are joined along the token axis, so that keys and values are not repeated per frame.
        q = self._split(self.query(x).reshape(memory.shape[0], -1, x.shape[-1]))  # [B, heads, F*T, d]
        k, v = self._split(self.key(memory)), self._split(self.value(memory))  # [B, heads, M, d]
        out: Tensor = self.out(_attend(q, k, v).transpose(1, 2).reshape(x.shape))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # In mixed precision on a CPU, attention stays in float32: in bfloat16 its backward pass is 3 times slower.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)


class GatedFeedForward(nn.Module):
    """GEGLU with exact GELU. The first half of the channels is the value, the second half the gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 8 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        half = self.contract.in_features
        expanded = self.expand(x)  # sliced instead of chunked, because a chunk is exported as a sequence
        out: Tensor = self.contract(expanded[..., :half] * F.gelu(expanded[..., half:]))
        return out


class TransformerBlock(nn.Module):
    """x += attention1(norm x); x += attention2(norm x); x += feed_forward(norm x).

    The two attentions attend to `memory1` and `memory2`; None: to x itself (self-attention).
    """

    def __init__(self, dim: int, heads: int, memory1_dim: int | None = None, memory2_dim: int | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention1 = Attention(dim, heads, memory1_dim or dim)
        self.attention2 = Attention(dim, heads, memory2_dim or dim)
        self.feed_forward = GatedFeedForward(dim)

    def forward(self, x: Tensor, memory1: Tensor | None = None, memory2: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention1(h, h if memory1 is None else memory1)
        h = self.norm2(x)
        x = x + self.attention2(h, h if memory2 is None else memory2)
        out: Tensor = x + self.feed_forward(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Self-attention over the pixels of each frame, then cross-attention to the context tokens."""

    def __init__(self, channels: int, head_dim: int, context_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, TRANSFORMER_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.block = TransformerBlock(channels, channels // head_dim, memory2_dim=context_dim)
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        # x: [B*F, C, H, W], context: [B, K, Dc]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B*F, H*W, C]
        tokens = self.proj_out(self.block(tokens, memory2=context))
        return x + tokens.transpose(1, 2).reshape(x.shape)


class TemporalTransformer(nn.Module):
    """Two self-attentions over the frames at each pixel. Its norm takes joint statistics over all frames."""

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, TRANSFORMER_EPS)
        self.proj_in = nn.Linear(channels, heads * head_dim)
        self.block = TransformerBlock(heads * head_dim, heads)
        self.proj_out = zero(nn.Linear(heads * head_dim, channels))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        # x: [B*F, C, H, W]
        h = self.norm(frames_inside(x, frames))  # [B, C, F, H*W]
        tokens = h.permute(0, 3, 2, 1).flatten(0, 1)  # [B*H*W, F, C]
        tokens = self.proj_out(self.block(self.proj_in(tokens)))
        h = tokens.unflatten(0, (-1, h.shape[3])).permute(0, 2, 3, 1)  # [B, F, C, H*W]
        return x + h.reshape(x.shape)


class TemporalConv(nn.Module):
    """Four convolutions over three frames each, with zero padding in time and one residual around all four."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, channels, RESNET_EPS) for _ in range(4))
        # [C, C, 3, 1] kernels over [B, C, F, H*W], equivalent to the released Conv3d (3, 1, 1).
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)) for _ in range(4))
        zero(self.convs[3])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        # x: [B*F, C, H, W]
        h = frames_inside(x, frames)
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            h = F.silu(norm(h))
            h = conv(self.dropout(h) if i else h)
        return x + h.transpose(1, 2).reshape(x.shape)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the embedding added between them, and a skip; then a temporal convolution."""

    def __init__(self, width_in: int, width: int, embedding_dim: int, dropout: float, temporal: bool) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(GROUPS, width_in, RESNET_EPS)
        self.conv_in = nn.Conv2d(width_in, width, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, width)
        self.norm_out = nn.GroupNorm(GROUPS, width, RESNET_EPS)
        self.conv_out = zero(nn.Conv2d(width, width, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(width_in, width, 1) if width != width_in else None
        self.temporal = TemporalConv(width, dropout) if temporal else None

    def forward(self, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
        # x: [B*F, Cin, H, W], embedding: [B*F, E]
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.embedding(F.silu(embedding))[:, :, None, None]
        h = self.conv_out(self.dropout(F.silu(self.norm_out(h))))
        h = h + (x if self.skip is None else self.skip(x))
        return h if self.temporal is None else self.temporal(h, frames)


class Downsample(nn.Conv2d):
    """3x3 convolution of stride 2, padded by 1 on every side: n -> ceil(n / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def frames_inside(x: Tensor, frames: int) -> Tensor:
    """[B*F, C, H, W] -> [B, C, F, H*W]."""
    return x.flatten(2).unflatten(0, (-1, frames)).transpose(1, 2)


def zero(module: M) -> M:
    """Set a layer's parameters to zero, so that the branch that it ends is zero at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
