"""A second implementation of a whole generation of the foreign family; tests/test_outside_family.py compares with it.

It does not use higen's runtime. The noise is numpy's Philox, and the solvers are diffusers' schedulers. PyTorch
resamples curves, and Stable Video Diffusion's code resamples the small picture. The networks are the family's own
layers, called without the solver step around them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as svd
from torch import Tensor

Predict = Callable[[Tensor, float, float, float], Tensor]
"""Computes m from a state [1,C,f,H,W], t, alpha and sigma."""


@dataclass(frozen=True)
class Networks:
    """The family's layers: `words` and `glass` by weights file, and `epsilon` with those of `water` by name."""

    words: Any
    glass: Any
    epsilon: dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """A request, with the model's defaults."""

    palette: PIL.Image.Image
    ids: Sequence[int]
    negative: Sequence[int] = (1, 2, 0, 0, 0, 0, 0, 0)
    seed: int = 0
    frames: int = 5
    width: int = 24
    height: int = 16
    fps: int = 6
    steps: tuple[int, int] = (3, 4)
    guidance: tuple[float, Sequence[float]] = (2.0, (1.0, 3.0))
    solver: tuple[str, str] = ("heun", "euler_ancestral")
    swell: Sequence[float] = (0.5,)
    current: Sequence[float] | None = (4.0,)
    drift: Sequence[float] | None = None
    depth: int = 3
    weather: str = "calm"
    carry: float = 0.3
    keep: float = 0.6
    snapshot: PIL.Image.Image | None = None
    footage: Sequence[PIL.Image.Image] | None = None


def normal(seed: int, purpose: int, *shape: int) -> Tensor:
    """Normal numbers of the stream (seed, purpose), drawn frame by frame: [F, ...], returned as [1, ..., F, H, W]."""
    count = int(np.prod(shape))
    raw = np.random.Philox(key=np.array([seed, purpose], np.uint64)).random_raw(count + count % 2) >> np.uint64(11)
    a, b = raw[0::2] + np.uint64(1), raw[1::2]
    radius, angle = np.sqrt(-2 * np.log(a * 2.0**-53)), 2 * np.pi * (b * 2.0**-53)
    drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).ravel()[:count]
    return torch.tensor(drawn.reshape(shape), dtype=torch.float32).transpose(0, 1)[None]


def generate(nets: Networks, wish: Wish) -> tuple[dict[str, Tensor], np.ndarray]:
    """The last latents of each loop, and the frames, uint8 [F,Y,X,3]."""
    high, wide = wish.height // 4, wish.width // 4
    channels = nets.glass.lens.out_channels
    still = _still(nets, wish, channels, high, wide)
    if wish.frames == 1:
        return {"pool": still}, _decode(nets, wish, still)
    shape = (wish.frames, channels, high, wide)
    tint = nets.glass.eye(svd._resize_with_antialiasing(_pixels(wish.palette, wish), (5, 7)))
    bearings, empty = (_bearings(nets, wish, ids, wish.frames, wish.swell) for ids in (wish.ids, wish.negative))
    foam = normal(wish.seed, 41, wish.frames, 1, high, wide)

    def branch(x: Tensor, t: float, alpha: float, sigma: float, rows: Tensor) -> Tensor:
        """Windows of 6 frames that start 4 frames apart, blended with tent-shaped weights."""
        n = min(6, wish.frames)
        starts = [*range(0, wish.frames - n, 4), wish.frames - n]
        tent, total, mixed = [min(j + 1, n - j) for j in range(n)], torch.zeros(wish.frames), torch.zeros_like(x)
        for s in starts:
            cut = slice(s, s + n)
            given = {"bearings": rows[:, cut], "still": still[:, :, 0], "tint": tint, "foam": foam[:, :, cut]}
            weight = torch.tensor(tent, dtype=torch.float32)
            mixed[:, :, cut] += weight[:, None, None] * _m(nets, "surge", x[:, :, cut], t, alpha, sigma, given)
            total[cut] += weight
        return mixed / total[:, None, None]

    scales = torch.tensor(np.interp(np.linspace(0, 1, wish.frames), np.linspace(0, 1, len(wish.guidance[1])),
                                    wish.guidance[1]), dtype=torch.float32)[:, None, None]  # fmt: skip

    def predict(*state: Any) -> Tensor:
        without = branch(*state, empty)
        return without + scales * (branch(*state, bearings) - without)

    offset = 0.1 * normal(wish.seed, 23, wish.frames, channels)[..., None, None]
    unit, added = normal(wish.seed, 22, *shape), offset + wish.carry * still
    clean = None
    if wish.footage is not None:
        pixels = torch.cat([_pixels(picture, wish) for picture in wish.footage[: wish.frames]])
        clean = nets.glass.lens(pixels).transpose(0, 1)[None]
    scheduler = _surge_scheduler(wish.solver[1])
    latents = _loop(scheduler, wish.steps[1], unit, added, clean, wish.keep, (wish.seed, 22), predict)
    return {"pool": still, "surge": latents}, _decode(nets, wish, latents)


def _still(nets: Networks, wish: Wish, channels: int, high: int, wide: int) -> Tensor:
    if wish.snapshot is not None:
        return nets.glass.lens(_pixels(wish.snapshot, wish))[:, :, None]
    bearings, empty = (_bearings(nets, wish, ids, 1, [0.0]) for ids in (wish.ids, wish.negative))

    def predict(*state: Any) -> Tensor:
        given, without = (_m(nets, "pool", *state, {"bearings": rows}) for rows in (bearings, empty))
        return without + wish.guidance[0] * (given - without)

    options = {"num_train_timesteps": 200, "beta_start": 0.002, "beta_end": 0.04, "beta_schedule": "scaled_linear"}
    kinds = {"heun": diffusers.HeunDiscreteScheduler, "euler": diffusers.EulerDiscreteScheduler}
    scheduler = kinds[wish.solver[0]](**options, timestep_spacing="linspace")
    unit = normal(wish.seed, 21, 1, channels, high, wide)
    return _loop(scheduler, wish.steps[0], unit, torch.zeros(1), None, 0.0, (wish.seed, 21), predict)


def _surge_scheduler(name: str) -> Any:
    options = {"num_train_timesteps": 300, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    if name == "lcm":
        return diffusers.LCMScheduler(**options, original_inference_steps=25)
    if name == "ddim":
        return diffusers.DDIMScheduler(**options, clip_sample=False)
    return diffusers.EulerAncestralDiscreteScheduler(**options, timestep_spacing="linspace")


def _m(nets: Networks, name: str, x: Tensor, t: float, alpha: float, sigma: float, given: dict[str, Tensor]) -> Tensor:
    # A row's alpha and sigma define the prediction: x0 = x / alpha - sigma / alpha epsilon.
    columns = (torch.tensor([value], dtype=torch.float32) for value in (t, 1 / alpha, sigma / alpha))
    made: Tensor = nets.epsilon[name](x, *columns, given, 1)
    return made


def _loop(
    scheduler: Any,
    steps: int,
    unit: Tensor,
    added: Tensor,
    clean: Tensor | None,
    keep: float,
    stream: tuple[int, int],
    predict: Predict,
) -> Tensor:
    """diffusers' loop. Its states are x / alpha if the scheduler has sigmas; the network always sees x."""
    scheduler.set_timesteps(steps)
    scaled = hasattr(scheduler, "sigmas")
    first = 0 if clean is None else len(scheduler.timesteps) - max(1, int(len(scheduler.timesteps) * keep))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    rows = []
    for i, t in enumerate(scheduler.timesteps):
        alpha = (1 + scheduler.sigmas[i] ** 2) ** -0.5 if scaled else scheduler.alphas_cumprod[int(t)] ** 0.5
        rows.append((float(t), float(alpha), float((1 - alpha**2) ** 0.5)))
    if clean is not None:
        state = rows[first][1] * clean + rows[first][2] * (unit + added)
    else:
        begin = float(scheduler.init_noise_sigma) * rows[0][1] if scaled else 1.0
        state = begin * unit + added
    sample = state / rows[first][1] if scaled else state
    with torch.inference_mode(), _fresh_noise(scheduler, stream, unit.shape) as row:
        for i in range(first, len(rows)):
            row[0] = i
            x = sample * rows[i][1] if scaled else sample
            more = {"eta": 0.5} if isinstance(scheduler, diffusers.DDIMScheduler) else {}
            sample = scheduler.step(predict(x, *rows[i]), scheduler.timesteps[i], sample, **more).prev_sample
    return sample


@contextlib.contextmanager
def _fresh_noise(scheduler: Any, stream: tuple[int, int], shape: Sequence[int]) -> Iterator[list[int]]:
    """Make diffusers draw its noise from the row's stream."""
    module, row = sys.modules[type(scheduler).__module__], [0]
    _, channels, frames, high, wide = shape
    before = getattr(module, "randn_tensor", None)

    def drawn(*_: Any, **__: Any) -> Tensor:
        return normal(stream[0], stream[1] + 2**32 * (row[0] + 1), frames, channels, high, wide)

    module.randn_tensor = drawn
    try:
        yield row
    finally:
        module.randn_tensor = before


def _bearings(nets: Networks, wish: Wish, ids: Sequence[int], frames: int, swell: Sequence[float]) -> Tensor:
    words = nets.words.scribe(torch.tensor([list(ids)]))
    frequencies = 10000.0 ** -(torch.arange(3) / 3)
    current = torch.zeros(1, 6, frames)
    if wish.current is not None:
        angles = torch.tensor(wish.current, dtype=torch.float32)[:, None] * frequencies
        current = _resampled(torch.cat([angles.cos(), angles.sin()], 1).T, frames)
    numbers = _resampled(torch.tensor([list(swell)], dtype=torch.float32), frames)[:, 0]
    # A single number applies to the loop's frames; numbers per frame apply to the request's frames.
    rows = frames if wish.drift is None or len(wish.drift) == 1 else wish.frames
    places = torch.linspace(0, 1, 5)
    distance = (torch.linspace(0, 1, rows)[:, None] - places).abs() if rows > 1 else torch.zeros(1, 5)
    drift = -distance if wish.drift is None else 1 - torch.tensor(wish.drift)[:, None] * distance
    drift = _resampled(drift.T, frames).transpose(1, 2)
    depth = torch.full((1, frames), float(wish.depth))
    one = [torch.tensor([float(value)]) for value in (("calm", "storm").index(wish.weather), wish.fps)]
    made: Tensor = nets.words.chart(words, current.transpose(1, 2), numbers, drift, depth, *one)
    return made


def _resampled(rows: Tensor, frames: int) -> Tensor:
    return torch.nn.functional.interpolate(rows[None], size=frames, mode="linear", align_corners=False)


def _pixels(picture: PIL.Image.Image, wish: Wish) -> Tensor:
    fitted = PIL.ImageOps.fit(picture, (wish.width, wish.height), PIL.Image.Resampling.LANCZOS)
    return torch.tensor(np.asarray(fitted, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def _decode(nets: Networks, wish: Wish, latents: Tensor) -> np.ndarray:
    """Decode two frames at a time, with one more frame on each side."""
    total = latents.shape[2]
    grain = normal(wish.seed, 42, total, 1, *latents.shape[3:])
    frames = []
    for first in range(0, total, 2):
        low, high = max(first - 1, 0), min(first + 3, total)
        pixels = nets.glass.develop(latents[:, :, low:high], grain[:, :, low:high])[0, :, first - low :][:, :2]
        frames.append(pixels.permute(1, 2, 3, 0))
    video = torch.cat(frames)[:total]
    return (255 * (video / 2 + 0.5).clamp(0, 1)).to(torch.uint8).numpy()
