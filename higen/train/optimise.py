"""One step of training with the gradients that are there: AdamW by a schedule, and the weights' running averages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from higen.errors import TrainingError
from higen.train.settings import OptimiserSettings

__all__ = ["Optimiser", "ema_decay", "learning_rate"]


def learning_rate(settings: OptimiserSettings, step: int, steps: int) -> float:
    """Rate of a step of `steps`: linear warm-up, constant, cosine to zero over the last `decay_part`."""
    start = (1 - settings.decay_part) * steps
    along = min(1.0, max(0.0, (step - start) / max(steps - start, 1e-9)))
    warm = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    return settings.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * along))


def ema_decay(ema: float, step: int) -> float:
    """Weight of the old average after `step` steps: the first steps are not remembered for ever."""
    return min(ema, (1 + step) / (10 + step))


class Optimiser:
    """The optimiser of named parameters over a run of `steps` steps.

    parameters  what is trained, by name
    average     the same names: exponential averages, which start as the parameters are now
    step        steps made
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimiserSettings, steps: int) -> None:
        self.parameters, self.settings, self.steps = dict(parameters), settings, steps
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = 0
        self._adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    def average_anew(self) -> None:
        """Let the averages start from the parameters as they are now."""
        for name, parameter in self.parameters.items():
            self.average[name].copy_(parameter.detach())

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.settings, self.step, self.steps)

    def clear(self) -> None:
        """Forget the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def advance(self) -> Tensor:
        """Make a step; returns the gradient's norm before it was clipped.

        Raises TrainingError, with nothing changed, for a gradient that is not finite.
        """
        for group in self._adamw.param_groups:
            group["lr"] = self.rate
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip or math.inf)
        if not math.isfinite(norm):
            raise TrainingError(
                f"step {self.step + 1}: the gradient is not finite; the last checkpoint is good: "
                "a smaller learning rate or precision fp32 may help"
            )
        self._adamw.step()
        self.step += 1
        decay = ema_decay(self.settings.ema, self.step)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return norm

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs: step, weights, average, optimiser."""
        return {
            "step": self.step,
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimiser": self._adamw.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
                self.average[name].copy_(state["average"][name])
        self._adamw.load_state_dict(state["optimiser"])
        self.step = state["step"]
