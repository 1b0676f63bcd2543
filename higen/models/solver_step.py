"""A denoising stage as a module: one whole solver step around any network that predicts m (docs/manifest.md, "loops").

The torch backend runs it and the export traces it, so the two agree by construction. Its inputs and outputs are
float32, in whatever precision the network computes. Guidance and the solver's update are computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from higen.stages import DEEP, EMPTY, Stage

__all__ = ["SolverStep"]


class SolverStep(nn.Module):
    """The step of `stage`, guided or plain. It takes its inputs and returns its outputs in the table's order.

    `predictor(x, t, alpha, sigma, conditions, branches) -> m` is the network. If the stage is guided, each argument has
    both branches along the first axis, first the one with the prompt, then the one without: x [2B,C,F,H,W], t, alpha
    and sigma [2B], and `conditions` {name: tensor}. A condition with an input `empty_NAME` is stacked with that input;
    other conditions are repeated. `branches`: 2, or 1 for a plain step. m has the shape of x.

    A variant that keeps or takes deep features calls `predictor.with_deep(..., deep) -> (m, deep)` instead. Its
    argument `deep` is the given features [2B,K,F,H,W] (None: they are computed). It returns the features that were
    used.
    """

    def __init__(self, stage: Stage, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor
        self.prefix = f"predictor.{getattr(predictor, 'prefix', '')}"
        """The prefix of the weights' names in this module."""
        self.replaced: dict[str, str] = {
            own: self.prefix + name for own, name in getattr(predictor, "replaced", {}).items()
        }
        """{prefix in the weights file: prefix in this module} of weights that take the place of others."""
        self.branches = 2 if stage.guided else 1
        self.inputs = tuple(tensor.name for tensor in stage.inputs)
        twins = {EMPTY + name for name in self.inputs}
        self.conditions = tuple(tensor.name for tensor in stage.conditions if tensor.name not in twins)
        self.keeps = any(made.name == DEEP for made in stage.outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns x' = A x + B m + C previous and previous' = alpha x - sigma m, both [B,C,F,H,W], and the deep
        features if the step keeps them.
        """
        given = dict(zip(self.inputs, tensors, strict=True))
        x, previous = given["latents"], given["previous"]
        told = (
            self._stacked(x),
            *(self._stacked(given[name]) for name in ("t", "alpha", "sigma")),
            {name: self._stacked(given[name], given.get(EMPTY + name)) for name in self.conditions},
            self.branches,
        )
        kept: tuple[Tensor, ...] = ()
        if self.keeps or DEEP in given:
            predictor: Any = self.predictor
            m, deep = predictor.with_deep(*told, self._by_branch(given.get(DEEP)))
            kept = (self._by_sample(deep).to(x.dtype),) if self.keeps else ()
        else:
            m = self.predictor(*told)
        m = m.to(x.dtype)
        if self.branches == 2:
            branches = m.unflatten(0, (2, -1))  # not chunked, because a chunk is exported as a sequence
            guidance = given["guidance"].to(x.dtype)[:, None, :, None, None]  # [B,1,f,1,1]
            m = branches[1] + guidance * (branches[0] - branches[1])
        a, b, c, alpha, sigma = (_column(given[name], x) for name in ("A", "B", "C", "alpha", "sigma"))
        x0 = alpha * x - sigma * m
        return a * x + b * m + c * previous, x0, *kept

    def _by_branch(self, deep: Tensor | None) -> Tensor | None:
        """[B,2K,F,H,W] -> [2B,K,F,H,W]."""
        if deep is None or self.branches == 1:
            return deep
        return deep.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)

    def _by_sample(self, deep: Tensor) -> Tensor:
        """[2B,K,F,H,W] -> [B,2K,F,H,W]."""
        return deep if self.branches == 1 else deep.unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2)

    def _stacked(self, given: Tensor, empty: Tensor | None = None) -> Tensor:
        return given if self.branches == 1 else torch.cat([given, given if empty is None else empty])


def _column(column: Tensor, like: Tensor) -> Tensor:
    return column.to(like.dtype).reshape(-1, 1, 1, 1, 1)
