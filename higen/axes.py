"""The sizes of a stage's free axes at run time. Graphs are checked with these sizes; engines are built for them.

A denoising stage runs on a batch, with the frames of its loop or of a window. Any other stage runs on one sample at a
time, with the frames of the loop that needs it. The decoder, and stages that take frames one by one (axis N), get one
chunk of frames at a time.
"""

from __future__ import annotations

from higen.manifest import Manifest
from higen.stages import TOKENS, Stage, source

__all__ = ["MOST", "chunk_of", "frames_of", "limits", "most_rows", "tile_of"]

MOST = 2**16
"""The largest size of an axis that nothing else limits."""


def limits(manifest: Manifest, name: str) -> dict[str, tuple[int, int]]:
    """Smallest and largest size of a stage's axes B, F, N and T; if both are equal, the axis is not free.

    A stage with `batch` has no largest B, because calls can be joined along the first axis. T, the tokens of a text's
    chunks, is left out if texts have only one chunk.
    """
    stage, text = manifest.stage(name), manifest.text
    tokens = {TOKENS: (text.length, text.length * text.chunks)} if text is not None and text.chunks > 1 else {}
    samples, images = (MOST, MOST) if stage.batch else (1, chunk_of(manifest, name))
    return {"B": (1, samples), "F": frames_of(manifest, name), "N": (1, images), **tokens}


def chunk_of(manifest: Manifest, name: str) -> int:
    """The most frames that a stage gets at a time, unless it gets the whole clip."""
    sizes = manifest.sizes
    return sizes.chunk + (2 * sizes.overlap if name in manifest.decoders else 0)


def most_rows(manifest: Manifest, stage: Stage, max_batch: int) -> int:
    """The largest size of a stage's first axis: `max_batch`; at least a chunk if the stage takes frames one by one."""
    by_frames = any(tensor.shape[0] == "N" for tensor in stage.inputs)
    return max(max_batch, chunk_of(manifest, stage.name)) if by_frames else max_batch


def frames_of(manifest: Manifest, name: str) -> tuple[int, int]:
    """Fewest and most frames F that a stage is run with."""
    name = manifest.listed(name)
    if name in manifest.decoders:
        return 1, chunk_of(manifest, name)
    fewest, _, most = manifest.sizes.frames
    ranges = [(fewest, most)] if name in manifest.feeding(*manifest.decoders) else []
    for loop in manifest.loops:
        stands_in = [source(row.latents).name for row in (loop.replaced, loop.start, loop.known) if row is not None]
        roots = [*loop.stages, *(other for other in stands_in if other in manifest.stage_names)]
        if name not in manifest.feeding(*roots):
            continue
        low, high = (1, 1) if loop.frames == 1 else (min(max(fewest, loop.least_frames), most), most)
        windows = loop.windows if name in loop.stages else None
        length = most if windows is None else windows.most or windows.length
        ranges.append((min(low, length), min(high, length)))
    ranges = ranges or [(fewest, most)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def tile_of(manifest: Manifest, name: str) -> tuple[int, int] | None:
    """The largest height and width, in latent cells, that a stage sees because of tiles; None without a limit."""
    tiles = [loop.tiles for loop in manifest.loops if manifest.listed(name) in loop.stages]
    given = [one for one in tiles if one is not None]
    if not given or len(given) < len(tiles):
        return None
    return max(one.height for one in given), max(one.width for one in given)
