"""Stable Video Diffusion's checkpoints: a folder of the hub's layout, or one file as published by the authors.

A folder     model_index.json, unet/, image_encoder/, vae/, scheduler/, feature_extractor/; plain files, fp16 variants
             or sharded files
One file     model.diffusion_model.*, conditioner.embedders.*, first_stage_model.* (ldm_names.py)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError
from higen.families import Converted
from higen.families.stage_rows import Sampling
from higen.families.svd import ldm_names, parts, spec
from higen.models.checkpoint_files import naming, read_json, read_names, read_state
from higen.noise_schedule import NoiseSchedule, Solver, is_whole

__all__ = ["convert", "recognise", "sampling_of"]

PIPELINE = "StableVideoDiffusionPipeline"

_LICENCE = (
    "Stability AI's: 1.0 non-commercial community licence, 1.1 community licence, unless the files' own licence "
    "says otherwise"
)
_TERMS = f"licence: {_LICENCE}; 1.0 forbids commercial use, 1.1 restricts it: read the terms before you use the model"

State = Mapping[str, Tensor]

_SIZE = 96
"""Side in latent cells of a square with as many pixels as a frame of the published models."""

_SINGLE_FILE = re.compile(r"model\.diffusion_model\..+\.time_stack\.")

_SETTINGS: Mapping[str, tuple[Any, Any]] = {
    "prediction_type": ("v_prediction", "epsilon"),
    "timestep_type": ("continuous", "discrete"),
    "timestep_spacing": ("leading", "linspace"),
    "use_karras_sigmas": (True, False),
    "use_exponential_sigmas": (False, False),
    "use_beta_sigmas": (False, False),
    "final_sigmas_type": ("zero", "zero"),
}
"""Scheduler settings: {name: (the only supported value, diffusers' default)}."""

_OTHERS = (Solver("heun", "karras"), Solver("dpm++2m", "karras"), Solver("euler_ancestral", "karras"))


def recognise(path: Path) -> bool:
    """Whether a folder or file holds a Stable Video Diffusion model."""
    if path.is_dir():
        index = path / "model_index.json"
        return index.is_file() and read_json(index).get("_class_name") == PIPELINE
    return any(_SINGLE_FILE.match(name) for name in read_names(path))


def convert(sources: Sequence[Path], **options: Any) -> Converted:
    """Tables and weights from one source.

    options  `chunk`: number of frames that are decoded at a time (14); the result depends on it
             `frames`: clip length in training, needed for a single file, which does not contain it

    Raises CheckpointError for a source that is missing, incomplete or another kind of model, and for a scheduler that
    the tables do not support.
    """
    if unknown := sorted(set(options) - {"chunk", "frames"}):
        raise CheckpointError(f"{', '.join(unknown)}: unknown; {spec.FAMILY} takes chunk and frames")
    for name, most in (("chunk", 2**16), ("frames", 2**14)):
        if (value := options.get(name)) is not None and not is_whole(value, 1, most):
            raise CheckpointError(f"{name}={value!r}: a number of frames from 1 to {most}")
    if len(sources) != 1:
        raise CheckpointError(f"{', '.join(map(str, sources)) or 'nothing'}: one folder or file is wanted")
    (source,) = sources
    chunk, frames = options.get("chunk") or spec.CHUNK, options.get("frames")
    with naming(source):
        return _folder(source, chunk, frames) if source.is_dir() else _single_file(source, chunk, frames)


def _folder(folder: Path, chunk: int, frames: int | None) -> Converted:
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != PIPELINE:
        raise CheckpointError(f"a {index.get('_class_name')}; a {PIPELINE} is wanted")
    notes: list[str] = []
    config = read_json(folder / "unet" / "config.json")
    unet, vision, codec = parts.unet_arguments(config), parts.vision_of(folder), parts.codec_arguments(folder)
    if frames not in (None, unet["num_frames"]):
        raise CheckpointError(f"frames={frames}: its unet/config.json says {unet['num_frames']}")
    sampling = sampling_of(read_json(folder / "scheduler" / "scheduler_config.json"))
    size = config.get("sample_size")
    return _converted(
        folder.name,
        spec.Networks(unet, vision, codec, float(codec.get("scaling_factor", 0.18215))),
        sampling,
        lambda: (
            parts.unet_state(folder, unet, notes.append),
            parts.vision_state(folder, vision.arguments, notes.append),
            parts.codec_state(folder, codec, notes.append),
        ),
        size if is_whole(size, 1, 2**14) else _SIZE,
        chunk,
        notes,
    )


def _single_file(path: Path, chunk: int, frames: int | None) -> Converted:
    if frames is None:
        raise CheckpointError(
            "one file does not say how many frames it was trained on: give --frames 14 (svd) or --frames 25 (svd_xt)"
        )
    notes: list[str] = []
    state = read_state(path, notes.append)
    unet, codec = ldm_names.unet_arguments(state, frames), ldm_names.codec_arguments(state)
    vision = spec.Vision(ldm_names.vision_arguments(state))
    return _converted(
        path.stem,
        spec.Networks(unet, vision, codec),
        _sampling(NoiseSchedule("edm")),
        lambda: (
            ldm_names.unet_from_ldm(state, unet),
            ldm_names.vision_from_ldm(state, vision.arguments),
            ldm_names.codec_from_ldm(state, codec),
        ),
        _SIZE,
        chunk,
        notes,
    )


def _converted(
    name: str,
    made_of: spec.Networks,
    sampling: Sampling,
    read: Callable[[], tuple[State, State, State]],
    size: int,
    chunk: int,
    notes: list[str],
) -> Converted:
    """The model directory of a source. `read` returns its tensors. `size`: see `spec.manifest`, but in latent cells."""
    _check_parts(made_of)
    weights = dict(zip((spec.UNET, spec.IMAGE_ENCODER, spec.AUTOENCODER), read(), strict=True))
    manifest = spec.manifest(
        made_of,
        sampling,
        name=name,
        licence=_LICENCE,
        size=size * made_of.factor,
        chunk=chunk,
        # It overflows in fp16 unless the configuration says that it does not.
        lowest="fp32" if made_of.codec.get("force_upcast", True) else "fp16",
    )
    return Converted(manifest=manifest, weights=weights, notes=(*notes, _TERMS))


def _check_parts(made_of: spec.Networks) -> None:
    """Raise CheckpointError if the image encoder or the autoencoder belongs to another U-Net."""
    unet, width = made_of.unet, made_of.vision.arguments["projection_dim"]
    reads = unet["cross_attention_dim"]
    for given in reads if isinstance(reads, (list, tuple)) else (reads,):
        if given != width:
            raise CheckpointError(f"the image encoder's projection_dim: {width}, but its U-Net reads {given}")
    channels = made_of.codec.get("latent_channels", 4)
    if channels != unet["out_channels"]:
        raise CheckpointError(
            f"the autoencoder's latent channels: {channels}, but its U-Net denoises {unet['out_channels']}"
        )


def sampling_of(config: Mapping[str, Any]) -> Sampling:
    """The sampling for a scheduler's configuration: Euler's method on Karras' noise levels with continuous time.

    Raises CheckpointError naming an unsupported class or setting, and what is supported.
    """
    kind = config.get("_class_name", "EulerDiscreteScheduler")
    if kind != "EulerDiscreteScheduler":
        raise CheckpointError(
            f"scheduler {kind}: only EulerDiscreteScheduler is known: write its configuration into "
            "scheduler_config.json; a "
            f"request may then also use the solvers {', '.join(solver.name for solver in _OTHERS)}"
        )
    for name, (wanted, default) in _SETTINGS.items():
        given = config.get(name, default)
        if (default if given is None else given) != wanted:
            raise CheckpointError(f"scheduler {kind}: {name}={given!r}: only {wanted!r} is known")
    bounds = {name: config.get(name) for name in ("sigma_min", "sigma_max")}
    for name, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"scheduler {kind}: {name}={value!r}: a number is wanted")
    schedule = NoiseSchedule("edm", **{name: float(value) for name, value in bounds.items()})  # type: ignore[arg-type]
    return _sampling(schedule)


def _sampling(schedule: NoiseSchedule) -> Sampling:
    return Sampling(schedule, "v", (Solver("euler", "karras"), *_OTHERS), spec.STEPS, spec.GUIDANCE)
