"""An independent implementation of weighted and long prompts for the tests, written from the rules in docs/manifest.md.

It parses by recursion (higen uses stacks), splits a flat list of tokens, and encodes with transformers.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from higen.tokenizer import clean

TOKEN = re.compile(r"\\[()\[\]\\]|\\|:\s*[-+]?[0-9.]+\s*\)|[()\[\]:]|[^()\[\]:\\]+")
Words = list[tuple[str | None, float]]


def parsed(prompt: str) -> Words:
    """Texts and weights. Neighbours of equal weight are joined; None stands for BREAK."""
    tokens = TOKEN.findall(prompt)
    found, _ = _group(tokens, 0, "")
    joined: Words = []
    for text, weight in found:
        if joined and text is not None and joined[-1][0] is not None and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)  # type: ignore[operator]
        elif text != "":
            joined.append((text, weight))
    return joined


def _group(tokens: list[str], at: int, opened: str) -> tuple[Words, int]:
    """The words up to the bracket that closes `opened`, or to the end, with the weight of this pair of brackets."""
    words: Words = []
    factor = {"": 1.0, "(": 1.1, "[": 1 / 1.1}[opened]
    while at < len(tokens):
        token = tokens[at]
        at += 1
        if token in ("(", "["):
            inner, at = _group(tokens, at, token)
            words += inner
        elif opened == "(" and token[0] == ":" and len(token) > 1:
            factor = float(token[1:-1])
            break
        elif (opened, token) in (("(", ")"), ("[", "]")):
            break
        elif token[0] == "\\":
            words.append((token[1:], 1.0))
        else:
            for i, part in enumerate(re.split(r"\bBREAK\b", token)):
                words += [(None, 1.0)] * (i > 0) + [(part, 1.0)]
    return [(text, weight if text is None else weight * factor) for text, weight in words], at


def chunked(tokenizer: Tokenizer, prompt: str, room: int = 75) -> list[list[tuple[int, float]]]:
    """Tokens with their weights, chunk by chunk."""
    comma = tokenizer.token_to_id(",</w>")
    chunks: list[list[tuple[int, float]]] = [[]]
    for text, weight in parsed(prompt):
        if text is None:
            chunks.append([])
            continue
        for token in tokenizer.encode(clean(text), add_special_tokens=False).ids:
            row = chunks[-1]
            if len(row) == room:
                commas = [i for i, (other, _) in enumerate(row) if other == comma]
                near = bool(commas) and token != comma and room - commas[-1] <= 20
                cut = commas[-1] + 1 if near else room
                chunks[-1:] = [row[:cut], row[cut:]]
            chunks[-1].append((token, weight))
    return chunks[:-1] if len(chunks) > 1 and not chunks[-1] else chunks


def embedding(model: Any, tokenizer: Tokenizer, prompt: str, least: int = 1, pad: int = 49407) -> torch.Tensor:
    """The hidden states of a prompt [1, 77 n, D], n at least `least`, with the weights applied."""
    chunks = chunked(tokenizer, prompt)
    chunks += [[]] * (least - len(chunks))
    parts = []
    for chunk in chunks:
        ids = [49406, *(token for token, _ in chunk), 49407]
        weights = torch.ones(1, 77, 1)
        weights[0, 1 : len(chunk) + 1, 0] = torch.tensor([weight for _, weight in chunk])
        with torch.inference_mode():
            hidden = model(torch.tensor([ids + [pad] * (77 - len(ids))])).last_hidden_state
        mean = hidden.mean()
        hidden = hidden * weights
        parts.append(hidden * (mean / hidden.mean()))
    return torch.cat(parts, dim=1)


def pair(model: Any, tokenizer: Tokenizer, prompt: str, negative: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both embeddings, with the same number of chunks."""
    n = max(len(chunked(tokenizer, prompt)), len(chunked(tokenizer, negative)))
    return embedding(model, tokenizer, prompt, n), embedding(model, tokenizer, negative, n)


def apart(got: Any, wanted: Any) -> float:
    """The largest difference relative to the largest expected value."""
    return float(np.abs(np.asarray(got) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())
