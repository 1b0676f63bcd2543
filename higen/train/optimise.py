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

    `total` is the length of the run, and `spent` the part that is over, in the same unit. By default `spent` is `step`.
    """
    start = (1 - settings.decay_part) * total
    along = min(1.0, max(0.0, ((step if spent is None else spent) - start) / max(total - start, 1e-9)))
    warm = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    least = settings.last_rate
    return settings.learning_rate * warm * (least + (1 - least) * (0.5 + 0.5 * math.cos(math.pi * along)))


def ema_decay(ema: float, step: int) -> float:
    """Weight of the old average after `step` steps. It is smaller at first, so that the first weights are forgotten."""
    return min(ema, (1 + step) / (10 + step))


class Optimiser:
    """The optimiser of named parameters over a run. The length of a run is a number of steps or a time.

    parameters  the trained parameters, by name
    average     exponential averages by the same names; they start at the parameters' initial values
    steps       number of steps in the run; None: as many as `time` (seconds) allows
    step        number of steps made
    seconds     time spent on them; counted by the training loop
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
        """Restart the averages from the current parameters."""
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
        """The rest of the run, in steps or in seconds."""
        return self.time - self.seconds if self.steps is None else self.steps - self.step

    @property
    def place(self) -> str:
        """The progress of the run, as text."""
        if self.steps is None:
            return f"step {self.step}, {self.seconds / 60:.1f} of {self.time / 60:.1f} minutes"
        return f"step {self.step} of {self.steps}"

    def clear(self) -> None:
        """Discard the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def advance(self) -> Tensor:
        """Make a step. Returns the norm of the gradient before clipping.

        If the gradient is not finite, raises TrainingError and changes no weight.
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
        """Everything that a resumed run needs: step, weights, average, optimiser, and seconds if they limit it."""
        return {
            **({"seconds": self.seconds} if self.steps is None else {}),
            "step": self.step,
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimiser": self._adamw.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
                self.average[name].copy_(state["average"][name])
        self._adamw.load_state_dict(state["optimiser"])
        self.step = state["step"]
        self.seconds = state.get("seconds", 0.0)
