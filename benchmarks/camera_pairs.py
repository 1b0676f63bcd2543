"""Trains adapters of the built-in model's temporal layers on pairs of opposite camera movements (lora_camera.py).

Differences from `higen train`, which needs far more steps for the same:

- A step draws a few clips, and takes each with the movement and with its opposite, with the same noise. The adapters
  have strength 1 for the one and -1 for the other. So what both have in common cannot hide the movement.
- The noise levels are those of the sampler's steps.
- Errors in the background count more than errors in the subject.
- The adapters begin at the main directions of the gradient of the layers' weights (LoRA-GA, Wang et al. 2024,
  arXiv:2407.05000), and the learning rate is that of a few large steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from higen.families.higen.preconditioning import precondition
from higen.staging import whole_file
from higen.train.batches import clip_cues
from higen.train.layers import _Adapter, set_strength, trained_parameters, write_lora
from higen.train.networks import Networks, Objective, build
from higen.train.settings import Settings

__all__ = ["Pair", "train"]

LEVELS = {999: 0.4, 666: 0.3, 333: 0.3}
"""The time steps of the model's default request, and how often each is trained."""
BATCH = 3
SUBJECT = 0.3
"""Weight of a latent cell that the subject may cover, relative to one that it never covers."""
PRIOR_NOISE = 0.03
SLOWER = 0.3
"""Learning rate of the first factor of an adapter, relative to the second one's."""
FIRST_PAIRS = 6
"""Batches whose gradients give the first directions."""


@dataclass(frozen=True)
class Pair:
    """A clip with a movement and with the opposite one: latents [2,C,F,h,w]. `free`: the part of each cell [h,w] that
    the subject never covers.
    """

    latents: Tensor
    free: Tensor
    caption: str


class Trainer:
    """The networks with their adapters, and the loss of pairs."""

    def __init__(self, settings: Settings, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.networks: Networks = build(settings, [])
        self.objective = Objective(self.networks, 0.0)
        found = trained_parameters(self.objective, settings)
        # The layers behind the prior and the gain stay as they are.
        self.parameters = {name: p for name, p in found.items() if "residual_gain" not in name}
        for module in self.objective.denoiser.unet.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        config = self.networks.config.unet
        self.cues = clip_cues(config, pairs[0].latents[0].float(), None, (False, False), (False, False))

    def backward(self, chosen: Sequence[Pair], t: Tensor, random: torch.Generator) -> float:
        """Add up the gradients of a batch; returns the loss. t [B]: the time step of each clip."""
        shape = (len(chosen), *chosen[0].latents.shape[1:])
        noise = torch.randn(shape, generator=random)
        shaken = PRIOR_NOISE * torch.randn((shape[0], shape[1], *shape[3:]), generator=random)
        weight = torch.stack([SUBJECT + (1 - SUBJECT) * pair.free for pair in chosen])[:, None, None]
        conditions = self._conditions([pair.caption for pair in chosen])
        key = shape[2] // 2
        prior = torch.stack([pair.latents[:, :, key].float().mean(dim=0) for pair in chosen]) + shaken
        total = 0.0
        for way, strength in enumerate((1.0, -1.0)):
            x0 = torch.stack([pair.latents[way].float() for pair in chosen])
            error = self._error(x0, noise, t, prior, conditions, strength)
            loss = (weight * error.square()).mean() / weight.mean() / 2
            loss.backward()
            total += float(loss.detach())
        return total

    def _conditions(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(np.stack([self.networks.tokenizer.encode([caption])[0] for caption in captions]))
        motion, appearance = (cue[None].expand(len(captions), -1, -1) for cue in self.cues)
        with torch.no_grad():
            hidden = self.objective.text(input_ids=tokens).last_hidden_state
            found: tuple[Tensor, Tensor] = self.objective.denoiser.conditioner(hidden, motion, appearance)
        return found

    def _error(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        prior: Tensor,
        conditions: tuple[Tensor, Tensor],
        strength: float,
    ) -> Tensor:
        """The error of the network's output, times the gain: in proportion to the error of the clip's latents."""
        unet, (context, embedding) = self.objective.denoiser.unet, conditions
        alpha, sigma = self.objective.alpha[t], self.objective.sigma[t]
        a, s = (value.view(-1, 1, 1, 1, 1) for value in (alpha, sigma))
        set_strength(self.objective, strength)
        with torch.no_grad():
            entered, g, c = precondition(unet, a * x0 + s * noise, alpha, sigma, context, embedding, prior)
            target = a * g * c * noise - s * c * (x0 - prior[:, :, None]) / g
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(entered, t, context, embedding, prior)
        found: Tensor = g * (out.float() - target)
        return found

    def start(self) -> None:
        """Point the adapters' first factors along the main directions of the layers' gradients; the second factors stay
        zero.
        """
        with _weight_gradients() as kept:
            for i in range(FIRST_PAIRS):
                random = torch.Generator().manual_seed(i)
                chosen = [self.pairs[j] for j in torch.randperm(len(self.pairs), generator=random)[:BATCH]]
                self.backward(chosen, torch.full((len(chosen),), max(LEVELS)), random)
        with torch.no_grad():
            for adapter, gradient in kept.items():
                directions = torch.linalg.svd(gradient.flatten(1), full_matrices=False)[2]
                count = min(len(directions), len(adapter.down))
                adapter.down[:count].copy_(directions[:count].view_as(adapter.down[:count]))
        for parameter in self.parameters.values():
            parameter.grad = None


@contextmanager
def _weight_gradients() -> Iterator[dict[Any, Tensor]]:
    """Collect the gradients of the weights that adapters give their layers, times the adapters' strengths."""
    kept: dict[Any, Tensor] = {}
    forward: Callable[..., Tensor] = _Adapter.forward

    def watched(self: Any, weight: Tensor) -> Tensor:
        made = forward(self, weight)
        if made.requires_grad:
            strength = self.strength
            made.register_hook(lambda g: kept.__setitem__(self, kept.get(self, 0) + g.detach() * strength))
        return made

    _Adapter.forward = watched  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        _Adapter.forward = forward  # type: ignore[method-assign]


def train(settings: Settings, pairs: Sequence[Pair], lora: Path, steps: int, rate: float) -> None:
    """Train for so many steps, and write the adapters to `lora`. A checkpoint beside it continues a stopped run."""
    trainer = Trainer(settings, pairs)
    named = trainer.parameters
    groups = [[p for name, p in named.items() if ("lora_A" in name) == down] for down in (True, False)]
    optimiser = torch.optim.Adam([{"params": group} for group in groups], lr=rate, betas=(0.9, 0.98), eps=1e-12)
    checkpoint, first = lora.with_suffix(".pt"), 0
    if checkpoint.exists():
        state: Mapping[str, Any] = torch.load(checkpoint)
        first, average = state["step"], state["average"]
        optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(state["parameters"][name])
    else:
        trainer.start()
        average = {name: p.detach().clone() for name, p in named.items()}
    levels, shares = torch.tensor(list(LEVELS)), torch.tensor(list(LEVELS.values()))
    began, smoothed = time.monotonic(), math.nan
    for step in range(first, steps):
        random = torch.Generator().manual_seed(1_000_003 + step)
        chosen = [pairs[j] for j in torch.randperm(len(pairs), generator=random)[:BATCH]]
        t = levels[torch.multinomial(shares, len(chosen), replacement=True, generator=random)]
        loss = trainer.backward(chosen, t, random)
        late = max(0.0, 2 * step / steps - 1)
        now = rate * min(1.0, (step + 1) / 8) * (0.5 + 0.5 * math.cos(math.pi * late))
        for group, part in zip(optimiser.param_groups, (SLOWER, 1.0), strict=True):
            group["lr"] = now * part
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in named.items():
                average[name].lerp_(parameter, 1 - min(0.95, (1 + step) / (6 + step)))
        smoothed = loss if math.isnan(smoothed) else 0.9 * smoothed + 0.1 * loss
        if (step + 1) % 50 == 0 or step + 1 == steps:
            pace = (time.monotonic() - began) / (step + 1 - first)
            print(f"step {step + 1} of {steps}, loss {smoothed:.4f}, {pace:.2f} s a step", flush=True)
            state = {
                "step": step + 1,
                "parameters": {name: p.detach() for name, p in named.items()},
                "average": average,
                "optimiser": optimiser.state_dict(),
            }
            with whole_file(checkpoint) as temporary:
                torch.save(state, temporary)
            write_lora(lora, average, settings.lora)
