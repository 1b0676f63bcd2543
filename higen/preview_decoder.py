"""The manifest's row for a cheaper decoder, which draws previews (docs/manifest.md, `sizes.preview`)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Preview"]


@dataclass(frozen=True)
class Preview:
    """If the control `control`, of kind choice, is `choice`, the stage `decoder` turns latents into pixels.

    The previews of a running request are drawn by this stage, whatever the control is.
    """

    control: str
    choice: str
    decoder: str
