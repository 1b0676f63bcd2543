"""Tiny models of diffusers' families with every parameter random, saved as on the hub. They give the expected results.

Zero-initialised layers would hide half of a network from a comparison, so no parameter keeps its first value.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from higen.convert import convert_sources
from higen.errors import CheckpointError
from higen.tokenizer import build_clip_tokenizer

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def randomised(module: torch.nn.Module, seed: int) -> Any:
    """The module with random parameters: weights of variance 1 / fan-in, norms near 1, biases of 0.2."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=random)
            else:
                parameter.normal_(1 if name.endswith("weight") else 0, 0.2, generator=random)
    return module.eval()


def text_encoder(width: int, activation: str = "quick_gelu", length: int = 77) -> CLIPTextModel:
    """CLIP's text model of two layers, over CLIP's whole vocabulary."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=length,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return randomised(CLIPTextModel(config), 5)


def autoencoder(levels: int = 2) -> diffusers.AutoencoderKL:
    """An autoencoder with a factor of 2 ** (levels - 1)."""
    return randomised(
        diffusers.AutoencoderKL(
            block_out_channels=[32] * levels,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            latent_channels=4,
        ),
        6,
    )


def image_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    """A U-Net for pictures with two levels; the finer level attends to the text."""
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    }
    return randomised(diffusers.UNet2DConditionModel(**{**arguments, **changes}), 1)


def control_net(**changes: Any) -> diffusers.ControlNetModel:
    """A control network for `image_unet()` and latents with 2x2 pixels per cell."""
    arguments: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "conditioning_embedding_out_channels": (16, 32),
    }
    return randomised(diffusers.ControlNetModel(**{**arguments, **changes}), 9)


def video_unet(**changes: Any) -> diffusers.UNet3DConditionModel:
    """A U-Net for video with two levels; the finer level attends to the text."""
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 16,
    }
    return randomised(diffusers.UNet3DConditionModel(**{**arguments, **changes}), 2)


def scheduler(kind: str, **settings: Any) -> Any:
    """A scheduler with Stable Diffusion's schedule."""
    made = getattr(diffusers, kind)
    return made(**{**SCALED_LINEAR, **settings})


def image_pipeline(sampler: Any, unet: Any = None, text: Any = None) -> diffusers.StableDiffusionPipeline:
    """A whole Stable Diffusion pipeline without a safety checker."""
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text if text is not None else text_encoder(32),
        tokenizer=None,
        unet=unet if unet is not None else image_unet(),
        scheduler=sampler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def video_pipeline(sampler: Any, unet: Any = None, kind: str = "TextToVideoSDPipeline") -> Any:
    """A whole ModelScope pipeline; `kind`: its class, for text to video or for video to video."""
    pipeline = getattr(diffusers, kind)(
        vae=autoencoder(),
        text_encoder=text_encoder(32, "gelu"),
        tokenizer=None,
        unet=unet if unet is not None else video_unet(),
        scheduler=sampler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: Any, folder: Path, pad_token: str = "<|endoftext|>", **how: Any) -> Path:
    """Save a pipeline as on the hub, including the tokenizer's files."""
    for name, part in pipeline.components.items():
        if part is None:
            continue
        if isinstance(part, torch.nn.Module):
            part.save_pretrained(folder / name, **how)
        elif hasattr(part, "save_pretrained"):
            part.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(build_clip_tokenizer().get_vocab()), encoding="utf-8")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad_token}), encoding="utf-8")
    index = {"_class_name": type(pipeline).__name__, "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def set_values(folder: Path, file: str, **changes: Any) -> Path:
    """Change values in one of a folder's JSON files."""
    config = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return folder


def assert_refused(saved: Path, into: Path, said: str, file: str = "", **changes: Any) -> None:
    """Check that a copy with changed values in `file`, or without the part `said`, is refused and writes nothing."""
    folder = Path(shutil.copytree(saved, into / "hub"))
    if file:
        set_values(folder, file, **changes)
    else:
        shutil.rmtree(folder / said)
    with pytest.raises(CheckpointError) as error:
        convert_sources([folder], into / "model")
    assert said in str(error.value)
    assert str(folder) in str(error.value)
    assert not (into / "model").exists()
