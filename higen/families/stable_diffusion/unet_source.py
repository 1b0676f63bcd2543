"""Reads only the U-Net of a Stable Diffusion folder or file, for another family that uses its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from higen.errors import CheckpointError
from higen.families.stable_diffusion.ldm_names import unet_arguments, unet_from_ldm
from higen.models.checkpoint_files import folder_state, read_json, read_state
from higen.models.diffusers_unet import image_unet_arguments

__all__ = ["read_unet"]

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def read_unet(source: Path, on_note: Callable[[str], None]) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a folder's or single file's U-Net under diffusers' names, and what it predicts.

    The prediction is "epsilon" or "v"; None for a single file, which does not contain it. Raises CheckpointError for
    anything but a Stable Diffusion U-Net, and for the U-Nets of SDXL, inpainting, depth and upscaling models.
    """
    if not source.is_dir():
        state = read_state(source, on_note)
        return unet_from_ldm(state, unet_arguments(state)), None
    image_unet_arguments(read_json(source / "unet" / "config.json"))
    given = read_json(source / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if given not in _PREDICTIONS:
        raise CheckpointError(f"prediction_type={given!r}: one of {', '.join(_PREDICTIONS)}")
    return folder_state(source / "unet", ("diffusion_pytorch_model",), on_note), _PREDICTIONS[given]
