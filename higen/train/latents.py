"""Clips as latents: the autoencoder's posterior, and its cache on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from higen.bundle import sha256
from higen.errors import MissingExtra, SettingsError, TrainingError
from higen.models.companion_stages import EncoderStage
from higen.staging import whole_file

__all__ = [
    "Encoded",
    "FrameEncoder",
    "LatentCache",
    "OpenClip",
    "encode",
    "to_pixels",
    "tower_sha256",
]

CHUNK = 8
"""Number of frames that are encoded at once."""


@dataclass(frozen=True)
class Encoded:
    """An encoded clip: mean and standard deviation of its latents [C,F,H,W] float32, scaled as the denoiser sees them
    (std is None if the autoencoder has no posterior), and its frames' features [F,D] if a separate encoder measures the
    appearance.
    """

    mean: Tensor
    std: Tensor | None = None
    features: Tensor | None = None

    def sample(self, random: torch.Generator) -> Tensor:
        """Latents [C,F,H,W] drawn from the posterior, as the reference trains on."""
        if self.std is None:
            return self.mean
        return self.mean + self.std * torch.randn(self.mean.shape, generator=random)


class FrameEncoder(Protocol):
    """Measures how similar frames look, by features with a cosine (higen.train.cues.appearance_similarity)."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features [F,D] of pixels [F,3,Y,X] from -1 to 1."""
        ...


class OpenClip:
    """A CLIP picture tower in transformers' format (the reference: OpenCLIP ViT-H/14)."""

    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, folder: str, device: torch.device) -> None:
        """Raises MissingExtra without transformers, SettingsError for a folder that is not such a tower."""
        try:
            from transformers import CLIPVisionModelWithProjection
        except ImportError as error:
            raise MissingExtra("transformers", "torch", "the OpenCLIP appearance cue") from error
        try:
            tower = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the checks of transformers raise errors of any kind
            raise SettingsError(
                f"cues.openclip={folder!r}: no CLIP picture tower in transformers' format "
                f"(such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K): {error}"
            ) from error
        self.tower = cast("nn.Module", tower).eval().requires_grad_(False).to(device)
        self.size = int(cast("Any", tower).config.image_size)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features [F,D] of the central square, resized to the tower by nearest neighbour, as in the reference."""
        side, (height, width) = min(pixels.shape[2:]), pixels.shape[2:]
        top, left = (height - side) // 2, (width - side) // 2
        square = F.interpolate(pixels[:, :, top : top + side, left : left + side], (self.size, self.size))
        mean, std = (torch.tensor(v, device=pixels.device).reshape(1, 3, 1, 1) for v in (self.MEAN, self.STD))
        features: Tensor = self.tower(pixel_values=((square * 0.5 + 0.5) - mean) / std).image_embeds
        return features.float()


def tower_sha256(folder: str) -> str:
    """sha256 of a CLIP tower's configuration and weights: the files that transformers reads, in any folder.

    Raises SettingsError if they cannot be read.
    """
    try:
        weights = sorted(Path(folder).glob("model*.safetensors")) or sorted(Path(folder).glob("pytorch_model*.bin"))
        if not weights:
            raise FileNotFoundError("no model.safetensors or pytorch_model.bin in it")
        found = [sha256(path) for path in (Path(folder, "config.json"), *weights)]
    except OSError as error:
        raise SettingsError(f"cues.openclip={folder!r}: no CLIP picture tower can be read: {error}") from error
    return hashlib.sha256("".join(found).encode()).hexdigest()


def to_pixels(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [F,Y,X,3] as float32 [F,3,Y,X] in -1 to 1 (reference: mean and deviation 0.5)."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).float() / 127.5 - 1.0


@torch.no_grad()
def encode(stage: EncoderStage, frames: NDArray[np.uint8], features: FrameEncoder | None = None) -> Encoded:
    """Encode uint8 frames [F,Y,X,3], a few at a time. The result is on the host."""
    device = next(stage.parameters()).device
    means, stds, found = [], [], []
    for chunk in to_pixels(frames).split(CHUNK):
        pixels = chunk.to(device)
        posterior = stage.autoencoder.encode(pixels.to(stage.dtype), return_dict=False)[0]  # type: ignore[operator]
        has_std = hasattr(posterior, "mean") and hasattr(posterior, "std") and not isinstance(posterior, Tensor)
        mean = posterior.mean if has_std else posterior
        means.append(((mean.float() - stage.shift) * stage.scale).cpu())
        if has_std:
            stds.append((posterior.std.float() * stage.scale.abs()).cpu())
        if features is not None:
            found.append(features(pixels).cpu())
    return Encoded(_clip(means), _clip(stds) if stds else None, torch.cat(found) if found else None)


def _clip(chunks: list[Tensor]) -> Tensor:
    return torch.cat(chunks).transpose(0, 1).contiguous()


class LatentCache:
    """A folder with one file for each `Encoded`. A file is written to a temporary name and moved into place. A broken
    file is made again.
    """

    def __init__(self, folder: str, recipe: Mapping[str, Any]) -> None:
        """`recipe`: everything that the latents depend on, except the file itself."""
        self.folder = Path(folder)
        self.recipe = json.dumps(dict(recipe), sort_keys=True)

    def path(self, source: Path, name: str, kind: int) -> Path:
        """Where the latents of a file are kept. Its size and modification time are part of the key. Raises OSError."""
        found = source.stat()
        key = json.dumps([self.recipe, name, kind, found.st_size, found.st_mtime_ns])
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:34]}.safetensors"

    def load(self, path: Path) -> Encoded | None:
        """The latents that are kept at `path`; None if there is no readable file."""
        try:
            tensors = load_file(path)
            return Encoded(tensors["mean"], tensors.get("std"), tensors.get("features"))
        except (OSError, SafetensorError, KeyError):
            return None

    def save(self, path: Path, encoded: Encoded) -> None:
        """Keep `encoded` at `path`. Raises TrainingError if it cannot be written."""
        tensors = {"mean": encoded.mean, "std": encoded.std, "features": encoded.features}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, temporary)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"data.cache: {path} cannot be written: {error}") from error
