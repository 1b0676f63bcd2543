"""The batches of a run over a data set of files."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from higen.errors import SettingsError
from higen.families.higen import spec
from higen.train.batches import Batch, Batches, StepBatches
from higen.train.data import IMAGE, VIDEO, Listing
from higen.train.latents import LatentCache, OpenClip
from higen.train.media import READING
from higen.train.networks import Networks
from higen.train.reader import Frame, Reader
from higen.train.settings import Settings
from higen.typed_json import to_json

__all__ = ["FileSource", "make_reader"]


class FileSource:
    """Batches of the files of a data set (`higen.train.batches.Source`): a process's share of each step."""

    def __init__(self, reader: Reader, batches: Batches, share: Mapping[int, range], device: torch.device) -> None:
        self.reader, self.maker, self.share, self.device = reader, batches, share, device

    def batches(self, step: int) -> StepBatches:
        """This process's batches of a step."""
        return StepBatches(self.batch(IMAGE, step), self.batch(VIDEO, step))

    def batch(self, kind: int, step: int) -> Batch | None:
        """Those of a kind; None where a step has none."""
        indices = self.share[kind]
        if not indices:
            return None
        samples = self.reader.samples(kind, step, indices)
        return self.maker.batch(samples, kind, step, indices).to(self.device)

    def close(self) -> None:
        """Stop reading ahead."""
        self.reader.close()


def make_reader(
    settings: Settings, networks: Networks, listing: Listing, tower: str | None, device: torch.device
) -> Reader:
    """The reader of a run. `tower`: sha256 of the picture tower that measures the appearance, if there is one.

    Raises SettingsError for a size that the model does not take.
    """
    data, model, cues = settings.data, networks.config, settings.cues
    defaults, multiple = model.defaults, model.autoencoder.factor * model.unet.size_multiple
    frame = Frame(*(getattr(data, name) or getattr(defaults, name) for name in ("frames", "width", "height", "fps")))
    for name in ("width", "height"):
        if getattr(frame, name) % multiple:
            raise SettingsError(f"data.{name}={getattr(frame, name)}: a multiple of {multiple} for this model")
    if not 2 <= frame.frames <= model.max_frames:
        raise SettingsError(f"data.frames={frame.frames}: from 2 to {model.max_frames} for this model")
    features = OpenClip(cues.openclip, device) if cues.openclip is not None else None
    recipe = {
        "reading": READING,
        "frame": [frame.frames, frame.width, frame.height, frame.fps],
        "autoencoder": networks.companions.files[spec.AUTOENCODER].sha256,
        "scale": to_json(model.autoencoder),
        "openclip": tower,
    }
    return Reader(
        listing,
        frame,
        networks.encoder,
        features,
        seed=settings.run.seed,
        per_step={IMAGE: data.images, VIDEO: data.videos},
        key_frames=data.key_frames,
        random_crop=data.crop == "random",
        random_start=data.start == "random",
        cache=LatentCache(data.cache, recipe) if data.cache is not None else None,
        workers=data.workers,
    )
