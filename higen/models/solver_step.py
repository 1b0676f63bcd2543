"""A denoising stage as a module: one whole solver step around any network that predicts m (docs/manifest.md, "loops").

The torch backend runs it and the export traces it, so the two agree by construction. Its inputs and outputs are
float32 whatever the network computes in; the guidance mix and the solver's update are computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from higen.stages import EMPTY, Stage

__all__ = ["SolverStep"]


class SolverStep(nn.Module):
    """The step of `stage`, guided or plain: takes its inputs and gives its outputs in the table's order.

    `predictor(x, t, alpha, sigma, conditions, branches) -> m` is the network. Where the stage is guided, each of its
    arguments has the branch with the prompt first and the one without behind it, along the first axis: x [2B,C,F,H,W],
    t, alpha and sigma [2B], and `conditions` {name: tensor}. A condition with an input `empty_NAME` is stacked with
    it, the others are repeated. `branches`: 2, or 1 for a plain step. m is like x.
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

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """x' = A x + B m + C previous and previous' = alpha x - sigma m, [B,C,F,H,W]."""
        given = dict(zip(self.inputs, tensors, strict=True))
        x, previous = given["latents"], given["previous"]
        m = self.predictor(
            self._stacked(x),
            *(self._stacked(given[name]) for name in ("t", "alpha", "sigma")),
            {name: self._stacked(given[name], given.get(EMPTY + name)) for name in self.conditions},
            self.branches,
        ).to(x.dtype)
        if self.branches == 2:
            branches = m.unflatten(0, (2, -1))  # not chunked: a chunk exports as a sequence
            guidance = given["guidance"].to(x.dtype)[:, None, :, None, None]  # [B,1,f,1,1]
            m = branches[1] + guidance * (branches[0] - branches[1])
        a, b, c, alpha, sigma = (_column(given[name], x) for name in ("A", "B", "C", "alpha", "sigma"))
        x0 = alpha * x - sigma * m
        return a * x + b * m + c * previous, x0

    def _stacked(self, given: Tensor, empty: Tensor | None = None) -> Tensor:
        return given if self.branches == 1 else torch.cat([given, given if empty is None else empty])


def _column(column: Tensor, like: Tensor) -> Tensor:
    return column.to(like.dtype).reshape(-1, 1, 1, 1, 1)
