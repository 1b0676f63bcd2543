"""Long prompts and weighted words: chunks of token ids, and what their weights do to the encoder's outputs.

The text encoder reads one chunk at a time: start, tokens, end, padding. The outputs of a prompt's chunks are joined
along the tokens. A word's weight multiplies the outputs of its tokens; then each chunk is scaled to its former mean.
These are the rules of AUTOMATIC1111's web UI ("emphasis: original").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from higen.errors import RequestError

__all__ = ["NEAR", "Chunks", "Reading", "joined_chunks", "weighted"]

NEAR = 20
"""A full chunk ends at its last comma if that is at most this many tokens back."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt as the text encoder reads it.

    ids      int64 [n, L], one row per chunk
    weights  float32 [n, L], 1 for start, end and padding
    blank    int64 [L], the ids of an empty text
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    blank: NDArray[np.int64]

    def padded(self, chunks: int) -> Reading:
        """This prompt with empty chunks at the end, so that it has `chunks` chunks."""
        more = chunks - len(self.ids)
        if more <= 0:
            return self
        ids = np.concatenate([self.ids, np.tile(self.blank, (more, 1))])
        return Reading(ids, np.concatenate([self.weights, np.ones((more, len(self.blank)), np.float32)]), self.blank)


class Chunks:
    """Distributes token ids over at most `most` chunks of `room` tokens each."""

    def __init__(self, room: int, most: int, comma: int | None) -> None:
        self.rows: list[list[tuple[int, float]]] = [[]]
        self._room, self._most, self._comma = room, most, comma
        self._last_comma = -1
        self._closed = False

    def add(self, ids: Iterable[int], weight: float) -> int | None:
        """Add the tokens of a text; returns the index of the first token that does not fit, or None."""
        for i, token in enumerate(ids):
            row = self.rows[-1]
            last = len(self.rows) == self._most
            if self._closed or (last and len(row) == self._room):
                return i
            if token == self._comma:
                self._last_comma = len(row)
            elif len(row) == self._room and self._last_comma >= 0 and len(row) - self._last_comma <= NEAR:
                moved = row[self._last_comma + 1 :]
                del row[self._last_comma + 1 :]
                self.begin()
                self.rows[-1].extend(moved)
            if len(self.rows[-1]) == self._room:
                self.begin()
            self.rows[-1].append((token, weight))
        return None

    def begin(self) -> None:
        """Begin a new chunk. If there are `most` chunks already, nothing can be added any more."""
        self._last_comma = -1
        if len(self.rows) == self._most:
            self._closed = True
        else:
            self.rows.append([])

    def reading(self, start: int, end: int, pad: int) -> Reading:
        """The filled chunks; an empty chunk at the end is left out."""
        rows = self.rows[:-1] if len(self.rows) > 1 and not self.rows[-1] else self.rows
        length = self._room + 2
        ids = np.full((len(rows), length), pad, np.int64)
        weights = np.ones((len(rows), length), np.float32)
        for i, row in enumerate(rows):
            ids[i, : len(row) + 2] = [start, *(token for token, _ in row), end]
            weights[i, 1 : len(row) + 1] = [weight for _, weight in row]
        blank = np.full(length, pad, np.int64)
        blank[:2] = start, end
        return Reading(ids, weights, blank)


def weighted(hidden: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs [1, L, D] of a chunk times the weights [L] of its tokens, scaled to the mean before the weights.

    Raises RequestError if the weights make the mean 0, because it cannot be restored.
    """
    if np.all(weights == 1.0):
        return hidden
    scaled = hidden * weights[None, :, None]
    before, after = hidden.mean(dtype=np.float64), scaled.mean(dtype=np.float64)
    if after == 0.0:
        raise RequestError("prompt: the weights of its words give an embedding with mean 0; change one of the weights")
    restored: NDArray[np.float32] = scaled * np.float32(before / after)
    return restored


def joined_chunks(parts: list[Mapping[str, NDArray[np.float32]]]) -> dict[str, NDArray[np.float32]]:
    """The outputs [1, L, D] of chunks, by name, joined in order: [1, n L, D]."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
