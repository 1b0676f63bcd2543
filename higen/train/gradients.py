"""The gradients of a denoiser's training step: the objective on the batches of a source."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from higen.errors import SettingsError
from higen.train.batches import Source, StepBatches
from higen.train.layers import set_strength
from higen.train.loop import step_seed
from higen.train.networks import Objective, spatial_names
from higen.train.processes import Processes
from higen.train.settings import Settings

__all__ = ["DenoiserGradients", "scale_gradients"]


class DenoiserGradients:
    """Adds up the gradients of a step (`higen.train.loop.Gradients`); its losses are "image" and "video".

    trained  the parameters that are trained, by name
    """

    def __init__(
        self,
        objective: Objective,
        trained: dict[str, nn.Parameter],
        source: Source,
        settings: Settings,
        processes: Processes,
    ) -> None:
        """Raises SettingsError for run.losses_in_turn or lora.scales with several processes."""
        for name, value in {
            "run.losses_in_turn": settings.run.losses_in_turn,
            "lora.scales": settings.lora.scales,
        }.items():
            if value and processes.count > 1:
                raise SettingsError(
                    f"{name}=true: only with one process, because several processes average the gradients of a "
                    "single loss"
                )
        self.source, self.settings, self.processes = source, settings, processes
        self.trained, self.objective = trained, objective
        spatial = (f"denoiser.{name}" for name in spatial_names(objective.denoiser.unet.config))
        self.spatial = [trained[name] for name in spatial if name in trained]
        self.parallel = processes.prepare(objective)

    def __call__(self, step: int, random: torch.Generator) -> Mapping[str, Tensor]:
        """The losses of a step, means over this process's samples."""
        batches = self.source.batches(step)
        # Only dropout layers still draw from the global generator.
        torch.manual_seed(step_seed(self.settings.run.seed, step) * 1_009 + self.processes.index)
        parts = batches.split(self.settings.run.micro_batches)
        losses: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            # Processes exchange gradients only once per step, with its last part.
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else self.processes.waiting(self.parallel):
                for name, loss in self._differentiate(part, len(parts)).items():
                    losses[name] = losses[name] + loss if name in losses else loss
        if (factor := self.settings.optimiser.spatial_gradient) != 1:
            scale_gradients(self.spatial, factor)
        return losses

    def _differentiate(self, part: StepBatches, parts: int) -> Mapping[str, Tensor]:
        """Add the gradients of one of the `parts` of a step; returns its share of the losses."""
        found: dict[str, Tensor] = {}
        bfloat16 = self.settings.run.precision == "bf16"
        for some in part.singly() if self.settings.run.losses_in_turn else [part]:
            for strength, share, even in some.evenly():
                set_strength(self.objective, strength)
                with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=bfloat16):
                    loss, image, video = self.parallel(even.images, even.videos, even.gains)
                self.processes.backward(loss / (parts / share))
                for name, value, batch in (("image", image, even.images), ("video", video, even.videos)):
                    if batch is not None:
                        its = value / (parts / share)
                        found[name] = found[name] + its if name in found else its
        return found


def scale_gradients(parameters: list[nn.Parameter], factor: float) -> None:
    """Multiply the existing gradients by a factor."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, factor)
