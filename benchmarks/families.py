"""Times whole loops of other families against diffusers' pipelines with the same weights, and compares the results.

    python benchmarks/families.py WORK [--family animatediff] [--size full|small|tiny] [--steps 10] [--precision fp16]
        [--make]

The models have the published architectures, at full size or with a fifth of the channels (small), and random weights.
No weight is zero, so every part of a network affects the result. WORK keeps the models; each takes 4 to 10 GB at full
size. Both sides run eagerly in PyTorch, on the GPU if there is one, from the same noise, with guidance. Each runs
twice, and the second run is timed. Prints Markdown. `against.py` compares more sides, on a CPU.
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
from higen.families.svd.spec import AUGMENTATION
from higen.noise import frame_noise, shaped
from higen.tables import Loop
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
    """A family's model, and one request to it on both sides.

    build    makes diffusers' pipeline at a size
    theirs   runs the request in diffusers
    options  arguments of the same request in higen
    shapes   frames, height and width in pixels at each size
    """

    build: Callable[[str], Any]
    theirs: Callable[[Any, Bundle, int, tuple[int, int, int]], Latents]
    options: Callable[[tuple[int, int, int]], dict[str, Any]]
    shapes: dict[str, tuple[int, int, int]]


SMALL = (64, 128, 256, 256)
"""Channels of a small U-Net's levels; the published U-Nets have five times as many."""

SMALL_TEXT = 128


def text_encoder(size: str) -> CLIPTextModel:
    """The text encoder of Stable Diffusion 1.5, or a narrow one."""
    if size == "small":
        return tiny.text_encoder(SMALL_TEXT)
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return CLIPTextModel(config)


def autoencoder(size: str, kind: Any = diffusers.AutoencoderKL) -> Any:
    """The autoencoder of Stable Diffusion, or that of Stable Video Diffusion (temporal decoder), or a narrow one."""
    channels = [32, 32, 64, 64] if size == "small" else [128, 256, 512, 512]
    ups = {} if kind is not diffusers.AutoencoderKL else {"up_block_types": ["UpDecoderBlock2D"] * 4}
    layers = 1 if size == "small" else 2
    return kind(
        block_out_channels=channels, down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=layers, **ups
    )


def picture_unet(size: str) -> diffusers.UNet2DConditionModel:
    """The U-Net of Stable Diffusion 1.5, or a narrow one."""
    if size == "small":
        return diffusers.UNet2DConditionModel(sample_size=32, block_out_channels=SMALL, cross_attention_dim=SMALL_TEXT)
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def build_stable_diffusion(size: str) -> Any:
    """Stable Diffusion 1.5."""
    sampler = tiny.scheduler("DDIMScheduler", set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    if size == "tiny":
        return tiny.image_pipeline(sampler)
    pipeline = tiny.image_pipeline(sampler, picture_unet(size), text_encoder(size))
    pipeline.vae = autoencoder(size)
    return pipeline


def build_animatediff(size: str) -> Any:
    """Stable Diffusion 1.5 with a motion module of the third version."""
    sampler = tiny.scheduler("DDIMScheduler", **tiny_animatediff.LINEAR)
    if size == "tiny":
        return tiny_animatediff.pipeline(sampler)
    widths = {"block_out_channels": SMALL} if size == "small" else {}
    motion = diffusers.MotionAdapter(use_motion_mid_block=False, **widths)
    pipeline = tiny_animatediff.pipeline(sampler, motion, picture_unet(size), text_encoder(size))
    pipeline.vae = autoencoder(size)
    return pipeline


def build_modelscope(size: str) -> Any:
    """ModelScope's text to video."""
    sampler = tiny.scheduler("DDIMScheduler", set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    if size == "tiny":
        return tiny.video_pipeline(sampler)
    if size == "small":
        unet = tiny.video_unet(
            block_out_channels=SMALL,
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
            up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
            cross_attention_dim=SMALL_TEXT,
            attention_head_dim=32,
        )
        text = tiny.text_encoder(SMALL_TEXT, "gelu")
    else:
        unet = diffusers.UNet3DConditionModel(sample_size=32, cross_attention_dim=1024, attention_head_dim=64)
        width = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
        text = CLIPTextModel(CLIPTextConfig(**width, hidden_act="gelu"))
    pipeline = tiny.video_pipeline(sampler, unet)
    pipeline.text_encoder, pipeline.vae = text, autoencoder(size)
    return pipeline


def build_svd(size: str) -> Any:
    """Stable Video Diffusion of 14 frames."""
    if size == "tiny":
        return tiny_svd.pipeline()
    coder = autoencoder(size, diffusers.AutoencoderKLTemporalDecoder)
    if size == "small":
        unet = diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=SMALL,
            cross_attention_dim=24,
            num_attention_heads=(2, 4, 8, 8),
            addition_time_embed_dim=64,
            projection_class_embeddings_input_dim=192,
            num_frames=8,
        )
        return tiny_svd.pipeline(unet=unet, image_encoder=tiny_svd.image_encoder(), vae=coder)
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


def noise(model: Bundle, size: tuple[int, int, int]) -> Latents:
    """higen's initial noise [1,4,F,H,W] of the last loop that the request runs; size: frames, height and width in
    pixels.
    """
    factor, loop = model.manifest.sizes.factor, last_loop(model, size[0])
    return frame_noise(SEED, loop.noise.purpose, 4, size[0], size[1] // factor, size[2] // factor)[None]


def of_text(pipeline: Any, model: Bundle, steps: int, size: tuple[int, int, int]) -> Latents:
    """diffusers' loop from a text."""
    clip = size[0] > 1
    assert model.manifest.text is not None
    tokenizer = PromptTokenizer.from_file(model.path / "tokenizer.json", model.manifest.text)
    ids = torch.from_numpy(tokenizer.encode([PROMPT, NEGATIVE])).to(DEVICE)
    dtype = pipeline.unet.dtype
    given, empty = pipeline.text_encoder(ids).last_hidden_state.to(dtype).split(1)
    start = torch.from_numpy(noise(model, size)).to(DEVICE, dtype)
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
    """diffusers' loop from a picture, to which higen's noise is added."""
    module: Any = sys.modules[type(pipeline).__module__]
    on_picture = shaped(SEED, AUGMENTATION, (1, 3, *size[1:]), None)
    before = module.randn_tensor
    module.randn_tensor = lambda *_, **known: torch.from_numpy(on_picture).to(DEVICE, known.get("dtype"))
    start = torch.from_numpy(noise(model, size)).transpose(1, 2).to(DEVICE, pipeline.unet.dtype)
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
    """higen's options for a request with a text."""
    return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance": 7.5, "frames": size[0]}


def shapes(frames: int, height: int, width: int) -> dict[str, tuple[int, int, int]]:
    """The shapes of a job at each size; the arguments are those of the full size."""
    clip = frames > 1
    return {"full": (frames, height, width), "small": (8 if clip else 1, 256, 256), "tiny": (5 if clip else 1, 16, 32)}


JOBS = {
    "stable_diffusion": Job(build_stable_diffusion, of_text, text_options, shapes(1, 512, 512)),
    "animatediff": Job(build_animatediff, of_text, text_options, shapes(16, 512, 512)),
    "modelscope": Job(build_modelscope, of_text, text_options, shapes(16, 256, 256)),
    "svd": Job(build_svd, of_picture, lambda s: {"image": picture(s), "frames": s[0]}, shapes(14, 576, 1024)),
}


def timed(run: Callable[[], Latents]) -> tuple[Latents, float, float]:
    """The second run's result, its seconds, and its peak GPU memory in GiB."""
    run()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronise()
    start = time.perf_counter()
    found = run()
    synchronise()
    spent = time.perf_counter() - start
    return found, spent, torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0


def made(work: Path, family: str, at: str, precision: str) -> tuple[Any, Path]:
    """diffusers' pipeline and higen's model directory with the same weights, at the size `at`."""
    where = work / f"{family}-{at}-{precision}"
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    torch.manual_seed(0)
    began = time.perf_counter()
    pipeline = JOBS[family].build(at)
    randomise(pipeline, dtype)
    pipeline.set_progress_bar_config(disable=True)
    if not where.exists():
        saved = tiny.save(pipeline, work / f"{where.name}-hub")
        convert_sources([saved], where, dtype=precision)
    print(f"{family}: made in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return pipeline, where


def request(family: str, at: str, steps: int) -> dict[str, Any]:
    """The options of a job's request to higen."""
    size = JOBS[family].shapes[at]
    return {"seed": SEED, "steps": steps, "height": size[1], "width": size[2], **JOBS[family].options(size)}


def last_loop(model: Bundle, frames: int) -> Loop:
    """The last loop that a request of so many frames runs."""
    return [loop for loop in model.manifest.loops if frames >= loop.least_frames][-1]


def last_latents(pipe: higen.Pipeline, options: dict[str, Any]) -> Latents:
    """higen's latents [B,C,F,H,W] after the last loop that the request runs, before decoding."""
    last = last_loop(pipe.bundle, options.get("frames", 2))
    for event in pipe.stream(**options):
        if isinstance(event, higen.Step) and event.loop == last.name and event.index + 1 == event.total:
            return pipe.backend.to_numpy(event.latents)
    raise AssertionError("a loop has a last step")


def compare(work: Path, family: str, at: str, steps: int, precision: str) -> None:
    """Measure both sides of a family and print their two rows of the table."""
    job = JOBS[family]
    size = job.shapes[at]
    pipeline, where = made(work, family, at, precision)
    model = Bundle.open(where)
    with torch.inference_mode():
        wanted, their_time, their_memory = timed(partial(job.theirs, pipeline, model, steps, size))
    del pipeline
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    with higen.load(where, "torch", device=DEVICE, precision=precision, verify=False) as pipe:
        found, spent, used = timed(partial(last_latents, pipe, request(family, at, steps)))
    apart = float(np.sqrt(np.mean((found - wanted) ** 2)) / np.sqrt(np.mean(wanted**2)))
    shape = f"{size[0]} x {size[2]}x{size[1]}"
    print(f"| {family} | {shape} | diffusers | {their_time:.2f} | 1.00 x | {their_memory:.1f} | |")
    ratio = their_time / spent
    print(f"| | | higen | {spent:.2f} | {ratio:.2f} x | {used:.1f} | {apart:.1e} |", flush=True)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time other families and diffusers' pipelines.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--family", choices=list(JOBS), action="append")
    parser.add_argument("--size", choices=("full", "small", "tiny"), default="full")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--make", action="store_true", help="only make the models; one process per family saves time")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.make:
        for family in given.family or JOBS:
            made(given.work, family, given.size, given.precision)
        return
    print(f"{hardware()}; {given.precision}, {given.steps} steps with guidance\n")
    print("| family | frames and size | side | s | ratio | peak GiB | latents apart (RMS) |")
    print("|---|---|---|---|---|---|---|")
    for family in given.family or JOBS:
        compare(given.work, family, given.size, given.steps, given.precision)


if __name__ == "__main__":
    main()
