"""Records in the manifest that a model's denoising networks have reusable deep features (higen/feature_reuse.py)."""

from __future__ import annotations

from dataclasses import replace

from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.errors import ModelError
from higen.manifest_file import Opened, rewrite

__all__ = ["with_deep_features"]


def with_deep_features(bundle: Bundle) -> Bundle:
    """The model with `deep` set in the rows of its loops' stages. Nothing is written if all of them have it.

    Raises ModelError for a network that its family cannot split into a deep and a shallow part.
    """
    pairs = [pair for loop in bundle.manifest.loops for pair in loop.pairs]
    own = dict.fromkeys(name for pair in pairs for name in pair if name is not None)
    missing = [name for name in own if bundle.manifest.stage(name).deep is None]
    if not missing:
        return bundle
    backend = TorchBackend(bundle, Options(device="cpu", precision="fp32"))
    found = {name: _channels(backend, name) for name in missing}
    backend.close()

    def entered(opened: Opened) -> Opened:
        rows = opened.manifest.stages
        stages = tuple(replace(row, deep=found.get(row.name, row.deep)) for row in rows)
        return replace(opened, manifest=replace(opened.manifest, stages=stages))

    rewrite(bundle.path, entered)
    return Bundle.open(bundle.path)


def _channels(backend: TorchBackend, name: str) -> int:
    channels: int | None = getattr(getattr(backend.module(name), "predictor", None), "deep_channels", None)
    if channels is None:
        raise ModelError(
            f"stages.{name}: the family {backend.bundle.manifest.family} has no shallow steps for it, so there is "
            "nothing to reuse"
        )
    return channels
