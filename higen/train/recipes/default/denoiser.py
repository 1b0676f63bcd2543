"""Trains the default model's text encoder and denoiser on cached latents; resumes exactly where it stopped.

    python -m higen.train.recipes.default.denoiser --state FOLDER --steps 5500

Each step draws one batch of key frames (the spatial network) and one of windows (the temporal network); both share
their parameters. Step n uses random numbers of its own (seed, n), so a resumed run goes on as if never stopped.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from higen.config import ScheduleConfig, TextConfig, UNetConfig
from higen.models.companions import text_encoder
from higen.models.unet import Denoiser
from higen.schedule import alphas_cumprod
from higen.tokenizer import PromptTokenizer, build_word_tokenizer
from higen.train.objective import gain_loss, residual_v_loss, v_loss
from higen.train.recipes.default.clips import Batch, Clips
from higen.train.recipes.default.subjects import vocabulary
from higen.train.record import lock

__all__ = ["TEXT", "UNET", "Networks", "Run", "train"]

UNET = UNetConfig(
    in_channels=32,
    out_channels=32,
    base_channels=32,
    channel_multipliers=(3, 5),
    blocks_per_level=1,
    attention_levels=(True, False),
    head_dim=32,
    first_temporal_heads=1,
    text_dim=128,
    context_dim=128,
    context_tokens=8,
    context_depth=1,
    context_heads=4,
    dropout=0.0,
    prior_preconditioning=True,
    pooled_context=True,
)
WORDS = (*vocabulary(), ",")
TEXT = TextConfig(
    clip={
        "vocab_size": len(WORDS) + 4,  # and the four special tokens
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "hidden_act": "gelu",
        "projection_dim": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    context_length=24,
    pad_id=0,
    clean=False,
)


@dataclass(frozen=True)
class Run:
    """How long and how fast. Two parts, each ending at a learning rate of zero.

    In the first, images and clips count the same. In the second, `text_steps` long, each step has three image batches
    and half of their noise levels are among the highest, where the text alone says what to draw: after the first part
    the subject is right and the background is not.
    """

    steps: int = 5_500
    text_steps: int = 600
    learning_rate: float = 1e-3
    text_learning_rate: float = 5e-4
    warm_up: int = 200
    decay_part: float = 0.5
    ema: float = 0.998
    clip: float = 1.0
    seed: int = 0
    save_every_s: float = 120.0

    @property
    def total(self) -> int:
        """Steps of both parts."""
        return self.steps + self.text_steps

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, cosine to zero; then a cosine to zero."""
        if step >= self.steps:
            return self.text_learning_rate * _cosine((step - self.steps) / max(1, self.text_steps))
        start = (1 - self.decay_part) * self.steps
        fall = _cosine(max(0.0, (step - start) / (self.steps - start)))
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up) * fall


def _cosine(part: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 + 0.5 * math.cos(math.pi * part)


class Networks(nn.Module):
    """Everything that is trained, and the tokenizer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = PromptTokenizer(build_word_tokenizer(WORDS), TEXT)
        self.text = text_encoder(TEXT)
        self.denoiser = Denoiser(UNET)
        # The prior starts as a second noisy frame would enter, not as nothing: it is then never ignored.
        self.denoiser.unet.prior.load_state_dict(self.denoiser.unet.conv_in.state_dict())

    def conditions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """context [B,K,Dc] and frame_embedding [B,F,E] of a batch."""
        tokens = torch.from_numpy(self.tokenizer.encode(batch.captions))
        hidden = self.text(input_ids=tokens).last_hidden_state
        context, embedding = self.denoiser.conditioner(hidden, batch.motion, batch.appearance)
        return context, embedding


class Trainer:
    """Networks, their averages, the optimiser and the number of steps made."""

    def __init__(self, clips: Clips, run: Run) -> None:
        torch.manual_seed(run.seed)
        self.clips, self.run = clips, run
        self.networks = Networks().train()
        self.spatial = self.networks.denoiser.spatial_unet()
        self.average = copy.deepcopy(self.networks).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.networks.parameters(), lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.step = 0
        self.abar = torch.from_numpy(alphas_cumprod(ScheduleConfig())).float()

    def advance(self) -> tuple[float, float]:
        """Make one step; returns the losses of the images and of the windows."""
        random = torch.Generator().manual_seed(self.run.seed * 1_000_003 + self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.run.rate(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        images = [self.image_loss(random) for _ in range(1 if self.step < self.run.steps else 3)][-1]
        windows = self.window_loss(random)
        nn.utils.clip_grad_norm_(self.networks.parameters(), self.run.clip)
        self.optimiser.step()
        self.step += 1
        decay = min(self.run.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.networks.parameters()), 1 - decay)
        return images, windows

    def image_loss(self, random: torch.Generator) -> float:
        """Forward and backward of a batch of key frames through the spatial network."""
        batch = self.clips.images(random)
        context, embedding = self.networks.conditions(batch)
        levels = torch.rand(len(batch.x0), generator=random)
        if self.step >= self.run.steps:
            levels[::2] = 1 - 0.12 * levels[::2]
        noise, t, alpha, sigma = self._noise(batch.x0, levels, random)
        loss = v_loss(self.spatial, batch.x0, noise, t, alpha, sigma, context, embedding, None).mean()
        loss.backward()
        return float(loss.detach())

    def window_loss(self, random: torch.Generator) -> float:
        """Forward and backward of a batch of windows through the temporal network."""
        batch = self.clips.windows(random, self.step / self.run.total)
        context, embedding = self.networks.conditions(batch)
        # Noise levels are biased high: that is where the motion is decided.
        levels = torch.rand(len(batch.x0), generator=random).sqrt()
        noise, t, alpha, sigma = self._noise(batch.x0, levels, random)
        unet = self.networks.denoiser.unet
        loss = residual_v_loss(unet, batch.x0, noise, t, alpha, sigma, context, embedding, batch.prior).mean()
        assert unet.residual_gain is not None  # UNET has prior preconditioning
        gain = gain_loss(unet.residual_gain, embedding, batch.x0, batch.prior)
        (loss + 0.1 * gain).backward()
        return float(loss.detach())

    def _noise(self, x0: Tensor, levels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = (levels * len(self.abar)).long().clamp(max=len(self.abar) - 1)
        abar = self.abar[t]
        return torch.randn(x0.shape, generator=random), t, abar.sqrt(), (1 - abar).sqrt()

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]


def train(state: Path, run: Run) -> None:
    """Train to `run.total` steps, resuming what `state` holds; saves are written aside and moved; Ctrl-C saves."""
    claim = lock(state)
    for number in (signal.SIGINT, signal.SIGTERM):  # a background process ignores SIGINT unless told otherwise
        signal.signal(number, signal.default_int_handler)
    try:
        _train(state, run)
    finally:
        if claim is not None:
            os.close(claim)


def _train(state: Path, run: Run) -> None:
    trainer = Trainer(Clips(state / "latents.safetensors", UNET), run)
    checkpoint = state / "denoiser.ckpt"
    if checkpoint.exists():
        trainer.load(torch.load(checkpoint, weights_only=True))
    total = sum(p.numel() for p in trainer.networks.parameters())
    print(f"{total / 1e6:.2f} M parameters, from step {trainer.step} of {run.total}", flush=True)
    saved, losses, began, first = time.monotonic(), [0.0, 0.0], time.monotonic(), trainer.step
    try:
        while trainer.step < run.total:
            losses = [0.98 * a + 0.02 * b if a else b for a, b in zip(losses, trainer.advance(), strict=True)]
            if trainer.step % 50 == 0:
                pace = (time.monotonic() - began) / (trainer.step - first)
                print(
                    f"{time.strftime('%H:%M:%S')} step {trainer.step} image {losses[0]:.4f} window {losses[1]:.4f} "
                    f"rate {run.rate(trainer.step):.2e} {pace:.3f} s a step",
                    flush=True,
                )
            if time.monotonic() - saved > run.save_every_s:
                save(trainer, checkpoint)
                saved = time.monotonic()
    finally:
        save(trainer, checkpoint)


def save(trainer: Trainer, checkpoint: Path) -> None:
    """Write a checkpoint atomically."""
    temporary = checkpoint.with_suffix(".part")
    torch.save(trainer.state(), temporary)
    temporary.replace(checkpoint)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the default model's text encoder and denoiser.")
    parser.add_argument("--state", type=Path, required=True, help="folder of the latents cache and the checkpoints")
    parser.add_argument("--steps", type=int, default=Run.steps, help="steps of the first part")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    train(arguments.state, Run(steps=arguments.steps))


if __name__ == "__main__":
    main()
