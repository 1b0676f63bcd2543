"""Walking diffusers' U-Nets for video, compared with their own forward."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_diffusers as tiny
import torch
from deep_truth import Reused

from higen.families.modelscope.predictors import UpscalingPredictor
from higen.models.video_walk import fold, per_frame, time_embedding, unfold, walk, walk_with_deep

SIZES: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64)}
THREE: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
}
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


def _forwards(kind: str, f: int) -> tuple[Any, Any, Any]:
    """A U-Net, its own forward on x, t and context, and the walk on these and deep features."""
    if kind == "Motion":
        unet = motion(True)
        whole = lambda x, t, text: unet(x, t, per_frame(text, f), return_dict=False)[0]  # noqa: E731
    elif kind == "3D":
        unet = tiny.randomised(diffusers.UNet3DConditionModel(**SIZES, **_kinds("3D"), attention_head_dim=8), 1)
        whole = lambda x, t, text: unet(x, t, text, return_dict=False)[0]  # noqa: E731
    else:
        unet = tiny.image_unet(block_out_channels=(32, 32, 64), **THREE)
        whole = lambda x, t, text: unet(x[:, :, 0], t, text, return_dict=False)[0][:, :, None]  # noqa: E731
    frames = {} if kind == "2D" else {"num_frames": f}

    def walked(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, deep: torch.Tensor | None) -> Any:
        first = unet.conv_in(fold(x))
        if kind == "3D":
            first = unet.transformer_in(first, num_frames=f, return_dict=False)[0]
        told = per_frame(time_embedding(unet, t), f), per_frame(text, f)
        m, kept = walk_with_deep(unet, first, *told, deep, **frames)
        return unfold(m, len(x)), kept

    return unet, whole, walked


@pytest.mark.parametrize("kind", ["Motion", "3D", "2D"])
@torch.inference_mode()
def test_reused_features(kind: str) -> None:
    """Only the last layer with another step's features, compared with whole forwards that get the features by hooks."""
    b, f, h, w = 2, 1 if kind == "2D" else 3, 4, 8
    unet, whole, walked = _forwards(kind, f)
    x, context, t = given(b, f, 4, h, w)
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with Reused(unet, lambda count: count == 0):
        wanted = [whole(x, t, context), whole(other, t / 2, context)]
    first, deep = walked(x, t, context, None)
    second, same = walked(other, t / 2, context, deep)
    assert same is deep
    assert deep.shape == (b * f, 32, h, w)
    for got, truth in zip((first, second), wanted, strict=True):
        assert torch.allclose(got, truth, atol=1e-6)
    assert not torch.allclose(second, whole(other, t / 2, context), atol=1e-3)


@torch.inference_mode()
def test_reused_features_of_the_upscaler() -> None:
    """SR600, which has its own upward path but the same last layer; sides of any size."""
    predictor = UpscalingPredictor(tiny.video_unet(layers_per_block=2))
    random = torch.Generator().manual_seed(3)
    x, other, context = (
        torch.randn(*shape, generator=random) for shape in ((1, 4, 3, 5, 7), (1, 4, 3, 5, 7), (1, 7, 32))
    )
    row = torch.ones(1), torch.ones(1), {"context": context}, 1
    with Reused(predictor.unet, lambda count: count == 0) as reused:
        reused.count = 0
        first = predictor(x, 500 * torch.ones(1), *row)
        reused.count = 1
        second = predictor(other, 300 * torch.ones(1), *row)
    m, deep = predictor.with_deep(x, 500 * torch.ones(1), *row)
    assert torch.equal(m, first)
    assert deep.shape == (1, predictor.deep_channels, 3, 5, 7)
    assert torch.allclose(predictor.with_deep(other, 300 * torch.ones(1), *row, deep)[0], second, atol=1e-6)
    assert not torch.allclose(predictor(other, 300 * torch.ones(1), *row), second, atol=1e-3)
