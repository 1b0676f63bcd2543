"""Starts the default model's networks from another one's weights: more subjects need no training from nothing."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from higen.bundle import Bundle
from higen.families.higen import spec

__all__ = ["start_from"]

WORDS = "embeddings.token_embedding.weight"


@torch.no_grad()
def start_from(encoder: nn.Module, denoiser: nn.Module, tokenizer: Tokenizer, model: Bundle) -> list[str]:
    """Copy `model`'s weights into both networks where names and shapes agree, and its words' embeddings word by word.

    Returns the names of the parameters that keep their own values. Raises IntegrityError for a broken model.
    """
    text = load_file(model.file(spec.TEXT_ENCODER))
    theirs = Tokenizer.from_file(str(model.file(spec.TOKENIZER))).get_vocab()
    ours = tokenizer.get_vocab()
    table = encoder.get_parameter(WORDS)
    if WORDS in text and text[WORDS].shape[1] == table.shape[1]:
        for word in ours.keys() & theirs.keys():
            table[ours[word]] = text[WORDS][theirs[word]].to(table.dtype)
    kept = _copy(denoiser, load_file(model.file(spec.UNET)), "denoiser.")
    return kept + [name for name in _copy(encoder, text, "text.") if not name.endswith(WORDS)]


def _copy(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> list[str]:
    kept = []
    for name, parameter in module.named_parameters():
        found = weights.get(name)
        if found is not None and found.shape == parameter.shape:
            parameter.copy_(found)
        else:
            kept.append(prefix + name)
    return kept
