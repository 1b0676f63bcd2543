"""The batches of a run over a data set of files."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from higen.errors import SettingsError
from higen.families.higen import spec
from higen.train.batches import Batch, Batches, GainBatch, StepBatches
from higen.train.data import IMAGE, VIDEO, Listing
from higen.train.draws import draw_window
from higen.train.latents import LatentCache, OpenClip
from higen.train.loop import step_generator
from higen.train.media import READING
from higen.train.networks import Networks
from higen.train.reader import Frame, Reader
from higen.train.settings import Settings
from higen.typed_json import to_json

__all__ = ["FileSource", "make_reader"]


class FileSource:
    """Batches from the files of a data set (`higen.train.batches.Source`): a process's share of each step."""

    def __init__(
        self,
        reader: Reader,
        batches: Batches,
        settings: Settings,
        share: Mapping[int, range],
        gains: range,
        device: torch.device,
    ) -> None:
        """`share`: this process's part of a step's pictures and clips. `gains`: its part of the clips for the gain."""
        self.reader, self.maker, self.settings, self.device = reader, batches, settings, device
        self.share, self._gains = share, gains

    def batches(self, step: int) -> StepBatches:
        """This process's batches of a step."""
        return StepBatches(self.batch(IMAGE, step), self.batch(VIDEO, step), self.gains(step))

    def batch(self, kind: int, step: int) -> Batch | None:
        """The batch of one kind; None if a step has no samples of it."""
        indices, length = self._indices(kind, step), self._length(step)
        if not indices:
            return None
        samples = self.reader.samples(kind, step, indices, self._indices(kind, step + 1))
        return self.maker.batch(samples, kind, step, indices, length).to(self.device)

    def gains(self, step: int) -> GainBatch | None:
        """The clips that train only the gain. Their indices follow those of all windows."""
        if not self._gains:
            return None
        windows = self.reader.per_step[VIDEO] - self.settings.objective.gain_clips
        indices = range(windows + self._gains.start, windows + self._gains.stop)
        return self.maker.gains(self.reader.samples(VIDEO, step, indices), step, indices).to(self.device)

    def _length(self, step: int) -> int:
        """Number of frames in the clips of a step; the same in every process."""
        run = self.settings.run
        random = step_generator(run.seed, step)
        return draw_window(self.settings.objective, self.reader.frame.frames, step / run.steps, random)

    def _indices(self, kind: int, step: int) -> range:
        share = self.share[kind]
        parts = self.reader.frame.frames // self._length(step) if kind == VIDEO else 1
        return range(share.start * parts, share.stop * parts)

    def close(self) -> None:
        """Stop reading ahead."""
        self.reader.close()


def make_reader(
    settings: Settings, networks: Networks, listing: Listing, tower: str | None, device: torch.device
) -> Reader:
    """The reader of a run. `tower`: sha256 of the picture tower that measures the appearance, if there is one.

    Raises SettingsError for a size or length that the model or the settings do not allow.
    """
    data, model, cues = settings.data, networks.config, settings.cues
    defaults, multiple = model.defaults, model.autoencoder.factor * model.unet.size_multiple
    frame = Frame(*(getattr(data, name) or getattr(defaults, name) for name in ("frames", "width", "height", "fps")))
    for name in ("width", "height"):
        if getattr(frame, name) % multiple:
            raise SettingsError(f"data.{name}={getattr(frame, name)}: a multiple of {multiple} for this model")
    if not 2 <= frame.frames <= model.max_frames:
        raise SettingsError(f"data.frames={frame.frames}: from 2 to {model.max_frames} for this model")
    lengths = (*settings.objective.windows, *settings.objective.late_windows)
    for length in lengths:
        if frame.frames % length:
            raise SettingsError(f"objective.windows: {length} does not divide data.frames={frame.frames}")
    most = data.videos * (frame.frames // min(lengths, default=frame.frames))
    features = OpenClip(cues.openclip, device) if cues.openclip is not None else None
    recipe = {
        "reading": READING,
        "frame": [frame.frames, frame.width, frame.height, frame.fps],
        "autoencoder": networks.companions.files[spec.AUTOENCODER].sha256,
        "scale": to_json(model.autoencoder),
        "openclip": tower,
        **({} if data.key_frame == 0.5 else {"key": data.key_frame}),
    }
    return Reader(
        listing,
        frame,
        networks.encoder,
        features,
        seed=settings.run.seed,
        per_step={IMAGE: data.images, VIDEO: most + settings.objective.gain_clips},
        key_frames=data.key_frames,
        key_frame=data.key_frame,
        random_crop=data.crop == "random",
        random_start=data.start == "random",
        cache=LatentCache(data.cache, recipe) if data.cache is not None else None,
        workers=data.workers,
        memory=settings.codec.memory * 1_000_000 if settings.codec.layers != "none" else 0,
    )
