"""AnimateDiff's checkpoints: a Stable Diffusion 1.5 model and a motion module, or a diffusers folder with both.

Two sources   a Stable Diffusion folder or single file, and a motion module (see `motion_sources`), in either order
One source    the folder of an AnimateDiffPipeline
A ControlNet or a SparseCtrl network may be added to either.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from higen.errors import CheckpointError, quoted
from higen.families import Converted
from higen.families.animatediff import spec
from higen.families.animatediff.motion_sources import Motion, diffusers_name, is_motion, read_motion
from higen.families.animatediff.sparse_control import read_sparse_control
from higen.families.animatediff.unet import motion_unet
from higen.families.preview_source import read_preview, with_preview
from higen.families.stable_diffusion import checkpoint as stable_diffusion
from higen.families.stable_diffusion import spec as image
from higen.families.stable_diffusion.control_source import (
    SPARSE,
    ControlSource,
    control_class,
    read_control,
    with_control,
    without_controls,
)
from higen.families.stage_rows import Sampling, clip_text
from higen.models import companion_checkpoints as companions
from higen.models.checkpoint_files import folder_state, naming, read_json
from higen.models.companions import TEXT_PREFIX, quiet_import
from higen.models.diffusers_schedulers import schedule_of
from higen.models.diffusers_unet import check_configuration, image_unet_arguments
from higen.models.lora import Lora, merged
from higen.schedule import NoiseSchedule, Solver
from higen.tables import TextRules
from higen.tokenizer import build_clip_tokenizer

__all__ = ["convert", "recognise"]

PIPELINES = ("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline")

_CLIP_SCHEDULE: Mapping[str, Any] = {"beta_schedule": "linear", "timestep_spacing": "linspace", "steps_offset": 1}
"""The schedule of the motion modules' training (the base model's is scaled_linear), and the grid of diffusers."""

_MOTION_LICENCE = "the motion module: Apache-2.0, unless its own licence says otherwise"

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Parts:
    """A model before adapters are merged into it. `weights`: U-Net, text encoder, autoencoder."""

    made_of: spec.Networks
    image: Sampling
    clip: Sampling
    weights: tuple[State, State, State]
    text: TextRules
    name: str
    licence: str
    size: int


def recognise(path: Path) -> bool:
    """Whether a folder or file holds motion modules, a pipeline with motion modules, or a SparseCtrl network."""
    index = path / "model_index.json"
    if path.is_dir() and index.is_file():
        return str(read_json(index).get("_class_name")).startswith("AnimateDiff")
    return is_motion(path) or control_class(path) == SPARSE


def convert(sources: Sequence[Path], **options: Any) -> Converted:
    """Tables and weights from a Stable Diffusion model and a motion module, or from one folder that has both.

    options  `prediction`: "epsilon" or "v", as for Stable Diffusion; default: as the files say
             `control_kind`: one of `control_source.KINDS`, needed if a ControlNet is among the sources
             `group_norm`: one of `spec.GROUP_NORMS`; None: as in the code for which the motion module's file was made
             `loras`: adapters (`lora.Lora`) that are added to the U-Net, its motion modules and the text encoder
             `preview`: folder or file of a tiny decoder for previews (`preview_source`)

    Raises CheckpointError for a source that is missing, incomplete or another kind of model, for parts that do not
    belong together, for a scheduler that the tables do not support, and for an adapter that does not fit.
    """
    if unknown := sorted(set(options) - {"prediction", "group_norm", "control_kind", "loras", "preview"}):
        known = "prediction, group_norm, control_kind, loras and preview"
        raise CheckpointError(f"{', '.join(unknown)}: unknown; {spec.FAMILY} takes {known}")
    group_norm = options.get("group_norm")
    if group_norm not in (None, *spec.GROUP_NORMS):
        raise CheckpointError(f"group_norm={quoted(group_norm)}: one of {', '.join(map(repr, spec.GROUP_NORMS))}")
    prediction, notes = options.get("prediction"), list[str]()
    classes, preview = ("ControlNetModel", SPARSE), read_preview(options.get("preview"))
    given, control = without_controls(list(sources), options.get("control_kind"), classes)
    motions = [path for path in given if recognise(path)]
    bases = [path for path in given if path not in motions]
    whole = [path for path in motions if (path / "model_index.json").is_file()]
    if len(given) == 1 and whole:
        with naming(whole[0]):
            parts = _folder(whole[0], prediction, group_norm, notes)
    elif len(motions) == len(bases) == 1 and not whole:
        parts = _two(bases[0], motions[0], prediction, group_norm, notes)
    else:
        named = ", ".join(map(str, sources)) or "nothing"
        besides = "" if control is None else f"; {control} is a control network"
        raise CheckpointError(
            f"{named}: a Stable Diffusion 1.5 model and one motion module are wanted, or one folder of a "
            f"{PIPELINES[0]}; the motion modules among them: {', '.join(map(str, motions)) or 'none'}{besides}"
        )
    found = None
    if control is not None:
        made_of, factor = parts.made_of, parts.made_of.codec.factor
        if control_class(control) == SPARSE:
            found = read_sparse_control(control, made_of.unet, factor, notes)
            made_of = replace(made_of, sparse_control=found.arguments)
        else:
            found = read_control(control, options["control_kind"], made_of.unet, factor, notes)
            made_of = replace(made_of, control=found.arguments)
        parts = replace(parts, made_of=made_of, name=f"{parts.name}-{found.name}")
    return with_preview(_converted(parts, options.get("loras") or (), notes, found), preview)


def _two(base: Path, module: Path, prediction: str | None, group_norm: str | None, notes: list[str]) -> _Parts:
    """A Stable Diffusion model and a motion module."""
    with naming(module):
        motion = read_motion(module, notes)
    pictures = stable_diffusion.convert([base], prediction=prediction)
    made_of, loop = image.networks(pictures.manifest), pictures.manifest.loops[0]
    if made_of.clip["hidden_size"] == stable_diffusion.TEXT_WIDTH_OF_2:
        raise CheckpointError(f"{base}: Stable Diffusion 2; motion modules are made for version 1.5")
    with naming(module):
        arguments = _arguments(made_of.unet, motion)
        unet = {**pictures.weights[image.UNET], **motion.state}
        _check(unet, arguments, "motion modules for this U-Net")
    notes += pictures.notes
    assert pictures.manifest.text is not None
    return _Parts(
        spec.Networks(arguments, made_of.clip, made_of.codec, group_norm or motion.group_norm),
        Sampling(loop.schedule, loop.prediction, loop.solvers, loop.steps),
        _clip_sampling(loop.schedule, loop.prediction, loop.solvers),
        (unet, pictures.weights[image.TEXT_ENCODER], pictures.weights[image.AUTOENCODER]),
        pictures.manifest.text,
        f"{pictures.manifest.name}-{module.name if module.is_dir() else module.stem}",
        f"{pictures.manifest.licence}; {_MOTION_LICENCE}",
        pictures.manifest.sizes.width,
    )


def _clip_sampling(base: NoiseSchedule, prediction: str, solvers: tuple[Solver, ...]) -> Sampling:
    """The sampling of clips, derived from the base model's sampling: DDIM first, with the settings of diffusers."""
    final = next((solver.final for solver in solvers if solver.name == "ddim"), "zero")
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": base.timesteps,
        "beta_start": base.beta_start,
        "beta_end": base.beta_end,
        "set_alpha_to_one": final == "zero",
        **_CLIP_SCHEDULE,
    }
    found = schedule_of(config, prediction)
    return Sampling(found.schedule, found.prediction, found.solvers, spec.STEPS)


def _folder(folder: Path, prediction: str | None, group_norm: str | None, notes: list[str]) -> _Parts:
    """A diffusers pipeline. Its motion modules are in its U-Net or in a separate folder."""
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise CheckpointError(f"a {kind}, which no family here runs; one of {', '.join(PIPELINES)} is wanted")
    config = read_json(folder / "unet" / "config.json")
    around = stable_diffusion.hub_parts(folder, prediction, notes)
    unet: State = folder_state(folder / "unet", ("diffusion_pytorch_model",), notes.append)
    if config.get("_class_name") == "UNetMotionModel":
        check_configuration(config, "UNetMotionModel")
        defaults = _defaults()
        arguments = defaults | {name: value for name, value in config.items() if name in defaults}
        if arguments["mid_block_layers"] != 1:
            raise CheckpointError(f"mid_block_layers={arguments['mid_block_layers']!r}: 1 is wanted")
    else:
        motion = read_motion(folder / "motion_adapter", notes)
        arguments = _arguments(image_unet_arguments(config), motion)
        unet = {**unet, **motion.state}
    _check(unet, arguments, "the U-Net of its config.json")
    schedule = around.schedule
    notes += [*schedule.notes, stable_diffusion.SAFETY]
    sampling = Sampling(schedule.schedule, schedule.prediction, schedule.solvers, spec.STEPS)
    text = clip_text(spec.TOKENIZER, around.clip["max_position_embeddings"], around.pad_id)
    return _Parts(
        spec.Networks(arguments, around.clip, around.codec, group_norm or spec.CLIP),
        sampling,
        sampling,
        (unet, around.text_encoder, around.autoencoder),
        text,
        folder.name,
        f"{stable_diffusion.licence_of(around.clip)}; {_MOTION_LICENCE}",
        int(config.get("sample_size") or 64) * around.codec.factor,
    )


def _defaults() -> dict[str, Any]:
    """The default values of UNetMotionModel's arguments, except the training size."""
    with quiet_import("diffusers", "the U-Net"):
        from diffusers import UNetMotionModel
    known = inspect.signature(UNetMotionModel.__init__).parameters.values()
    return {row.name: row.default for row in known if row.name not in ("self", "sample_size")}


def _arguments(pictures: Mapping[str, Any], motion: Motion) -> dict[str, Any]:
    """UNetMotionModel's arguments for an image U-Net with these motion modules, as in its `from_unet2d`.

    Raises CheckpointError for motion modules of another base model, and for a U-Net with parts that UNetMotionModel
    does not have.
    """
    with quiet_import("diffusers", "the U-Net"):
        from diffusers import UNet2DConditionModel
    defaults = {row.name: row.default for row in inspect.signature(UNet2DConditionModel.__init__).parameters.values()}
    usual = ("block_out_channels", "layers_per_block", "attention_head_dim", "cross_attention_dim")
    given = {**{name: defaults[name] for name in usual}, **pictures}
    widths, layers = tuple(given["block_out_channels"]), given["layers_per_block"]
    of_levels = (layers,) * len(widths) if isinstance(layers, int) else tuple(layers)
    if (widths, of_levels) != (motion.widths, motion.layers):
        raise CheckpointError(
            f"motion modules for a U-Net with {_levels(motion.widths, motion.layers)}, but this one "
            f"has {_levels(widths, of_levels)}"
        )
    arguments = _defaults()
    for name, value in given.items():
        if name in ("down_block_types", "up_block_types"):
            arguments[name] = [_with_motion(kind) for kind in value]
        elif name in arguments:
            arguments[name] = value
        elif name != "attention_head_dim" and value not in (None, defaults.get(name)):
            raise CheckpointError(f"{name}={value!r}: a U-Net with motion modules cannot have it")
    # In an image U-Net, diffusers keeps the number of heads under the name of the head's size.
    heads = given.get("num_attention_heads") or given.get("attention_head_dim")
    return {**arguments, "num_attention_heads": heads, **motion.arguments}


def _levels(widths: tuple[int, ...], layers: tuple[int, ...]) -> str:
    return f"levels of {', '.join(map(str, widths))} channels and {', '.join(map(str, layers))} blocks"


def _with_motion(kind: str) -> str:
    found = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
    if kind not in found:
        raise CheckpointError(f"{kind}: motion modules go between {', '.join(sorted(found))}")
    return kind.replace("2D", "Motion")


def _check(unet: State, arguments: Mapping[str, Any], what: str) -> None:
    shapes = companions.shapes_of(lambda: motion_unet(arguments, spec.CLIP))
    companions.check_tensors(unet, shapes, what)


def _converted(parts: _Parts, loras: Sequence[Lora], notes: list[str], control: ControlSource | None) -> Converted:
    """The model directory, with adapters merged. Raises CheckpointError for parts that do not belong together."""
    made_of, (unet, text, autoencoder) = parts.made_of, parts.weights
    channels, width = made_of.unet.get("in_channels"), made_of.unet.get("cross_attention_dim")
    companions.check_parts("its U-Net", made_of.clip, made_of.codec.arguments, width, channels)
    if loras:
        states, names = {"unet": unet, "text_encoder": text}, {"text_encoder": TEXT_PREFIX}
        merging: list[str] = []
        changed = merged(states, loras, merging, nested=names, renamed=diffusers_name)
        unet, text, notes = changed["unet"], changed["text_encoder"], [*merging, *notes]
    over = {spec.FRAME: "each frame, as in the authors' code", spec.CLIP: "all frames, as in diffusers"}
    other = next(name for name in spec.GROUP_NORMS if name != made_of.group_norm)
    return Converted(
        manifest=spec.manifest(
            made_of,
            parts.image,
            parts.clip,
            name=parts.name,
            licence=parts.licence,
            size=parts.size,
            text=parts.text,
            edges=control is not None and control.edges,
        ),
        weights={spec.UNET: with_control(unet, control), spec.TEXT_ENCODER: text, spec.AUTOENCODER: autoencoder},
        texts={spec.TOKENIZER: build_clip_tokenizer().to_str(pretty=True)},
        notes=(
            *notes,
            f"the motion modules' group norms take their statistics over {over[made_of.group_norm]} "
            f"(--group-norm {other} for the other)",
            f"at most {made_of.most_frames} frames, the positions that the motion modules know",
            f"licence of {_MOTION_LICENCE}",
        ),
    )
