"""HiGen's released checkpoints: its denoiser, OpenCLIP's text tower and Stable Diffusion's autoencoder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError
from higen.families import Converted
from higen.families.higen import spec
from higen.families.higen.personal import with_difference, with_loras
from higen.families.higen.reference_names import config_from_reference, from_reference
from higen.families.higen.spec import AutoencoderConfig, ModelConfig, TextConfig, UNetConfig
from higen.families.preview_source import read_preview, with_preview
from higen.models import companion_checkpoints as companions
from higen.models import hub_folders
from higen.models.checkpoint_files import Note, naming, read_names, read_state
from higen.models.lora import Lora
from higen.models.nestings import found_in
from higen.paths import given_path
from higen.tokenizer import build_clip_tokenizer

__all__ = ["convert", "kl_config", "recognise"]

State = Mapping[str, Tensor]

_OWN = {"context_embedding.tokens", "msim_embedding.0.weight"}
"""Tensors that no other family's denoiser has."""


def recognise(path: Path) -> bool:
    """Whether `path` is HiGen's denoiser. Its companions do not count, because other models use them too."""
    return path.is_file() and read_names(path) >= _OWN


def convert(sources: Sequence[Path], **options: Any) -> Converted:
    """Tables and weights from three sources: denoiser, text encoder, autoencoder.

    denoiser     HiGen's .pth or .safetensors, possibly nested under `state_dict`
    text         open_clip's .bin or .safetensors, a Stable Diffusion 2 .ckpt, or a diffusers folder of it
    autoencoder  a Stable Diffusion .ckpt or .safetensors (`first_stage_model.*`), or a diffusers folder of it
    options      `arguments`: for a denoiser of another size than the released one, the reference constructor's keyword
                 arguments that the tensors' shapes do not show (`head_dim`)
                 `spatial`, `base`: paths of a personalised Stable Diffusion 2.1 and of the model it was fine-tuned
                 from; their difference is added to the spatial tensors (`personal`)
                 `loras`: adapters (`lora.Lora`) of Stable Diffusion 2.1 that are added to the spatial tensors
                 `prediction`: what these models predict, if their files do not contain it; only "v" is accepted
                 `preview`: folder or file of a tiny decoder for previews (`preview_source`)

    Raises CheckpointError if a source is missing, refused or does not fit.
    """
    if unknown := sorted(set(options) - _OPTIONS):
        raise CheckpointError(f"{', '.join(unknown)}: unknown; {spec.FAMILY} takes {', '.join(sorted(_OPTIONS))}")
    personal, preview = _Personal.of(options), read_preview(options.get("preview"))
    if len(sources) != 3:
        given = ", ".join(map(os.fspath, sources)) or "nothing"
        raise CheckpointError(f"{given}: three sources are wanted: denoiser, text encoder, autoencoder")
    denoiser, text, autoencoder = sources
    notes: list[str] = []
    with naming(denoiser):
        unet_config, released = _denoiser(denoiser, options.get("arguments") or {}, notes.append)
    unet = personal.added(released, unet_config, notes)
    with naming(text):
        text_config, text_encoder = _text(text, notes.append)
    with naming(autoencoder):
        autoencoder_config, vae = _autoencoder(autoencoder, notes.append)
    config = _model_config(denoiser, unet_config, text_config, autoencoder_config)
    config = replace(config, licence=config.licence + personal.licence)
    made = Converted(
        manifest=spec.manifest(config),
        weights={spec.UNET: unet, spec.TEXT_ENCODER: text_encoder, spec.AUTOENCODER: vae},
        texts={spec.TOKENIZER: build_clip_tokenizer().to_str(pretty=True)},
        notes=tuple(notes),
    )
    return with_preview(made, preview)


_OPTIONS = frozenset({"arguments", "base", "loras", "prediction", "preview", "spatial"})


@dataclass(frozen=True)
class _Personal:
    """The fine-tune and the adapters of Stable Diffusion 2.1 that are added to the spatial tensors."""

    spatial: Path | None
    base: Path | None
    loras: tuple[Lora, ...]
    prediction: str | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Personal:
        """Raises CheckpointError for options that do not belong together."""
        spatial, base = (
            None if options.get(name) is None else given_path(options[name], name) for name in ("spatial", "base")
        )
        made = cls(spatial, base, tuple(options.get("loras") or ()), options.get("prediction"))
        if (spatial is None) != (base is None):
            raise CheckpointError(
                "--spatial FINETUNE and --base BASE: give both, because their difference is added to the spatial "
                "tensors"
            )
        if made.prediction is not None and spatial is None and not made.loras:
            raise CheckpointError(
                f"prediction={made.prediction!r}: HiGen predicts v; this option describes --spatial or --lora"
            )
        return made

    def added(self, state: State, config: UNetConfig, notes: list[str]) -> State:
        """The denoiser with these parts added. Raises CheckpointError."""
        if self.spatial is not None and self.base is not None:
            state = with_difference(state, config, self.spatial, self.base, self.prediction, notes)
        return with_loras(state, config, self.loras, self.prediction, notes) if self.loras else state

    @property
    def licence(self) -> str:
        """The text that these parts add to the model's licence."""
        names = [*([] if self.spatial is None else [self.spatial.name]), *(lora.path.name for lora in self.loras)]
        return f"; with {', '.join(names)}, which have their own terms" if names else ""


def _silent(_: str) -> None: ...


def _denoiser(
    path: Path, arguments: Mapping[str, object], on_note: Note = _silent
) -> tuple[UNetConfig, dict[str, Tensor]]:
    state = read_state(path, on_note)
    head_dim = arguments.get("head_dim", UNetConfig.head_dim)
    config = config_from_reference({**_reference_arguments(state, head_dim), **arguments})
    return config, from_reference(state, config)


def _reference_arguments(state: State, head_dim: object) -> dict[str, object]:
    """The reference constructor's arguments that follow from the tensors' shapes."""

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].ndim <= axis:
            raise CheckpointError(f"not a HiGen denoiser: missing {name}, or it has too few axes; {found_in(state)}")
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


def _text(path: Path, on_note: Note = _silent) -> tuple[TextConfig, dict[str, Tensor]]:
    if path.is_dir():
        return _text_of_folder(path, on_note)
    state = read_state(path, on_note)
    clip = companions.text_arguments_from_openclip(state)
    _check_text(clip)
    return TextConfig(clip, context_length=clip["max_position_embeddings"]), companions.text_from_openclip(state)


def _check_text(clip: Mapping[str, Any]) -> None:
    """Raise CheckpointError for another text encoder. The released one is 1024 wide and omits the last of 24 layers."""
    layers, activation = clip.get("num_hidden_layers"), clip.get("hidden_act")
    if activation != "gelu" or (clip.get("hidden_size") == 1024 and layers != 23):
        raise CheckpointError(
            f"a text encoder of {layers} layers (the unused last one not counted) and the activation {activation!r}; "
            "HiGen reads OpenCLIP's ViT-H/14, which Stable Diffusion 2 has too: 23 layers, 'gelu'"
        )


def _text_of_folder(folder: Path, on_note: Note = _silent) -> tuple[TextConfig, dict[str, Tensor]]:
    """The text encoder of a diffusers folder. It does not contain the unused last block."""
    clip = hub_folders.text_arguments(folder)
    _check_text(clip)
    hub_folders.check_vocabulary(folder)
    config = TextConfig(clip=clip, context_length=clip.get("max_position_embeddings", 77))
    return config, hub_folders.text_state(folder, clip, on_note)


def _autoencoder(path: Path, on_note: Note = _silent) -> tuple[AutoencoderConfig, dict[str, Tensor]]:
    if path.is_dir():
        return _autoencoder_of_folder(path, on_note)
    state = read_state(path, on_note)
    arguments = companions.autoencoder_arguments_from_ldm(state)
    return kl_config(arguments), companions.autoencoder_from_ldm(state)


def kl_config(arguments: dict[str, Any]) -> AutoencoderConfig:
    """The configuration of diffusers' AutoencoderKL with these arguments."""
    factor, shift, scale = companions.kl_numbers(arguments)
    return AutoencoderConfig("AutoencoderKL", arguments, factor, (shift,), (scale,))


def _autoencoder_of_folder(folder: Path, on_note: Note = _silent) -> tuple[AutoencoderConfig, dict[str, Tensor]]:
    arguments, state = hub_folders.autoencoder_of(folder, on_note)
    return kl_config(arguments), state


def _model_config(denoiser: Path, unet: UNetConfig, text: TextConfig, autoencoder: AutoencoderConfig) -> ModelConfig:
    """The configuration for the manifest. Raises CheckpointError for parts that do not belong together."""
    companions.check_parts("this denoiser", text.clip, autoencoder.arguments, unet.text_dim, unet.in_channels)
    name = "HiGen (CVPR 2024)" if unet == UNetConfig() else denoiser.stem
    licence = "as published by ali-vilab/VGen (its code: Apache-2.0)"
    return ModelConfig(name=name, licence=licence, unet=unet, text=text, autoencoder=autoencoder)
