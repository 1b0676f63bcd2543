"""A vocabulary made from captions, and a text encoder for it with the weights of one with another vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from higen.families.higen.spec import TextConfig
from higen.tokenizer import build_word_tokenizer

__all__ = ["EMBEDDINGS", "copy_words", "keep_words", "with_words", "words_of"]

EMBEDDINGS = "embeddings.token_embedding.weight"
"""The text encoder's parameter with a row for each token."""
MARKS = 4
"""Number of tokens before the words: [PAD], start, end, [UNK]."""
BPE = "</w>"
"""Suffix, in CLIP's vocabularies, of a token that is a whole word or the last part of a word."""


def words_of(captions: Iterable[str]) -> list[str]:
    """The words of the captions, as a word tokenizer splits them."""
    empty = build_word_tokenizer(())
    return sorted(
        {
            word
            for caption in captions
            for word, _ in empty.pre_tokenizer.pre_tokenize_str(empty.normalizer.normalize_str(caption))
        }
    )


def with_words(config: TextConfig, words: int) -> TextConfig:
    """The text encoder's configuration for a word tokenizer: [PAD] 0, start 1, end 2, [UNK] 3, then the words."""
    tokens = {"vocab_size": words + MARKS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return replace(config, clip={**config.clip, **tokens}, pad_id=0, clean=False)


@torch.no_grad()
def copy_words(table: Tensor, ours: Mapping[str, int], given: Tensor, theirs: Mapping[str, int]) -> set[str]:
    """Copy embeddings between two vocabularies: from `given` [V,D] with the rows `theirs` by token, into `table` [W,D]
    with the rows `ours`. Returns the copied tokens. A word that CLIP splits into several tokens is not copied.
    """
    places = {word: theirs.get(word + BPE, theirs.get(word)) for word in ours}
    known = {word: place for word, place in places.items() if place is not None}
    for word, place in known.items():
        table[ours[word]] = given[place].to(table.dtype)
    return set(known)


@torch.no_grad()
def keep_words(encoder: nn.Module, tokenizer: Tokenizer, given: nn.Module, source: Tokenizer, pad_id: int) -> str:
    """Copy the layers of a trained text encoder into a new one, and the embeddings of the tokens that both have.
    Returns a line that says how many words are known.

    encoder, tokenizer     the new text encoder, and its word tokenizer
    given, source, pad_id  the trained text encoder, its tokenizer, and its padding token
    """
    trained = dict(given.named_parameters())
    for name, parameter in encoder.named_parameters():
        if name != EMBEDDINGS:
            parameter.copy_(trained[name])
    table, before, vocabulary = encoder.get_parameter(EMBEDDINGS), trained[EMBEDDINGS], tokenizer.get_vocab()
    table[0] = before[pad_id]
    words = {word for word, place in vocabulary.items() if place >= MARKS}
    known = copy_words(table, vocabulary, before, source.get_vocab()) & words
    return (
        f"the vocabulary is the {len(words)} words of the captions: the model knew {len(known)} of them, "
        f"{len(words) - len(known)} are new"
    )
