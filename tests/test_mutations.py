"""Typical mistakes of a port, made on purpose. The committed fixtures must detect each of them.

The list is the reference's own (mutation_sensitivity.json). If no case detects a mistake, a real one could pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higen import conditioning
from higen.families.higen import cues, spec
from higen.families.higen.unet import Conditioner, ContextTokens, Denoiser, UNet
from higen.models import layers
from higen.models.layers import Attention, Downsample, ResBlock, TemporalConv, TemporalTransformer, TransformerBlock
from higen.models.solver_step import SolverStep
from higen.parity import run

SUBSET = Path(__file__).parent / "reference" / "fixtures"

Mutation = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: dict[str, tuple[str, Mutation]] = {}
"""name: (the cases that should detect the mistake, the mistake)."""


def mutation(noticed_by: str) -> Callable[[Mutation], Mutation]:
    def register(mistake: Mutation) -> Mutation:
        MUTATIONS[mistake.__name__] = (noticed_by, mistake)
        return mistake

    return register


def after_init(patch: pytest.MonkeyPatch, kind: type[nn.Module], change: Callable[..., None]) -> None:
    """Apply `change` to every module of a class once it is built."""
    original = kind.__init__

    def build(self: nn.Module, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        change(self)

    patch.setattr(kind, "__init__", build)


def set_eps(eps: float, *names: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for name in names:
            module.get_submodule(name).eps = eps

    return change


@mutation("forward/p1/spatial")
def sin_before_cos(patch: pytest.MonkeyPatch) -> None:
    original = layers.Sinusoid.forward
    patch.setattr(layers.Sinusoid, "forward", lambda self, t: torch.cat(original(self, t).chunk(2, -1)[::-1], -1))


@mutation("forward/p1/temporal")
def sin_before_cos_in_cues(patch: pytest.MonkeyPatch) -> None:
    original = conditioning.sinusoid
    patch.setattr(conditioning, "sinusoid", lambda values, dim: np.roll(original(values, dim), dim // 2, -1))


@mutation("forward/p1")
def sinusoid_half_minus_1(patch: pytest.MonkeyPatch) -> None:
    def frequencies(dim: int) -> np.ndarray:
        return (10000.0 ** (-np.arange(dim // 2) / (dim // 2 - 1))).astype(np.float32)

    patch.setattr(layers, "frequencies", frequencies)


@mutation("units/p1")
def transformer_groupnorm_eps_1e5(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers, "TRANSFORMER_EPS", 1e-5)


@mutation("units/p1")
def resblock_groupnorm_eps_1e6(patch: pytest.MonkeyPatch) -> None:
    after_init(patch, ResBlock, set_eps(1e-6, "norm_in", "norm_out"))


@mutation("forward/p1/temporal")
def temporal_conv_groupnorm_eps_1e6(patch: pytest.MonkeyPatch) -> None:
    after_init(patch, TemporalConv, set_eps(1e-6, *(f"norms.{i}" for i in range(4))))


@mutation("")
def layernorm_eps_1e6(patch: pytest.MonkeyPatch) -> None:
    after_init(patch, TransformerBlock, set_eps(1e-6, "norm1", "norm2", "norm3"))


@mutation("units/p1/out@")
def head_groupnorm_eps_1e6(patch: pytest.MonkeyPatch) -> None:
    after_init(patch, UNet, set_eps(1e-6, "norm_out"))


@mutation("forward/p1")
def gelu_tanh(patch: pytest.MonkeyPatch) -> None:
    exact = F.gelu
    patch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))


@mutation("units/p1")
def geglu_halves_swapped(patch: pytest.MonkeyPatch) -> None:
    def forward(self: layers.GatedFeedForward, x: Tensor) -> Tensor:
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.contract(value * F.gelu(gate))

    patch.setattr(layers.GatedFeedForward, "forward", forward)


def per_frame(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """[B, C, F, N] normalised frame by frame."""
    return torch.stack([norm(frame) for frame in x.unbind(2)], 2)


@mutation("units/p1")
def temporal_transformer_norm_per_frame(patch: pytest.MonkeyPatch) -> None:
    class PerFrame(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([super(PerFrame, self).forward(frame) for frame in x.unbind(2)], 2)

    after_init(patch, TemporalTransformer, lambda module: setattr(module.norm, "__class__", PerFrame))


@mutation("units/p1")
def temporal_conv_norm_per_frame(patch: pytest.MonkeyPatch) -> None:
    def forward(self: TemporalConv, x: Tensor, frames: int) -> Tensor:
        h = layers.frames_inside(x, frames)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(F.silu(per_frame(norm, h)))
        return x + h.transpose(1, 2).reshape(x.shape)

    patch.setattr(TemporalConv, "forward", forward)


@mutation("units/p1")
def temporal_transformer_no_attn2(patch: pytest.MonkeyPatch) -> None:
    def forward(self: TemporalTransformer, x: Tensor, frames: int) -> Tensor:
        h = self.norm(layers.frames_inside(x, frames))
        tokens = self.proj_in(h.permute(0, 3, 2, 1).flatten(0, 1))
        normed = self.block.norm1(tokens)
        tokens = tokens + self.block.attention1(normed, normed)
        tokens = self.proj_out(tokens + self.block.feed_forward(self.block.norm3(tokens)))
        return x + tokens.unflatten(0, (-1, h.shape[3])).permute(0, 2, 3, 1).reshape(x.shape)

    patch.setattr(TemporalTransformer, "forward", forward)


@mutation("units/p1")
def temporal_active_at_f1(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Denoiser, "spatial_unet", lambda self: self.unet)


@mutation("units/p1")
def temporal_conv_replicate_pad(patch: pytest.MonkeyPatch) -> None:
    def change(module: TemporalConv) -> None:
        for conv in module.convs:
            conv.padding_mode = "replicate"

    after_init(patch, TemporalConv, change)


@mutation("forward/p1/temporal")
def temporal_heads_from_channels_in_init(patch: pytest.MonkeyPatch) -> None:
    def change(module: UNet) -> None:
        if module.temporal_in is not None:
            for attention in (module.temporal_in.block.attention1, module.temporal_in.block.attention2):
                attention.heads = module.config.base_channels // module.config.head_dim

    after_init(patch, UNet, change)


@mutation("forward/p2/temporal")
def motion_interp_on_values(patch: pytest.MonkeyPatch) -> None:
    original = cues.motion_values

    def values(motion: object, frames: int) -> np.ndarray:
        return conditioning.resample_in_time(original(motion, frames)[:, None], frames)[:, 0]

    patch.setattr(cues, "motion_values", values)


@mutation("forward/p2/temporal")
def motion_interp_align_corners(patch: pytest.MonkeyPatch) -> None:
    def resample(vectors: np.ndarray, frames: int) -> np.ndarray:
        source = torch.from_numpy(vectors).T[None]
        resampled = F.interpolate(source, size=frames, mode="linear", align_corners=True)
        return resampled[0].T.numpy()

    patch.setattr(conditioning, "resample_in_time", resample)


@mutation("forward/p2/temporal")
def motion_repeat_last(patch: pytest.MonkeyPatch) -> None:
    def resample(vectors: np.ndarray, frames: int) -> np.ndarray:
        return np.concatenate([vectors, vectors[-1:]])[:frames]

    patch.setattr(conditioning, "resample_in_time", resample)


@mutation("forward/p1")
def appearance_transposed_or_dropped(patch: pytest.MonkeyPatch) -> None:
    original = Conditioner.forward
    patch.setattr(Conditioner, "forward", lambda self, hidden, motion, rows: original(self, hidden, motion, 0.0 * rows))


@mutation("forward/p1/temporal")
def prior_not_added(patch: pytest.MonkeyPatch) -> None:
    original = UNet._enter
    patch.setattr(UNet, "_enter", lambda self, latents, prior: original(self, latents, None))


@mutation("forward/p1/spatial")
def prior_bias_skipped_when_zero(patch: pytest.MonkeyPatch) -> None:
    def enter(self: UNet, latents: Tensor, prior: Tensor | None) -> Tensor:
        x = self.conv_in(latents.transpose(1, 2).flatten(0, 1))
        if prior is not None and prior.any():
            x = x + self.prior(prior).repeat_interleave(latents.shape[2], 0)
        return x

    patch.setattr(UNet, "_enter", enter)


@mutation("units/p1")
def emb_without_silu(patch: pytest.MonkeyPatch) -> None:
    def change(module: ResBlock) -> None:
        # The layer gets the embedding as it enters the block, before the block's SiLU.
        module.embedding.register_forward_pre_hook(lambda layer, inputs: (module.raw,))
        module.register_forward_pre_hook(lambda block, inputs: setattr(block, "raw", inputs[1]))

    after_init(patch, ResBlock, change)


@mutation("forward/p1/temporal_f2_b2")
def embeddings_frame_major(patch: pytest.MonkeyPatch) -> None:
    def embed(self: UNet, t: Tensor, context: Tensor, frame_embedding: Tensor) -> Tensor:
        time = self.time(t)
        return (time[:, None] + frame_embedding).transpose(0, 1).flatten(0, 1)

    patch.setattr(UNet, "_embedding", embed)


@mutation("units/p1/context")
def context_attn1_as_self_attn(patch: pytest.MonkeyPatch) -> None:
    def forward(self: ContextTokens, hidden: Tensor) -> Tensor:
        text, tokens = self.text_in(hidden), self.tokens.expand(hidden.shape[0], -1, -1)
        for block in self.blocks:
            tokens = block(tokens, None, text)
        return self.out(tokens)

    patch.setattr(ContextTokens, "forward", forward)


@mutation("units/p1")
def attention_scale_inner_dim(patch: pytest.MonkeyPatch) -> None:
    attend = F.scaled_dot_product_attention

    def mistaken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, scale=(q.shape[1] * q.shape[3]) ** -0.5)

    patch.setattr(F, "scaled_dot_product_attention", mistaken)


@mutation("units/p1")
def attention_heads_interleaved(patch: pytest.MonkeyPatch) -> None:
    def split(self: Attention, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)

    patch.setattr(Attention, "_split", split)


@mutation("units/p1")
def upsample_bilinear(patch: pytest.MonkeyPatch) -> None:
    resize = F.interpolate
    patch.setattr(F, "interpolate", lambda x, scale_factor, mode: resize(x, scale_factor=scale_factor, mode="bilinear"))


@mutation("forward/p1")
def downsample_asymmetric_pad(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Downsample, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, stride=2)

    patch.setattr(Downsample, "forward", forward)


@mutation("units/p1")
def silu_to_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "silu", lambda x, inplace=False: F.gelu(x))


@mutation("forward/p2")
def skip_before_x(patch: pytest.MonkeyPatch) -> None:
    join = torch.cat
    patch.setattr(torch, "cat", lambda tensors, dim=0: join(tensors[::-1] if dim == 1 else tensors, dim))


@mutation("sample")
def guidance_the_other_way(patch: pytest.MonkeyPatch) -> None:
    original = SolverStep.forward

    def forward(self: SolverStep, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        at = self.inputs.index("context")
        return original(self, *inputs[:at], inputs[at + 1], inputs[at], *inputs[at + 2 :])

    patch.setattr(SolverStep, "forward", forward)


@mutation("sample")
def last_step_ends_at_the_clean_latent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(spec, "DDIM", replace(spec.DDIM, final="zero"))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noticed_by, mistake = MUTATIONS[name]
    mistake(monkeypatch)
    assert [case.name for case in run(SUBSET, only=noticed_by) if not case.passed]


def test_every_mistake_the_reference_lists_is_made(reference: Path) -> None:
    listed = json.loads((reference / "mutation_sensitivity.json").read_text())
    assert set(listed) - {"none"} <= set(MUTATIONS)
