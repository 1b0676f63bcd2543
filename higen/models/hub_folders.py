"""Reads text encoder, autoencoder, vocabulary and licence from a folder in the Hugging Face hub's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError
from higen.models import companion_checkpoints as companions
from higen.models.checkpoint_files import Note, folder_state, read_json
from higen.models.companions import autoencoder, text_encoder
from higen.text_files import TextError, read_text
from higen.tokenizer import build_clip_tokenizer

__all__ = ["autoencoder_of", "card_licence", "check_vocabulary", "text_arguments", "text_state"]

_CLIP_ARGUMENTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
}
_KL_ARGUMENTS = {
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block"),
    *("down_block_types", "up_block_types", "act_fn", "norm_num_groups", "scaling_factor", "shift_factor"),
    *("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
}


def text_arguments(folder: Path) -> dict[str, Any]:
    """CLIPTextConfig's arguments of `folder`/text_encoder. Raises CheckpointError."""
    given = read_json(folder / "text_encoder" / "config.json")
    kind = next(iter(given.get("architectures") or ["CLIPTextModel"]))
    if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise CheckpointError(f"its text encoder is a {kind}; a CLIPTextModel is wanted")
    return {name: value for name, value in given.items() if name in _CLIP_ARGUMENTS}


def text_state(folder: Path, arguments: Mapping[str, Any], on_note: Note) -> dict[str, Tensor]:
    """The tensors of `folder`/text_encoder. `arguments`: of its CLIPTextConfig. Raises CheckpointError."""
    state = companions.text_from_transformers(
        folder_state(folder / "text_encoder", ("model", "pytorch_model"), on_note)
    )
    shapes = companions.shapes_of(lambda: text_encoder(arguments))
    companions.check_tensors(state, shapes, "the text encoder of its config.json")
    return state


def check_vocabulary(folder: Path) -> None:
    """Raise CheckpointError if the folder's tokenizer has another vocabulary than CLIP's."""
    vocabulary = folder / "tokenizer" / "vocab.json"
    if vocabulary.is_file() and read_json(vocabulary) != build_clip_tokenizer().get_vocab():
        raise CheckpointError(f"{vocabulary}: not CLIP's vocabulary, and no other is known")


def card_licence(folder: Path) -> str | None:
    """The licence in the front matter of the folder's model card (README.md, `license:`); None if there is none."""
    try:
        card = read_text(folder / "README.md")
    except (OSError, TextError):
        return None
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    found = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)", head[1], re.MULTILINE) if head else None
    return None if found is None else found[1]


def autoencoder_of(folder: Path, on_note: Note) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """AutoencoderKL's arguments and the tensors of `folder`/vae. Raises CheckpointError."""
    given = read_json(folder / "vae" / "config.json")
    if given.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise CheckpointError(f"its autoencoder is a {given['_class_name']}; an AutoencoderKL is wanted")
    arguments = {name: value for name, value in given.items() if name in _KL_ARGUMENTS}
    state = companions.autoencoder_from_diffusers(folder_state(folder / "vae", ("diffusion_pytorch_model",), on_note))
    shapes = companions.shapes_of(lambda: autoencoder("AutoencoderKL", arguments))
    companions.check_tensors(state, shapes, "the autoencoder of its config.json")
    return arguments, state
