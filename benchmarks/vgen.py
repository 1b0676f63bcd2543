"""HiGen's published code, run from a checkout that the user names: its U-Net and its DDIM loop, in PyTorch.

None of that code is part of this repository. Get it with `git clone https://github.com/ali-vilab/VGen`. Only the files
of the U-Net and of the sampler are imported. Packages that they import, and that neither needs on a CPU, are replaced:
xformers' attention by PyTorch's, gradient checkpoints by nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from functorch.einops import rearrange
from numpy.typing import NDArray
from safetensors.torch import load_file

import higen
from higen.bundle import Bundle
from higen.families.higen import spec
from higen.families.higen.cues import appearance_cue
from higen.families.higen.reference_names import config_from_reference, reference_names
from higen.noise import frame_noise, offset_noise
from higen.tokenizer import PromptTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import TINY, write_tiny_model

MOTION, APPEARANCE, GUIDANCE, OFFSET = 500, 1.0, 12.0, 0.1
"""The published settings (configs/higen_infer.yaml, inference_higen_entrance.py)."""

PROMPT, SEED = "a blue whale swimming", 7
SHAPES = {"full": (32, 32, 56), "small": (16, 16, 24), "tiny": (4, 8, 8)}
"""Frames, height and width of a clip's latents. The published autoencoder makes 8 pixels of one."""

PICTURES = {"full": (1, 32, 56), "small": (1, 32, 56), "tiny": (1, 8, 8)}
"""The same of a single picture, for the first loop alone."""

FACTOR = TINY.autoencoder.factor
"""Pixels of one, in the model made here; its autoencoder takes no part."""

Latents = NDArray[np.float32]


def arguments(size: str) -> dict[str, Any]:
    """Arguments of `UNetSD_HiGen`: the published ones (configs/higen_train.yaml), or fewer channels."""
    return {
        "in_dim": 4,
        "out_dim": 4,
        "dim": {"full": 320, "small": 128, "tiny": 32}[size],
        "y_dim": 1024 if size == "full" else 64,
        "context_dim": 1024,
        "dim_mult": [1, 2, 4, 4],
        "num_heads": 8 if size != "tiny" else 2,
        "head_dim": 64 if size != "tiny" else 32,
        "num_res_blocks": 2,
        "attn_scales": [1.0, 0.5, 0.25],
        "dropout": 0.1,
        "num_tokens": 16,
        "context_embedding_depth": 2,
    }


def make(where: Path, size: str) -> None:
    """A model directory of higen with this architecture and random weights. No weight is zero."""
    given = arguments(size)
    clip = {**TINY.text.clip, "hidden_size": given["y_dim"], "projection_dim": given["y_dim"]}
    config = replace(
        TINY,
        name=f"higen-{size}",
        unet=config_from_reference(given),
        text=replace(TINY.text, clip=clip),
        defaults=replace(TINY.defaults, width=16, height=16),
    )
    write_tiny_model(where, config)


def options(size: str, steps: int, clip: bool = True) -> dict[str, Any]:
    """The request for a clip or a picture, as options of higen's pipeline."""
    frames, height, width = (SHAPES if clip else PICTURES)[size]
    return {
        "prompt": PROMPT,
        "frames": frames,
        "height": FACTOR * height,
        "width": FACTOR * width,
        "steps": (steps, steps) if clip else steps,
        "solver": "ddim",
        "guidance": GUIDANCE,
        "motion": MOTION,
        "appearance": APPEARANCE,
        "seed": SEED,
    }


def replaced(name: str, **content: Any) -> None:
    """Put a module of this name in the place of a package."""
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    """xformers' function: [B,N,D], without a mask."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def import_vgen(checkout: Path) -> tuple[Any, Any]:
    """The classes `UNetSD_HiGen` and `DiffusionDDIM` of the checkout."""
    if not (checkout / "tools/modules/unet/unet_higen.py").is_file():
        raise SystemExit(f"{checkout} is not a checkout of VGen: tools/modules/unet/unet_higen.py is not there")
    replaced("xformers")
    replaced("xformers.ops", memory_efficient_attention=attention)
    sys.modules["xformers"].__dict__["ops"] = sys.modules["xformers.ops"]
    replaced("open_clip")
    replaced("einops", rearrange=rearrange)
    replaced("rotary_embedding_torch", RotaryEmbedding=lambda *_, **__: None)
    replaced("fairscale")
    replaced("fairscale.nn")
    replaced("fairscale.nn.checkpoint", checkpoint_wrapper=lambda module: module)
    for name in ("utils", "tools", "tools.modules", "tools.modules.unet", "tools.modules.diffusions"):
        replaced(name, __path__=[str(checkout / name.replace(".", "/"))])  # without running their __init__.py
    unet = importlib.import_module("tools.modules.unet.unet_higen")
    sampler = importlib.import_module("tools.modules.diffusions.diffusion_ddim")
    return unet.UNetSD_HiGen, sampler.DiffusionDDIM


def reference(checkout: Path, where: Path, size: str, steps: int, clip: bool = True) -> Any:
    """A function that runs the request with the published code and the weights of the model directory `where`.

    It follows inference_higen_entrance.py from the text's features to the clip's latents, from higen's noise.
    """
    network, ddim = import_vgen(checkout)
    unet = network(**arguments(size)).eval()
    ours = load_file(where / spec.UNET)
    shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    names = reference_names(config_from_reference(arguments(size)))
    unet.load_state_dict({theirs: ours[name].reshape(shapes[theirs]) for name, theirs in names.items()})
    schedule = {"num_timesteps": 1000, "zero_terminal_snr": True, "init_beta": 0.00085, "last_beta": 0.0120}
    diffusion = ddim(schedule_param=schedule, mean_type="v", loss_type="mse", var_type="fixed_small")
    with higen.load(where, "torch", verify=False) as pipe:
        words, empty = text_features(pipe, Bundle.open(where))
    frames, *area = (SHAPES if clip else PICTURES)[size]

    def loop(noise: Latents, prior: torch.Tensor, motion: Any, appearance: Any) -> torch.Tensor:
        common = {"spat_prior": prior, "motion_cond": motion, "appearance_cond": appearance}
        latents: torch.Tensor = diffusion.ddim_sample_loop(
            noise=torch.from_numpy(noise[None]),
            model=unet,
            model_kwargs=[{"y": words, **common}, {"y": empty, **common}],
            guide_scale=GUIDANCE,
            ddim_timesteps=steps,
        )
        return latents

    def run() -> Latents:
        one = torch.ones(1, 1, 32)
        key = loop(frame_noise(SEED, 0, 4, 1, *area), torch.zeros(1, 4, *area), torch.tensor([0]), one)
        if not clip:
            return key.numpy()
        noise = frame_noise(SEED, 1, 4, frames, *area) + OFFSET * offset_noise(SEED, 2, 4, frames)
        motion = torch.full((1, frames - 1), MOTION)
        rows = torch.from_numpy(appearance_cue(APPEARANCE, frames, 32)[None])
        return loop(noise, key[:, :, 0], motion, rows).numpy()

    return run


def text_features(pipe: higen.Pipeline, model: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    """The text encoder's output [1,L,D] for the prompt, and for no words."""
    assert model.manifest.text is not None
    tokenizer = PromptTokenizer.from_file(model.path / "tokenizer.json", model.manifest.text)
    ids = tokenizer.encode([PROMPT, ""])
    hidden = pipe.backend.to_numpy(pipe.backend.run("text_encoder", tokens=ids)["hidden"])
    words, empty = torch.from_numpy(np.ascontiguousarray(hidden)).split(1)
    return words, empty
