"""Reads and builds the decoder of a tiny autoencoder (TAESD, Bohan 2023), which diffusers calls AutoencoderTiny.

It takes the latents of a denoising loop as they are (over the scaling factor of its configuration, which is 1), limits
them to 3 tanh(x / 3), and makes pixels from 0 to 1, which become -1 to 1. Two kinds of files are read:

diffusers'   a folder with config.json; decoder.layers.0.weight, decoder.layers.2.conv.0.weight, and the encoder
authors'     taesd_decoder.safetensors or .pth; 1.weight, 3.conv.0.weight. The limit is layer 0 and has no tensors
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from higen.errors import CheckpointError, ManifestError
from higen.models.checkpoint_files import Note, folder_state, naming, read_json, read_state
from higen.models.companion_checkpoints import check_tensors, shapes_of
from higen.models.companions import quiet, quiet_import
from higen.models.nestings import below, found_in

__all__ = ["PreviewStage", "read_tiny_decoder", "tiny_decoder"]

_CLASS = "AutoencoderTiny"
_ARGUMENTS: Mapping[str, Any] = {
    "latent_channels": 4,
    "out_channels": 3,
    "decoder_block_out_channels": [64, 64, 64, 64],
    "num_decoder_blocks": [3, 3, 3, 1],
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
"""The constructor arguments of AutoencoderTiny for its decoder, with their defaults."""

_PREFIXES = ("decoder.layers.", "taesd_decoder.", "decoder.")
_MOST = 1024
_WHAT = "a tiny decoder (TAESD)"
_LAYER = re.compile(r"(\d+)\.(?:(conv|skip)\.)?.+")

State = Mapping[str, Tensor]


def tiny_decoder(arguments: Mapping[str, Any]) -> nn.Module:
    """The decoder of diffusers' AutoencoderTiny: latents [N,C,H,W] -> pixels [N,3,Y,X], about -1 to 1.

    Raises ManifestError for arguments that diffusers refuses, MissingExtra without diffusers.
    """
    with quiet_import("diffusers", "the tiny decoder"):
        from diffusers import AutoencoderTiny
    with quiet("diffusers"):
        try:
            decoder: nn.Module = AutoencoderTiny(**arguments).decoder
        except Exception as error:  # diffusers' checks raise errors of many types
            raise ManifestError(f"{_CLASS}: diffusers refuses {dict(arguments)!r}: {error}") from error
    return decoder


class PreviewStage(nn.Module):
    """latents [N,C,H,W] -> pixels [N,3,Y,X], about -1 to 1 (not clamped). The decoder takes latents / `scale`."""

    prefix = "decoder."

    def __init__(self, decoder: nn.Module, scale: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.scale = scale

    def forward(self, latents: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        encoded = latents if self.scale == 1 else latents / self.scale
        pixels: Tensor = self.decoder(encoded.to(dtype))
        return pixels.float()


def read_tiny_decoder(path: Path, on_note: Note) -> tuple[dict[str, Any], float, dict[str, Tensor]]:
    """Constructor arguments, scaling factor, and tensors by diffusers' names without `decoder.`.

    path   a folder in diffusers' layout, or a file with the authors' or diffusers' names

    Raises CheckpointError for anything else, such as the encoder's file, and for tensors that are missing or do not
    fit.
    """
    with naming(path):
        if path.is_dir():
            arguments, scale = _configuration(read_json(path / "config.json"))
            state = below(folder_state(path, ("diffusion_pytorch_model",), on_note), "decoder.")
        else:
            arguments, state = _single_file(read_state(path, on_note))
            scale = 1.0
        check_tensors(state, shapes_of(lambda: tiny_decoder(arguments)), _WHAT)
    return arguments, scale, state


def _configuration(config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    if config.get("_class_name") != _CLASS:
        raise CheckpointError(f"a {config.get('_class_name')}; an {_CLASS} is wanted")
    arguments = {name: config.get(name, default) for name, default in _ARGUMENTS.items()}
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    if type(scale) not in (int, float) or not 1e-6 < scale < 1e6:
        raise CheckpointError(f"config.json: scaling_factor={scale!r}: a number above 0")
    if shift not in (None, 0, 0.0):
        raise CheckpointError(f"config.json: shift_factor={shift!r}: 0 is wanted")
    if arguments["out_channels"] != 3:
        raise CheckpointError(f"config.json: out_channels={arguments['out_channels']!r}: 3 is wanted")
    widths, blocks = arguments["decoder_block_out_channels"], arguments["num_decoder_blocks"]
    for name, value, least in (("decoder_block_out_channels", widths, 1), ("num_decoder_blocks", blocks, 0)):
        if not (isinstance(value, list) and 1 <= len(value) <= 16 and all(_is_count(n, least) for n in value)):
            allowed = f"a list of 1 to 16 whole numbers from {least} to {_MOST}"
            raise CheckpointError(f"config.json: {name}={value!r}: {allowed}")
    if len(set(widths)) > 1:
        raise CheckpointError(f"config.json: decoder_block_out_channels={widths}: equal widths are wanted")
    for name in ("latent_channels", "upsampling_scaling_factor"):
        if not _is_count(arguments[name]):
            raise CheckpointError(f"config.json: {name}={arguments[name]!r}: a whole number from 1 to {_MOST}")
    if arguments["upsample_fn"] != "nearest":
        raise CheckpointError(f"config.json: upsample_fn={arguments['upsample_fn']!r}: 'nearest' is wanted")
    return arguments, float(scale)


def _is_count(value: object, least: int = 1) -> bool:
    return type(value) is int and least <= value <= _MOST


def _single_file(state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of a decoder, from its tensors, and the tensors under diffusers' names."""
    own = next((found for prefix in _PREFIXES if (found := below(state, prefix))), dict(state))
    layers: dict[int, str] = {}
    for name in own:
        if (match := _LAYER.fullmatch(name)) is None:
            raise CheckpointError(f"not {_WHAT}: it has {name}; {found_in(state)}")
        layers[int(match[1])] = "block" if match[2] else "convolution"
    first = own.get(f"{min(layers)}.weight") if layers else None
    last = own.get(f"{max(layers)}.weight") if layers else None
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise CheckpointError(f"not {_WHAT}: its first and last layers are convolutions; {found_in(state)}")
    channels, colours = int(first.shape[1]), int(last.shape[0])
    if channels == 3 and colours != 3:
        raise CheckpointError(f"an encoder, which turns pictures into latents; {_WHAT} is wanted")
    if colours != 3:
        raise CheckpointError(f"not {_WHAT}: it gives {colours} channels, 3 are wanted")
    blocks = [0]
    for place in sorted(layers)[1:-1]:
        if layers[place] == "block":
            blocks[-1] += 1
        else:
            blocks.append(0)
    arguments = {
        **_ARGUMENTS,
        "latent_channels": channels,
        "decoder_block_out_channels": [int(first.shape[0])] * len(blocks),
        "num_decoder_blocks": blocks,
    }
    return arguments, {f"layers.{_shifted(name, -min(layers))}": tensor for name, tensor in own.items()}


def _shifted(name: str, by: int) -> str:
    place, _, rest = name.partition(".")
    return f"{int(place) + by}.{rest}"
