"""Notices before a run's first step, one line each, about problems that training cannot fix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from higen.cpu import has_bf16
from higen.errors import quoted
from higen.models.companion_stages import DecoderStage, EncoderStage
from higen.tokenizer import PromptTokenizer
from higen.train.data import Item, Listing, explained
from higen.train.latents import to_pixels
from higen.train.media import Placement, Unusable, read_image, read_video
from higen.train.reader import Frame

__all__ = ["codec_psnr", "notices", "slow_bfloat16"]

FAITHFUL = 25.0
"""PSNR in dB of frames through the autoencoder. Below it, people see that the autoencoder was not made for them."""
FRAMES, TRIES = 4, 12
"""Number of frames to measure, and number of files that are tried for them."""
CAPTIONS = 5000
"""Largest number of captions that are checked."""


def notices(
    listing: Listing, frame: Frame, encoder: EncoderStage, tokenizer: PromptTokenizer, bfloat16: bool
) -> Iterator[str]:
    """The notices for a run over a data set."""
    if listing.skipped:
        yield f"left out of the data set{explained(listing.skipped)}"
    if line := _captions(tokenizer, (item.caption for item in listing.items)):
        yield line
    if (
        bfloat16
        and next(encoder.parameters()).device.type == "cpu"
        and (line := slow_bfloat16("run.precision = 'fp32'"))
    ):
        yield line
    if (found := codec_psnr(encoder, listing.items, frame)) is not None and found < FAITHFUL:
        yield (
            f"the autoencoder, which is not trained, shows frames of this data set with a PSNR of {found:.1f} dB "
            f"({FAITHFUL:g} or more is wanted): no video will be better than that, however long the run is"
        )


def slow_bfloat16(instead: str) -> str | None:
    """A notice if bfloat16 is slower than float32 on this processor, else None. `instead`: how to choose float32."""
    if has_bf16() is not False:
        return None
    return (
        "this processor has no products in bfloat16 (AMX or AVX512-BF16), so a step may take ten times as long as in "
        f"float32: {instead}"
    )


def codec_psnr(encoder: EncoderStage, items: Sequence[Item], frame: Frame) -> float | None:
    """PSNR in dB of a few middle frames of a data set through the autoencoder; None if no frame can be read."""
    decoder = DecoderStage(encoder.autoencoder, encoder.shift.flatten().tolist(), encoder.scale.flatten().tolist())
    decoder.to(next(encoder.parameters()).device).eval()
    found = [_psnr(encoder, decoder, pixels) for pixels in islice(_frames(items, frame), FRAMES)]
    return float(np.mean(found)) if found else None


def _frames(items: Sequence[Item], frame: Frame) -> Iterator[NDArray[np.uint8]]:
    """Middle frames uint8 [1,Y,X,3] of files from all over the data set."""
    for i in np.unique(np.linspace(0, len(items) - 1, TRIES).round().astype(int)):
        size = (items[i].path, frame.width, frame.height)
        try:
            if items[i].video:
                yield read_video(*size, frame.fps, frame.frames, Placement(), [frame.frames // 2])
            else:
                yield read_image(*size, Placement())
        except Unusable:
            continue


@torch.no_grad()
def _psnr(encoder: EncoderStage, decoder: DecoderStage, frame: NDArray[np.uint8]) -> float:
    pixels = to_pixels(frame).to(next(encoder.parameters()).device)
    shown = decoder(encoder(pixels)).clamp(-1, 1).cpu().numpy().transpose(0, 2, 3, 1)
    error = np.mean((np.rint((shown + 1) * 127.5) - frame) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def _captions(tokenizer: PromptTokenizer, captions: Iterable[str]) -> str | None:
    """A notice about captions that the model cannot read unchanged, with their number and the first one; else None."""
    distinct = list(islice(dict.fromkeys(captions), CAPTIONS))
    cut: dict[str, str] = {}
    for caption in distinct:
        said: list[Warning] = []
        tokenizer.encode([caption], said.append)
        if said:
            cut[caption] = str(said[0])
    empty = "" in distinct
    if not cut and not empty:
        return None
    lines = [f"{len(cut)} of {len(distinct)} captions are changed when they are read"] if cut else []
    lines += [f"the first is {quoted(caption)}: {reason}" for caption, reason in islice(cut.items(), 1)]
    return "; ".join([*lines, *(["some captions are empty"] if empty else [])])
