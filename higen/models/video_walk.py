"""diffusers' U-Nets for video walked block by block, so that a step exports with free batch and frames.

Their own forward repeats each sample's time embedding and text by `repeat_interleave`, and that exports to a graph for
the example's batch alone. The blocks export as they are, so the forward is rewritten here and the blocks are called.
UNetMotionModel, UNetSpatioTemporalConditionModel, UNet3DConditionModel and UNet2DConditionModel share the skeleton: a
first convolution, blocks down, middle, blocks up, a last convolution. Frames lie along the first axis, those of one
sample behind each other.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["ClipPredictor", "More", "down_and_middle", "ends", "fold", "per_frame", "time_embedding", "unfold"]
__all__ += ["last_layers", "walk", "walk_with_deep"]


def fold(x: Tensor) -> Tensor:
    """[B,C,F,H,W] -> [B*F,C,H,W]."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold(y: Tensor, batch: int) -> Tensor:
    """[B*F,C,H,W] -> [B,C,F,H,W]. `batch`: B, a tensor's `shape[0]`, so that it stays free in a graph."""
    return y.unflatten(0, (batch, -1)).transpose(1, 2)


def per_frame(x: Tensor, frames: int) -> Tensor:
    """[B,...] -> [B*F,...], each sample's row for each of its frames: `repeat_interleave` by a free number."""
    return x[:, None].expand(-1, frames, *(-1,) * (x.ndim - 1)).flatten(0, 1)


def time_embedding(unet: Any, t: Tensor) -> Tensor:
    """t [B] -> [B,E]: sinusoids, which are computed in float32, and the two layers behind them."""
    embedding: Tensor = unet.time_embedding(unet.time_proj(t).to(unet.conv_in.weight.dtype))
    return embedding


More = tuple[tuple[Tensor, ...], Tensor]
"""What a control network adds: to the skip connections, in the order of `down_and_middle`, and to the middle."""


def walk(unet: Any, x: Tensor, embedding: Tensor, context: Tensor, more: More | None = None, **frames: Any) -> Tensor:
    """From behind the first convolution to the prediction: [N,C,H,W] -> [N,C',H,W], N the frames of all samples.

    embedding  [N,E]; context [N,L,Dc], of the blocks that attend to it
    more       what is added behind the first half
    frames     what tells the blocks how many frames a sample has: `num_frames` or `image_only_indicator`, by the class

    H and W are multiples of what the blocks down divide them by: no block is told the size to upsample to.
    """
    return walk_with_deep(unet, x, embedding, context, None, more, **frames)[0]


def walk_with_deep(
    unet: Any,
    x: Tensor,
    embedding: Tensor,
    context: Tensor,
    deep: Tensor | None,
    more: More | None = None,
    **frames: Any,
) -> tuple[Tensor, Tensor]:
    """`walk`, and the features [N,K,H,W] that enter the last layer of the blocks up from below. With `deep`, those of
    another step, that layer alone is run (higen/feature_reuse.py); `more` is not added then.
    """
    if deep is None:
        y, skips = down_and_middle(unet, x, embedding, context, **frames)
        if more is not None:
            skips, y = tuple(skip + one for skip, one in zip(skips, more[0], strict=True)), y + more[1]
            x = skips[0]
        for block in unet.up_blocks[:-1]:
            own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            y = block(hidden_states=y, temb=embedding, res_hidden_states_tuple=own, **_text(block, context), **frames)
        deep = last_layers(unet, y, skips[1:], embedding, context, slice(None, -1), **frames)
    return ends(unet, last_layers(unet, deep, (x,), embedding, context, slice(-1, None), **frames)), deep


def last_layers(
    unet: Any, x: Tensor, skips: tuple[Tensor, ...], embedding: Tensor, context: Tensor, which: slice, **frames: Any
) -> Tensor:
    """Some of the layers of the last block up, which has no upsampler: the same modules in a block of fewer."""
    block = unet.up_blocks[-1]
    part = copy.copy(block)
    lists = {
        name: nn.ModuleList(rows[which]) for name, rows in block.named_children() if isinstance(rows, nn.ModuleList)
    }
    part._modules = block._modules | lists
    made: Tensor = part(
        hidden_states=x, temb=embedding, res_hidden_states_tuple=skips, **_text(block, context), **frames
    )
    return made


def down_and_middle(
    unet: Any, x: Tensor, embedding: Tensor, context: Tensor, **frames: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first half of `walk`: what the middle block makes, and the skip connections, the last one's last."""
    skips: tuple[Tensor, ...] = (x,)
    for block in unet.down_blocks:
        x, more = block(hidden_states=x, temb=embedding, **_text(block, context), **frames)
        skips += more
    if unet.mid_block is not None:
        # A middle block without temporal layers is that of a U-Net for pictures, which knows of no frames.
        known = inspect.signature(type(unet.mid_block).forward).parameters
        told = {name: value for name, value in frames.items() if name in known}
        x = unet.mid_block(x, embedding, encoder_hidden_states=context, **told)
    return x, skips


def ends(unet: Any, x: Tensor) -> Tensor:
    """What stands behind the blocks of a U-Net: [N,C,H,W] -> the prediction [N,C',H,W]."""
    if unet.conv_norm_out is not None:
        x = unet.conv_act(unet.conv_norm_out(x))
    predicted: Tensor = unet.conv_out(x)
    return predicted


def _text(block: Any, context: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


class ClipPredictor(nn.Module):
    """m of a U-Net for video, as `SolverStep` asks for it; its one condition is `context` [B,T,Dc]."""

    prefix = "unet."

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet: Any = unet

    @property
    def deep_channels(self) -> int | None:
        """Channels of the deep features; None: it has none."""
        return int(self.unet.conv_in.out_channels)

    def enter(self, first: Tensor, frames: int) -> Tensor:
        """What stands between the first convolution and the blocks: [B*F,C,H,W] -> the same. Here nothing."""
        return first

    def through(
        self, first: Tensor, embedding: Tensor, context: Tensor, frames: int, deep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """From behind `enter` to the prediction, [B*F,C',H,W], and the deep features, see `walk_with_deep`."""
        return walk_with_deep(self.unet, first, embedding, context, deep, num_frames=frames)

    def forward(self, *told: Any) -> Tensor:
        """x [B,C,F,H,W] and the other arguments of `with_deep` -> m, like x."""
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
        """m, like x [B,C,F,H,W], and the deep features [B,K,F,H,W]: `deep`, where they are given."""
        unet, frames = self.unet, x.shape[2]
        dtype = unet.conv_in.weight.dtype
        embedding, context = time_embedding(unet, t), conditions["context"].to(dtype)
        first = self.enter(unet.conv_in(fold(x.to(dtype))), frames)
        given = None if deep is None else fold(deep.to(dtype))
        told = per_frame(embedding, frames), per_frame(context, frames), frames
        m, kept = self.through(first, *told, given)
        return unfold(m, x.shape[0]), unfold(kept, x.shape[0])
