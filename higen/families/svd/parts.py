"""The networks of a Stable Video Diffusion folder: checks their configurations, builds them and reads their tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from higen.errors import CheckpointError, ManifestError
from higen.families.svd.spec import Vision
from higen.models import companion_checkpoints as companions
from higen.models.checkpoint_files import Note, folder_state, read_json
from higen.models.companions import autoencoder, quiet, quiet_import
from higen.models.diffusers_unet import diffusers_network
from higen.noise_schedule import is_whole

__all__ = ["CODEC", "codec_state", "image_encoder", "unet_arguments", "video_unet", "vision_of"]
__all__ += ["codec_arguments", "unet_state", "vision_state"]

CODEC = "AutoencoderKLTemporalDecoder"

_UNET = "UNetSpatioTemporalConditionModel"
_VISION_ARGUMENTS = {
    *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps"),
}
_CODEC_ARGUMENTS = {
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "down_block_types"),
    *("scaling_factor", "force_upcast"),
}
_IDS = 3
"""How many numbers condition the network on a clip: frames per second, motion bucket, augmentation."""


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments in a U-Net's config.json, with diffusers' defaults for missing ones.

    Raises CheckpointError for another kind of model, MissingExtra.
    """
    kind = config.get("_class_name", _UNET)
    if kind != _UNET:
        raise CheckpointError(f"its U-Net is a {kind}; a {_UNET} is wanted")
    with quiet_import("diffusers", "the U-Net"):
        from diffusers import UNetSpatioTemporalConditionModel
    known = inspect.signature(UNetSpatioTemporalConditionModel.__init__).parameters
    defaults = {name: row.default for name, row in known.items() if name not in ("self", "sample_size")}
    arguments = {name: config.get(name, default) for name, default in defaults.items()}
    for name in ("in_channels", "out_channels", "num_frames"):
        if not is_whole(arguments[name], 1, 2**14):
            raise CheckpointError(f"{name}={arguments[name]!r}: a whole number from 1")
    given, made = arguments["in_channels"], arguments["out_channels"]
    if given != 2 * made:
        raise CheckpointError(
            f"a U-Net with {given} input and {made} output channels: twice as many input as output channels "
            "are wanted, for the latents of the clip and of the picture"
        )
    ids, width = arguments["projection_class_embeddings_input_dim"], arguments["addition_time_embed_dim"]
    if ids != _IDS * width:
        raise CheckpointError(
            f"projection_class_embeddings_input_dim={ids}: must be {_IDS} x addition_time_embed_dim={width}"
        )
    return arguments


def video_unet(arguments: Mapping[str, Any]) -> nn.Module:
    """diffusers' UNetSpatioTemporalConditionModel, randomly initialised. Raises ManifestError, MissingExtra."""
    return diffusers_network("UNetSpatioTemporalConditionModel", arguments, "unet", "the U-Net")


def unet_state(folder: Path, arguments: Mapping[str, Any], on_note: Note) -> dict[str, Tensor]:
    """The tensors of `folder`/unet. Raises CheckpointError."""
    state = folder_state(folder / "unet", ("diffusion_pytorch_model",), on_note)
    shapes = companions.shapes_of(lambda: video_unet(arguments))
    companions.check_tensors(state, shapes, "the U-Net of its config.json")
    return state


def vision_of(folder: Path) -> Vision:
    """CLIPVisionConfig's arguments of `folder`/image_encoder, and its normalisation of pixels.

    The normalisation is in feature_extractor/preprocessor_config.json; without that file it is CLIP's.
    Raises CheckpointError.
    """
    given = read_json(folder / "image_encoder" / "config.json")
    kind = next(iter(given.get("architectures") or ["CLIPVisionModelWithProjection"]))
    if kind != "CLIPVisionModelWithProjection":
        raise CheckpointError(f"its image encoder is a {kind}; a CLIPVisionModelWithProjection is wanted")
    with quiet_import("transformers", "the image encoder"):
        from transformers import CLIPVisionConfig
    with quiet("transformers"):
        try:
            config = CLIPVisionConfig(**{name: value for name, value in given.items() if name in _VISION_ARGUMENTS})
        except Exception as error:  # its checks raise errors of many types
            raise CheckpointError(f"image_encoder/config.json: transformers refuses it: {error}") from error
    arguments = {name: getattr(config, name) for name in sorted(_VISION_ARGUMENTS)}
    path = folder / "feature_extractor" / "preprocessor_config.json"
    numbers = read_json(path) if path.is_file() else {}
    own = Vision(arguments)
    return Vision(
        arguments,
        _three(numbers, "image_mean", own.mean),
        _three(numbers, "image_std", own.deviation),
    )


def _three(numbers: Mapping[str, Any], name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    given = numbers.get(name, default)
    good = isinstance(given, (list, tuple)) and len(given) == 3 and all(isinstance(n, (int, float)) for n in given)
    if not good or (name == "image_std" and not all(n > 0 for n in given)):
        raise CheckpointError(f"preprocessor_config.json: {name}={given!r}: three numbers are wanted")
    return float(given[0]), float(given[1]), float(given[2])


def image_encoder(arguments: Mapping[str, Any]) -> nn.Module:
    """transformers' CLIPVisionModelWithProjection, randomly initialised. Raises ManifestError, MissingExtra."""
    with quiet_import("transformers", "the image encoder"):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    with quiet("transformers"):
        try:
            built: nn.Module = CLIPVisionModelWithProjection(CLIPVisionConfig(**arguments))
        except Exception as error:  # as for the U-Net
            raise ManifestError(f"architecture.vision: transformers refuses it: {error}") from error
    return built


def vision_state(folder: Path, arguments: Mapping[str, Any], on_note: Note) -> dict[str, Tensor]:
    """The tensors of `folder`/image_encoder, without a buffer that older files contain. Raises CheckpointError."""
    state = folder_state(folder / "image_encoder", ("model", "pytorch_model"), on_note)
    state.pop("vision_model.embeddings.position_ids", None)
    shapes = companions.shapes_of(lambda: image_encoder(arguments))
    companions.check_tensors(state, shapes, "the image encoder of its config.json")
    return state


def codec_arguments(folder: Path) -> dict[str, Any]:
    """AutoencoderKLTemporalDecoder's arguments of `folder`/vae. Raises CheckpointError."""
    given = read_json(folder / "vae" / "config.json")
    if given.get("_class_name", CODEC) != CODEC:
        raise CheckpointError(f"its autoencoder is a {given['_class_name']}; an {CODEC} is wanted")
    return {name: value for name, value in given.items() if name in _CODEC_ARGUMENTS}


def codec_state(folder: Path, arguments: Mapping[str, Any], on_note: Note) -> dict[str, Tensor]:
    """The tensors of `folder`/vae. Raises CheckpointError."""
    state = companions.autoencoder_from_diffusers(folder_state(folder / "vae", ("diffusion_pytorch_model",), on_note))
    shapes = companions.shapes_of(lambda: autoencoder(CODEC, arguments))
    companions.check_tensors(state, shapes, "the autoencoder of its config.json")
    return state
