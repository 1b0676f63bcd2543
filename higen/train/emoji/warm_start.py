"""Starts the default model's networks from another model's weights, so that more subjects are learned sooner."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from higen.bundle import Bundle
from higen.families.higen import spec
from higen.train.words import EMBEDDINGS, copy_words

__all__ = ["start_from"]


@torch.no_grad()
def start_from(encoder: nn.Module, denoiser: nn.Module, tokenizer: Tokenizer, model: Bundle) -> list[str]:
    """Copy `model`'s weights into both networks where names and shapes agree, and the embeddings of words by word.

    Returns the names of the parameters that were not copied. Raises IntegrityError for a broken model.
    """
    text = load_file(model.file(spec.TEXT_ENCODER))
    theirs = Tokenizer.from_file(str(model.file(spec.TOKENIZER))).get_vocab()
    ours = tokenizer.get_vocab()
    table = encoder.get_parameter(EMBEDDINGS)
    if EMBEDDINGS in text and text[EMBEDDINGS].shape[1] == table.shape[1]:
        copy_words(table, ours, text[EMBEDDINGS], theirs)
    kept = _copy(denoiser, load_file(model.file(spec.UNET)), "denoiser.")
    return kept + [name for name in _copy(encoder, text, "text.") if not name.endswith(EMBEDDINGS)]


def _copy(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> list[str]:
    kept = []
    for name, parameter in module.named_parameters():
        found = weights.get(name)
        if found is not None and found.shape == parameter.shape:
            parameter.copy_(found)
        else:
            kept.append(prefix + name)
    return kept
