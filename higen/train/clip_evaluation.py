"""Measures a model against clips of any kind (`higen evaluate MODEL --clips my.jsonl`).

Every video of the data set is cut as in training, and a clip is drawn from its caption. The real clip through the
model's codec is the upper bound for any denoiser. The measures are those of `higen.measures`, which suit clips of any
content.

psnr, psnr_copy   against the real clip, in dB: the clip, and its own middle frame repeated
psnr_real_copy    the real middle frame repeated; no model knows this frame
psnr_codec        the real clip through the autoencoder
difference        mean difference of neighbouring frames, in levels of 255; also of the real clip
motion, appearance  as training measures them; also of the real clip
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from higen.bundle import Bundle
from higen.errors import PromptWarning, SettingsError, quoted
from higen.families.higen import spec
from higen.measures import fidelity
from higen.measures.features import FEATURES, clip_features
from higen.measures.statistics import frechet_distance, spearman
from higen.tokenizer import PromptTokenizer
from higen.train.data import Item, list_items
from higen.train.media import Placement, Unusable, read_video
from higen.train.pipeline_maker import PipelineMaker, measured_cues
from higen.train.reader import Frame

__all__ = ["REQUESTS", "Clips", "CueFollowing", "Distances", "Evaluation", "Row", "check_clips", "evaluate_clips"]

Frames = NDArray[np.uint8]
CLOSER = 0.01
"""Least difference in PSNR, in dB, by which a clip counts as closer than its repeated middle frame."""
REQUESTS = (0.0, 0.5, 1.0, 2.0)
"""The requested cues, as multiples of the real clip's cue."""
SHOWN = 3
"""Largest number of problems that an error names."""
LEAST = np.array([1.0] * 6 + [0.25] * 6)
"""Smallest unit of each feature. The unit is the deviation of the real clips."""


@dataclass(frozen=True)
class Row:
    """The measures of the clip that was drawn for one real clip; see the module's docstring."""

    clip: str
    prompt: str
    seed: int
    psnr: float
    psnr_copy: float
    psnr_real_copy: float
    psnr_codec: float
    beats_copy: bool
    difference: float
    difference_real: float
    motion: float
    motion_real: float
    appearance: float
    appearance_real: float


@dataclass(frozen=True)
class CueFollowing:
    """How well one cue is followed: rank correlation of requested and measured cue, as a mean over the prompts
    (`spearman`) and over all clips (`spearman_pooled`). `clips`: number of drawn clips.
    """

    cue: str
    clips: int
    spearman: float
    spearman_pooled: float


@dataclass(frozen=True)
class Distances:
    """Frechet distances to the real clips, on FEATURES in units of the real clips' deviation: of the drawn clips, and
    of the real clips through the codec. `floor`: between two halves of the real clips (None: fewer than four clips).
    """

    drawn: float
    codec: float
    floor: float | None


@dataclass(frozen=True)
class Evaluation:
    """All measures. `distances` is None for a single clip."""

    rows: tuple[Row, ...]
    cues: tuple[CueFollowing, ...]
    distances: Distances | None

    def means(self) -> dict[str, float]:
        """Means of the rows' numbers, by name."""
        names = [field.name for field in fields(Row) if field.name not in ("clip", "prompt", "seed")]
        return {name: float(np.mean([getattr(row, name) for row in self.rows])) for name in names}


@dataclass(frozen=True)
class Clips:
    """Real clips of a data set, which are read and cut to a model's size on demand."""

    items: tuple[Item, ...]
    frame: Frame

    def read(self, item: Item) -> Frames:
        """uint8 [F,H,W,3]. Raises Unusable."""
        size = self.frame
        return read_video(item.path, size.width, size.height, size.fps, size.frames, Placement())


def check_clips(path: Path, bundle: Bundle, limit: int | None = None) -> Clips:
    """The clips of a data set to measure a model against: at most `limit` videos, spread over the data set.

    Raises SettingsError, before anything is drawn, for a data set without a video, for clips that cannot be read or are
    too short, for empty captions, and for captions that the tokenizer does not take unchanged. Also raises what opening
    a model raises.
    """
    if bundle.manifest.family != "higen":
        raise SettingsError(
            f"{bundle.path}: only models of the family 'higen' are measured, not {bundle.manifest.family!r}"
        )
    config = spec.config(bundle.manifest)
    defaults = config.defaults
    try:
        listing = list_items(path)
    except SettingsError as error:
        raise SettingsError(f"--clips: {str(error).removeprefix('data.path=')}") from error
    items = [item for item in listing.items if item.video]
    if not items:
        raise SettingsError(f"--clips: {path} has no video; pictures are not measured")
    if limit is not None and limit < len(items):
        items = [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]
    clips = Clips(tuple(items), Frame(defaults.frames, defaults.width, defaults.height, defaults.fps))
    tokenizer = PromptTokenizer.from_file(bundle.file(spec.TOKENIZER), config.text.rules)
    problems = [f"{item.name}: {problem}" for item in items for problem in _problems(item, clips, tokenizer)]
    if problems:
        rest = f"; {len(problems)} in all" if len(problems) > SHOWN else ""
        raise SettingsError(f"--clips: {path}: {'; '.join(problems[:SHOWN])}{rest}")
    return clips


def _problems(item: Item, clips: Clips, tokenizer: PromptTokenizer) -> Iterator[str]:
    try:
        clips.read(item)
    except Unusable as error:
        yield str(error)
    said: list[Warning] = []
    tokenizer.encode([item.caption], said.append)
    if said or not item.caption:
        yield f"caption {quoted(item.caption)}: {said[0] if said else 'a text is wanted'}"


def evaluate_clips(make: PipelineMaker, clips: Clips, seeds: int = 1, shown: bool = False) -> Evaluation:
    """Draw and measure clips. `seeds`: clips per prompt. Requested cues are measured only with the first seed."""
    rows, features = list[Row](), dict[str, list[NDArray[np.float64]]]({"drawn": [], "codec": [], "real": []})
    asked: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = {"motion": [], "appearance": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)  # the captions were checked
        for item in tqdm(clips.items, desc="clips", disable=not shown):
            real = clips.read(item)
            encoded = make.encode(real)
            through, cues = make.decode(encoded), measured_cues(encoded)
            features["real"].append(clip_features(real))
            features["codec"].append(clip_features(through))
            for seed in range(seeds):
                clip = make(item.caption, seed, None, None)
                rows.append(_row(item, seed, clip, real, through, measured_cues(make.encode(clip)), cues))
                features["drawn"].append(clip_features(clip))
            for place, cue in enumerate(asked):
                wanted = [part * cues[place] for part in REQUESTS]
                got = [_followed(make, item.caption, cue, place, value) for value in wanted]
                asked[cue].append((wanted, got))
    following = tuple(
        CueFollowing(
            cue,
            len(pairs) * len(REQUESTS),
            float(np.mean([spearman(wanted, got) for wanted, got in pairs])),
            spearman(np.concatenate([w for w, _ in pairs]), np.concatenate([g for _, g in pairs])),
        )
        for cue, pairs in asked.items()
    )
    return Evaluation(tuple(rows), following, distances(features) if len(clips.items) > 1 else None)


def _followed(make: PipelineMaker, prompt: str, cue: str, place: int, value: float) -> float:
    motion, appearance = (value, None) if cue == "motion" else (None, value)
    return measured_cues(make.encode(make(prompt, 0, motion, appearance)))[place]


def _row(
    item: Item,
    seed: int,
    clip: Frames,
    real: Frames,
    through: Frames,
    cues: tuple[float, float],
    real_cues: tuple[float, float],
) -> Row:
    middle = len(clip) // 2
    score = fidelity.psnr(clip, real)
    copy = fidelity.psnr(np.broadcast_to(clip[middle], clip.shape), real)
    return Row(
        item.name,
        item.caption,
        seed,
        score,
        copy,
        fidelity.psnr(np.broadcast_to(real[middle], real.shape), real),
        fidelity.psnr(through, real),
        score > copy + CLOSER,
        fidelity.difference(clip),
        fidelity.difference(real),
        cues[0],
        real_cues[0],
        cues[1],
        real_cues[1],
    )


def distances(features: Mapping[str, Sequence[NDArray[np.float64]]]) -> Distances:
    """Frechet distances of sets of features ("drawn", "codec", "real", each [n][FEATURES], n from 2)."""
    real = np.stack(features["real"])
    unit = np.maximum(real.std(axis=0), LEAST)
    assert real.shape[1] == len(FEATURES)
    scaled = {name: np.stack(rows) / unit for name, rows in features.items()}
    halves = scaled["real"][::2], scaled["real"][1::2]
    return Distances(
        frechet_distance(scaled["drawn"], scaled["real"]),
        frechet_distance(scaled["codec"], scaled["real"]),
        frechet_distance(*halves) if len(real) >= 4 else None,
    )
