"""The model of `interpreter_model` with known frames: its film passes through given pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from interpreter_model import MANIFEST as PLAIN
from interpreter_model import Array, Formula, changed, linear, step
from numpy.typing import NDArray

from higen.manifest import Manifest
from higen.stages import Tensor
from higen.tables import Control, Known

__all__ = ["MANIFEST", "cells", "told", "told_step"]

MANIFEST: Manifest = changed(
    replace(
        PLAIN,
        controls=(
            *PLAIN.controls,
            Control("keyframes", "frames", "frames that the film passes through"),
            Control("mask", "mask", "white: redrawn"),
        ),
    ),
    "film",
    known=Known("keyframes", "watch@keyframes.seen", "mask"),
)


def told(manifest: Manifest, flat: bool) -> Manifest:
    """The film's stages take the known frames as inputs; `flat`: their mask [B, F], else [B, 1, F, H, W]."""
    more = (
        Tensor("known", ("B", "C", "F", "H", "W"), source="known:latents"),
        Tensor("mask", ("B", "F") if flat else ("B", 1, "F", "H", "W"), source="known:mask"),
    )
    rows = {name: manifest.stage(name).inputs for name in ("film_one", "film_two")}
    for name, inputs in rows.items():
        manifest = changed(manifest, name, inputs=(*inputs, *more))
    return manifest


def told_step(**given: Array) -> dict[str, Array]:
    """A step of `linear` plus 0.2 of the known latents."""
    mask = given["mask"].reshape(len(given["mask"]), 1, given["latents"].shape[2], *given["mask"].shape[3:])
    mask = mask if mask.ndim == 5 else mask[..., None, None]
    own: Formula = step(lambda x, t, hints: linear(x, t, hints) + 0.2 * mask * given["known"])
    return own(**{name: value for name, value in given.items() if name not in ("known", "mask")})


def cells(picture: NDArray[np.uint8]) -> Array:
    """What the stage `watch` computes for a picture [8, 12, 3] of the request's size: [C, 4, 6], in float64."""
    red = picture[..., 0].astype(np.float64) / 127.5 - 1
    blocks = red.reshape(4, 2, 6, 2)
    found: Any = np.stack([blocks.mean(axis=(1, 3)), blocks[:, 0, :, 0]])
    return found
