"""Camera movements over the recipe's scenes: rendered, and measured in clips by registering their backgrounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from higen.train.emoji.packs import clip_indices, scene
from higen.train.emoji.subjects import FRAMES, KEY_INDEX, SUBJECTS

__all__ = ["CAMERAS", "SIDE", "Camera", "Frames", "movement", "outside", "rendered", "smaller"]

SIDE = 128


Frames = NDArray[np.uint8]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Camera:
    """A camera movement.

    matrix  the map [2,3] for an amount of movement, from a pixel of the frame to the scene's pixel that it shows, both
            relative to the centre
    step    amount from one frame to the next at scale 1
    reach   largest amount, relative to the key frame, that the measurement looks for
    unit    unit of the amount over a whole clip
    """

    matrix: Callable[[float], Matrix]
    step: float
    reach: float
    unit: str


def _pan(amount: float) -> Matrix:
    return np.array([[1, 0, -amount], [0, 1, 0]], dtype=np.float64)


def _zoom(amount: float) -> Matrix:
    scale = np.exp(-amount)
    return np.array([[scale, 0, 0], [0, scale, 0]], dtype=np.float64)


def _roll(amount: float) -> Matrix:
    cosine, sine = np.cos(amount), np.sin(amount)
    return np.array([[cosine, sine, 0], [-sine, cosine, 0]], dtype=np.float64)


CAMERAS = {
    "pan": Camera(_pan, 1.0, 14.0, "pixels"),
    "zoom": Camera(_zoom, 0.015, 0.2, "natural logarithm of the size"),
    "roll": Camera(_roll, 0.018, 0.25, "radians"),
}


def smaller(camera: Camera, size: float) -> Camera:
    """The same movement, `size` times as far. The measurement looks at least for a third of the largest movement."""
    return replace(camera, step=camera.step * size, reach=camera.reach * max(size, 1 / 3))


def rendered(loop: Frames, s: int, background: str, speed: float, camera: Camera, scale: float) -> Frames:
    """A clip uint8 [16,128,128,3] of a subject's loop, with a moving camera."""
    places = clip_indices(len(loop), SUBJECTS[s].key_frame, speed)
    clip = []
    for i, place in enumerate(places):
        matrix = camera.matrix((i - KEY_INDEX) * camera.step * scale)
        row, column = np.mgrid[0:SIDE, 0:SIDE] + 0.5 - SIDE / 2
        x, y = (matrix[k, 0] * column + matrix[k, 1] * row + matrix[k, 2] + SIDE / 2 - 0.5 for k in (0, 1))
        behind = scene(background, (x / SIDE).astype(np.float32), (y / SIDE).astype(np.float32))
        # Premultiplied colours do not bleed into transparent pixels.
        centred = matrix[:, 2] + SIDE / 2 - matrix[:, :2] @ np.full(2, SIDE / 2)
        coefficients = tuple(np.column_stack([matrix[:, :2], centred]).ravel())
        moved = Image.fromarray(loop[place]).convert("RGBa")
        subject = np.asarray(
            moved.transform((SIDE, SIDE), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
        )
        alpha = subject[..., 3:].astype(np.float32) / 255
        clip.append(np.rint(np.clip(subject[..., :3] + behind * (1 - alpha), 0, 255)).astype(np.uint8))
    return np.stack(clip)


def outside(loop: Frames) -> NDArray[np.bool_]:
    """Pixels that are outside the subject in every frame of the loop, even if it has moved a little: bool [H,W]."""
    shown = torch.from_numpy((loop[..., 3] > 8).any(axis=0)).float()[None, None]
    grown: NDArray[np.bool_] = functional.max_pool2d(shown, 13, 1, 6)[0, 0].numpy() == 0
    return grown


def movement(clip: Frames, mask: NDArray[np.bool_], camera: Camera) -> float:
    """The movement from the first to the last frame, from the slope of a straight line through the frames' amounts."""
    x = torch.from_numpy(clip.transpose(0, 3, 1, 2).astype(np.float32))
    amounts = np.linspace(-camera.reach, camera.reach, 113)
    moved = torch.stack([warped(x[KEY_INDEX], camera.matrix(amount)) for amount in amounts])
    inside = torch.from_numpy(mask).float()
    weights = torch.stack([warped(inside[None], camera.matrix(amount))[0] for amount in amounts]) * inside
    weights = weights * (weights > 0.99)
    found = []
    for i, frame in enumerate(x):
        errors = 1 - _alike(moved, frame, weights)
        found.append((i - KEY_INDEX, _least(errors.double().numpy(), amounts)))
    places, values = np.array(found).T
    return float(places @ values / (places @ places) * (FRAMES - 1))


def warped(picture: Tensor, matrix: Matrix) -> Tensor:
    """A picture [C,H,W] as a camera at `matrix` sees it; 0 outside the picture."""
    theta = torch.from_numpy(np.column_stack([matrix[:, :2], matrix[:, 2] / (SIDE / 2)])).float()[None]
    grid = functional.affine_grid(theta, [1, *picture.shape], align_corners=False)
    return functional.grid_sample(picture[None], grid, "bilinear", "zeros", align_corners=False)[0]


def _alike(moved: Tensor, frame: Tensor, weights: Tensor) -> Tensor:
    """Normalised correlation [N] of pictures [N,3,H,W] with one [3,H,W], weighted by `weights` [N,H,W]. For flat
    pictures it is close to 0.
    """
    weights = weights[:, None] / weights.sum(dim=(1, 2)).clamp_min(1)[:, None, None, None]

    def centred(picture: Tensor) -> Tensor:
        return picture - (weights * picture).sum(dim=(2, 3), keepdim=True)

    def mean(product: Tensor) -> Tensor:
        return (weights * product).sum(dim=(1, 2, 3))

    a, b = centred(moved), centred(frame[None])
    return mean(a * b) / (mean(a.square()) * mean(b.square())).sqrt().clamp_min(3.0)


def _least(errors: NDArray[np.float64], amounts: NDArray[np.float64]) -> float:
    """The amount at the minimum of the parabola through the smallest error and its neighbours."""
    i = int(np.clip(errors.argmin(), 1, len(errors) - 2))
    left, here, right = errors[i - 1 : i + 2]
    bend = left - 2 * here + right
    shift = 0.5 * (left - right) / bend if bend > 0 else 0.0
    return float(amounts[i] + np.clip(shift, -1, 1) * (amounts[1] - amounts[0]))
