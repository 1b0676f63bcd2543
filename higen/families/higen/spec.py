"""Makes HiGen's tables (docs/manifest.md) from a model's configuration.

    text_encoder -> conditioner -> spatial_unet x steps -> the key frame's latents, the prior
    conditioner (motion, appearance) -> temporal_unet x steps -> vae_decoder

Only data, no PyTorch. `manifest` makes the tables; `config` recovers the configuration from them.
"""

from __future__ import annotations

from dataclasses import replace

from higen.errors import ManifestError
from higen.families.higen.architecture import (
    FAMILY,
    architecture,
    autoencoder_config,
    preview,
    text_config,
    unet_config,
)
from higen.families.higen.configuration import (
    TOKENIZER,
    AutoencoderConfig,
    Defaults,
    FewStepPreset,
    ModelConfig,
    TextConfig,
    UNetConfig,
    read_config,
    write_config,
)
from higen.families.stage_rows import (
    KNOWN,
    autoencoder_stages,
    known_frames_controls,
    solver_stages,
    strength_control,
    text_encoder_stage,
)
from higen.manifest import Manifest
from higen.presets import Preset, Stretch
from higen.schedule import Solver
from higen.stages import Output, Stage, Tensor
from higen.tables import Control, Loop, Mix, NoiseRule, Offset, Replaced, Sizes, Start, Variant

__all__ = ["AUTOENCODER", "DDIM", "DPM", "FAMILY", "TEXT_ENCODER", "TOKENIZER", "UNET"]
__all__ += ["AutoencoderConfig", "Defaults", "ModelConfig", "TextConfig", "UNetConfig"]
__all__ += [
    "autoencoder_config",
    "config",
    "manifest",
    "preview",
    "read_config",
    "stages",
    "text_config",
    "unet_config",
    "write_config",
]

UNET, TEXT_ENCODER, AUTOENCODER = "unet.safetensors", "text_encoder.safetensors", "vae.safetensors"

DDIM = Solver("ddim", "leading-floor", offset=1, final="first")
"""As in the reference: it ends at entry 0 of the schedule, which still contains noise (diffusion_ddim.py)."""

DPM = Solver("dpm++2m", "trailing-ceil", final="zero")

STRENGTH = 0.6
"""Default of the control `strength`: how much of a given video is redrawn."""

PLAIN = "_plain"
"""Suffix of a denoising stage's name, for the same step with one branch of guidance."""

KNOWN_INPUTS = (
    Tensor("known", ("B", "C", "F", "H", "W"), source="known:latents"),
    Tensor("known_mask", ("B", "F"), source="known:mask"),
)
"""The inputs for known frames in the steps of a clip, if the model was trained with known frames."""

TEMPORAL = "temporal_unet"
KNOWN_TEMPORAL = "temporal_unet_known"
"""The steps of a clip with known frames, if they have layers of their own (`UNetConfig.known_layers`)."""


# The tables.


def manifest(config: ModelConfig, plain: bool = True) -> Manifest:
    """The tables of a model. `plain=False`: without the steps with one branch of guidance.

    Raises ManifestError for a configuration whose parts do not fit each other.
    """
    every = stages(config.unet.known_frames, config.unet.level_channels[0], config.unet.known_layers)
    loops = _loops(config, plain)
    stepping = {name for loop in loops for name in loop.stages}
    rows = tuple(stage for stage in every if not stage.denoises or stage.name in stepping)
    return Manifest(
        name=config.name,
        licence=config.licence,
        family=FAMILY,
        architecture=architecture(config),
        prompts=config.prompts,
        sizes=_sizes(config),
        text=config.text.rules,
        controls=_controls(config),
        stages=rows,
        loops=loops,
        presets=tuple(Preset(p.name, p.steps, p.guidance, (None, p.stretch), p.usual) for p in config.defaults.presets),
    )


def stages(known_frames: bool = False, deep: int | None = None, known_layers: bool = False) -> tuple[Stage, ...]:
    """The stages of a HiGen model, including the plain ones.

    known_frames  the steps of a clip take known frames as inputs
    deep          channels of the network's deep features
    known_layers  there are other steps for a clip with known frames
    """
    hidden = ("B", "L", "Dt")
    prior = Tensor("prior", ("B", "C", "H", "W"), source="spatial.latents")
    known = _denoising_stages(KNOWN_TEMPORAL, "F", deep, prior, *KNOWN_INPUTS) if known_layers else ()
    return (
        text_encoder_stage(TEXT_ENCODER, "Dt"),
        Stage(
            "conditioner",
            UNET,
            (
                Tensor("hidden", hidden, source="text_encoder.hidden"),
                Tensor("motion", ("B", "F", "D"), source="control:motion"),
                Tensor("appearance", ("B", "F", "R"), source="control:appearance"),
            ),
            (Output("context", ("B", "K", "Dc")), Output("frame_embedding", ("B", "F", "E"))),
        ),
        *_denoising_stages("spatial_unet", 1, deep),
        *_denoising_stages(TEMPORAL, "F", deep, prior, *(KNOWN_INPUTS if known_frames else ())),
        *known,
        *autoencoder_stages(AUTOENCODER, "image"),
    )


def _denoising_stages(name: str, frames: str | int, deep: int | None, *extra: Tensor) -> tuple[Stage, Stage]:
    context = Tensor("context", ("B", "K", "Dc"), source="conditioner.context")
    empty = Tensor("empty_context", ("B", "K", "Dc"), source="conditioner@negative.context")
    embedding = Tensor("frame_embedding", ("B", frames, "E"), source="conditioner.frame_embedding")
    return solver_stages(name, name + PLAIN, UNET, frames, (context, empty, embedding, *extra), deep)


def _sizes(config: ModelConfig) -> Sizes:
    unet, defaults, factor = config.unet, config.defaults, config.autoencoder.factor
    return Sizes(
        symbols={
            "L": config.text.context_length,
            "C": unet.in_channels,
            "Dt": unet.text_dim,
            "D": unet.base_channels,
            "R": unet.appearance_columns,
            "K": unet.context_tokens,
            "Dc": unet.context_dim,
            "E": unet.embedding_dim,
        },
        factor=factor,
        multiple=factor * unet.size_multiple,
        width=defaults.width,
        height=defaults.height,
        fps=defaults.fps,
        frames=(1, defaults.frames, config.max_frames),
        decoder="vae_decoder",
        chunk=2,  # as the reference decodes
        overlap=0,
    )


def _controls(config: ModelConfig) -> tuple[Control, ...]:
    defaults = config.defaults
    return (
        Control(
            "motion",
            "curve",
            "amount of motion: 10 times the distance between the latents of neighbouring frames",
            encoding="sinusoid",
            low=0.0,
            measured="distance",
            default=defaults.motion,
            optional=config.optional_cues or defaults.motion is None,
            usual=defaults.usual_motion,
        ),
        Control(
            "appearance",
            "curve",
            "change of appearance over the clip: from 0 (none) to 1 (the ends differ), or a matrix of similarities",
            encoding="similarity",
            measured="similarity",
            default=defaults.appearance,
            optional=config.optional_cues or defaults.appearance is None,
        ),
        Control(
            "offset_noise",
            "number",
            "strength of the noise that is constant within each frame",
            encoding="number",
            low=0.0,
            default=defaults.offset_noise,
        ),
        Control("image", "picture", "the key frame, instead of one generated from the text"),
        *known_frames_controls(),
        Control("video", "clip", "a video to start from"),
        strength_control("video", STRENGTH),
    )


def _loops(config: ModelConfig, plain: bool) -> tuple[Loop, Loop]:
    """The loop of the key frame, then the loop of the clip. The key frame has the cues of a still clip."""
    defaults, solvers = config.defaults, _solvers(config.defaults.solver)
    guided = tuple(name if has else None for name, has in zip(("spatial_unet", TEMPORAL), config.guided, strict=True))
    spatial = Loop(
        name="spatial",
        guided=guided[0],
        plain="spatial_unet" + PLAIN if plain else None,
        frames=1,
        schedule=config.schedule,
        prediction="v",
        solvers=solvers,
        steps=defaults.steps[0],
        guidance=defaults.guidance[0],
        noise=NoiseRule(purpose=0),
        controls={"motion": 0.0, "appearance": 0.0},
        replaced=Replaced("image", "vae_encoder.latents"),
    )
    temporal = replace(
        spatial,
        name="temporal",
        guided=guided[1],
        plain=TEMPORAL + PLAIN if plain else None,
        frames="F",
        least_frames=2,
        steps=defaults.steps[1],
        guidance=defaults.guidance[1],
        noise=NoiseRule(
            purpose=1,
            offset=Offset(purpose=2, scale="control:offset_noise"),
            mix=Mix("spatial", defaults.noise_mix) if defaults.noise_mix else None,
        ),
        controls={},
        replaced=None,
        start=Start("video", "vae_encoder@video.latents", "control:strength"),
        known=KNOWN,
        variant=_known_variant(config.guided[1], plain) if config.unet.known_layers else None,
        stretch=_stretch(defaults),
    )
    return spatial, temporal


def _known_variant(guided: bool, plain: bool) -> Variant:
    """The steps of a clip with known frames. There is one for each of the loop's own steps."""
    return Variant(KNOWN.control, KNOWN_TEMPORAL if guided else None, KNOWN_TEMPORAL + PLAIN if plain else None)


def _stretch(defaults: Defaults) -> Stretch | None:
    """The stretch of a clip's latents from the key frame's; None if no request needs it."""
    needed = defaults.stretch != 1 or any(preset.stretch is not None for preset in defaults.presets)
    return Stretch("spatial", defaults.stretch) if needed else None


def _solvers(default: str) -> tuple[Solver, ...]:
    """The solvers of a loop, the default one first. Raises ManifestError for another name."""
    rows = {solver.name: solver for solver in (DDIM, DPM)}
    if default not in rows:
        raise ManifestError(f"defaults.solver={default!r}: one of {', '.join(map(repr, rows))}")
    return rows.pop(default), *rows.values()


def config(manifest: Manifest) -> ModelConfig:
    """The configuration from which `manifest` made the tables.

    Raises ManifestError if the tables are not those of a HiGen model, or if no configuration corresponds to them.
    """
    controls = {control.name: control for control in manifest.controls}
    loops = {loop.name: loop for loop in manifest.loops}
    wanted = ("motion", "appearance", "offset_noise", "spatial", "temporal")
    if missing := [name for name in wanted if name not in controls | loops]:
        raise ManifestError(f"controls, loops: {', '.join(missing)} missing; family={FAMILY!r} has them")
    pair = (loops["spatial"], loops["temporal"])
    for key in ("schedule", "solvers"):
        if getattr(pair[0], key) != getattr(pair[1], key):
            raise ManifestError(f"loops.temporal.{key}: must equal the spatial loop's in this family")
    sizes, motion, appearance = manifest.sizes, controls["motion"], controls["appearance"]
    return ModelConfig(
        name=manifest.name,
        licence=manifest.licence,
        unet=unet_config(manifest),
        schedule=pair[0].schedule,
        text=text_config(manifest),
        autoencoder=autoencoder_config(manifest),
        defaults=Defaults(
            frames=sizes.frames[1],
            width=sizes.width,
            height=sizes.height,
            fps=sizes.fps,
            steps=(pair[0].steps, pair[1].steps),
            guidance=(_one_guidance(pair[0]), _one_guidance(pair[1])),
            solver=pair[0].solvers[0].name,
            motion=motion.default,
            appearance=appearance.default,
            offset_noise=controls["offset_noise"].default,
            usual_motion=motion.usual,
            noise_mix=_noise_mix(pair[1]),
            stretch=1.0 if pair[1].stretch is None else pair[1].stretch.by,
            presets=tuple(_few_steps(preset) for preset in manifest.presets),
        ),
        max_frames=sizes.frames[2],
        optional_cues=motion.optional and appearance.optional,
        prompts=manifest.prompts,
        guided=(pair[0].guided is not None, pair[1].guided is not None),
    )


def _few_steps(preset: Preset) -> FewStepPreset:
    (first, second), (scale, other), (_, by) = preset.steps, preset.guidance, preset.stretch  # the first loop has none
    return FewStepPreset(preset.name, (first, second), (scale, other), by, preset.usual)


def _noise_mix(loop: Loop) -> float:
    mix = loop.noise.mix
    if mix is not None and isinstance(mix.scale, str):
        raise ManifestError(f"loops.{loop.name}.noise.mix.scale={mix.scale!r}: a number for this family's training")
    return 0.0 if mix is None else float(mix.scale)


def _one_guidance(loop: Loop) -> float:
    if isinstance(loop.guidance, tuple):
        raise ManifestError(f"loops.{loop.name}.guidance={list(loop.guidance)}: one number for this family's training")
    return loop.guidance
