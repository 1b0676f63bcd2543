"""Trains the default model's text encoder and denoiser on cached latents; resumes exactly where it stopped.

    python -m higen.train.recipes.default.denoiser --state FOLDER --steps 20000

Each step draws one batch of key frames (the spatial network) and one of windows (the temporal network); both share
their parameters. Step n uses random numbers of its own (seed, n), so a resumed run goes on as if never stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from higen.bundle import Bundle
from higen.errors import SettingsError
from higen.families.higen.spec import ModelConfig, TextConfig, UNetConfig
from higen.families.higen.unet import Denoiser
from higen.models.companions import text_encoder
from higen.schedule import alphas_cumprod
from higen.tokenizer import PromptTokenizer, build_word_tokenizer
from higen.train.checkpoints import Checkpoints
from higen.train.denormals import flushed_denormals
from higen.train.objective import gain_loss, residual_square, residual_v_loss, v_loss
from higen.train.optimise import Optimiser
from higen.train.processes import stop_signals
from higen.train.recipes.default.clips import Clips, Selection
from higen.train.recipes.default.start import start_from
from higen.train.recipes.default.subjects import SUBJECTS, subjects_named, vocabulary
from higen.train.record import claimed
from higen.train.settings import OptimiserSettings, first_difference
from higen.typed_json import to_json

__all__ = ["TEXT", "UNET", "Networks", "Run", "train"]

UNET = UNetConfig(
    in_channels=32,
    out_channels=32,
    base_channels=32,
    channel_multipliers=(3, 4),
    blocks_per_level=1,
    attention_levels=(True, False),
    head_dim=32,
    first_temporal_heads=1,
    text_dim=128,
    context_dim=128,
    context_tokens=12,
    context_depth=1,
    context_heads=4,
    dropout=0.0,
    prior_preconditioning=True,
    pooled_context=True,
)
HIGHEST = 0.12
"""Part of the noise levels at which nothing of the picture is left: what is drawn is what was asked for."""
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


OPTIMISER = OptimiserSettings(
    learning_rate=1e-3, betas=(0.9, 0.99), warm_up=200, decay_part=0.5, clip=1.0, ema=0.998, train_text=True
)


@dataclass(frozen=True)
class Run:
    """How long and how fast; images and clips count the same.

    Part `told_part` of the images and of the windows have one of the highest noise levels, where prompt, cues and prior
    alone say what to draw: with uniform levels the subject becomes right and the background does not, and motion, which
    is decided there, is learned late. `bfloat16`: the U-Net's products are taken in it, which is faster on some
    processors and slower on others, also among those with instructions for it.
    """

    steps: int = 20_000
    told_part: float = 0.5
    seed: int = 0
    bfloat16: bool = False
    save_every_s: float = 120.0
    optimiser: OptimiserSettings = OPTIMISER


class Networks(nn.Module):
    """Everything that is trained, and the tokenizer."""

    def __init__(self, config: UNetConfig = UNET) -> None:
        super().__init__()
        self.tokenizer = PromptTokenizer(build_word_tokenizer(WORDS), TEXT.rules)
        self.text = text_encoder(TEXT.clip)
        self.denoiser = Denoiser(config)
        # The prior starts as a second noisy frame would enter, not as nothing: it is then never ignored.
        self.denoiser.unet.prior.load_state_dict(self.denoiser.unet.conv_in.state_dict())

    def conditions(self, captions: list[str], motion: Tensor, appearance: Tensor) -> tuple[Tensor, Tensor]:
        """context [B,K,Dc] and frame_embedding [B,F,E] for captions and the two cues [B,F,D] and [B,F,R]."""
        tokens = torch.from_numpy(self.tokenizer.encode(captions))
        hidden = self.text(input_ids=tokens).last_hidden_state
        context, embedding = self.denoiser.conditioner(hidden, motion, appearance)
        return context, embedding


class Trainer:
    """Networks and their optimiser.

    A network without prior preconditioning (`clips.config`) is given no prior: it draws clips from the text alone.
    """

    def __init__(self, clips: Clips, run: Run) -> None:
        torch.manual_seed(run.seed)
        self.clips, self.run = clips, run
        self.networks = Networks(clips.config).train()
        self.spatial = self.networks.denoiser.spatial_unet()
        self.optimiser = Optimiser(dict(self.networks.named_parameters()), run.optimiser, run.steps)
        self.abar = torch.from_numpy(alphas_cumprod(ModelConfig().schedule)).float()

    @property
    def progress(self) -> float:
        """Part of the run that is done, 0 to 1."""
        return self.optimiser.step / self.run.steps

    def advance(self) -> tuple[float, float]:
        """Make one step; returns the losses of the images and of the windows."""
        random = torch.Generator().manual_seed(self.run.seed * 1_000_003 + self.optimiser.step)
        self.optimiser.clear()
        images = self.image_loss(random)
        windows = self.window_loss(random)
        if self.clips.config.prior_preconditioning:
            self.told_loss(random).backward()
        self.optimiser.advance()
        return images, windows

    def image_loss(self, random: torch.Generator) -> float:
        """Forward and backward of a batch of key frames through the spatial network."""
        batch = self.clips.images(random, self.progress)
        context, embedding = self.networks.conditions(batch.captions, batch.motion, batch.appearance)
        levels = self._levels(torch.rand(len(batch.x0), generator=random), random)
        noise, t, alpha, sigma = self._noise(batch.x0, levels, random)
        with self._mixed():
            loss = v_loss(self.spatial, batch.x0, noise, t, alpha, sigma, context, embedding, None).mean()
        loss.backward()
        return float(loss.detach())

    def window_loss(self, random: torch.Generator) -> float:
        """Forward and backward of a batch of windows through the temporal network."""
        batch = self.clips.windows(random, self.progress)
        context, embedding = self.networks.conditions(batch.captions, batch.motion, batch.appearance)
        unet = self.networks.denoiser.unet
        if not self.clips.config.prior_preconditioning:
            levels = self._levels(torch.rand(len(batch.x0), generator=random), random)
            noise, t, alpha, sigma = self._noise(batch.x0, levels, random)
            with self._mixed():
                loss = v_loss(unet, batch.x0, noise, t, alpha, sigma, context, embedding, None).mean()
            loss.backward()
            return float(loss.detach())
        # The other noise levels are biased high, too: what is left of the motion is decided there.
        levels = self._levels(torch.rand(len(batch.x0), generator=random).sqrt(), random)
        noise, t, alpha, sigma = self._noise(batch.x0, levels, random)
        with self._mixed():
            loss = residual_v_loss(unet, batch.x0, noise, t, alpha, sigma, context, embedding, batch.prior).mean()
        gain = gain_loss(unet, context, embedding, residual_square(batch.x0, batch.prior))
        (loss + 0.1 * gain).backward()
        return float(loss.detach())

    def told_loss(self, random: torch.Generator) -> Tensor:
        """The gain's likelihood on many whole clips: the few windows of a step, among all that text has to say, never
        taught it to tell "standing still" from "fast"."""
        told = self.clips.told(random, self.progress)
        context, embedding = self.networks.conditions(told.captions, told.motion, told.appearance)
        return gain_loss(self.networks.denoiser.unet, context, embedding, told.square)

    def _mixed(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.run.bfloat16)

    def _levels(self, usual: Tensor, random: torch.Generator) -> Tensor:
        """The `usual` noise levels [B], 0 to 1, or one of the highest for part `told_part` of them."""
        high = torch.rand(len(usual), generator=random) < self.run.told_part
        return torch.where(high, 1 - HIGHEST * torch.rand(len(usual), generator=random), usual)

    def _noise(self, x0: Tensor, levels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = (levels * len(self.abar)).long().clamp(max=len(self.abar) - 1)
        abar = self.abar[t]
        return torch.randn(x0.shape, generator=random), t, abar.sqrt(), (1 - abar).sqrt()


def train(state: Path, run: Run, start: Bundle | None = None, clips: Clips | None = None) -> None:
    """Train to `run.steps` steps, resuming what `state` holds; saves are written aside and moved; Ctrl-C saves.

    A new run starts from random weights, or from those of the model `start` as far as they fit.
    Without `clips`, the recipe's own network is trained on all of the latents cache in `state`.
    The caller has claimed `state` (higen.train.record).
    Raises SettingsError where `state` holds a run of another configuration (more steps are another schedule), and
    TrainingError.
    """
    if clips is None:
        clips = Clips(state / "latents.safetensors", UNET, Selection(new=() if start is None else _new(start)))
    with flushed_denormals():
        _train(Checkpoints(state / "checkpoints", keep=2), Trainer(clips, run), start)


def _new(start: Bundle) -> tuple[int, ...]:
    known = subjects_named(start.manifest.prompts)
    return tuple(i for i in range(len(SUBJECTS)) if i not in known)


def described(run: Run, clips: Clips) -> dict[str, Any]:
    """Everything that changes what a run learns: flat keys, JSON values."""
    sections = {"run": run, "optimiser": run.optimiser, "unet": clips.config}
    found = {f"{section}.{name}": value for section, part in sections.items() for name, value in to_json(part).items()}
    del found["run.optimiser"], found["run.save_every_s"]
    selection = clips.selection
    found |= {"selection.motion": selection.motion, "selection.appearance": selection.appearance}
    for i in selection.subjects:
        found[f"subject {SUBJECTS[i].name}"] = {**to_json(SUBJECTS[i]), "new": i in selection.new}
    return found | {"words (sha256)": hashlib.sha256(" ".join(WORDS).encode()).hexdigest()}


def _train(checkpoints: Checkpoints, trainer: Trainer, start: Bundle | None) -> None:
    optimiser, networks, run = trainer.optimiser, trainer.networks, trainer.run
    settings, made = described(run, trainer.clips), checkpoints.load()
    if made is not None:
        found = first_difference(made.get("settings", {}), settings)
        if found is not None:
            raise SettingsError(
                f"{checkpoints.folder.parent} holds a run of another configuration: {found}; "
                f"put it back, or remove {checkpoints.folder} to start anew"
            )
        optimiser.load(made)
    elif start is not None:
        start_from(networks.text, networks.denoiser, networks.tokenizer.tokenizer, start)
        optimiser.average_anew()
    total = sum(p.numel() for p in networks.parameters())
    print(f"{total / 1e6:.2f} M parameters, from step {optimiser.step} of {run.steps}", flush=True)
    saved, losses, began, first = time.monotonic(), [0.0, 0.0], time.monotonic(), optimiser.step
    with stop_signals() as stopped:
        while optimiser.step < run.steps:
            rate = optimiser.rate
            losses = [0.98 * a + 0.02 * b if a else b for a, b in zip(losses, trainer.advance(), strict=True)]
            if optimiser.step % 50 == 0:
                pace = (time.monotonic() - began) / (optimiser.step - first)
                print(
                    f"{time.strftime('%H:%M:%S')} step {optimiser.step} image {losses[0]:.4f} window {losses[1]:.4f} "
                    f"rate {rate:.2e} {pace:.3f} s a step",
                    flush=True,
                )
            if stopped.is_set() or optimiser.step == run.steps or time.monotonic() - saved > run.save_every_s:
                checkpoints.save(optimiser.step, {**optimiser.state(), "settings": settings})
                saved = time.monotonic()
            if stopped.is_set():
                raise KeyboardInterrupt


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the default model's text encoder and denoiser.")
    parser.add_argument("--state", type=Path, required=True, help="folder of the latents cache and the checkpoints")
    parser.add_argument("--steps", type=int, default=Run.steps, help="steps in all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=OPTIMISER.learning_rate, help="the largest")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--start", type=Path, help="model directory whose weights a new run starts from")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = None if arguments.start is None else Bundle.open(arguments.start)
    optimiser = replace(OPTIMISER, learning_rate=arguments.learning_rate)
    with claimed(arguments.state):
        train(arguments.state, Run(steps=arguments.steps, bfloat16=arguments.bf16, optimiser=optimiser), start)


if __name__ == "__main__":
    main()
