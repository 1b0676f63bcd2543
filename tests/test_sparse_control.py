"""SparseCtrl in AnimateDiff's steps, compared with diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import test_animatediff as clips
import tiny_animatediff as tiny_motion
import tiny_diffusers as tiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray
from test_control import base, drawn, module, per_frame, scheduler
from test_stable_diffusion import apart

import higen
from higen.bundle import Bundle
from higen.convert import convert_sources
from higen.pipeline import Pipeline

# a warning of diffusers under NumPy 2 about arrays made from tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

__all__ = ["base", "module"]  # fixtures

KINDS: dict[str, dict[str, Any]] = {"rgb": {}, "scribble": tiny_motion.SHOWN_PIXELS}
SCALES = [0.2, 1.0, 0.7]
PLACES = (2, 0)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, base: Path, module: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    hub = tmp_path_factory.mktemp("hub") / f"animatediff-sparsectrl-{kind}"
    tiny_motion.sparse_control(**KINDS[kind]).save_pretrained(hub)
    return convert_sources([base, hub, module], tmp_path_factory.mktemp("converted") / "model", dtype="fp32")


@pytest.fixture(scope="module")
def by_torch(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="torch")


def pictures() -> NDArray[np.uint8]:
    return drawn(clips.FRAMES, clips.WIDTH, clips.HEIGHT)


def given() -> dict[int, NDArray[np.uint8]]:
    return {place: pictures()[place] for place in PLACES}


def truth(kind: str, base: Path, scales: list[float]) -> Any:
    """diffusers' pipeline. It encodes pictures to the mean of their latents, as higen does, not to a random sample."""
    pipeline: Any = diffusers.AnimateDiffSparseControlNetPipeline(
        vae=tiny.autoencoder(),
        text_encoder=tiny.text_encoder(32),
        tokenizer=None,
        unet=tiny.image_unet(),
        motion_adapter=tiny_motion.adapter(),
        controlnet=per_frame(tiny_motion.sparse_control(**KINDS[kind]), scales),
        scheduler=scheduler(base, **tiny_motion.LINEAR),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wanted_latents(model: Bundle, kind: str, base: Path, places: tuple[int, ...]) -> NDArray[np.float32]:
    """The final latents [C,F,H,W] of diffusers' pipeline."""
    pipeline = truth(kind, base, SCALES)

    def call(**named: Any) -> Any:
        shown = [PIL.Image.fromarray(pictures()[place]) for place in places]
        sizes = {"width": clips.WIDTH, "height": clips.HEIGHT}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiagonalGaussianDistribution, "sample", lambda own, generator=None: own.mode())
            return type(pipeline).__call__(
                pipeline, conditioning_frames=shown, controlnet_frame_indices=list(places), **sizes, **named
            )

    call.text_encoder = pipeline.text_encoder  # type: ignore[attr-defined]
    return clips.wanted_latents(model, pipeline.scheduler, 3, 7.5, call, frames=clips.FRAMES)


def test_a_clip_with_pictures_of_two_frames_is_that_of_diffusers(
    model: Bundle, kind: str, by_torch: Pipeline, base: Path
) -> None:
    got = clips.last_latents(by_torch, control=given(), control_scale=SCALES, steps=3, guidance=7.5)
    assert apart(got, wanted_latents(model, kind, base, PLACES)) < 1e-4
    assert apart(clips.last_latents(by_torch, steps=3, guidance=7.5), got) > 1e-2
