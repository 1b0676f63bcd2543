"""Runs diffusers' video U-Nets block by block, so that a step can be exported with dynamic batch and frame axes.

diffusers' own forward repeats each sample's time embedding and text with `repeat_interleave`. That exports to a graph
that only fits the example's batch. The blocks can be exported unchanged, so only the forward is rewritten here.
UNetMotionModel, UNetSpatioTemporalConditionModel, UNet3DConditionModel and UNet2DConditionModel have the same
structure: a first convolution, blocks on the way down, a middle block, blocks on the way up, a last convolution. Frames
are along the first axis; the frames of one sample are consecutive.
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
    """[B*F,C,H,W] -> [B,C,F,H,W]. `batch`: B as a tensor's `shape[0]`, so that it stays dynamic in a graph."""
    return y.unflatten(0, (batch, -1)).transpose(1, 2)


def per_frame(x: Tensor, frames: int) -> Tensor:
    """[B,...] -> [B*F,...]: `repeat_interleave` of each sample's row by its number of frames, which stays dynamic."""
    return x[:, None].expand(-1, frames, *(-1,) * (x.ndim - 1)).flatten(0, 1)


def time_embedding(unet: Any, t: Tensor) -> Tensor:
    """t [B] -> [B,E]: sinusoids, which are computed in float32, and the two layers after them."""
    embedding: Tensor = unet.time_embedding(unet.time_proj(t).to(unet.conv_in.weight.dtype))
    return embedding


More = tuple[tuple[Tensor, ...], Tensor]
"""The terms of a control network: for the skip connections, in the order of `down_and_middle`, and for the middle."""


def walk(unet: Any, x: Tensor, embedding: Tensor, context: Tensor, more: More | None = None, **frames: Any) -> Tensor:
    """The U-Net from after the first convolution to the prediction: [N,C,H,W] -> [N,C',H,W], N: frames of all samples.

    embedding  [N,E]
    context    [N,L,Dc], for the blocks that attend to it
    more       terms that are added after the first half
    frames     the argument for the number of frames: `num_frames` or `image_only_indicator`, depending on the class

    H and W must be multiples of the U-Net's downsampling, because the blocks get no target size for upsampling.
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
    """The result of `walk`, and the deep features [N,K,H,W] that enter the last layer on the way up from below. With
    `deep`, the deep features of another step, only that layer is run (higen/feature_reuse.py), and `more` is not added.
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
    """Run the layers `which` of the last block on the way up, with the same modules. This block has no upsampler."""
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
    """The first half of `walk`: the output of the middle block, and the skip connections in the order of the blocks."""
    skips: tuple[Tensor, ...] = (x,)
    for block in unet.down_blocks:
        x, more = block(hidden_states=x, temb=embedding, **_text(block, context), **frames)
        skips += more
    if unet.mid_block is not None:
        # A middle block without temporal layers is that of an image U-Net. It takes no number of frames.
        known = inspect.signature(type(unet.mid_block).forward).parameters
        told = {name: value for name, value in frames.items() if name in known}
        x = unet.mid_block(x, embedding, encoder_hidden_states=context, **told)
    return x, skips


def ends(unet: Any, x: Tensor) -> Tensor:
    """The layers after the blocks of a U-Net: [N,C,H,W] -> the prediction [N,C',H,W]."""
    if unet.conv_norm_out is not None:
        x = unet.conv_act(unet.conv_norm_out(x))
    predicted: Tensor = unet.conv_out(x)
    return predicted


def _text(block: Any, context: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


class ClipPredictor(nn.Module):
    """Predicts m with a video U-Net, as `SolverStep` calls it. The only condition is `context` [B,T,Dc]."""

    prefix = "unet."

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet: Any = unet

    @property
    def deep_channels(self) -> int | None:
        """Channels of the deep features; None if there are no deep features."""
        return int(self.unet.conv_in.out_channels)

    def enter(self, first: Tensor, frames: int) -> Tensor:
        """Layers between the first convolution and the blocks: [B*F,C,H,W] -> the same. There are none by default."""
        return first

    def terms(
        self, noisy: Tensor, t: Tensor, context: Tensor, conditions: Mapping[str, Tensor], frames: int
    ) -> More | None:
        """The terms of a control network. There is none by default. noisy [B*F,C,H,W], t [B], context [B*F,T,Dc]"""
        return None

    def first_term(self, noisy: Tensor, conditions: Mapping[str, Tensor]) -> Tensor | None:
        """The term for the first skip connection [B*F,C',H,W]. It needs none of the control network's blocks."""
        return None

    def through(
        self,
        first: Tensor,
        embedding: Tensor,
        context: Tensor,
        frames: int,
        deep: Tensor | None,
        more: More | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The U-Net from after `enter` to the prediction [B*F,C',H,W], and the deep features (see `walk_with_deep`)."""
        return walk_with_deep(self.unet, first, embedding, context, deep, more, num_frames=frames)

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
        """m, shaped like x [B,C,F,H,W], and the deep features [B,K,F,H,W], which are `deep` if it is given.

        The deep features contain the terms of a control network. So a step with the deep features of another step adds
        only the term for the first skip connection.
        """
        unet, frames = self.unet, x.shape[2]
        noisy = fold(x.to(unet.conv_in.weight.dtype))
        context = per_frame(conditions["context"].to(noisy.dtype), frames)
        embedding = per_frame(time_embedding(unet, t), frames)
        first = self.enter(unet.conv_in(noisy), frames)
        more, given = None, None
        if deep is None:
            more = self.terms(noisy, t, context, conditions, frames)
        else:
            term, given = self.first_term(noisy, conditions), fold(deep.to(noisy.dtype))
            first = first if term is None else first + term
        m, kept = self.through(first, embedding, context, frames, given, more)
        return unfold(m, x.shape[0]), unfold(kept, x.shape[0])
