"""Networks and templates that recognise the default model's subjects and clips. They learn only from real clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from higen.measures.networks import ClipNetwork, PictureNetwork, fit, kept
from higen.measures.templates import Templates
from higen.train.emoji.evaluation.real_clips import RealClips
from higen.train.emoji.packs import clip_indices
from higen.train.emoji.subjects import FRAMES

__all__ = ["NOTHING", "Judges"]

NOTHING = -1
"""The classifier's answer for a picture without a subject."""
SIDE = 64
SPEEDS = (0.0, 0.5, 1.0, 2.0)
DISTORTIONS = 4
PICTURE_STEPS, PICTURES = 800, 48
CLIP_STEPS, CLIPS = 600, 16
VERSION = 1
"""Part of the cache's key. Raise it when the training in this module changes."""


class Judges:
    """A classifier of subjects, a network for clips, and templates. Trained networks are kept in `folder`."""

    def __init__(
        self, real: RealClips, folder: Path, steps: tuple[int, int] = (PICTURE_STEPS, CLIP_STEPS), shown: bool = False
    ) -> None:
        """`steps`: training steps of the picture classifier, and of the network for clips."""
        self.real = real
        self._pictures = _Pictures(real)
        self._templates: tuple[int, Templates] | None = None
        self._thresholds: dict[tuple[int, int], float] = {}
        subjects, backgrounds = len(real.loops), len(real.pictures)
        self.key = key = {"version": VERSION, "steps": steps, "data": self._pictures.fingerprint}
        heads = {
            "subject": subjects,
            "background": backgrounds,
            "speed": len(SPEEDS),
            "order": 3,
            "distortion": DISTORTIONS,
        }
        random = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.classifier = kept(
            folder / "identity.pt",
            key,
            PictureNetwork(subjects + 1),
            lambda network: fit(network, self._picture_loss, steps[0], "identity", shown=shown),
        )
        self.network = kept(
            folder / "clips.pt",
            key,
            ClipNetwork(heads),
            lambda network: fit(network, self._clip_loss, steps[1], "clip features", shown=shown),
        )
        torch.random.set_rng_state(random)

    @torch.inference_mode()
    def subject(self, clip: NDArray[np.uint8]) -> int:
        """The subject that the classifier sees in a clip, by the mean over its frames; NOTHING if there is none."""
        found = int(self.classifier(_small(clip)).log_softmax(dim=1).mean(dim=0).argmax())
        return found if found < len(self.real.loops) else NOTHING

    @torch.inference_mode()
    def features(self, clips: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
        """Features of clips [n, 32], for the Frechet distance."""
        rows = [self.network(_small(clip).transpose(0, 1)[None]) for clip in clips]
        return torch.cat(rows).double().numpy()

    @torch.inference_mode()
    def real_features(self, conditions: Sequence[tuple[int, int, float, int]]) -> NDArray[np.float64]:
        """Features of real clips, given as (subject, background, speed, offset) for RealClips.clip."""
        rows = []
        for start in range(0, len(conditions), CLIPS):
            clips = [self._pictures.clip(*c).transpose(0, 1) for c in conditions[start : start + CLIPS]]
            rows.append(self.network(torch.stack(clips) * 2 - 1))
        return torch.cat(rows).double().numpy()

    def templates(self, b: int) -> Templates:
        """The templates of all subjects on a background. Only those of the last background are kept in memory."""
        if self._templates is None or self._templates[0] != b:
            self._templates = (b, Templates(self.real.loops, self.real.pictures[b]))
        return self._templates[1]

    def threshold(self, s: int, b: int) -> float:
        """The least correlation that counts as the subject. It is half way between 1 (the real clip) and the best
        correlation of another subject's key frame with the subject's templates.
        """
        if (s, b) not in self._thresholds:
            keys = np.concatenate([self.real.clip(i, b, 0.0)[:1] for i in range(len(self.real.loops))])
            scores = self.templates(b).scores(keys)  # [pictured, template]
            np.fill_diagonal(scores, -1)
            self._thresholds |= {(i, b): (1 + best) / 2 for i, best in enumerate(scores.max(axis=0))}
        return self._thresholds[s, b]

    # Training of the networks.

    def _picture_loss(self, network: PictureNetwork, random: torch.Generator) -> Tensor:
        pictures, labels = self._pictures.batch(PICTURES, random)
        return functional.cross_entropy(network(pictures), labels)

    def _clip_loss(self, network: ClipNetwork, random: torch.Generator) -> Tensor:
        clips, answers = self._pictures.clips(CLIPS, random)
        logits = network.answers(network(clips))
        return torch.stack(
            [functional.cross_entropy(logits[name], wanted, ignore_index=-100) for name, wanted in answers.items()]
        ).sum()


class _Pictures:
    """The loops and backgrounds at 64x64, composed at random."""

    def __init__(self, real: RealClips) -> None:
        self.key_frames = real.key_frames
        self.loops = []
        for loop in real.loops:
            frames = torch.from_numpy(loop.astype(np.float32)).permute(0, 3, 1, 2) / 255
            alpha = frames[:, 3:]
            # Premultiplied, so that transparent pixels have no effect: [n, 4, 64, 64] from 0 to 1.
            reduced = functional.adaptive_avg_pool2d(torch.cat([frames[:, :3] * alpha, alpha], dim=1), SIDE)
            self.loops.append((reduced * 255).round().byte())
        pictures = torch.from_numpy(np.stack(real.pictures)).float().permute(0, 3, 1, 2) / 255
        self.backgrounds = functional.adaptive_avg_pool2d(pictures, SIDE)

    @property
    def fingerprint(self) -> list[float]:
        """Numbers that depend only on the data. Sums of floats would also depend on the number of threads."""
        return [*(int(loop.sum()) for loop in self.loops), round(float(self.backgrounds.double().sum()), 3)]

    def batch(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """RGB [n,3,64,64] from -1 to 1, and the subject's index. One picture in six has no subject (the last index)."""
        labels = torch.randint(len(self.loops), (count,), generator=random)
        frames = torch.stack([self._frame(int(s), random) for s in labels])
        shifts = torch.randint(-3, 4, (count, 2), generator=random).tolist()
        frames = torch.stack([f.roll((y, x), (1, 2)) for f, (y, x) in zip(frames, shifts, strict=True)])
        behind = torch.stack([self._behind(random) for _ in range(count)])
        kind = torch.randint(18, (count,), generator=random)  # 0: only background, 1: a blob, 2: a puzzle
        frames[kind == 0] = 0
        for i in (kind == 1).nonzero()[:, 0]:
            frames[i] = _blurred(frames[i], 15)
        pictures = frames[:, :3] + behind * (1 - frames[:, 3:])
        for i in (kind == 2).nonzero()[:, 0]:
            pictures[i] = _shuffled(pictures[i], random)
        labels[kind < 3] = len(self.loops)
        # A subject must be recognised although a decoder's pictures are soft and noisy.
        soft = torch.rand((count, 1, 1, 1), generator=random)
        pictures = pictures.lerp(_blurred(pictures, 3), soft)
        pictures = pictures * (0.85 + 0.3 * torch.rand((count, 1, 1, 1), generator=random))
        pictures = pictures + 0.03 * torch.randn(pictures.shape, generator=random)
        return pictures.clamp(0, 1) * 2 - 1, labels

    def clips(self, count: int, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """RGB [n,3,16,64,64] from -1 to 1, and the correct answer for each head; -100 if there is no answer."""
        clips, answers = [], []
        for _ in range(count):
            s, b = _integer(random, len(self.loops)), _integer(random, len(self.backgrounds))
            speed, offset = _integer(random, len(SPEEDS)), _integer(random, 13) - 6
            order, distortion = _integer(random, 3), _integer(random, DISTORTIONS)
            clip = self.clip(s, b, SPEEDS[speed], offset)
            if order == 1:
                clip = clip.flip(0)
            elif order == 2:
                clip = clip[torch.randperm(FRAMES, generator=random)]
            clips.append(_distorted(clip, distortion, random).transpose(0, 1))
            moving = speed > 0
            answers.append((s, b, speed if order < 2 else -100, order if moving else -100, distortion))
        columns = torch.tensor(answers).T
        names = ("subject", "background", "speed", "order", "distortion")
        return torch.stack(clips).clamp(0, 1) * 2 - 1, dict(zip(names, columns, strict=True))

    def clip(self, s: int, b: int, speed: float, offset: int) -> Tensor:
        """A clip as from RealClips: [16,3,64,64] from 0 to 1."""
        places = clip_indices(len(self.loops[s]), self.key_frames[s] + offset, speed)
        frames = self.loops[s][torch.from_numpy(places)].float() / 255
        return frames[:, :3] + self.backgrounds[b] * (1 - frames[:, 3:])

    def _frame(self, s: int, random: torch.Generator) -> Tensor:
        return self.loops[s][_integer(random, len(self.loops[s]))].float() / 255

    def _behind(self, random: torch.Generator) -> Tensor:
        """One of the backgrounds, a gradient, or soft noise: [3,64,64]."""
        kind = _integer(random, 4)
        if kind < 2:
            return self.backgrounds[_integer(random, len(self.backgrounds))]
        if kind == 2:
            corners = torch.rand((1, 3, 2, 2), generator=random)
            return functional.interpolate(corners, (SIDE, SIDE), mode="bilinear", align_corners=True)[0]
        size = (4, 8, 16)[_integer(random, 3)]
        noise = torch.rand((1, 3, size, size), generator=random)
        return functional.interpolate(noise, (SIDE, SIDE), mode="bilinear", align_corners=True)[0]


def _distorted(clip: Tensor, kind: int, random: torch.Generator) -> Tensor:
    """A clip [F,3,64,64] unchanged (0), blurred (1), with fine speckle (2), or with changing coloured blobs (3)."""
    strength = 0.02 + 0.1 * float(torch.rand((), generator=random))
    if kind == 1:
        return _blurred(clip, 5)
    if kind == 2:
        return clip + strength * torch.randn(clip.shape, generator=random)
    if kind == 3:
        blobs = torch.randn((len(clip), 3, 8, 8), generator=random)
        return clip + strength * functional.interpolate(blobs, (SIDE, SIDE), mode="bilinear")
    return clip


def _blurred(x: Tensor, size: int) -> Tensor:
    return functional.avg_pool2d(x, size, 1, size // 2, count_include_pad=False)


def _shuffled(x: Tensor, random: torch.Generator) -> Tensor:
    """A picture [C,64,64] with its sixteen patches in random order."""
    patches = functional.unfold(x, 16, stride=16)  # [C*256, 16]
    return functional.fold(patches[:, torch.randperm(16, generator=random)], SIDE, 16, stride=16)


def _small(clip: NDArray[np.uint8]) -> Tensor:
    """uint8 [F,H,W,3] -> [F,3,64,64] from -1 to 1, resized by area."""
    x = torch.from_numpy(clip.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    return functional.adaptive_avg_pool2d(x, SIDE)


def _integer(random: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=random))
