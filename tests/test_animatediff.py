"""AnimateDiff: tiny random models in every published format, beside diffusers' own pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cpp_build
import diffusers
import numpy as np
import pytest
import tiny_animatediff as tiny_motion
import tiny_diffusers as tiny
import torch
from numpy.typing import NDArray
from test_stable_diffusion import apart, set_values, tokens

import higen
from higen.bundle import Bundle
from higen.convert import convert_sources
from higen.export.model import export_model
from higen.noise import frame_noise, row_purpose
from higen.pipeline import Pipeline

# diffusers and NumPy 2: an array of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

PROMPT, NEGATIVE, SEED = "waves on a beach", "blurry", 7
WIDTH, HEIGHT, FRAMES = 16, 8, 3  # pixels: 8x4 latent cells
SIZES = {"width": WIDTH, "height": HEIGHT}
PURPOSE = 1  # of a clip's noise

BASE = {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's folder of Stable Diffusion 1.5, whose scheduler is PNDM, as there."""
    pipeline = tiny.image_pipeline(tiny.scheduler("PNDMScheduler", **BASE))
    folder = tiny.save(pipeline, tmp_path_factory.mktemp("hub") / "stable-diffusion-v1-5")
    return set_values(folder, "scheduler/scheduler_config.json", clip_sample=False)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's folder of a motion adapter with a middle block."""
    folder = tmp_path_factory.mktemp("hub") / "motion-adapter-v1-5-2"
    tiny_motion.adapter().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base: Path, module: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The model directory of the two, with its graphs."""
    bundle = convert_sources([base, module], tmp_path_factory.mktemp("converted") / "model", dtype="fp32")
    return export_model(bundle)


@pytest.fixture(scope="module")
def by_torch(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="torch")


@pytest.fixture(scope="module")
def by_graphs(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="onnx")


def last_latents(pipe: Pipeline, **options: Any) -> NDArray[np.float32]:
    """The final latents [C,F,H,W] of our loop."""
    given = {"seed": SEED, "frames": FRAMES, "negative_prompt": NEGATIVE, **SIZES, **options}
    *_, last = (event for event in pipe.stream(PROMPT, **given) if isinstance(event, higen.Step))
    return np.asarray(last.latents, dtype=np.float32)[0]


def sampler(base: Path, kind: str, **changes: Any) -> Any:
    """diffusers' scheduler of this kind, of the base's configuration changed as its documentation says."""
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return getattr(diffusers, kind).from_config({**config, **tiny_motion.LINEAR, **changes})


def wanted_latents(
    model: Bundle,
    scheduler: Any,
    steps: int,
    guidance: float,
    pipeline: Any = None,
    frames: int = FRAMES,
    height: int = HEIGHT // 2,
    width: int = WIDTH // 2,
) -> NDArray[np.float32]:
    """The final latents [C,F,H,W] of diffusers' pipeline on the noise of our seed; height and width in cells."""
    pipeline = pipeline or tiny_motion.pipeline(scheduler)
    pipeline.scheduler = scheduler
    noise = torch.from_numpy(frame_noise(SEED, PURPOSE, 4, frames, height, width))[None]
    rows = iter(range(1000))

    def drawn(*_: Any, **__: Any) -> torch.Tensor:
        return torch.from_numpy(frame_noise(SEED, row_purpose(PURPOSE, next(rows)), 4, frames, height, width))[None]

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", drawn, raising=False)
        given, empty = (pipeline.text_encoder(tokens(model, text)).last_hidden_state for text in (PROMPT, NEGATIVE))
        made = pipeline(
            prompt_embeds=given,
            negative_prompt_embeds=empty,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.clone(),
            output_type="latent",
        )
    latents: NDArray[np.float32] = made.frames[0].numpy()
    return latents


SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
}


@pytest.mark.parametrize("steps", [8, 25])
@pytest.mark.parametrize("solver", ["ddim", "dpm++2m", "euler_ancestral"])
def test_final_latents_are_those_of_diffusers(
    base: Path, model: Bundle, by_torch: Pipeline, solver: str, steps: int
) -> None:
    wanted = wanted_latents(model, sampler(base, SAMPLERS[solver]), steps, 7.5)
    got = last_latents(by_torch, solver=solver, steps=steps, guidance=7.5)
    assert apart(got, wanted) < 1e-4


def test_the_first_solver_is_that_of_diffusers_documentation(model: Bundle) -> None:
    loop = model.manifest.loop("temporal")
    assert loop.solvers[0].name == "ddim"
    assert {solver.name for solver in loop.solvers} == set(SAMPLERS)
    assert loop.schedule.kind == "linear"
    assert model.manifest.loop("spatial").schedule.kind == "scaled_linear"


@pytest.mark.parametrize("steps", [8, 25])
def test_graphs_give_the_same(base: Path, model: Bundle, by_graphs: Pipeline, steps: int) -> None:
    wanted = wanted_latents(model, sampler(base, "DDIMScheduler"), steps, 7.5)
    assert apart(last_latents(by_graphs, steps=steps, guidance=7.5), wanted) < 1e-4
