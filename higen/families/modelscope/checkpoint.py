"""ModelScope's and ZeroScope's checkpoints: a folder of the hub's layout, or the authors' three files.

A folder     model_index.json, unet/, text_encoder/, vae/, scheduler/; plain, fp16 variants or in several files
Three files  text2video_pytorch_model.pth, open_clip_pytorch_model.bin, VQGAN_autoencoder.pth, or a folder of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError
from higen.families import Converted
from higen.families.modelscope import spec
from higen.families.modelscope.unet import video_unet, video_unet_arguments
from higen.families.modelscope.vgen_names import MARKS, unet_arguments, unet_from_vgen
from higen.families.stable_diffusion.checkpoint import hub_parts
from higen.families.stable_diffusion.spec import Codec, Sampling
from higen.families.stage_rows import clip_text
from higen.models import companion_checkpoints as companions
from higen.models import hub_folders
from higen.models.checkpoint_files import folder_state, naming, read_json, read_names, read_state
from higen.models.companions import TEXT_PREFIX
from higen.models.diffusers_schedulers import Schedule, schedule_of
from higen.models.lora import Lora, merged
from higen.tokenizer import build_clip_tokenizer

__all__ = ["convert", "recognise"]

State = Mapping[str, Tensor]

PIPELINES = ("TextToVideoSDPipeline", "VideoToVideoSDPipeline")
FILES = ("text2video_pytorch_model.pth", "open_clip_pytorch_model.bin", "VQGAN_autoencoder.pth")
"""What the authors call the U-Net, the text encoder and the autoencoder."""

LICENCE = "CC-BY-NC-4.0"
_NOTE = f"ModelScope's weights, and what is made of them, are under {LICENCE}: no commercial use"

_DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
"""What the authors' network was trained and is sampled with (configuration.json: linear_sd)."""

_SIZE = 256
"""Pixels a side that the authors' network was trained on."""


def recognise(path: Path) -> bool:
    """Whether a folder or file holds ModelScope's network for text to video, or one made of it."""
    if path.is_dir():
        index = path / "model_index.json"
        return read_json(index).get("_class_name") in PIPELINES if index.is_file() else (path / FILES[0]).is_file()
    names = read_names(path)
    return names >= MARKS and "context_embedding.tokens" not in names


@dataclass(frozen=True)
class _Parts:
    """What one kind of source holds. `weights`: U-Net, text encoder, autoencoder; `size`: width and height, pixels."""

    made_of: spec.Networks
    schedule: Schedule
    weights: tuple[State, State, State]
    pad_id: int
    name: str
    licence: str
    size: tuple[int, int]


def convert(sources: Sequence[Path], **options: Any) -> Converted:
    """Tables and weights from a folder, or from the U-Net, the text encoder and the autoencoder as files.

    options  `prediction`: "epsilon", for a U-Net in a file that is not called as the authors call theirs: other
             models have the same tensors
             `loras`: adapters (`lora.Lora`) that are added to the U-Net and the text encoder

    Raises CheckpointError for a source that is missing, incomplete or another kind of model, for a scheduler that the
    tables lack, and for an adapter that does not fit.
    """
    if unknown := sorted(set(options) - {"prediction", "loras"}):
        raise CheckpointError(f"{', '.join(unknown)}: unknown; {spec.FAMILY} takes prediction and loras")
    prediction, notes = options.get("prediction"), list[str]()
    if len(sources) == 1 and sources[0].is_dir() and not (sources[0] / "model_index.json").is_file():
        with naming(folder := sources[0]):
            sources = [_inside(folder, name) for name in FILES]
    if len(sources) not in (1, len(FILES)) or (len(sources) == 1 and not sources[0].is_dir()):
        given = ", ".join(map(str, sources)) or "nothing"
        raise CheckpointError(f"{given}: one folder is wanted, or three files: {', '.join(FILES)}, in this order")
    with naming(sources[0]):
        if len(sources) == 1:
            parts = _folder(sources[0], prediction, notes)
        else:
            parts = _three_files(sources, prediction, notes)
        unet, clip, codec = parts.made_of.unet, parts.made_of.clip, parts.made_of.codec
        companions.check_parts("its U-Net", clip, codec.arguments, unet["cross_attention_dim"], unet["in_channels"])
    return _converted(parts, options.get("loras") or (), notes)


def _inside(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise CheckpointError(f"has no {name}, and {', '.join(FILES)} belong together")
    return folder / name


def _folder(folder: Path, prediction: str | None, notes: list[str]) -> _Parts:
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise CheckpointError(f"a {kind}; one of {', '.join(PIPELINES)} is wanted")
    config = read_json(folder / "unet" / "config.json")
    arguments = video_unet_arguments(config)
    around = hub_parts(folder, prediction, notes)
    unet = folder_state(folder / "unet", ("diffusion_pytorch_model",), notes.append)
    companions.check_tensors(unet, companions.shapes_of(lambda: video_unet(arguments)), "the U-Net of its config.json")
    made_of = spec.Networks(arguments, around.clip, around.codec)
    card = hub_folders.card_licence(folder)
    licence = f"{LICENCE} where its model card says nothing else" if card is None else f"{card}, as its model card says"
    return _Parts(
        made_of,
        around.schedule,
        (unet, around.text_encoder, around.autoencoder),
        around.pad_id,
        folder.name,
        licence,
        _pixels(config.get("sample_size"), around.codec.factor),
    )


def _pixels(sample_size: object, factor: int) -> tuple[int, int]:
    """Width and height of a U-Net's `sample_size`, in latent cells: one number, or height and width."""
    pair = sample_size if isinstance(sample_size, (list, tuple)) and len(sample_size) == 2 else (sample_size,) * 2
    height, width = (int(side) * factor if isinstance(side, int) and side > 0 else _SIZE for side in pair)
    return width, height


def _three_files(sources: Sequence[Path], prediction: str | None, notes: list[str]) -> _Parts:
    denoiser, text, autoencoder = sources
    state = read_state(denoiser, notes.append)
    arguments = unet_arguments(state)
    unet = unet_from_vgen(state, arguments)
    _check_prediction(denoiser, prediction)
    with naming(text):
        tower = read_state(text, notes.append)
        clip, encoder = companions.text_arguments_from_openclip(tower), companions.text_from_openclip(tower)
    with naming(autoencoder):
        held = read_state(autoencoder, notes.append)
        codec, vae = companions.autoencoder_arguments_from_ldm(held), companions.autoencoder_from_ldm(held)
    _, shift, scale = companions.kl_numbers(codec)
    return _Parts(
        spec.Networks(arguments, clip, Codec(codec, shift, scale)),
        schedule_of(_DDIM),
        (unet, encoder, vae),
        0,
        denoiser.stem,
        f"{LICENCE} where the file's own says nothing else",
        (_SIZE, _SIZE),
    )


def _check_prediction(denoiser: Path, prediction: str | None) -> None:
    """Raise CheckpointError where neither the file's name nor the option says that the network predicts epsilon."""
    others = "VGen's SR600 and its own text-to-video network, which predict v, have the same tensors"
    if prediction not in (None, "epsilon"):
        raise CheckpointError(f"prediction={prediction!r}: {others}, and no family here runs them")
    if prediction is None and not denoiser.name.startswith(Path(FILES[0]).stem):
        raise CheckpointError(
            f"its tensors are those of ModelScope's {FILES[0]}, but {others}: give --prediction epsilon where it is "
            "ModelScope's network or made of it, as ZeroScope is"
        )


def _converted(parts: _Parts, loras: Sequence[Lora], notes: list[str]) -> Converted:
    """The model directory, with the adapters merged. Raises CheckpointError for an adapter that does not fit."""
    schedule = parts.schedule
    names = (spec.UNET, spec.TEXT_ENCODER, spec.AUTOENCODER)
    weights = dict(zip(names, parts.weights, strict=True))
    merging: list[str] = []
    if loras:
        states = {"unet": weights[spec.UNET], "text_encoder": weights[spec.TEXT_ENCODER]}
        changed = merged(states, loras, merging, nested={"text_encoder": TEXT_PREFIX})
        weights |= {spec.UNET: changed["unet"], spec.TEXT_ENCODER: changed["text_encoder"]}
    return Converted(
        manifest=spec.manifest(
            parts.made_of,
            Sampling(schedule.schedule, schedule.prediction, schedule.solvers, guidance=spec.GUIDANCE),
            name=parts.name,
            licence=parts.licence,
            size=parts.size,
            text=clip_text(spec.TOKENIZER, parts.made_of.clip["max_position_embeddings"], parts.pad_id),
        ),
        weights=weights,
        texts={spec.TOKENIZER: build_clip_tokenizer().to_str(pretty=True)},
        notes=(*merging, *notes, *schedule.notes, f"licence: {parts.licence}", _NOTE),
    )
