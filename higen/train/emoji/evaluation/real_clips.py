"""The real clips of the default model's data, as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from higen.train.emoji.packs import background, clip_indices, compose, load_loop
from higen.train.emoji.subjects import BACKGROUNDS, SUBJECTS

__all__ = ["RealClips"]

Frames = NDArray[np.uint8]
EDGE = 3
"""Width in pixels of the border around a subject. It counts neither as subject nor as background."""


class RealClips:
    """Loops of the subjects over the backgrounds. The clip of a prompt is known pixel by pixel."""

    def __init__(self, loops: Sequence[Frames], key_frames: Sequence[int], pictures: Sequence[Frames]) -> None:
        """Each subject's loop (RGBA [n,H,W,4], not premultiplied) and key frame; the backgrounds, RGB [H,W,3]."""
        self.loops, self.key_frames, self.pictures = list(loops), list(key_frames), list(pictures)
        self.outside = [_outside(loop) for loop in self.loops]

    @classmethod
    def read(cls, folder: Path) -> RealClips:
        """The recipe's clips, from its folder of WebP loops."""
        loops = [load_loop(folder / f"{subject.codepoint}.webp") for subject in SUBJECTS]
        return cls(loops, [subject.key_frame for subject in SUBJECTS], [background(b.name) for b in BACKGROUNDS])

    def clip(self, s: int, b: int, speed: float, offset: int = 0, warp: float = 0.0) -> Frames:
        """A clip uint8 [16,H,W,3] at a speed (0: the key frame repeated). It starts `offset` loop frames later than the
        recipe's clip. `warp`: see `clip_indices`.
        """
        loop = self.loops[s]
        return compose(loop[self._indices(s, speed, offset, warp)], self.pictures[b])

    def coverage(self, s: int, speed: float, offset: int = 0, warp: float = 0.0) -> NDArray[np.float32]:
        """The subject's opacity in each pixel of the clip with these arguments: float32 [16,H,W], 0 to 1."""
        alpha = self.loops[s][self._indices(s, speed, offset, warp), ..., 3]
        return np.divide(alpha, 255, dtype=np.float32)

    def _indices(self, s: int, speed: float, offset: int, warp: float) -> NDArray[np.int64]:
        return clip_indices(len(self.loops[s]), self.key_frames[s] + offset, speed, warp=warp)


def _outside(loop: Frames) -> NDArray[np.bool_]:
    """Pixels that are more than EDGE pixels away from the subject in every frame of the loop: bool [H,W]."""
    shown = Image.fromarray(((loop[..., 3] > 8).any(axis=0) * 255).astype(np.uint8))
    outside: NDArray[np.bool_] = np.asarray(shown.filter(ImageFilter.MaxFilter(2 * EDGE + 1))) == 0
    return outside
