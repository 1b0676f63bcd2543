"""One step of training from given gradients: AdamW with a schedule, and running averages of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from higen.errors import TrainingError
from higen.train.settings import OptimiserSettings

__all__ = ["Optimiser", "ema_decay", "learning_rate"]


def learning_rate(settings: OptimiserSettings, step: int, total: float, spent: float | None = None) -> float:
    """Rate of a step: linear warm-up, constant, cosine to `last_rate` over the last `decay_part`.

    `total` is the length of the run and `spent` the part of it that is over, in the same unit; left out, `spent` is
    `step`.
    """
    start = (1 - settings.decay_part) * total
    along = min(1.0, max(0.0, ((step if spent is None else spent) - start) / max(total - start, 1e-9)))
    warm = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    least = settings.last_rate
    return settings.learning_rate * warm * (least + (1 - least) * (0.5 + 0.5 * math.cos(math.pi * along)))


def ema_decay(ema: float, step: int) -> float:
    """Weight of the old average after `step` steps. It is smaller in the first steps, so that these are forgotten."""
    return min(ema, (1 + step) / (10 + step))


class Optimiser:
    """The optimiser of named parameters over a run, whose length is a number of steps or a time.

    parameters  what is trained, by name
    average     the same names: exponential averages, which start as the parameters are now
    steps       how many there are; None: as many as `time` (seconds) allows
    step        steps made
    seconds     spent on them; counted by the training loop
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimiserSettings,
        steps: int | None = None,
        time: float = 0.0,
    ) -> None:
        self.parameters, self.settings, self.steps, self.time = dict(parameters), settings, steps, time
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step, self.seconds = 0, 0.0
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
        if self.steps is None:
            return learning_rate(self.settings, self.step, self.time, self.seconds)
        return learning_rate(self.settings, self.step, self.steps)

    @property
    def left(self) -> float:
        """What is left of the run: steps, or seconds."""
        return self.time - self.seconds if self.steps is None else self.steps - self.step

    @property
    def place(self) -> str:
        """Where the run is, for a person."""
        if self.steps is None:
            return f"step {self.step}, {self.seconds / 60:.1f} of {self.time / 60:.1f} minutes"
        return f"step {self.step} of {self.steps}"

    def clear(self) -> None:
        """Forget the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def advance(self) -> Tensor:
        """Make a step; returns the gradient's norm before it was clipped.

        Raises TrainingError, and changes nothing, for a gradient that is not finite.
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
        """Everything a resumed run needs: step, weights, average, optimiser, and seconds where they are its length."""
        return {
            **({"seconds": self.seconds} if self.steps is None else {}),
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
        self.seconds = state.get("seconds", 0.0)
