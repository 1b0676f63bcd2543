"""Small networks that judge pictures and clips. They train on real data in a minute or two on one core."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from higen.staging import whole_file

__all__ = ["ClipNetwork", "PictureNetwork", "fit", "kept"]

Network = TypeVar("Network", bound=nn.Module)


class PictureNetwork(nn.Module):
    """Classifies what a picture shows: RGB [n,3,64,64] in -1 to 1 -> logits [n, classes]. 0.17 M parameters."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (24, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 4, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits."""
        quarters = nn.functional.adaptive_avg_pool2d(self.body(pictures), 2).flatten(1)
        out: Tensor = self.head(quarters)
        return out


class ClipNetwork(nn.Module):
    """Features of a clip by three-dimensional convolutions: RGB [n,3,F,64,64] in -1 to 1 -> [n, 32].

    The convolutions get the frames and four times the differences of frames. Without this factor, the network learns
    the order of frames later than their contents. `heads`: the classifiers on the features, with their numbers of
    classes.
    """

    def __init__(self, heads: Mapping[str, int]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(6, 24, (1, 4, 4), (1, 4, 4)),
            nn.SiLU(),
            nn.Conv3d(24, 48, 3, 2, 1),
            nn.GroupNorm(8, 48),
            nn.SiLU(),
            nn.Conv3d(48, 96, 3, 2, 1),
            nn.GroupNorm(8, 96),
            nn.SiLU(),
        )
        self.features = nn.Linear(96 * 4, 32)
        self.heads = nn.ModuleDict({name: nn.Linear(32, classes) for name, classes in heads.items()})

    def forward(self, clips: Tensor) -> Tensor:
        """Features."""
        changes = nn.functional.pad(clips.diff(dim=2), (0, 0, 0, 0, 1, 0))
        seen = torch.cat([clips, 4 * changes], dim=1)
        quarters = nn.functional.adaptive_avg_pool3d(self.body(seen), (1, 2, 2)).flatten(1)
        out: Tensor = self.features(quarters)
        return out

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        """Logits of each head."""
        active = nn.functional.silu(features)
        return {name: head(active) for name, head in self.heads.items()}


def fit(
    network: Network,
    loss: Callable[[Network, torch.Generator], Tensor],
    steps: int,
    name: str,
    rate: float = 3e-3,
    shown: bool = False,
) -> Network:
    """Minimise `loss` with AdamW and a cosine schedule to zero.

    `loss` draws a batch with the generator at each step. The generator has a fixed seed, so the same initial weights
    give the same result. `shown`: show a progress bar."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    random = torch.Generator().manual_seed(0)
    network.train()
    for step in tqdm(range(steps), desc=name, disable=not shown):
        for group in optimiser.param_groups:
            warm = min(1.0, (step + 1) / min(50, 1 + steps // 10))
            group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimiser.zero_grad(set_to_none=True)
        loss(network, random).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
    return network.eval().requires_grad_(False)


def kept(path: Path, key: Mapping[str, Any], network: Network, make: Callable[[Network], Network]) -> Network:
    """`network` with the weights in `path`, if they were made for this `key`. Otherwise `make` trains it.

    Trained weights are saved in `path`. A damaged file is made again. Raises OSError if the file cannot be written.
    """
    mark = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    weights = _read(path, mark)
    if weights is not None:
        network.load_state_dict(weights)
        return network.eval().requires_grad_(False)
    made = make(network)
    content = io.BytesIO()  # torch's file writer hides the system's error
    torch.save({"key": mark, "network": made.state_dict()}, content)
    with whole_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    return made


def _read(path: Path, mark: str) -> dict[str, Tensor] | None:
    """The weights in `path`; None if they have another key or the file cannot be read."""
    try:
        state = torch.load(path, weights_only=True)
        weights: dict[str, Tensor] = state["network"]
        return weights if state["key"] == mark else None
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        return None
