"""Builds and loads the networks around the denoiser: transformers' CLIP text model and diffusers' autoencoders.

`higen.models.companion_checkpoints` maps released checkpoints to the names used here.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from higen.errors import BackendError, ManifestError, MissingExtra
from higen.models.weights import fill

if TYPE_CHECKING:
    from transformers import CLIPTextModel

__all__ = [
    "TEXT_PREFIX",
    "autoencoder",
    "load_autoencoder",
    "load_text_encoder",
    "quiet",
    "quiet_import",
    "restore_buffers",
    "text_encoder",
]

AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderKLTemporalDecoder")
TEXT_PREFIX = "text_model."
"""transformers before 5 nests the text model under this name, in the module and in files. Our names do not contain it.
"""


def text_encoder(arguments: Mapping[str, Any]) -> CLIPTextModel:
    """CLIP's text model with CLIPTextConfig's `arguments`, randomly initialised.

    tokens [B,L] int64 -> .last_hidden_state [B,L,Dt], after the final norm. Under `torch.device("meta")` it takes no
    memory. Raises ManifestError for arguments that transformers refuses, MissingExtra without transformers.
    """
    with quiet_import("transformers", "the text encoder"):
        from transformers import CLIPTextConfig, CLIPTextModel
    with quiet("transformers"):
        try:
            return CLIPTextModel(CLIPTextConfig(**arguments))
        except Exception as error:  # the checks and the arithmetic of transformers raise errors of many types
            raise ManifestError(f"clip={dict(arguments)!r}: transformers refuses it: {error}") from error


def autoencoder(kind: str, arguments: Mapping[str, Any]) -> nn.Module:
    """diffusers' autoencoder `kind` with the constructor arguments `arguments`, randomly initialised.

    It has encode(pixels [N,3,Y,X]) and decode(latents [N,C,H,W]) as in diffusers. A temporal decoder also takes the
    number of frames. Raises ManifestError for an unknown kind or for arguments that diffusers refuses, MissingExtra
    without diffusers.
    """
    if kind not in AUTOENCODERS:
        raise ManifestError(f"autoencoder.kind={kind!r}: one of {', '.join(AUTOENCODERS)}")
    with quiet_import("diffusers", "the autoencoder"):
        import diffusers

        made = getattr(diffusers, kind)
    with quiet("diffusers"):
        try:
            built: nn.Module = made(**arguments)
        except Exception as error:  # as for the text encoder
            raise ManifestError(f"autoencoder.arguments={dict(arguments)!r}: diffusers refuses it: {error}") from error
    return built


def load_text_encoder(
    path: str | os.PathLike[str],
    arguments: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CLIPTextModel:
    """The text encoder of a safetensors file, in `dtype` (None: as stored), frozen and in evaluation mode.

    The weights are never in memory twice. Raises IntegrityError for a file that is not safetensors or has other tensors
    than the arguments require (the first ten are listed), and the errors of `text_encoder`.
    """
    with torch.device("meta"):
        encoder = text_encoder(arguments)
    _load(encoder, path, dtype, torch.device(device))
    return encoder


def load_autoencoder(
    path: str | os.PathLike[str],
    kind: str,
    arguments: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The autoencoder of a safetensors file. See `load_text_encoder`."""
    with torch.device("meta"):
        built = autoencoder(kind, arguments)
    _load(built, path, dtype, torch.device(device))
    return built


def _load(module: nn.Module, path: str | os.PathLike[str], dtype: torch.dtype | None, device: torch.device) -> None:
    fill(module, path, dtype, device, lambda name: name.removeprefix(TEXT_PREFIX))
    restore_buffers(module, device)


def restore_buffers(module: nn.Module, device: torch.device) -> None:
    """Restore the buffers that are not stored in files and have no values after building on the meta device. The only
    known ones are CLIP's positions.
    """
    for name, buffer in [(name, buffer) for name, buffer in module.named_buffers() if buffer.is_meta]:
        parent, _, leaf = name.rpartition(".")
        if leaf != "position_ids":
            raise BackendError(f"transformers or diffusers has the buffer {name}, which this higen cannot restore")
        positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        module.get_submodule(parent).register_buffer(leaf, positions, persistent=False)


@contextmanager
def quiet_import(package: str, purpose: str) -> Iterator[None]:
    """Import a library without its warnings. Raises MissingExtra if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise MissingExtra(package, "torch", purpose) from error


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Silence a library's log messages inside the block. Import the library first: its import sets the log level."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
