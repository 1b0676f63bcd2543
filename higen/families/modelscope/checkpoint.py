"""ModelScope's, ZeroScope's and VGen's checkpoints: a folder of the hub's layout, or the authors' three files.

A folder     model_index.json, unet/, text_encoder/, vae/, scheduler/; plain files, fp16 variants or sharded files
Three files  text2video_pytorch_model.pth, open_clip_pytorch_model.bin, VQGAN_autoencoder.pth, or a folder of them
VGen         tft2v_t2v_*.pth, videolcm_t2v_*.pth or sr_step_*.pth as the first of the three files
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError, quoted
from higen.families import Converted
from higen.families.modelscope import spec
from higen.families.modelscope.unet import video_unet, video_unet_arguments
from higen.families.modelscope.vgen_kinds import kind_of, without_guides
from higen.families.modelscope.vgen_names import MARKS, check_others, unet_arguments, unet_from_vgen
from higen.families.preview_source import read_preview, with_preview
from higen.families.stable_diffusion.checkpoint import hub_parts
from higen.families.stable_diffusion.spec import Codec
from higen.families.stage_rows import Sampling, clip_text
from higen.models import companion_checkpoints as companions
from higen.models import hub_folders
from higen.models.checkpoint_files import folder_state, naming, read_json, read_names, read_state
from higen.models.companions import TEXT_PREFIX
from higen.models.lora import Lora, merged
from higen.models.nestings import found_in
from higen.tokenizer import build_clip_tokenizer

__all__ = ["convert", "recognise"]

State = Mapping[str, Tensor]

PIPELINES = ("TextToVideoSDPipeline", "VideoToVideoSDPipeline")
FILES = ("text2video_pytorch_model.pth", "open_clip_pytorch_model.bin", "VQGAN_autoencoder.pth")
"""The authors' file names of the U-Net, the text encoder and the autoencoder."""

LICENCE = "CC-BY-NC-4.0"
VGEN_LICENCE = "as published by ali-vilab/VGen (its code: Apache-2.0), derived from ModelScope's under CC-BY-NC-4.0"
_NOTE = f"ModelScope's weights and everything derived from them are under {LICENCE}: no commercial use"

_SIZE = 256
"""The side in pixels of the frames that the authors' network was trained on."""


def recognise(path: Path) -> bool:
    """Whether a folder or file holds ModelScope's text-to-video network, or one derived from it."""
    if path.is_dir():
        index = path / "model_index.json"
        return read_json(index).get("_class_name") in PIPELINES if index.is_file() else (path / FILES[0]).is_file()
    names = read_names(path)
    return names >= MARKS and "context_embedding.tokens" not in names


@dataclass(frozen=True)
class _Parts:
    """The contents of a source. `weights`: U-Net, text encoder, autoencoder; `size`: width and height in pixels."""

    made_of: spec.Networks
    sampling: Sampling
    weights: tuple[State, State, State]
    pad_id: int
    name: str
    licence: str
    size: tuple[int, int]


def convert(sources: Sequence[Path], **options: Any) -> Converted:
    """Tables and weights from a folder, or from the U-Net, the text encoder and the autoencoder as files.

    options  `prediction`: "epsilon" for a U-Net file with another name whose U-Net is ModelScope's or derived from it
             `network`: the network in a U-Net file, if the file's name does not show it (`vgen_kinds.NAMES`)
             `loras`: adapters (`lora.Lora`) that are added to the U-Net and the text encoder
             `preview`: folder or file of a tiny decoder for previews (`preview_source`)

    Raises CheckpointError for a source that is missing, incomplete or another kind of model, for a scheduler that the
    tables do not support, and for an adapter that does not fit.
    """
    if unknown := sorted(set(options) - {"prediction", "network", "loras", "preview"}):
        known = "prediction, network, loras and preview"
        raise CheckpointError(f"{', '.join(unknown)}: unknown; {spec.FAMILY} takes {known}")
    preview = read_preview(options.get("preview"))
    prediction, network, notes = options.get("prediction"), options.get("network"), list[str]()
    if len(sources) == 1 and sources[0].is_dir() and not (sources[0] / "model_index.json").is_file():
        with naming(folder := sources[0]):
            sources = [_inside(folder, name) for name in FILES]
    if len(sources) not in (1, len(FILES)) or (len(sources) == 1 and not sources[0].is_dir()):
        given = ", ".join(map(str, sources)) or "nothing"
        raise CheckpointError(f"{given}: one folder is wanted, or three files: {', '.join(FILES)}, in this order")
    with naming(sources[0]):
        if len(sources) == 1:
            if network is not None:
                raise CheckpointError(f"network={quoted(network)}: only for a U-Net in a file, but this is a folder")
            parts = _folder(sources[0], prediction, notes)
        else:
            parts = _three_files(sources, prediction, network, notes)
        unet, clip, codec = parts.made_of.unet, parts.made_of.clip, parts.made_of.codec
        companions.check_parts("its U-Net", clip, codec.arguments, unet["cross_attention_dim"], unet["in_channels"])
    return with_preview(_converted(parts, options.get("loras") or (), notes), preview)


def _inside(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise CheckpointError(f"{name} is missing; {', '.join(FILES)} belong together")
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
    schedule = around.schedule
    notes += schedule.notes
    licence = f"{LICENCE} unless its model card says otherwise" if card is None else f"{card}, as its model card says"
    return _Parts(
        made_of,
        Sampling(schedule.schedule, schedule.prediction, schedule.solvers, guidance=spec.GUIDANCE),
        (unet, around.text_encoder, around.autoencoder),
        around.pad_id,
        folder.name,
        licence,
        _pixels(config.get("sample_size"), around.codec.factor),
    )


def _pixels(sample_size: object, factor: int) -> tuple[int, int]:
    """Width and height in pixels. `sample_size` is a U-Net's, in latent cells: one number, or (height, width)."""
    pair = sample_size if isinstance(sample_size, (list, tuple)) and len(sample_size) == 2 else (sample_size,) * 2
    height, width = (int(side) * factor if isinstance(side, int) and side > 0 else _SIZE for side in pair)
    return width, height


def _three_files(sources: Sequence[Path], prediction: str | None, network: str | None, notes: list[str]) -> _Parts:
    denoiser, text, autoencoder = sources
    state: State = read_state(denoiser, notes.append)
    check_others(state)
    if not state.keys() >= MARKS:
        raise CheckpointError(f"not ModelScope's U-Net, nor one of VGen's with its layers: {found_in(state)}")
    # ZeroScope's files have other names. --prediction epsilon says that they hold ModelScope's network.
    kind = kind_of(denoiser, network or ("modelscope" if prediction == "epsilon" else None), state)
    if prediction not in (None, kind.sampling.prediction):
        raise CheckpointError(f"prediction={prediction!r}: {kind.title} predicts {kind.sampling.prediction}")
    state = without_guides(state, kind, notes)
    arguments = unet_arguments(state)
    unet = unet_from_vgen(state, arguments)
    with naming(text):
        tower = read_state(text, notes.append)
        clip, encoder = companions.text_arguments_from_openclip(tower), companions.text_from_openclip(tower)
    with naming(autoencoder):
        held = read_state(autoencoder, notes.append)
        codec, vae = companions.autoencoder_arguments_from_ldm(held), companions.autoencoder_from_ldm(held)
    _, shift, scale = companions.kl_numbers(codec)
    licence = LICENCE if kind.name == "modelscope" else VGEN_LICENCE
    return _Parts(
        spec.Networks(arguments, clip, Codec(codec, shift, scale), kind.upscales),
        kind.sampling,
        (unet, encoder, vae),
        0,
        denoiser.stem,
        f"{licence} unless the file's own licence says otherwise",
        kind.size,
    )


def _converted(parts: _Parts, loras: Sequence[Lora], notes: list[str]) -> Converted:
    """The model directory, with the adapters merged. Raises CheckpointError for an adapter that does not fit."""
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
            parts.sampling,
            name=parts.name,
            licence=parts.licence,
            size=parts.size,
            text=clip_text(spec.TOKENIZER, parts.made_of.clip["max_position_embeddings"], parts.pad_id),
        ),
        weights=weights,
        texts={spec.TOKENIZER: build_clip_tokenizer().to_str(pretty=True)},
        notes=(*merging, *notes, f"licence: {parts.licence}", _NOTE),
    )
