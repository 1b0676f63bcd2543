"""VGen's networks with the same tensors as ModelScope's: which one a file holds, and how each is sampled.

Their tensors have the same names, so the file's name or the user must say which network it is. Source of the numbers:
VGen's configs/{tft2v_t2v,videolcm_t2v,sr600}_infer.yaml and the inference entry points of the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from higen.errors import CheckpointError, quoted
from higen.families.modelscope import spec
from higen.families.stage_rows import Sampling
from higen.models.diffusers_schedulers import schedule_of
from higen.schedule import NoiseSchedule, Solver

__all__ = ["NAMES", "Kind", "kind_of", "without_guides"]

State = Mapping[str, Tensor]

FIRST = "input_blocks.0.0.weight"
"""The first convolution."""

GUIDES = 8
"""Input channels of TF-T2V and VideoLCM for guiding pictures. They are zeros if only a text guides the network."""

_IMAGE = "pre_image_condition."
"""TF-T2V's layers for a guiding picture. They are not needed for text."""


@dataclass(frozen=True)
class Kind:
    """One of VGen's networks.

    name, title   its name as a value of `network`, and its name in messages
    begins        the beginning of its files' names
    guides        input channels of the first convolution after those of the latents
    size          width and height in pixels for which it was trained
    """

    name: str
    title: str
    begins: str
    sampling: Sampling
    size: tuple[int, int]
    guides: int = 0
    upscales: bool = False


_DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
"""The schedule of ModelScope's network, in training and sampling (configuration.json: linear_sd)."""

_MODELSCOPE = schedule_of(_DDIM)
_ZERO_SNR = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
_LEADING = Solver("ddim", "leading", offset=1, final="first")

_KINDS = (
    Kind(
        "modelscope",
        "ModelScope's text to video",
        "text2video_pytorch_model",
        Sampling(_MODELSCOPE.schedule, _MODELSCOPE.prediction, _MODELSCOPE.solvers, guidance=spec.GUIDANCE),
        (256, 256),
    ),
    Kind("tft2v", "TF-T2V", "tft2v_t2v", Sampling(_ZERO_SNR, "v", (_LEADING,), guidance=9.0), (448, 256), GUIDES),
    Kind(
        "videolcm",
        "VideoLCM",
        "videolcm_t2v",
        Sampling(_ZERO_SNR, "v", (Solver("lcm"),), steps=4, guidance=1.0),
        (448, 256),
        GUIDES,
    ),
    Kind(
        "sr600",
        "VGen's SR600",
        "sr_step",
        Sampling(
            NoiseSchedule("cosine", zero_terminal_snr=True),
            "v",
            (Solver("ddim", "trailing-ceil"), Solver("dpm++2m", "trailing-ceil")),
            steps=40,
            guidance=3.0,
        ),
        (1280, 720),
        upscales=True,
    ),
)
NAMES = tuple(kind.name for kind in _KINDS)


def kind_of(path: Path, network: str | None, state: State) -> Kind:
    """The network in the file `path`: `network`, one of `NAMES`, or else the one that the file's name indicates.

    Raises CheckpointError if neither says it, and if the first convolution belongs to another network.
    """
    if network is not None and network not in NAMES:
        raise CheckpointError(f"network={quoted(network)}: one of {', '.join(NAMES)}")
    found = [kind for kind in _KINDS if (kind.name == network if network else path.name.startswith(kind.begins))]
    if not found:
        named = ", ".join(f"{kind.name} ({kind.title}, {kind.begins}*)" for kind in _KINDS)
        raise CheckpointError(
            f"its tensors do not say which network it is, nor does its name: give --network, one of {named}. "
            "VGen's own text-to-video network has the same tensors, and no family here runs it"
        )
    (kind,) = found
    _check_guides(kind, state)
    return kind


def _check_guides(kind: Kind, state: State) -> None:
    channels = int(state[FIRST].shape[1]) if FIRST in state and state[FIRST].ndim == 4 else None
    wide = spec.LATENT_CHANNELS + GUIDES
    if not kind.guides and (image := next((name for name in state if name.startswith(_IMAGE)), None)):
        raise CheckpointError(f"{image}: a layer of TF-T2V, not of {kind.title}")
    if channels == wide and not kind.guides:
        raise CheckpointError(f"a U-Net with {wide} input channels is TF-T2V or VideoLCM, not {kind.title}")
    if kind.guides and channels != wide:
        raise CheckpointError(f"a U-Net with {channels} input channels is not {kind.title}, which has {wide}")


def without_guides(state: State, kind: Kind, notes: list[str]) -> State:
    """A network's tensors without those for guiding pictures: their inputs are zeros if only a text guides it."""
    if not kind.guides:
        return state
    unused = sorted(name for name in state if name.startswith(_IMAGE))
    notes.append(
        f"{kind.title} is converted for text only: the first convolution's last {kind.guides} input "
        f"channels{f' and {len(unused)} tensors {_IMAGE}*' if unused else ''} are left out, because only pictures "
        "use them"
    )
    kept = {name: tensor for name, tensor in state.items() if name not in unused}
    return {**kept, FIRST: state[FIRST][:, : spec.LATENT_CHANNELS]}
