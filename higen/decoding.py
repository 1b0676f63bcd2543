"""Decodes latents to frames, one chunk at a time, so that memory use does not grow with the clip.

A model may have a cheaper decoder for previews: a request may choose it, and the previews of a running request use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from higen.backends.base import Backend
from higen.events import Frames
from higen.manifest import Manifest
from higen.request import Request
from higen.sampler import cut
from higen.sources import Place, Sources
from higen.video import to_uint8

__all__ = ["decoded", "previewing"]


def previewing(manifest: Manifest, backend: Backend, request: Request) -> Request:
    """The request with the decoder for previews, if the model has one and the backend can run it."""
    row = manifest.sizes.preview
    if row is None or backend.choose(row.decoder, manifest.sizes.decoder) != row.decoder:
        return request
    return replace(request, controls={**request.controls, row.control: row.choice})


def decoded(latents: Any, manifest: Manifest, backend: Backend, sources: Sources) -> Iterator[Frames]:
    """Decode latents [B,C,f,H,W], a chunk of one sample's frames at a time, with the decoder of the request.

    A chunk never mixes samples, because rounding can depend on the batch size. Each chunk is decoded together with
    frames of context on both sides, which are then dropped.
    """
    sizes, decoder = manifest.sizes, manifest.stage(manifest.chosen_decoder(sources.request.controls))
    z = np.asarray(backend.to_numpy(latents), dtype=np.float32)
    (given,) = (tensor for tensor in decoder.inputs if tensor.source == "state")
    batch, _, total = z.shape[:3]
    done = 0
    for video in range(batch):
        others = sources.inputs(decoder, Place(video, total))
        for first in range(0, total, sizes.chunk):
            last = min(first + sizes.chunk, total)
            start, end = max(first - sizes.overlap, 0), min(last + sizes.overlap, total)
            chunk = z[video : video + 1, :, start:end]
            if len(given.shape) == 4:
                chunk = chunk[0].swapaxes(0, 1)
            parts = {name: cut(decoder, name, value, "F", start, end) for name, value in others.items()}
            outputs = backend.run(decoder.name, **{given.name: chunk}, **parts)
            pixels = backend.to_numpy(outputs[decoder.outputs[0].name])
            if len(given.shape) == 5:
                pixels = pixels[0].swapaxes(0, 1)
            done += last - first
            yield Frames(video, first, to_uint8(pixels[first - start : last - start]), done, batch * total)
