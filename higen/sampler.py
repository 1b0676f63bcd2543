"""The denoising loop: gives each row of a solver to a denoising stage, and its outputs to the next row
(docs/manifest.md, "loops")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen import noise
from higen.errors import BackendError
from higen.feature_reuse import FeatureReuse, Runner
from higen.free_init import FreeInit, renewed
from higen.schedule import SolverTable, tail
from higen.stages import STATE, Stage
from higen.tables import Tiles, Windows

__all__ = ["Edit", "Plan", "Runner", "Step", "cut", "denoise", "initial_state", "repeated", "tail"]
__all__ += ["window_weights"]

PIXELS = {"H": "Y", "W": "X"}

COEFFICIENTS = ("t", "A", "B", "C", "alpha", "sigma")

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """State after step `index` (from 0) of `total`: `latents` x_t' and `previous`, the estimate of the clean latents.

    Both are [B, C, F, H, W] tensors of the backend's type. `t` is the row's timestep.
    """

    loop: str
    stage: str
    index: int
    total: int
    t: float
    latents: Any
    previous: Any


@dataclass(frozen=True)
class Edit:
    """Known frames: where `mask` is 1, the estimate of the clean latents, and so the result, is `known`.

    known [B,C,F,H,W], mask [B,1,F,h,w], 0 to 1; h and w may be 1.
    """

    known: Array
    mask: Array


@dataclass(frozen=True)
class Plan:
    """How one loop is run for one request.

    stage      gives the stage that does a row with this guidance [B, f]
    conditions gives the inputs of a stage other than its state, [B, ...] each
    guidance   [rows, B, f]
    seeds, purpose   streams of the noise that a stochastic solver adds
    first      the first row to run
    reuse      the whole network runs once in this many rows; the rows between reuse its deep features (Ma et al. 2024,
               DeepCache); 1: it runs in every row
    stretch    latents z [B,C,1 or f,H,W] and a factor s: after the last row, x becomes z + s (x - z), both for the
               state and for the estimate of the clean latents
    """

    loop: str
    stage: Callable[[Array], Stage]
    conditions: Callable[[Stage], Mapping[str, Any]]
    table: SolverTable
    guidance: Array
    seeds: Sequence[int]
    purpose: int
    first: int = 0
    edit: Edit | None = None
    windows: Windows | None = None
    tiles: Tiles | None = None
    reuse: int = 1
    stretch: tuple[Array, float] | None = None


def initial_state(
    table: SolverTable, unit: Array, added: Array | None = None, clean: Array | None = None, first: int = 0
) -> Array:
    """The state before row `first`: `initial` times the noise [B,C,f,H,W], plus `added`.

    With `clean` latents, the loop begins at row `first` with that row's noise level (Meng et al. 2022, SDEdit).
    """
    if clean is not None:
        whole = unit if added is None else unit + added
        return np.float32(table.start_alpha[first]) * clean + np.float32(table.start_sigma[first]) * whole
    scaled = unit if table.initial == 1.0 else np.float32(table.initial) * unit
    return scaled if added is None else scaled + added


def denoise(backend: Runner, plan: Plan, latents: Array) -> Iterator[Step]:
    """Run the rows of a plan's table on `latents` [B,C,F,H,W]; yields the state after each step."""
    batch = len(latents)
    table = plan.table.tail(plan.first) if plan.first else plan.table
    x: Any = latents
    previous: Any = np.zeros_like(latents)
    reusing = FeatureReuse(backend, plan.reuse) if plan.reuse > 1 else None
    for i in range(len(table)):
        guidance = plan.guidance[plan.first + i]
        stage = plan.stage(guidance)
        conditions = plan.conditions(stage)
        if reusing is not None:
            stage = reusing.step(stage, i)
        row = {name: np.full(batch, getattr(table, name)[i], np.float32) for name in COEFFICIENTS}
        if stage.guided:
            row["guidance"] = guidance
        if table.noise[i]:
            previous = _fresh(plan, latents.shape, plan.first + i)
        inputs = {"latents": x, "previous": previous, **row, **conditions}
        out = _run(reusing or backend, stage, inputs, plan, latents.shape[3:])
        x, previous = out["latents"], out["previous"]
        if plan.edit is not None:
            x, previous = _edited(backend, plan.edit, x, previous, float(table.B[i]), float(table.sigma[i]))
        if i == len(table) - 1:
            if plan.stretch is not None:
                x, previous = (_stretched(backend.to_numpy(one), *plan.stretch, plan.edit) for one in (x, previous))
            if plan.edit is not None:  # a solver may end at a noise level above 0
                x = np.where(plan.edit.mask == 1, plan.edit.known, x)
        yield Step(plan.loop, stage.name, i, len(table), float(table.t[i]), x, previous)


def repeated(
    backend: Runner,
    plan: Plan,
    noise_of: Callable[[int], tuple[Array, Array | None]],
    level: tuple[float, float],
    free_init: FreeInit,
) -> Iterator[Step]:
    """Run a plan `free_init.iterations` times, each with the low frequencies of the result before it.

    noise_of  gives the initial noise of an iteration (from 0), and the latents that are added to it
    level     alpha and sigma of the noisiest state
    """
    unit, added = noise_of(0)
    first = unit if added is None else unit + added
    latents, rows = initial_state(plan.table, unit, added), len(plan.table)
    for k in range(free_init.iterations):
        step = None
        stretch = plan.stretch if k + 1 == free_init.iterations else None
        for step in denoise(backend, replace(plan, purpose=noise.again(plan.purpose, k), stretch=stretch), latents):
            yield replace(step, index=k * rows + step.index, total=free_init.iterations * rows)
        if k + 1 < free_init.iterations and step is not None:
            noisy = np.float32(level[0]) * backend.to_numpy(step.latents) + np.float32(level[1]) * first
            unit, added = noise_of(k + 1)
            fresh = unit if added is None else unit + added
            latents = initial_state(plan.table, renewed(noisy, fresh, free_init))


def _fresh(plan: Plan, shape: Sequence[int], row: int) -> Array:
    """Fresh noise for a row; a stochastic first-order solver takes it as `previous`."""
    purpose = noise.row_purpose(plan.purpose, row)
    _, channels, frames, height, width = shape
    return np.stack([noise.frame_noise(seed, purpose, channels, frames, height, width) for seed in plan.seeds])


def _edited(backend: Runner, edit: Edit, latents: Any, clean: Any, b: float, sigma: float) -> tuple[Array, Array]:
    """The state that would follow if the stage had estimated the edited clean latents.

    m is in both x0 = alpha x - sigma m and x' = A x + B m + C previous, so replacing x0 by x0* adds
    B / -sigma (x0* - x0) to x'.
    """
    x0 = backend.to_numpy(clean)
    wanted = x0 + edit.mask * (edit.known - x0)
    if sigma == 0.0 and b != 0.0:
        raise BackendError("an edit needs rows whose estimate depends on the network (sigma is 0)")
    moved = backend.to_numpy(latents) + np.float32(b / -sigma if sigma else 0.0) * (wanted - x0)
    return moved.astype(np.float32), wanted.astype(np.float32)


def _stretched(x: Array, origin: Array, by: float, edit: Edit | None) -> Array:
    """Latents stretched from `origin`. The factor falls to 1 where frames are known: these stay as they are."""
    more = np.float32(by) - np.float32(1)
    factor = np.float32(1) + (more if edit is None else (np.float32(1) - edit.mask.astype(np.float32)) * more)
    return np.asarray(origin + factor * (x - origin), np.float32)


def window_weights(frames: int, windows: Windows) -> list[tuple[int, Array]]:
    """The first frame of each window, and the weights of its frames, float32. For each frame, the weights sum to 1.

    Windows begin `stride` frames apart; the last one ends with the clip. Weights fall towards both ends of a window.
    """
    length = windows.length
    starts = [*range(0, frames - length, windows.stride), frames - length]
    hill = np.minimum(np.arange(length) + 1, length - np.arange(length)).astype(np.float64)
    total = np.zeros(frames)
    for start in starts:
        total[start : start + length] += hill
    return [(start, (hill / total[start : start + length]).astype(np.float32)) for start in starts]


def _run(
    backend: Runner, stage: Stage, inputs: Mapping[str, Any], plan: Plan, size: Sequence[int]
) -> Mapping[str, Any]:
    """Run a step on the whole clip, or on windows of its frames, and mix the outputs of the windows.

    Mixing the steps equals stepping with the mixed prediction, because a step is linear in it and the weights sum to 1.
    """
    windows, frames = plan.windows, plan.guidance.shape[2]
    if windows is None or frames <= windows.length:
        return _run_tiles(backend, stage, inputs, plan.tiles, size)
    host = {name: backend.to_numpy(value) for name, value in inputs.items()}
    mixed = {name: np.zeros_like(host["latents"]) for name in STATE}
    for start, weight in window_weights(frames, windows):
        part = {name: cut(stage, name, value, "F", start, start + windows.length) for name, value in host.items()}
        for name, value in _run_tiles(backend, stage, part, plan.tiles, size).items():
            mixed[name][:, :, start : start + windows.length] += weight[:, None, None] * backend.to_numpy(value)
    return mixed


def _run_tiles(
    backend: Runner, stage: Stage, inputs: Mapping[str, Any], tiles: Tiles | None, size: Sequence[int]
) -> Mapping[str, Any]:
    """Run a step on whole frames, or on tiles of them, and mix the outputs of the tiles like those of windows."""
    height, width = size
    if tiles is None or (height <= tiles.height and width <= tiles.width):
        return backend.run(stage.name, **inputs)
    host = {name: backend.to_numpy(value) for name, value in inputs.items()}
    mixed = {name: np.zeros_like(host["latents"]) for name in STATE}
    for top, down in _tile_weights(height, tiles.height, tiles.stride):
        rows = _tile(stage, host, "H", top, top + len(down), height)
        for left, across in _tile_weights(width, tiles.width, tiles.stride):
            part = _tile(stage, rows, "W", left, left + len(across), width)
            place = (..., slice(top, top + len(down)), slice(left, left + len(across)))
            for name, value in backend.run(stage.name, **part).items():
                mixed[name][place] += down[:, None] * across * backend.to_numpy(value)
    return mixed


def _tile(
    stage: Stage, inputs: Mapping[str, NDArray[Any]], axis: str, start: int, end: int, size: int
) -> dict[str, NDArray[Any]]:
    """The part of each input from latent cell `start` to `end` of axis H or W (`size` cells); the same of pixels."""
    found = {name: cut(stage, name, value, axis, start, end) for name, value in inputs.items()}
    pixels = PIXELS[axis]
    for name, value in found.items():
        shape = stage.input(name).shape
        if pixels in shape:
            factor = value.shape[shape.index(pixels)] // size
            found[name] = cut(stage, name, value, pixels, factor * start, factor * end)
    return found


def _tile_weights(size: int, length: int, stride: int) -> list[tuple[int, Array]]:
    """The first cell of each tile along one axis, and the weights of its cells, by `window_weights`."""
    return window_weights(size, Windows(min(size, length), min(size, stride)))


def cut(stage: Stage, name: str, value: NDArray[Any], axis: str, start: int, end: int) -> NDArray[Any]:
    """The part of a stage's input from `start` to `end` along an axis; the whole input if it does not have the axis."""
    shape = stage.input(name).shape
    if axis not in shape:
        return value
    where = (*[slice(None)] * shape.index(axis), slice(start, end))
    return np.ascontiguousarray(value[where])
