"""Adds a tiny decoder to a model's tables: a stage, and the control that chooses it. Only data, no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from higen.errors import CheckpointError
from higen.manifest import Manifest
from higen.preview_decoder import Preview
from higen.stages import Output, Stage, Tensor
from higen.tables import Control
from higen.typed_json import to_json

__all__ = ["ARCHITECTURE", "WEIGHTS", "TinyDecoder", "preview_stage", "with_preview_rows"]

ARCHITECTURE = "preview"
"""The key of a family's `architecture` that holds the tiny decoder."""

WEIGHTS = "preview.safetensors"
CONTROL, FULL, PREVIEW = "decoder", "full", "preview"


@dataclass(frozen=True)
class TinyDecoder:
    """The decoder of diffusers' AutoencoderTiny, by its constructor arguments; it takes latents / `scale`."""

    arguments: dict[str, Any]
    scale: float = 1.0

    @property
    def channels(self) -> int:
        """The channels of its latents."""
        return int(self.arguments["latent_channels"])

    @property
    def factor(self) -> int:
        """Pixels per latent cell."""
        levels = len(self.arguments["decoder_block_out_channels"])
        return int(self.arguments["upsampling_scaling_factor"] ** (levels - 1))


def preview_stage(manifest: Manifest) -> str:
    """The name of the stage that `with_preview_rows` adds."""
    return f"{manifest.sizes.decoder}_{PREVIEW}"


def with_preview_rows(manifest: Manifest, decoder: TinyDecoder) -> Manifest:
    """The tables with the stage `preview_stage`, and a control with which a request chooses it.

    Raises CheckpointError if the model's latents are not those of the decoder, and if it already has such a stage.
    """
    sizes = manifest.sizes
    if sizes.preview is not None:
        raise CheckpointError(f"{manifest.name} already has a decoder for previews, {sizes.preview.decoder}")
    if CONTROL in (control.name for control in manifest.controls):
        raise CheckpointError(f"{manifest.name} has another control with the name {CONTROL!r}")
    axis = next(tensor for tensor in manifest.decoder.inputs if tensor.source == "state").shape[1]
    channels = axis if isinstance(axis, int) else manifest.fixed[axis]
    for what, given, wanted in (
        ("channels of latents", decoder.channels, channels),
        ("pixels per latent cell", decoder.factor, sizes.factor),
    ):
        if given != wanted:
            raise CheckpointError(f"a tiny decoder for {given} {what}, but {manifest.name} has {wanted}")
    stage = Stage(
        preview_stage(manifest),
        WEIGHTS,
        (Tensor("latents", ("N", axis, "H", "W")),),
        (Output("pixels", ("N", 3, "Y", "X")),),
    )
    meaning = f"{FULL}: the model's own decoder; {PREVIEW}: a tiny one, faster and less exact"
    return replace(
        manifest,
        architecture={**manifest.architecture, ARCHITECTURE: to_json(decoder)},
        sizes=replace(sizes, preview=Preview(CONTROL, PREVIEW, stage.name)),
        controls=(
            *manifest.controls,
            Control(CONTROL, "choice", meaning, "number", choices=(FULL, PREVIEW), default=FULL),
        ),
        stages=(*manifest.stages, stage),
    )
