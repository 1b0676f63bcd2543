"""Released checkpoints to a model directory: HiGen's denoiser, OpenCLIP's text tower, Stable Diffusion's autoencoder.

Tensors are mapped from disk, renamed as views, and cast and written one at a time: a conversion needs about as much
memory as its largest tensor. Pickles are read with PyTorch's restricted unpickler or not at all.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from higen import bundle as files
from higen.bundle import Bundle
from higen.config import AutoencoderConfig, ModelConfig, TextConfig, UNetConfig
from higen.errors import CheckpointError, ManifestError, OutputError
from higen.models import companion_checkpoints as companions
from higen.models.checkpoint import config_from_reference, from_reference
from higen.models.companions import autoencoder as build_autoencoder
from higen.models.companions import text_encoder as build_text_encoder
from higen.models.weights import DTYPES, write_safetensors
from higen.tokenizer import build_clip_tokenizer, write_tokenizer

__all__ = ["DTYPES", "convert", "read_state", "write_safetensors"]

Progress = Callable[[str, int, int], None]
"""Called with (file being written, bytes written so far, bytes in all)."""

State = Mapping[str, Tensor]
_PICKLES = (".pth", ".pt", ".ckpt", ".bin")
_CLIP_ARGUMENTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
}
_KL_ARGUMENTS = {
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block"),
    *("down_block_types", "up_block_types", "act_fn", "norm_num_groups", "scaling_factor", "shift_factor"),
    *("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
}


def convert(
    denoiser: str | os.PathLike[str],
    text: str | os.PathLike[str],
    autoencoder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "fp16",
    overwrite: bool = False,
    arguments: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Make the model directory `output` from released checkpoints.

    denoiser     HiGen's .pth or .safetensors, maybe nested under `state_dict`
    text         open_clip's .bin or .safetensors, a Stable Diffusion 2 .ckpt, or a diffusers folder of it
    autoencoder  a Stable Diffusion .ckpt or .safetensors (`first_stage_model.*`), or a diffusers folder of it
    dtype        "fp16", "bf16" or "fp32": how the weights are stored
    arguments    the reference constructor's keyword arguments that shapes cannot tell (`head_dim`), for a denoiser of
                 another size than the released one

    Raises CheckpointError (a source is missing, refused, does not fit or has weights that are not finite), OutputError
    (unknown dtype, no room on the disk) or ModelError (`output` exists or cannot be written). Nothing is left behind
    when it fails.
    """
    if dtype not in DTYPES:
        raise OutputError(f"dtype={dtype!r}: one of {', '.join(map(repr, DTYPES))}")
    with _naming(denoiser):
        unet_config, unet = _denoiser(Path(denoiser), arguments or {})
    with _naming(text):
        text_config, text_encoder = _text(Path(text))
    with _naming(autoencoder):
        autoencoder_config, vae = _autoencoder(Path(autoencoder))
    config = _model_config(Path(denoiser), unet_config, text_config, autoencoder_config)
    parts = {files.UNET: unet, files.TEXT_ENCODER: text_encoder, files.AUTOENCODER: vae}
    total = sum(tensor.numel() for state in parts.values() for tensor in state.values()) * DTYPES[dtype].itemsize
    with files.create(output, config, overwrite) as folder:
        _check_space(folder, total)
        done = 0

        def advance(name: str, size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(name, done, total)

        for name, state in parts.items():
            write_safetensors(folder / name, state, dtype, lambda size, name=name: advance(name, size))  # type: ignore[misc]
        write_tokenizer(build_clip_tokenizer(), folder / files.TOKENIZER)
    return Bundle.open(output)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, mapped from disk where its format allows; a nesting `state_dict` is opened.

    Raises CheckpointError. A pickle is never allowed to run code: what the restricted unpickler refuses is refused.
    """
    suffix = path.suffix.lower()
    if suffix != ".safetensors" and suffix not in _PICKLES:
        raise CheckpointError(f"{path}: a {', '.join(_PICKLES)} or .safetensors file is wanted")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    loaded = _read_safetensors(path) if suffix == ".safetensors" else _read_pickle(path)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    entries = loaded.items() if isinstance(loaded, Mapping) else ()
    state = {name: tensor.detach() for name, tensor in entries if isinstance(tensor, Tensor) and isinstance(name, str)}
    if not state:
        raise CheckpointError(f"{path}: holds no tensors by name, not even under 'state_dict'")
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


class _Inert:
    """Stands for the harmless classes that Stable Diffusion's training left in its checkpoints; does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Inert, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
    )
]


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported[^\n]*", str(error))
        raise CheckpointError(
            f"{path}: refused, because it holds more than tensors and reading it could run code"
            f" ({reason[0] if reason else str(error).splitlines()[0]}); use its .safetensors version if there is one"
        ) from error
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise CheckpointError(f"{path}: cannot be read as a PyTorch checkpoint: {error}") from error


@contextmanager
def _naming(source: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with a source is a CheckpointError that begins with its path."""
    try:
        yield
    except (CheckpointError, ManifestError) as error:
        message = str(error)
        named = message if message.startswith(os.fspath(source)) else f"{os.fspath(source)}: {message}"
        raise CheckpointError(named) from error


def _denoiser(path: Path, arguments: Mapping[str, object]) -> tuple[UNetConfig, dict[str, Tensor]]:
    state = read_state(path)
    head_dim = arguments.get("head_dim", UNetConfig.head_dim)
    config = config_from_reference({**_reference_arguments(state, head_dim), **arguments})
    return config, from_reference(state, config)


def _reference_arguments(state: State, head_dim: object) -> dict[str, object]:
    """The reference constructor's arguments, as far as the tensors' shapes tell them."""

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].ndim <= axis:
            raise CheckpointError(f"not a HiGen denoiser: missing {name}, or it has too few axes")
        return int(state[name].shape[axis])

    if not isinstance(head_dim, int) or head_dim < 1:
        raise CheckpointError(f"head_dim={head_dim!r}: a whole number from 1")
    entries: dict[int, set[str]] = {}
    for name in state:
        if found := re.match(r"input_blocks\.(\d+)\.(\w+)\.", name):
            entries.setdefault(int(found[1]), set()).add(found[2])
    base, inner = size("time_embed.0.weight", 1), size("input_blocks.0.1.proj_in.weight", 0)
    if inner % head_dim:
        raise CheckpointError(
            f"the first temporal transformer is {inner} wide, which head_dim={head_dim} does not divide: "
            "shapes do not tell the head's size, so give arguments={'head_dim': ...}"
        )
    levels: list[list[int]] = [[]]  # the entries of each level
    for entry in sorted(entries.keys() - {0}):
        if "op" in entries[entry]:
            levels.append([])
        else:
            levels[-1].append(entry)
    if not all(levels):
        raise CheckpointError("not a HiGen denoiser: a level of input_blocks has no residual block")
    return {
        "in_dim": size("input_blocks.0.0.weight", 1),
        "out_dim": size("out.2.weight", 0),
        "dim": base,
        "dim_mult": [size(f"input_blocks.{level[0]}.0.out_layers.3.weight", 0) // base for level in levels],
        "num_res_blocks": len(levels[0]),
        "attn_scales": [0.5**i for i, level in enumerate(levels) if "1" in entries[level[0]]],
        "head_dim": head_dim,
        "num_heads": inner // head_dim,
        "y_dim": size("context_embedding.input_mapping.weight", 1),
        "context_dim": size("context_embedding.output_mapping.weight", 0),
        "num_tokens": size("context_embedding.tokens", 1),
        "context_embedding_depth": len(
            {name.split(".")[2] for name in state if name.startswith("context_embedding.context_transformer.")}
        ),
    }


def _text(path: Path) -> tuple[TextConfig, dict[str, Tensor]]:
    if path.is_dir():
        return _text_of_folder(path)
    state = read_state(path)
    config = companions.text_config_from_openclip(state)
    _check_text(config.clip)
    return config, companions.text_from_openclip(state)


def _check_text(clip: Mapping[str, Any]) -> None:
    """The released model's text encoder is 1024 wide and stops before the last of its 24 layers."""
    layers, activation = clip.get("num_hidden_layers"), clip.get("hidden_act")
    if activation != "gelu" or (clip.get("hidden_size") == 1024 and layers != 23):
        raise CheckpointError(
            f"a text encoder of {layers} layers (the unused last one not counted) and the activation {activation!r}; "
            "HiGen reads OpenCLIP's ViT-H/14, which Stable Diffusion 2 has too: 23 layers, 'gelu'"
        )


def _text_of_folder(folder: Path) -> tuple[TextConfig, dict[str, Tensor]]:
    """The text encoder of a diffusers folder: there the unused last block is gone already."""
    given = _json(folder / "text_encoder" / "config.json")
    clip = {name: value for name, value in given.items() if name in _CLIP_ARGUMENTS}
    _check_text(clip)
    vocabulary = folder / "tokenizer" / "vocab.json"
    if vocabulary.is_file() and _json(vocabulary) != build_clip_tokenizer().get_vocab():
        raise CheckpointError(f"{vocabulary}: not CLIP's vocabulary, and HiGen knows no other")
    config = TextConfig(clip=clip, context_length=clip.get("max_position_embeddings", 77))
    state = companions.text_from_transformers(_folder_state(folder / "text_encoder", ("model", "pytorch_model")))
    shapes = companions.shapes_of(lambda: build_text_encoder(config))
    companions.check_tensors(state, shapes, "the text encoder of its config.json")
    return config, state


def _autoencoder(path: Path) -> tuple[AutoencoderConfig, dict[str, Tensor]]:
    if path.is_dir():
        return _autoencoder_of_folder(path)
    state = read_state(path)
    return companions.autoencoder_config_from_ldm(state), companions.autoencoder_from_ldm(state)


def _autoencoder_of_folder(folder: Path) -> tuple[AutoencoderConfig, dict[str, Tensor]]:
    given = _json(folder / "vae" / "config.json")
    if given.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise CheckpointError(f"its autoencoder is a {given['_class_name']}; an AutoencoderKL is wanted")
    arguments = {name: value for name, value in given.items() if name in _KL_ARGUMENTS}
    config = AutoencoderConfig(
        arguments=arguments,
        factor=2 ** (len(arguments.get("block_out_channels", ())) - 1),
        shift=(float(arguments.get("shift_factor") or 0.0),),
        scale=(float(arguments.get("scaling_factor", 0.18215)),),
    )
    state = companions.autoencoder_from_diffusers(_folder_state(folder / "vae", ("diffusion_pytorch_model",)))
    shapes = companions.shapes_of(lambda: build_autoencoder(config))
    companions.check_tensors(state, shapes, "the autoencoder of its config.json")
    return config, state


def _folder_state(folder: Path, stems: tuple[str, ...]) -> dict[str, Tensor]:
    candidates = [folder / f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in stems]
    for path in candidates:
        if path.is_file():
            return read_state(path)
    raise CheckpointError(f"{folder}: holds none of {', '.join(path.name for path in candidates)}")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read, and a diffusers folder has it: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is wanted")
    return value


def _model_config(denoiser: Path, unet: UNetConfig, text: TextConfig, autoencoder: AutoencoderConfig) -> ModelConfig:
    """The manifest's configuration. Raises CheckpointError for parts that do not belong together."""
    vocabulary = build_clip_tokenizer().get_vocab_size()
    for what, given, wanted in (
        ("text encoder's width", text.clip.get("hidden_size"), unet.text_dim),
        ("text encoder's vocabulary", text.clip.get("vocab_size"), vocabulary),
        ("autoencoder's latent channels", autoencoder.arguments.get("latent_channels"), unet.in_channels),
    ):
        if given != wanted:
            raise CheckpointError(f"the {what}: {given}, but this denoiser and CLIP's tokenizer want {wanted}")
    name = "HiGen (CVPR 2024)" if unet == UNetConfig() else denoiser.stem
    licence = "as published by ali-vilab/VGen (its code: Apache-2.0)"
    return ModelConfig(name=name, licence=licence, unet=unet, text=text, autoencoder=autoencoder)


def _check_space(folder: Path, size: int) -> None:
    """The weights and 8 MiB for tokenizer and manifest must fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < size + 8 * 2**20:
        raise OutputError(
            f"{folder.parent}: the model takes {size / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free"
        )
