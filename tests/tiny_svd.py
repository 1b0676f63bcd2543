"""A tiny Stable Video Diffusion model with every parameter random, saved as on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import tiny_diffusers as tiny
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection


def unet(**changes: Any) -> diffusers.UNetSpatioTemporalConditionModel:
    """A U-Net of two levels; the finer level attends to the picture."""
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "cross_attention_dim": 24,
        "num_attention_heads": (2, 4),
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 48,
        "num_frames": 6,
    }
    return tiny.randomised(diffusers.UNetSpatioTemporalConditionModel(**{**arguments, **changes}), 11)


def image_encoder(**changes: Any) -> CLIPVisionModelWithProjection:
    """CLIP's picture encoder with two layers, for the pipeline's 224 x 224 pictures."""
    arguments: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,
        "patch_size": 56,
        "hidden_act": "gelu",
    }
    return tiny.randomised(CLIPVisionModelWithProjection(CLIPVisionConfig(**{**arguments, **changes})), 12)


def autoencoder(**changes: Any) -> diffusers.AutoencoderKLTemporalDecoder:
    """An autoencoder with a factor of 2, whose decoder mixes the frames."""
    arguments: dict[str, Any] = {
        "block_out_channels": [32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
    }
    return tiny.randomised(diffusers.AutoencoderKLTemporalDecoder(**{**arguments, **changes}), 13)


def scheduler(**changes: Any) -> diffusers.EulerDiscreteScheduler:
    """The published scheduler."""
    settings: dict[str, Any] = {
        **tiny.SCALED_LINEAR,
        "prediction_type": "v_prediction",
        "timestep_type": "continuous",
        "timestep_spacing": "leading",
        "use_karras_sigmas": True,
        "sigma_min": 0.002,
        "sigma_max": 700.0,
        "steps_offset": 1,
    }
    return diffusers.EulerDiscreteScheduler(**{**settings, **changes})


def pipeline(**parts: Any) -> diffusers.StableVideoDiffusionPipeline:
    """A whole pipeline; `parts` replace its own parts."""
    own: dict[str, Any] = {
        "vae": parts.get("vae") or autoencoder(),
        "image_encoder": parts.get("image_encoder") or image_encoder(),
        "unet": parts.get("unet") or unet(),
        "scheduler": parts.get("scheduler") or scheduler(),
        "feature_extractor": CLIPImageProcessor(),
    }
    made = diffusers.StableVideoDiffusionPipeline(**own)
    made.set_progress_bar_config(disable=True)
    return made


def save(made: diffusers.StableVideoDiffusionPipeline, folder: Path, **how: Any) -> Path:
    """Save a pipeline as on the hub."""
    for name, part in made.components.items():
        if isinstance(part, torch.nn.Module):
            part.save_pretrained(folder / name, **how)
        else:
            part.save_pretrained(folder / name)
    index = {"_class_name": type(made).__name__, "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
