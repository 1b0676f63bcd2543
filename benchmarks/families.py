"""Times whole loops of other families beside diffusers' pipelines of the same weights, and says how far they are apart.

    python benchmarks/families.py WORK [--family animatediff] [--size full|tiny] [--steps 10] [--precision fp16]
        [--make]

The models have the published architectures and random weights: none is zero, so that nothing of a network is hidden.
WORK keeps them; full size takes 4 to 10 GB each. Both sides run in PyTorch, eagerly, on the GPU if there is one, from
the same noise, with guidance; each is run twice and the second run is timed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from hardware import hardware, synchronise
from numpy.typing import NDArray
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

import higen
from higen.bundle import Bundle
from higen.convert import convert_sources
from higen.families.svd.spec import AUGMENTATION, NOISE
from higen.noise import frame_noise, shaped
from higen.tokenizer import PromptTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_animatediff
import tiny_diffusers as tiny
import tiny_svd

PROMPT, NEGATIVE, SEED = "a red apple, on a table", "blurry", 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Latents = NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """A family's model: `build` makes diffusers' pipeline of it, `theirs` and `ours` run the loop on the same noise."""

    build: Callable[[bool], Any]
    theirs: Callable[[Any, Bundle, int, tuple[int, int, int]], Latents]
    options: Callable[[tuple[int, int, int]], dict[str, Any]]
    full: tuple[int, int, int]
    tiny: tuple[int, int, int]


def text_encoder() -> CLIPTextModel:
    """Stable Diffusion 1.5's."""
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return CLIPTextModel(config)


def autoencoder(kind: Any = diffusers.AutoencoderKL) -> Any:
    """Stable Diffusion's, or Stable Video Diffusion's with a temporal decoder."""
    ups = {} if kind is not diffusers.AutoencoderKL else {"up_block_types": ["UpDecoderBlock2D"] * 4}
    downs = ["DownEncoderBlock2D"] * 4
    return kind(block_out_channels=[128, 256, 512, 512], down_block_types=downs, layers_per_block=2, **ups)


def build_stable_diffusion(full: bool) -> Any:
    """Stable Diffusion 1.5."""
    sampler = tiny.scheduler("DDIMScheduler", set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    if not full:
        return tiny.image_pipeline(sampler)
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    pipeline = tiny.image_pipeline(sampler, unet, text_encoder())
    pipeline.vae = autoencoder()
    return pipeline


def build_animatediff(full: bool) -> Any:
    """Stable Diffusion 1.5 with a motion module of the third version."""
    sampler = tiny.scheduler("DDIMScheduler", **tiny_animatediff.LINEAR)
    if not full:
        return tiny_animatediff.pipeline(sampler)
    motion = diffusers.MotionAdapter(use_motion_mid_block=False)
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    pipeline = tiny_animatediff.pipeline(sampler, motion, unet, text_encoder())
    pipeline.vae = autoencoder()
    return pipeline


def build_svd(full: bool) -> Any:
    """Stable Video Diffusion of 14 frames."""
    if not full:
        return tiny_svd.pipeline()
    vision = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1024,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    )
    unet = diffusers.UNetSpatioTemporalConditionModel(num_frames=14)
    coder = autoencoder(diffusers.AutoencoderKLTemporalDecoder)
    return tiny_svd.pipeline(unet=unet, image_encoder=CLIPVisionModelWithProjection(vision), vae=coder)


def randomise(pipeline: Any, dtype: torch.dtype) -> None:
    """Random weights of variance 1 / fan-in, norms near 1."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(DEVICE)
            with torch.no_grad():
                for name, parameter in part.named_parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, parameter[0].numel() ** -0.5)
                    else:
                        parameter.normal_(1 if name.endswith("weight") else 0, 0.1)
            part.eval().to(dtype)


def noise(model: Bundle, purpose: int, size: tuple[int, int, int]) -> Latents:
    """Our initial noise [1,4,F,H,W]; size: frames, height and width in pixels."""
    factor = model.manifest.sizes.factor
    return frame_noise(SEED, purpose, 4, size[0], size[1] // factor, size[2] // factor)[None]


def of_text(pipeline: Any, model: Bundle, steps: int, size: tuple[int, int, int]) -> Latents:
    """diffusers' loop from a text."""
    clip = size[0] > 1
    assert model.manifest.text is not None
    tokenizer = PromptTokenizer.from_file(model.path / "tokenizer.json", model.manifest.text)
    ids = torch.from_numpy(tokenizer.encode([PROMPT, NEGATIVE])).to(DEVICE)
    dtype = pipeline.unet.dtype
    given, empty = pipeline.text_encoder(ids).last_hidden_state.to(dtype).split(1)
    start = torch.from_numpy(noise(model, 1 if clip else 0, size)).to(DEVICE, dtype)
    made = pipeline(
        prompt_embeds=given,
        negative_prompt_embeds=empty,
        num_inference_steps=steps,
        guidance_scale=7.5,
        latents=start if clip else start[:, :, 0],
        output_type="latent",
        **({"num_frames": size[0]} if clip else {}),
    )
    latents = made.frames if clip else made.images[:, :, None]
    return np.asarray(latents.float().cpu())


def picture(size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A picture of slow waves."""
    rows, columns = np.mgrid[: size[1], : size[2]]
    waves = np.sin(rows[..., None] / 40 + columns[..., None] / 60 + np.arange(3))
    colours: NDArray[np.uint8] = np.clip(127 + 90 * waves, 0, 255).astype(np.uint8)
    return colours


def of_picture(pipeline: Any, model: Bundle, steps: int, size: tuple[int, int, int]) -> Latents:
    """diffusers' loop from a picture, with our noise on it."""
    module: Any = sys.modules[type(pipeline).__module__]
    on_picture = shaped(SEED, AUGMENTATION, (1, 3, *size[1:]), None)
    before = module.randn_tensor
    module.randn_tensor = lambda *_, **known: torch.from_numpy(on_picture).to(DEVICE, known.get("dtype"))
    start = torch.from_numpy(noise(model, NOISE, size)).transpose(1, 2).to(DEVICE, pipeline.unet.dtype)
    try:
        made = pipeline(
            PIL.Image.fromarray(picture(size)),
            height=size[1],
            width=size[2],
            num_frames=size[0],
            num_inference_steps=steps,
            latents=start,
            output_type="latent",
        )
    finally:
        module.randn_tensor = before
    return np.asarray(made.frames.float().cpu().transpose(1, 2))


def text_options(size: tuple[int, int, int]) -> dict[str, Any]:
    """Ours."""
    return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance": 7.5, "frames": size[0]}


JOBS = {
    "stable_diffusion": Job(build_stable_diffusion, of_text, text_options, (1, 512, 512), (1, 16, 32)),
    "animatediff": Job(build_animatediff, of_text, text_options, (16, 512, 512), (5, 16, 32)),
    "svd": Job(build_svd, of_picture, lambda s: {"image": picture(s), "frames": s[0]}, (14, 576, 1024), (5, 16, 32)),
}


def timed(run: Callable[[], Latents]) -> tuple[Latents, float, float]:
    """The second run's result, its seconds, and the GPU memory at its peak in GiB."""
    run()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronise()
    start = time.perf_counter()
    found = run()
    synchronise()
    spent = time.perf_counter() - start
    return found, spent, torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0


def made(work: Path, family: str, full: bool, precision: str) -> tuple[Any, Path]:
    """diffusers' pipeline and our model directory of the same weights."""
    where = work / f"{family}-{'full' if full else 'tiny'}-{precision}"
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    torch.manual_seed(0)
    began = time.perf_counter()
    pipeline = JOBS[family].build(full)
    randomise(pipeline, dtype)
    pipeline.set_progress_bar_config(disable=True)
    if not where.exists():
        saved = tiny.save(pipeline, work / f"{where.name}-hub")
        convert_sources([saved], where, dtype=precision)
    print(f"{family}: made in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return pipeline, where


def compare(work: Path, family: str, full: bool, steps: int, precision: str) -> None:
    """Two rows of the table."""
    job = JOBS[family]
    size = job.full if full else job.tiny
    pipeline, where = made(work, family, full, precision)
    model = Bundle.open(where)
    with torch.inference_mode():
        wanted, their_time, their_memory = timed(partial(job.theirs, pipeline, model, steps, size))
    del pipeline
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    with higen.load(where, "torch", device=DEVICE, precision=precision, verify=False) as pipe:

        def ours() -> Latents:
            options = {"seed": SEED, "steps": steps, "height": size[1], "width": size[2], **job.options(size)}
            for event in pipe.stream(**options):
                if isinstance(event, higen.Step) and event.index + 1 == event.total:
                    return pipe.backend.to_numpy(event.latents)  # before they are decoded
            raise AssertionError("a loop has a last step")

        found, spent, used = timed(ours)
    apart = float(np.sqrt(np.mean((found - wanted) ** 2)) / np.sqrt(np.mean(wanted**2)))
    shape = f"{size[0]} x {size[2]}x{size[1]}"
    print(f"| {family} | {shape} | diffusers | {their_time:.2f} | 1.00 x | {their_memory:.1f} | |")
    ratio = their_time / spent
    print(f"| | | higen | {spent:.2f} | {ratio:.2f} x | {used:.1f} | {apart:.1e} |", flush=True)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time other families beside diffusers.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--family", choices=list(JOBS), action="append")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--make", action="store_true", help="only make the models: one process a family saves time")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.make:
        for family in given.family or JOBS:
            made(given.work, family, given.size == "full", given.precision)
        return
    print(f"{hardware()}; {given.precision}, {given.steps} steps with guidance\n")
    print("| family | frames and size | side | s | ratio | peak GiB | latents apart (RMS) |")
    print("|---|---|---|---|---|---|---|")
    for family in given.family or JOBS:
        compare(given.work, family, given.size == "full", given.steps, given.precision)


if __name__ == "__main__":
    main()
