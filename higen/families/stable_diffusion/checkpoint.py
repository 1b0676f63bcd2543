"""Stable Diffusion's checkpoints: a folder of the hub's layout, or one file as published by authors and fine-tuners.

A folder     model_index.json, unet/, text_encoder/, vae/, scheduler/; plain files, fp16 variants or sharded files
One file     model.diffusion_model.*, cond_stage_model.*, first_stage_model.*
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError
from higen.families import Converted
from higen.families.preview_source import read_preview, with_preview
from higen.families.stable_diffusion import spec
from higen.families.stable_diffusion.control_source import is_control, read_control, with_control, without_controls
from higen.families.stable_diffusion.ldm_names import PREFIX, unet_arguments, unet_from_ldm
from higen.families.stage_rows import Sampling
from higen.models import companion_checkpoints as companions
from higen.models import hub_folders
from higen.models.checkpoint_files import folder_state, naming, read_json, read_names, read_state
from higen.models.companions import TEXT_PREFIX
from higen.models.diffusers_schedulers import Schedule, schedule_of
from higen.models.diffusers_unet import image_unet, image_unet_arguments
from higen.models.lora import Lora, merged
from higen.tokenizer import build_clip_tokenizer

__all__ = ["SAFETY", "TEXT_WIDTH_OF_2", "Parts", "convert", "hub_parts", "licence_of", "recognise"]

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
PREDICTIONS = ("epsilon", "v")

TEXT_WIDTH_OF_2 = 1024
"""Width of the text encoder of version 2 and 2.1 (OpenCLIP's ViT-H). Version 1 has CLIP's ViT-L, 768 wide."""

_LICENCES = {1: "CreativeML OpenRAIL-M", 2: "CreativeML Open RAIL++-M"}
SAFETY = "the safety checker is left out: check the generated pictures by other means"

_AUTHORS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_DDIM = {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, **_AUTHORS}
"""The scheduler for single files. Its schedule is also that of training."""


def recognise(path: Path) -> bool:
    """Whether a folder or file holds a Stable Diffusion model of version 1 or 2, or a ControlNet."""
    if is_control(path):
        return True
    if path.is_dir():
        index = path / "model_index.json"
        return index.is_file() and read_json(index).get("_class_name") in PIPELINES
    names = read_names(path)
    return f"{PREFIX}input_blocks.0.0.weight" in names and not any(".time_stack." in name for name in names)


def convert(sources: Sequence[Path], **options: Any) -> Converted:
    """Tables and weights from one source, or from a model and a ControlNet for it.

    options  `prediction`: "epsilon" or "v", for a single file of version 2, which does not say it
             `control_kind`: one of `control_source.KINDS`, needed with a ControlNet
             `loras`: adapters (`lora.Lora`) that are added to the U-Net and the text encoder
             `preview`: folder or file of a tiny decoder for previews (`preview_source`)

    Raises CheckpointError for a source that is missing, incomplete or another kind of model, for a scheduler that the
    tables do not support, and for an adapter that does not fit.
    """
    if unknown := sorted(set(options) - {"prediction", "control_kind", "loras", "preview"}):
        known = "prediction, control_kind, loras and preview"
        raise CheckpointError(f"{', '.join(unknown)}: unknown; {spec.FAMILY} takes {known}")
    prediction = options.get("prediction")
    if prediction not in (None, *PREDICTIONS):
        raise CheckpointError(f"prediction={prediction!r}: one of {', '.join(PREDICTIONS)}")
    kind = options.get("control_kind")
    bases, control = without_controls(list(sources), kind)
    if len(bases) != 1:
        besides = "" if control is None else f" beside the ControlNet {control}"
        raise CheckpointError(f"{', '.join(map(str, bases)) or 'nothing'}: one folder or file is wanted{besides}")
    (source,) = bases
    notes, preview = list[str](), read_preview(options.get("preview"))
    with naming(source):
        read = _folder if source.is_dir() else _single_file
        made = read(source, prediction, notes)
    made = _with_loras(made, options.get("loras") or ())
    return with_preview(made if control is None else _with_control(made, control, str(kind)), preview)


def _with_control(made: Converted, path: Path, kind: str) -> Converted:
    notes: list[str] = []
    made_of, own = spec.networks(made.manifest), made.manifest
    control = read_control(path, kind, made_of.unet, made_of.codec.factor, notes)
    (loop,) = own.loops
    manifest = spec.manifest(
        replace(made_of, control=control.arguments),
        Sampling(loop.schedule, loop.prediction, loop.solvers, loop.steps, loop.guidance),
        name=f"{own.name}-{control.name}",
        licence=own.licence,
        size=own.sizes.width,
        pad_id=own.text.pad_id if own.text is not None else 0,
        edges=control.edges,
    )
    weights = {**made.weights, spec.UNET: with_control(made.weights[spec.UNET], control)}
    return replace(made, manifest=manifest, weights=weights, notes=(*made.notes, *notes))


def _with_loras(made: Converted, loras: Sequence[Lora]) -> Converted:
    if not loras:
        return made
    notes: list[str] = []
    networks = {"unet": made.weights[spec.UNET], "text_encoder": made.weights[spec.TEXT_ENCODER]}
    changed = merged(networks, loras, notes, nested={"text_encoder": TEXT_PREFIX})
    weights = {**made.weights, spec.UNET: changed["unet"], spec.TEXT_ENCODER: changed["text_encoder"]}
    return replace(made, weights=weights, notes=(*notes, *made.notes))


def _folder(folder: Path, prediction: str | None, notes: list[str]) -> Converted:
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in PIPELINES:
        raise CheckpointError(f"a {index.get('_class_name')}; one of {', '.join(PIPELINES)} is wanted")
    config = read_json(folder / "unet" / "config.json")
    arguments = image_unet_arguments(config)
    around = hub_parts(folder, prediction, notes)
    unet = folder_state(folder / "unet", ("diffusion_pytorch_model",), notes.append)
    shapes = companions.shapes_of(lambda: image_unet(arguments))
    companions.check_tensors(unet, shapes, "the U-Net of its config.json")
    made_of = spec.Networks(arguments, around.clip, around.codec)
    size = int(config.get("sample_size") or 64) * made_of.codec.factor
    weights = (unet, around.text_encoder, around.autoencoder)
    return _converted(folder, made_of, around.schedule, weights, size, around.pad_id, notes)


@dataclass(frozen=True)
class Parts:
    """Everything but the U-Net in a folder of the hub's layout: configurations, and the tensors of two networks."""

    schedule: Schedule
    clip: dict[str, Any]
    codec: spec.Codec
    pad_id: int
    text_encoder: dict[str, Tensor]
    autoencoder: dict[str, Tensor]


def hub_parts(folder: Path, prediction: str | None, notes: list[str]) -> Parts:
    """Read scheduler, tokenizer, text encoder and autoencoder. Raises CheckpointError."""
    schedule = schedule_of(read_json(folder / "scheduler" / "scheduler_config.json"))
    if prediction not in (None, schedule.prediction):
        raise CheckpointError(f"prediction={prediction!r}: its scheduler says {schedule.prediction!r}")
    hub_folders.check_vocabulary(folder)
    clip = hub_folders.text_arguments(folder)
    text = hub_folders.text_state(folder, clip, notes.append)
    codec, autoencoder = hub_folders.autoencoder_of(folder, notes.append)
    return Parts(schedule, clip, _codec(codec), _pad_id(folder, clip), text, autoencoder)


def _pad_id(folder: Path, clip: dict[str, Any]) -> int:
    """The padding token after a prompt: from the folder's tokenizer, else 0 for version 2 and the end token for 1."""
    config = folder / "tokenizer" / "tokenizer_config.json"
    token = read_json(config).get("pad_token") if config.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return 0 if clip["hidden_size"] == TEXT_WIDTH_OF_2 else 49407
    found = build_clip_tokenizer().token_to_id(token)
    if found is None:
        raise CheckpointError(f"{config}: pad_token={token!r} is not a token of CLIP")
    return int(found)


def _single_file(path: Path, prediction: str | None, notes: list[str]) -> Converted:
    state = read_state(path, notes.append)
    arguments = unet_arguments(state)
    if arguments["use_linear_projection"]:
        if prediction is None:
            raise CheckpointError(
                "a file of version 2 does not say what it predicts: give --prediction v (2.1 at 768 pixels) or "
                "--prediction epsilon (2.1-base at 512 pixels)"
            )
        clip, text = companions.text_arguments_from_openclip(state), companions.text_from_openclip(state)
    else:
        clip, text = companions.text_arguments_from_ldm(state), companions.text_from_ldm(state)
    schedule = schedule_of(_DDIM, prediction or "epsilon")
    codec = _codec(companions.autoencoder_arguments_from_ldm(state))
    made_of = spec.Networks(arguments, clip, codec)
    weights = (unet_from_ldm(state, arguments), text, companions.autoencoder_from_ldm(state))
    size = 768 if prediction == "v" else 512
    pad = 0 if arguments["use_linear_projection"] else 49407
    return _converted(path, made_of, schedule, weights, size, pad, notes)


def licence_of(clip: Mapping[str, Any]) -> str:
    """The licence of the published weights, of version 1 or 2 according to the text encoder."""
    version = 2 if clip["hidden_size"] == TEXT_WIDTH_OF_2 else 1
    return f"{_LICENCES[version]} unless the file's own licence says otherwise; its use restrictions apply"


def _codec(arguments: dict[str, Any]) -> spec.Codec:
    _, shift, scale = companions.kl_numbers(arguments)
    return spec.Codec(arguments, shift, scale)


def _converted(
    source: Path,
    made_of: spec.Networks,
    schedule: Schedule,
    weights: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]],
    size: int,
    pad: int,
    notes: list[str],
) -> Converted:
    """The model directory of a source. Raises CheckpointError for parts that do not belong together."""
    unet, clip, codec = made_of.unet, made_of.clip, made_of.codec
    companions.check_parts("its U-Net", clip, codec.arguments, unet.get("cross_attention_dim"), unet.get("in_channels"))
    sampling = Sampling(schedule.schedule, schedule.prediction, schedule.solvers)
    licence = licence_of(clip)
    return Converted(
        manifest=spec.manifest(
            made_of,
            sampling,
            name=source.name if source.is_dir() else source.stem,
            licence=licence,
            size=size,
            pad_id=pad,
        ),
        weights=dict(zip((spec.UNET, spec.TEXT_ENCODER, spec.AUTOENCODER), weights, strict=True)),
        texts={spec.TOKENIZER: build_clip_tokenizer().to_str(pretty=True)},
        notes=(*notes, *schedule.notes, SAFETY, f"licence: {licence}"),
    )
