"""Runs a denoising step on a batch whose prompts have different numbers of chunks of tokens.

A prompt's picture must not depend on the other prompts of its batch. So short prompts are not padded to the longest
one; samples with the same number of chunks are run together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.manifest import Manifest
from higen.sampler import Runner
from higen.stages import TOKENS

__all__ = ["ChunkRunner"]


class ChunkRunner:
    """A backend that the denoising loop runs on, for samples with different numbers of chunks."""

    def __init__(self, backend: Runner, manifest: Manifest, chunks: Sequence[int]) -> None:
        assert manifest.text is not None
        self._backend = backend
        self._stages = {stage.name: stage for stage in manifest.all_stages}
        self._groups = [(n * manifest.text.length, np.flatnonzero(np.equal(chunks, n))) for n in sorted({*chunks})]

    @classmethod
    def over(cls, backend: Runner, manifest: Manifest, chunks: Sequence[int]) -> Runner:
        """The backend itself if all samples have the same number of chunks, else a ChunkRunner."""
        return backend if len({*chunks}) == 1 else cls(backend, manifest, chunks)

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage on [B, ...] tensors, by groups. Inputs with the axis T are cut to a group's number of tokens."""
        row = self._stages[stage]
        ragged = {tensor.name for tensor in row.inputs if TOKENS in tensor.shape}
        host = {name: self._backend.to_numpy(value) for name, value in tensors.items()}
        made: dict[str, NDArray[Any]] = {}
        for tokens, samples in self._groups:
            part = {n: v[samples, :tokens] if n in ragged else v[samples] for n, v in host.items()}
            for name, value in self._backend.run(stage, **part).items():
                found = self._backend.to_numpy(value)
                made.setdefault(name, np.empty((len(host["latents"]), *found.shape[1:]), found.dtype))[samples] = found
        return made

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor as a numpy array on the host."""
        return self._backend.to_numpy(tensor)
