"""Tidepool's stages as PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from higen.families import Weights
from higen.manifest import Manifest
from higen.models.solver_step import SolverStep
from tidepool.spec import EYE, FACTOR, FILES, LENGTH, PLACES, VOCABULARY, Widths, widths

__all__ = ["Glass", "TidepoolNetworks", "Water", "Words", "containers", "open"]


def open(manifest: Manifest, weights: Weights) -> TidepoolNetworks:  # noqa: A001 (the family protocol's name)
    """The networks of a model. Nothing is loaded yet."""
    return TidepoolNetworks(manifest, weights)


class TidepoolNetworks:
    """Loads each weights file when a stage first needs it."""

    def __init__(self, manifest: Manifest, weights: Weights) -> None:
        self._manifest = manifest
        self._weights = weights
        self._loaded: dict[str, nn.Module] = {}

    def module(self, stage: str) -> nn.Module:
        """A stage as a module, in evaluation mode."""
        row = self._manifest.stage(stage)
        loaded = self._of_file(row.weights)
        if row.denoises:
            network = stage.partition("_")[0]
            return SolverStep(row, Epsilon(network, getattr(loaded, network))).eval()
        network = {"reel": "lens"}.get(stage, stage)
        return Reader(network, getattr(loaded, network)).eval()

    def _of_file(self, file: str) -> nn.Module:
        if file not in self._loaded:
            with torch.device("meta"):
                made = containers(widths(self._manifest))[file]()
            self._weights.fill(made, file)
            self._loaded[file] = made
        return self._loaded[file]


def containers(sizes: Widths) -> Mapping[str, Callable[[], nn.Module]]:
    """The function that makes each weights file's module."""
    makers: tuple[Callable[[], nn.Module], ...] = (lambda: Words(sizes), lambda: Water(sizes), lambda: Glass(sizes))
    return dict(zip(FILES, makers, strict=True))


class Reader(nn.Module):
    """A network under its own name, so that its parameters have the names of the weights file."""

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, network)

    def forward(self, *tensors: Tensor) -> Tensor:
        network = self.get_submodule(self._name)
        dtype = next(network.parameters()).dtype
        out: Tensor = network(*(t.to(dtype) if t.is_floating_point() else t for t in tensors))
        return out.float()


class Epsilon(nn.Module):
    """Predicts epsilon for `SolverStep`. The result is close to noise * x, the exact one for data of variance one."""

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, network)

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor], branches: int
    ) -> Tensor:
        """x [B,C,F,H,W] -> epsilon of the same shape. alpha and sigma [B] are those of x0 = alpha x - sigma epsilon."""
        network = self.get_submodule(self._name)
        dtype = next(network.parameters()).dtype
        signal, noise = 1.0 / alpha, sigma / alpha  # x = signal x0 + noise epsilon
        row = torch.stack([t / 300.0, signal, noise], dim=1).to(dtype)
        made: Tensor = network(x.to(dtype), row, {name: value.to(dtype) for name, value in conditions.items()})
        return noise[:, None, None, None, None] * x + 0.5 * made.to(x.dtype)


class Words(nn.Module):
    """The networks that read the request's text and numbers."""

    def __init__(self, sizes: Widths) -> None:
        super().__init__()
        self.scribe = nn.Embedding(VOCABULARY, sizes.words)
        self.chart = Chart(sizes)


class Chart(nn.Module):
    """words [B,L,Dt], current [B,F,D], drift [B,F,R], the others [B,F] or [B] -> bearings [B,F,E]."""

    def __init__(self, sizes: Widths) -> None:
        super().__init__()
        self.text = nn.Linear(LENGTH * sizes.words, sizes.bearing)
        self.current = nn.Linear(sizes.curve, sizes.bearing)
        self.drift = nn.Linear(PLACES, sizes.bearing)
        self.numbers = nn.Linear(4, sizes.bearing)

    def forward(
        self,
        words: Tensor,
        current: Tensor,
        swell: Tensor,
        drift: Tensor,
        depth: Tensor,
        weather: Tensor,
        pace: Tensor,
    ) -> Tensor:
        per_clip = torch.stack([weather, pace / 10.0], dim=1)[:, None].expand(-1, swell.shape[1], -1)
        numbers = self.numbers(torch.cat([torch.stack([swell, depth / 5.0], dim=2), per_clip], dim=2))
        per_frame = self.current(current) + self.drift(drift) + numbers
        return torch.tanh(self.text(words.flatten(1))[:, None] + per_frame)


class Water(nn.Module):
    """The denoising networks."""

    def __init__(self, sizes: Widths) -> None:
        super().__init__()
        self.pool = Pool(sizes)
        self.surge = Surge(sizes)


class Pool(nn.Module):
    """For one frame: x [B,C,1,H,W], row [B,3] (t, signal, noise) and `bearings` [B,1,E]."""

    def __init__(self, sizes: Widths) -> None:
        super().__init__()
        self.enter = nn.Conv3d(sizes.channels, sizes.hidden, (1, 3, 3), padding=(0, 1, 1))
        self.row = nn.Linear(3, sizes.hidden)
        self.bearings = nn.Linear(sizes.bearing, sizes.hidden)
        self.leave = nn.Conv3d(sizes.hidden, sizes.channels, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor, row: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        hidden = self.enter(x) + _per_frame(self.bearings(conditions["bearings"]) + self.row(row)[:, None])
        made: Tensor = self.leave(F.silu(hidden))
        return made


class Surge(nn.Module):
    """For a clip: x [B,C,F,H,W], row [B,3], `bearings` [B,F,E], `still` [B,C,H,W], `tint` [B,E], `foam` [B,1,F,H,W]."""

    def __init__(self, sizes: Widths) -> None:
        super().__init__()
        self.enter = nn.Conv3d(sizes.channels + 1, sizes.hidden, (1, 3, 3), padding=(0, 1, 1))
        self.still = nn.Conv2d(sizes.channels, sizes.hidden, 1)
        self.row = nn.Linear(3, sizes.hidden)
        self.bearings = nn.Linear(sizes.bearing, sizes.hidden)
        self.tint = nn.Linear(sizes.bearing, sizes.hidden)
        self.along = nn.Conv3d(sizes.hidden, sizes.hidden, (3, 1, 1), padding=(1, 0, 0))
        self.leave = nn.Conv3d(sizes.hidden, sizes.channels, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor, row: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        whole = self.row(row) + self.tint(conditions["tint"])
        hidden = self.enter(torch.cat([x, conditions["foam"]], dim=1))
        hidden = hidden + self.still(conditions["still"])[:, :, None]
        hidden = hidden + _per_frame(self.bearings(conditions["bearings"]) + whole[:, None])
        made: Tensor = self.leave(F.silu(self.along(F.silu(hidden))))
        return made


def _per_frame(rows: Tensor) -> Tensor:
    """[B,F,C] as [B,C,F,1,1]."""
    return rows.transpose(1, 2)[:, :, :, None, None]


class Glass(nn.Module):
    """The networks from pictures to latents and conditions, and from latents to pictures."""

    def __init__(self, sizes: Widths) -> None:
        super().__init__()
        self.lens = nn.Conv2d(3, sizes.channels, FACTOR, stride=FACTOR)
        self.eye = Eye(sizes)
        self.develop = Develop(sizes)


class Eye(nn.Module):
    """A picture [B,3,h,w] -> tint [B,E]."""

    def __init__(self, sizes: Widths) -> None:
        super().__init__()
        self.look = nn.Linear(3 * EYE[0] * EYE[1], sizes.bearing)

    def forward(self, picture: Tensor) -> Tensor:
        return torch.tanh(self.look(picture.flatten(1)))


class Develop(nn.Module):
    """latents [B,C,F,H,W], grain [B,1,F,H,W] -> pixels [B,3,F,Y,X]; each frame depends on its neighbours."""

    def __init__(self, sizes: Widths) -> None:
        super().__init__()
        self.mix = nn.Conv3d(sizes.channels + 1, 3 * FACTOR * FACTOR, 3, padding=1)

    def forward(self, latents: Tensor, grain: Tensor) -> Tensor:
        cells = self.mix(torch.cat([latents, grain], dim=1))  # [B, 3 a b, F, H, W]
        cells = cells.unflatten(1, (3, FACTOR, FACTOR)).permute(0, 1, 4, 5, 2, 6, 3)  # [B, 3, F, H, a, W, b]
        return 1.1 * torch.tanh(cells.flatten(5, 6).flatten(3, 4))
