"""A denoising stage as a module: one whole solver step around any network that predicts m (docs/manifest.md, "loops").

The torch backend runs it and the export traces it, so the two agree by construction. Its inputs and outputs are
float32 whatever the network computes in; the guidance mix and the solver's update are computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from higen.stages import DEEP, EMPTY, Stage

__all__ = ["SolverStep"]


class SolverStep(nn.Module):
    """The step of `stage`, guided or plain: takes its inputs and gives its outputs in the table's order.

    `predictor(x, t, alpha, sigma, conditions, branches) -> m` is the network. Where the stage is guided, each of its
    arguments has the branch with the prompt first and the one without behind it, along the first axis: x [2B,C,F,H,W],
    t, alpha and sigma [2B], and `conditions` {name: tensor}. A condition with an input `empty_NAME` is stacked with
    it, the others are repeated. `branches`: 2, or 1 for a plain step. m is like x.

    A variant that keeps or takes deep features asks for `predictor.with_deep(..., deep) -> (m, deep)` instead: the
    features [2B,K,F,H,W] that it is given (None: it computes them), and those that were used.
    """

    def __init__(self, stage: Stage, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor
        self.prefix = f"predictor.{getattr(predictor, 'prefix', '')}"
        """What the names of the weights have before them here."""
        self.branches = 2 if stage.guided else 1
        self.inputs = tuple(tensor.name for tensor in stage.inputs)
        twins = {EMPTY + name for name in self.inputs}
        self.conditions = tuple(tensor.name for tensor in stage.conditions if tensor.name not in twins)
        self.keeps = any(made.name == DEEP for made in stage.outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """x' = A x + B m + C previous and previous' = alpha x - sigma m, [B,C,F,H,W]; then the deep features that a
        step keeps.
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
            branches = m.unflatten(0, (2, -1))  # not chunked: a chunk exports as a sequence
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
