"""Walking diffusers' U-Nets for video, beside their own forward."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_diffusers as tiny
import torch

from higen.models.video_walk import fold, per_frame, time_embedding, unfold, walk

SIZES: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64)}
SHAPES = [(1, 1, 4, 8), (2, 3, 4, 4), (3, 3, 8, 4), (1, 8, 4, 4)]  # B, F, H, W


def _kinds(kind: str) -> dict[str, Any]:
    return {
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
        "cross_attention_dim": 32,
    }


def motion(middle: bool) -> Any:
    heads = {"num_attention_heads": 4, "motion_num_attention_heads": 4}
    unet = diffusers.UNetMotionModel(**SIZES, **_kinds("Motion"), **heads, use_motion_mid_block=middle)
    return tiny.randomised(unet, 1)


def given(b: int, f: int, channels: int, h: int, w: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    drawn = (torch.randn(*shape, generator=random) for shape in ((b, channels, f, h, w), (b, 7, 32)))
    return (*drawn, torch.rand(b, generator=random) * 999)


@pytest.mark.parametrize("middle", [True, False])
@torch.inference_mode()
def test_motion_modules(middle: bool) -> None:
    unet = motion(middle)
    for b, f, h, w in SHAPES:
        x, context, t = given(b, f, 4, h, w)
        wanted = unet(x, t, per_frame(context, f), return_dict=False)[0]
        embedding = per_frame(time_embedding(unet, t), f)
        got = walk(unet, unet.conv_in(fold(x)), embedding, per_frame(context, f), num_frames=f)
        assert torch.allclose(unfold(got, b), wanted, atol=1e-6)


@torch.inference_mode()
def test_spatio_temporal_blocks() -> None:
    more = {"in_channels": 8, "num_attention_heads": (2, 4), "num_frames": 3}
    ids = {"addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 96}
    unet: Any = diffusers.UNetSpatioTemporalConditionModel(**SIZES, **_kinds("SpatioTemporal"), **more, **ids)
    unet = tiny.randomised(unet, 1)
    for b, f, h, w in SHAPES:
        x, context, t = given(b, f, 8, h, w)
        added = torch.tensor([[6.0, 127.0, 0.02]]).expand(b, 3)
        wanted = unet(x.transpose(1, 2), t, context, added, return_dict=False)[0].transpose(1, 2)
        embedding = time_embedding(unet, t) + unet.add_embedding(unet.add_time_proj(added.flatten()).reshape(b, -1))
        made = (unet.conv_in(fold(x)), per_frame(embedding, f), per_frame(context, f))
        got = walk(unet, *made, image_only_indicator=torch.zeros(b, f))
        assert torch.allclose(unfold(got, b), wanted, atol=1e-6)


@torch.inference_mode()
def test_temporal_convolutions() -> None:
    unet: Any = tiny.randomised(diffusers.UNet3DConditionModel(**SIZES, **_kinds("3D"), attention_head_dim=8), 1)
    for b, f, h, w in SHAPES:
        x, context, t = given(b, f, 4, h, w)
        wanted = unet(x, t, context, return_dict=False)[0]
        first = unet.transformer_in(unet.conv_in(fold(x)), num_frames=f, return_dict=False)[0]
        got = walk(unet, first, per_frame(time_embedding(unet, t), f), per_frame(context, f), num_frames=f)
        assert torch.allclose(unfold(got, b), wanted, atol=1e-6)
