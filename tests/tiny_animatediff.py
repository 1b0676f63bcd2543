"""Tiny AnimateDiff models of diffusers with every parameter random, in every published format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import tiny_diffusers as tiny
import torch

State = dict[str, torch.Tensor]

LINEAR = {"beta_schedule": "linear", "timestep_spacing": "linspace", "steps_offset": 1, "clip_sample": False}
"""The changes to Stable Diffusion's scheduler in diffusers' documentation."""


def adapter(**changes: Any) -> Any:
    """A motion adapter for `tiny.image_unet()`."""
    arguments: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "motion_layers_per_block": 1,
        "motion_num_attention_heads": 8,
        "motion_max_seq_length": 24,
    }
    return tiny.randomised(diffusers.MotionAdapter(**{**arguments, **changes}), 3)


def pipeline(sampler: Any, motion: Any = None, unet: Any = None, text: Any = None) -> Any:
    """A whole AnimateDiff pipeline."""
    made = diffusers.AnimateDiffPipeline(
        vae=tiny.autoencoder(),
        text_encoder=text if text is not None else tiny.text_encoder(32),
        tokenizer=None,
        unet=unet if unet is not None else tiny.image_unet(),
        motion_adapter=motion if motion is not None else adapter(),
        scheduler=sampler,
    )
    made.set_progress_bar_config(disable=True)
    return made


def authors_names(motion: Any, wrapper: str = "module.") -> State:
    """A motion adapter's tensors as the authors name them, with a table of positions in each attention."""
    found: State = {}
    for name, tensor in motion.state_dict().items():
        name = re.sub(r"(motion_modules\.\d+)\.", r"\1.temporal_transformer.", name)
        if name.endswith("pos_embed.pe"):
            base = f"{wrapper}{name.removesuffix('pos_embed.pe')}"
            found |= {f"{base}attention_blocks.{i}.pos_encoder.pe": tensor.clone() for i in (0, 1)}
            continue
        name = re.sub(r"\.attn(\d)\.", lambda m: f".attention_blocks.{int(m[1]) - 1}.", name)
        name = re.sub(r"\.norm([12])\.", lambda m: f".norms.{int(m[1]) - 1}.", name)
        found[wrapper + name.replace(".norm3.", ".ff_norm.")] = tensor.clone()
    return found


def checkpoint(path: Path, motion: Any, wrapper: str = "module.") -> Path:
    """A motion module as the authors publish it."""
    torch.save({"epoch": 1, "global_step": 2, "state_dict": authors_names(motion, wrapper)}, path)
    return path


def sparse_control(**changes: Any) -> Any:
    """A SparseCtrl network for `tiny.image_unet()`, which is shown latents; see `SHOWN_PIXELS`."""
    arguments: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "motion_num_attention_heads": 8,
        "motion_max_seq_length": 16,
    }
    return tiny.randomised(diffusers.SparseControlNetModel(**{**arguments, **changes}), 10)


SHOWN_PIXELS: dict[str, Any] = {
    "use_simplified_condition_embedding": False,
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": (16, 32),
}
"""The changes to `sparse_control` for a network that is shown pixels, in latents with 2x2 pixels per cell."""
