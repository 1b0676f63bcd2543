"""Compares text encoder, autoencoder and tokenizer with the reference, at tiny sizes with stored weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from higen.errors import FixtureError, HigenError, PromptWarning
from higen.families.higen.spec import TextConfig
from higen.models.companion_checkpoints import (
    autoencoder_arguments_from_ldm,
    autoencoder_from_ldm,
    text_arguments_from_openclip,
    text_from_openclip,
)
from higen.models.companions import autoencoder, text_encoder
from higen.parity.compare import Difference, compare, refuse_unknown
from higen.parity.fixtures import CaseTensors, entry, read_json, take
from higen.tokenizer import PromptTokenizer, build_clip_tokenizer

__all__ = ["plan_companions"]

State = dict[str, Tensor]
_BLOCK = "transformer.resblocks."


def plan_companions(path: Path) -> Iterator[tuple[str, Callable[[], list[Difference]]]]:
    """(name, check) of each part of `companions.json`; tensors in `companions.safetensors`. Raises FixtureError."""
    record, tensors = read_json(path), CaseTensors(path.with_suffix(".safetensors"))
    where = str(path)
    refuse_unknown(record, ("text", "vae", "tokenizer"), where)
    refuse_unknown(tensors.cases, [part + suffix for part in ("text", "vae") for suffix in ("", "_w")], where)
    checks = {"text": _text, "vae": _autoencoder}
    for part, check in checks.items():
        if part in record or part in tensors.cases:
            yield part, partial(_with_tensors, check, entry(record, part, dict, where), tensors, part, where)
    if "tokenizer" in record:
        yield "tokenizer", partial(_tokenizer, entry(record, "tokenizer", list, where), where)


def _with_tensors(
    check: Callable[[Mapping[str, Any], State, State, str], list[Difference]],
    record: Mapping[str, Any],
    tensors: CaseTensors,
    part: str,
    where: str,
) -> list[Difference]:
    stored, weights = tensors.read(part), tensors.read(f"{part}_w")
    try:
        with torch.no_grad():
            return check(record, stored, weights, f"{where}: {part}")
    except HigenError as error:
        raise FixtureError(f"{where}: {part}: {error}") from error


def _text(record: Mapping[str, Any], stored: State, tower: State, where: str) -> list[Difference]:
    """Tokens [B,L] to hidden states after the final norm: without the last block (what HiGen reads), and with it.

    higen's encoder leaves the last block out, so the result "with it" comes from an encoder with one more block. The
    pooled output is the projection of the state at the end token (the greatest id).
    """
    (tokens,) = take(stored, where, "tokens")
    blocks = 1 + max(int(name.removeprefix(_BLOCK).partition(".")[0]) for name in tower if name.startswith(_BLOCK))
    first = {name.removeprefix(f"{_BLOCK}0."): tensor for name, tensor in tower.items() if f"{_BLOCK}0." in name}
    longer = tower | {f"{_BLOCK}{blocks}.{name}": tensor for name, tensor in first.items()}
    ours: State = {}
    for name, state in (("penultimate", tower), ("last", longer)):
        hidden = _text_encoder(state, entry(record, "heads", int, where))(input_ids=tokens).last_hidden_state
        ours[f"{name}_tokens"] = hidden
        if "text_projection" in tower:
            ours[f"{name}_pooled"] = hidden[torch.arange(len(tokens)), tokens.argmax(-1)] @ tower["text_projection"]
    refuse_unknown(stored, ours, where)
    return [compare(name, ours[name], tensor) for name, tensor in stored.items()]


def _text_encoder(state: State, heads: int) -> nn.Module:
    # A released tower has 64 channels per head; this file gives the number of heads.
    encoder: nn.Module = text_encoder({**text_arguments_from_openclip(state), "num_attention_heads": heads})
    encoder.load_state_dict(text_from_openclip(state))
    return encoder.eval()


def _autoencoder(record: Mapping[str, Any], stored: State, weights: State, where: str) -> list[Difference]:
    """Pixels to the posterior's moments, latents (unscaled) to pixels."""
    pixels, latents = take(stored, where, "img", "z")
    model: Any = autoencoder("AutoencoderKL", autoencoder_arguments_from_ldm(weights))
    model.load_state_dict(autoencoder_from_ldm(weights))
    model.eval()
    ours = {"moments": model.encode(pixels).latent_dist.parameters, "dec": model.decode(latents).sample}
    refuse_unknown(stored, ours, where)
    return [compare(name, ours[name], tensor) for name, tensor in stored.items()]


def _tokenizer(prompts: list[Any], where: str) -> list[Difference]:
    """Prompts to ids, exactly."""
    tokenizer = PromptTokenizer(build_clip_tokenizer(), TextConfig().rules)
    found = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, dict):
            raise FixtureError(f"{where}: tokenizer: {prompt!r}: an object with text and ids is wanted")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)  # one of the prompts is too long on purpose
            ids = tokenizer.encode([entry(prompt, "text", str, where)])[0]
        expected = torch.tensor(entry(prompt, "ids", list, where))
        found.append(compare(f"prompt {i}", torch.from_numpy(ids), expected, allowed=0.0))
    return found
