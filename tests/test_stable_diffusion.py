"""Stable Diffusion: tiny random models in every published format, compared with diffusers' own pipelines."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpp_build
import diffusers
import numpy as np
import prompt_truth as truth
import pytest
import sealing
import tiny_diffusers as tiny
import torch
from deep_truth import Reused
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import higen
from higen.bundle import Bundle
from higen.convert import convert_sources
from higen.errors import CheckpointError, PromptWarning
from higen.export.model_graphs import export_model
from higen.families.stable_diffusion.checkpoint import recognise
from higen.families.stable_diffusion.ldm_names import PREFIX, ldm_name
from higen.noise import frame_noise, row_purpose
from higen.pipeline import Pipeline
from higen.tokenizer import PromptTokenizer, build_clip_tokenizer

# a warning of diffusers under NumPy 2 about arrays made from tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

PROMPT, NEGATIVE, SEED = "a red apple, on a table", "blurry", 7
WIDTH, HEIGHT = 32, 16  # pixels: 16x8 latent cells


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the hub's, with a tiny model of version 1 and also the scheduler PNDM."""
    scheduler = tiny.scheduler("PNDMScheduler", steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False)
    folder = tiny.save(tiny.image_pipeline(scheduler), tmp_path_factory.mktemp("hub") / "stable-diffusion-v1.5")
    return tiny.set_values(folder, "scheduler/scheduler_config.json", clip_sample=False)


@pytest.fixture(scope="module")
def model(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The model directory made from that folder, with graphs."""
    bundle = convert_sources([saved], tmp_path_factory.mktemp("converted") / "model", dtype="fp32")
    return export_model(bundle)


@pytest.fixture(scope="module")
def by_torch(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="torch")


@pytest.fixture(scope="module")
def by_graphs(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="onnx")


def last_latents(pipe: Pipeline, **options: Any) -> NDArray[np.float32]:
    """The final latents [C,1,H,W] of our loop."""
    given = {"seed": SEED, "width": WIDTH, "height": HEIGHT, "negative_prompt": NEGATIVE, **options}
    *_, last = (event for event in pipe.stream(PROMPT, **given) if isinstance(event, higen.Step))
    return np.asarray(last.latents, dtype=np.float32)[0]


def tokens(model: Bundle, *texts: str) -> torch.Tensor:
    assert model.manifest.text is not None
    tokenizer = PromptTokenizer.from_file(model.path / "tokenizer.json", model.manifest.text)
    return torch.from_numpy(tokenizer.encode(texts))


@contextlib.contextmanager
def _our_noise(scheduler: Any, noise: torch.Tensor) -> Iterator[None]:
    """Make diffusers' schedulers draw each row's fresh noise from our streams."""
    module, row = sys.modules[type(scheduler).__module__], iter(range(1000))
    before = getattr(module, "randn_tensor", None)

    def drawn(*_: Any, **__: Any) -> torch.Tensor:
        fresh = frame_noise(SEED, row_purpose(0, next(row)), 4, 1, *noise.shape[-2:])
        return torch.from_numpy(fresh[:, 0])[None]

    module.randn_tensor = drawn  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.randn_tensor = before  # type: ignore[attr-defined]


def wanted_latents(model: Bundle, scheduler: Any, steps: int, guidance: float, pipeline: Any = None) -> Any:
    """The final latents of diffusers' pipeline from the noise of our seed."""
    pipeline = pipeline or tiny.image_pipeline(scheduler)
    pipeline.scheduler = scheduler
    with torch.inference_mode():
        given, empty = (pipeline.text_encoder(tokens(model, text)).last_hidden_state for text in (PROMPT, NEGATIVE))
        noise = torch.from_numpy(frame_noise(SEED, 0, 4, 1, HEIGHT // 2, WIDTH // 2)[:, 0])[None]
        with _our_noise(scheduler, noise):
            made = pipeline(
                prompt_embeds=given,
                negative_prompt_embeds=empty,
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=noise.clone(),
                output_type="latent",
            )
    return made.images.numpy().swapaxes(0, 1)


def apart(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The largest difference relative to the largest wanted value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
}


def sampler(saved: Path, solver: str) -> Any:
    """diffusers' scheduler of this kind, with the folder's configuration."""
    kind = getattr(diffusers, SAMPLERS[solver])
    return kind.from_config(json.loads((saved / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("steps", [8, 25])
@pytest.mark.parametrize("solver", SAMPLERS)
def test_final_latents_are_those_of_diffusers(
    saved: Path, model: Bundle, by_torch: Pipeline, solver: str, steps: int
) -> None:
    wanted = wanted_latents(model, sampler(saved, solver), steps, 7.5)
    got = last_latents(by_torch, solver=solver, steps=steps, guidance=7.5)
    assert apart(got, wanted) < 1e-4


@pytest.mark.parametrize(("solver", "guidance", "reuse"), [("dpm++2m", 7.5, 2), ("ddim", 1.0, 3)])
def test_reused_features_are_those_of_diffusers_with_hooks(
    saved: Path, model: Bundle, by_torch: Pipeline, solver: str, guidance: float, reuse: int
) -> None:
    pipeline = tiny.image_pipeline(None)
    with Reused(pipeline.unet, lambda count: count % reuse == 0):
        wanted = wanted_latents(model, sampler(saved, solver), 8, guidance, pipeline)
    options = {"solver": solver, "steps": 8, "guidance": guidance}
    assert apart(last_latents(by_torch, reuse=reuse, **options), wanted) < 1e-4
    assert apart(last_latents(by_torch, **options), wanted) > 1e-3


def test_without_guidance_the_plain_step_runs(
    saved: Path, model: Bundle, by_torch: Pipeline, by_graphs: Pipeline
) -> None:
    wanted = wanted_latents(model, sampler(saved, "ddim"), 8, 1.0)
    for pipe in (by_torch, by_graphs):
        stages = {event.stage for event in pipe.stream(PROMPT, guidance=1.0, steps=2) if isinstance(event, higen.Step)}
        assert stages == {"spatial_unet_plain"}
        assert apart(last_latents(pipe, steps=8, guidance=1.0), wanted) < 1e-4


@pytest.mark.parametrize("steps", [8, 25])
def test_graphs_give_the_same(saved: Path, model: Bundle, by_graphs: Pipeline, steps: int) -> None:
    wanted = wanted_latents(model, sampler(saved, "ddim"), steps, 7.5)
    assert apart(last_latents(by_graphs, steps=steps, guidance=7.5), wanted) < 1e-4


def test_pictures_are_those_of_diffusers(saved: Path, model: Bundle, by_torch: Pipeline, by_graphs: Pipeline) -> None:
    """Also a batch of three: each of its samples equals a single generation."""
    scheduler = sampler(saved, "ddim")
    latents = torch.from_numpy(wanted_latents(model, scheduler, 8, 7.5)).swapaxes(0, 1)
    autoencoder = tiny.autoencoder()
    with torch.inference_mode():
        pixels = autoencoder.decode(latents / autoencoder.config.scaling_factor, return_dict=False)[0]
    wanted = np.trunc(((pixels / 2 + 0.5).clamp(0, 1) * 255).numpy()[0].transpose(1, 2, 0))
    options = {"negative_prompt": NEGATIVE, "width": WIDTH, "height": HEIGHT, "steps": 8, "guidance": 7.5}
    for pipe in (by_torch, by_graphs):
        one, *_ = pipe([PROMPT, "a cat", "a dog"], seed=[SEED, 1, 2], **options)
        assert len(one) == 1
        assert np.abs(one.frames[0] - wanted).max() <= 1
        assert np.array_equal(pipe.image(PROMPT, seed=SEED, **options), one.frames[0])


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm++2m"])
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_image_to_image_is_that_of_diffusers(
    saved: Path, model: Bundle, by_torch: Pipeline, solver: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    scheduler = sampler(saved, solver)
    parts = {**tiny.image_pipeline(scheduler).components, "image_encoder": None}
    pipeline = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(frame_noise(SEED, 0, 4, 1, HEIGHT // 2, WIDTH // 2)[:, 0])[None]
    monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda *_, **__: noise)
    with torch.inference_mode():
        pixels = torch.from_numpy(picture.transpose(2, 0, 1)[None] / 127.5 - 1).float()
        vae = pipeline.vae
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        given, empty = (pipeline.text_encoder(tokens(model, text)).last_hidden_state for text in (PROMPT, NEGATIVE))
        wanted = pipeline(
            prompt_embeds=given,
            negative_prompt_embeds=empty,
            image=latents,
            strength=strength,
            num_inference_steps=10,
            guidance_scale=4.0,
            output_type="latent",
        ).images.numpy()
    got = last_latents(by_torch, solver=solver, steps=10, guidance=4.0, image=picture, strength=strength)
    assert apart(got.swapaxes(0, 1), wanted) < 1e-4


def inverted(scheduler: Any, network: Any, latents: torch.Tensor, timesteps: Any = None) -> torch.Tensor:
    """diffusers' DDIM inversion without guidance. `timesteps`: ascending, for spacings that its scheduler lacks."""
    scheduler.timesteps = scheduler.timesteps if timesteps is None else timesteps
    for t in scheduler.timesteps:
        latents = scheduler.step(network(latents, t), int(t), latents).prev_sample
    return latents


def test_inversion_is_that_of_diffusers(
    saved: Path, model: Bundle, by_torch: Pipeline, by_graphs: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inverted picture, which is then denoised with another text."""
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    forwards = sampler(saved, "ddim")
    backwards = diffusers.DDIMInverseScheduler.from_config(forwards.config)
    backwards.set_timesteps(8)
    pipeline = tiny.image_pipeline(forwards)
    with torch.inference_mode():
        pixels = torch.from_numpy(picture.transpose(2, 0, 1)[None] / 127.5 - 1).float()
        clean = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        text = pipeline.text_encoder(tokens(model, "a green apple")).last_hidden_state
        noisy = inverted(backwards, lambda x, t: pipeline.unet(x, t, encoder_hidden_states=text).sample, clean)
    monkeypatch.setattr(sys.modules[__name__], "frame_noise", lambda *_: noisy.numpy().swapaxes(0, 1))
    wanted = wanted_latents(model, forwards, 8, 4.0, pipeline)
    options = {"image": picture, "strength": 1.0, "inversion": "a green apple", "negative_prompt": NEGATIVE}
    for pipe in (by_torch, by_graphs):
        events = pipe.stream(PROMPT, steps=8, guidance=4.0, width=WIDTH, height=HEIGHT, **options)
        states = [np.asarray(e.latents)[0] for e in events if isinstance(e, higen.Step)]
        assert len(states) == 16
        assert apart(states[7].swapaxes(0, 1), noisy.numpy()) < 1e-4
        assert apart(states[-1], wanted) < 1e-4


# Weighted words and long prompts.

WEIGHTED = "a (red:1.4) [apple], on a ((wooden table:1.2), dark)"
LONG = "a red apple on a wooden table, " * 12
TEXTS = [
    (WEIGHTED, "(blurry:1.3)"),
    (LONG, "blurry"),
    ("a cat", f"bad BREAK {LONG}"),
    ("BREAK (a cat BREAK a dog:0.6)", ""),
]


def wanted_of(model: Bundle, scheduler: Any, prompt: str, negative: str) -> NDArray[np.float32]:
    """The final latents of diffusers' pipeline for the embeddings of prompt_truth.py."""
    pipeline = tiny.image_pipeline(scheduler)
    given, empty = truth.pair(pipeline.text_encoder, build_clip_tokenizer(), prompt, negative)
    noise = torch.from_numpy(frame_noise(SEED, 0, 4, 1, HEIGHT // 2, WIDTH // 2)[:, 0])[None]
    with torch.inference_mode():
        made = pipeline(
            prompt_embeds=given,
            negative_prompt_embeds=empty,
            num_inference_steps=8,
            guidance_scale=7.5,
            latents=noise.clone(),
            output_type="latent",
        )
    return np.asarray(made.images.numpy().swapaxes(0, 1), np.float32)


@pytest.mark.parametrize(("prompt", "negative"), TEXTS, ids=range(len(TEXTS)))
def test_weighted_and_long_prompts(
    saved: Path, model: Bundle, by_torch: Pipeline, by_graphs: Pipeline, prompt: str, negative: str
) -> None:
    wanted = wanted_of(model, sampler(saved, "ddim"), prompt, negative)
    options = {"seed": SEED, "width": WIDTH, "height": HEIGHT, "steps": 8, "guidance": 7.5}
    for pipe in (by_torch, by_graphs):
        *_, last = (e for e in pipe.stream(prompt, negative_prompt=negative, **options) if isinstance(e, higen.Step))
        assert apart(np.asarray(last.latents)[0], wanted) < 1e-4


def test_prompts_of_one_batch_have_chunks_of_their_own(by_torch: Pipeline, by_graphs: Pipeline) -> None:
    options = {"width": WIDTH, "height": HEIGHT, "steps": 3, "negative_prompt": "blurry"}
    for pipe in (by_torch, by_graphs):
        batch = pipe(["a cat", LONG, "a dog", WEIGHTED], seed=[1, 2, 3, 4], **options)
        alone = [pipe(text, seed=i, **options) for i, text in enumerate(["a cat", LONG, "a dog", WEIGHTED], 1)]
        for one, other in zip(batch, alone, strict=True):
            assert np.abs(one.frames.astype(int) - other.frames).max() <= 1


def test_a_model_that_was_converted_before_reads_plain_texts(model: Bundle, tmp_path: Path) -> None:
    """Such tables have no rules for weights, and their context has a fixed number of tokens."""
    folder = Path(shutil.copytree(model.path, tmp_path / "model"))
    for graph in folder.glob("spatial_unet*.onnx"):
        graph.unlink()
    document = json.loads((folder / "higen.json").read_text(encoding="utf-8"))
    del document["text"]["weights"], document["text"]["chunks"]
    for name in [name for name in document["graphs"] if name.startswith("spatial_unet")]:
        del document["graphs"][name], document["files"][name]
    for row in document["stages"]:
        for tensor in row["inputs"]:
            tensor["shape"] = ["L" if n == "T" else n for n in tensor["shape"]]
    sealing.write(folder, document)
    old, new = higen.load(folder, backend="torch"), higen.load(model.path, backend="torch")
    options = {"seed": SEED, "width": WIDTH, "height": HEIGHT, "steps": 2}
    assert np.array_equal(old(PROMPT, **options).frames, new(PROMPT, **options).frames)
    assert np.array_equal(old("a (cat:1.3)", **options).frames, new(r"a \(cat\:1.3\)", **options).frames)
    with pytest.warns(PromptWarning, match="the model reads 75"):
        old(LONG, **options)


# Formats.


@pytest.mark.parametrize(
    "how", [{"variant": "fp16"}, {"max_shard_size": "300KB"}, {"safe_serialization": False}], ids=str
)
def test_every_way_that_diffusers_saves(saved: Path, model: Bundle, tmp_path: Path, how: dict[str, Any]) -> None:
    pipeline = tiny.image_pipeline(sampler(saved, "ddim"))
    folder = tiny.save(pipeline, tmp_path / "hub", **how)
    got = convert_sources([folder], tmp_path / "model", dtype="fp32")
    for name in ("unet.safetensors", "text_encoder.safetensors", "vae.safetensors"):
        ours, wanted = load_file(got.path / name), load_file(model.path / name)
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_v_prediction_and_the_other_text_encoder(tmp_path: Path) -> None:
    """Version 2.1: v, heads of 64 channels, linear projections, padding with token 0."""
    unet = tiny.image_unet(
        block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True, cross_attention_dim=48
    )
    text = tiny.text_encoder(48, "gelu")
    scheduler = tiny.scheduler(
        "DDIMScheduler", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipeline = tiny.image_pipeline(scheduler, unet, text)
    model = convert_sources([tiny.save(pipeline, tmp_path / "hub", pad_token="!")], tmp_path / "model", dtype="fp32")
    assert model.manifest.text is not None
    assert model.manifest.text.pad_id == 0
    got = last_latents(higen.load(model.path, backend="torch"), steps=8, guidance=7.5)
    assert apart(got, wanted_latents(model, scheduler, 8, 7.5, pipeline)) < 1e-4


def single_file(path: Path, width: int = 32, text_prefix: str = "cond_stage_model.transformer.") -> Path:
    """The tiny version 1 model in the authors' format, with an unused EMA copy and a buffer of the schedule."""
    unet, vae = tiny.image_unet(), tiny.autoencoder()
    levels = [kind.startswith("Cross") for kind in unet.config.up_block_types]
    state = {PREFIX + ldm_name(name, 1, levels): tensor for name, tensor in unet.state_dict().items()}
    text = {f"{text_prefix}{name}": tensor for name, tensor in tiny.text_encoder(width).state_dict().items()}
    codec = {f"first_stage_model.{name}": tensor for name, tensor in _ldm_autoencoder(vae).items()}
    more = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
    save_file({name: tensor.contiguous() for name, tensor in (state | text | codec | more).items()}, path)
    return path


def _ldm_autoencoder(vae: Any) -> dict[str, torch.Tensor]:
    from higen.models.companion_checkpoints import autoencoder_ldm_name as codec_name

    state = {codec_name(name, 2): tensor for name, tensor in vae.state_dict().items()}
    return {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in state.items()}


def test_a_single_file_is_the_same_model(model: Bundle, tmp_path: Path) -> None:
    file = single_file(tmp_path / "personalised.safetensors")
    assert recognise(file)
    got = convert_sources([file], tmp_path / "model", dtype="fp32")
    for name in ("unet.safetensors", "text_encoder.safetensors", "vae.safetensors"):
        ours, wanted = load_file(got.path / name), load_file(model.path / name)
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    assert got.manifest.text == model.manifest.text
    assert got.manifest.loops[0].schedule == model.manifest.loops[0].schedule
    assert got.manifest.loops[0].solvers[0] == model.manifest.loops[0].solvers[0]
    assert got.manifest.name == "personalised"


@pytest.mark.parametrize("linear", [False, True])
def test_names_of_a_single_file_are_those_that_diffusers_reads(linear: bool) -> None:
    """diffusers' own converter restores every tensor."""
    changes: dict[str, Any] = {"layers_per_block": 2, "block_out_channels": (32, 64, 64)}
    changes["down_block_types"] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    changes["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    unet = tiny.image_unet(**changes, use_linear_projection=linear)
    levels = [kind.startswith("Cross") for kind in unet.config.up_block_types]
    theirs = {PREFIX + ldm_name(name, 2, levels): tensor for name, tensor in unet.state_dict().items()}
    back = convert_ldm_unet_checkpoint(theirs, dict(unet.config))
    assert back.keys() == unet.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in unet.state_dict().items())


# C++ makes the same pictures.


def test_cpp_and_python_make_the_same_picture(built: Path, model: Bundle, by_graphs: Pipeline, tmp_path: Path) -> None:
    wanted = by_graphs(PROMPT, seed=SEED, steps=6, width=WIDTH, height=HEIGHT, guidance=3.0).frames
    flags = [f"--seed={SEED}", "--steps=6", f"--width={WIDTH}", f"--height={HEIGHT}", "--guidance=3"]
    output = tmp_path / "picture.npy"
    cpp_build.done(built / "higen-run", model.path, PROMPT, "-q", "-o", output, *flags)
    assert np.abs(np.load(output).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(("prompt", "negative"), TEXTS, ids=range(len(TEXTS)))
def test_cpp_reads_weighted_and_long_prompts(
    built: Path, model: Bundle, by_graphs: Pipeline, tmp_path: Path, prompt: str, negative: str
) -> None:
    options: dict[str, Any] = {"seed": SEED, "steps": 4, "width": WIDTH, "height": HEIGHT, "guidance": 3.0}
    wanted = by_graphs(prompt, negative_prompt=negative, **options).frames
    flags = [f"--{name}={value}" for name, value in options.items()]
    output = tmp_path / "picture.npy"
    cpp_build.done(built / "higen-run", model.path, prompt, "-q", "-o", output, f"--negative={negative}", *flags)
    assert np.abs(np.load(output).astype(int) - wanted).max() <= 1


# Bad input.


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("unet/config.json", {"addition_embed_type": "text_time"}, "SDXL"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"in_channels": 5}, "depth"),
        ("unet/config.json", {"_class_name": "UNetMotionModel"}, "UNetMotionModel"),
        ("unet/config.json", {"cross_attention_dim": 40}, "do not fit"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "dpm++2m"),
        ("scheduler/scheduler_config.json", {"_class_name": "KDPM2DiscreteScheduler"}, "heun"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type='flow'"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0}, "beta_end"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
    ],
    ids=str,
)
def test_other_models_are_refused(saved: Path, tmp_path: Path, file: str, changes: dict[str, Any], said: str) -> None:
    tiny.assert_refused(saved, tmp_path, said, file, **changes)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "scheduler"])
def test_a_folder_with_a_missing_part(saved: Path, tmp_path: Path, part: str) -> None:
    tiny.assert_refused(saved, tmp_path, part)


def test_weights_that_are_not_numbers(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "hub")
    file = next((tmp_path / "hub" / "unet").glob("*.safetensors"))
    state = load_file(file)
    state["conv_in.bias"][0] = float("nan")
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        convert_sources([tmp_path / "hub"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    file = single_file(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        convert_sources([file], tmp_path / "model")


def test_a_file_of_version_2_does_not_say_what_it_predicts(tmp_path: Path) -> None:
    unet = tiny.image_unet(block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True)
    levels = [kind.startswith("Cross") for kind in unet.config.up_block_types]
    state = {PREFIX + ldm_name(name, 1, levels): tensor for name, tensor in unet.state_dict().items()}
    save_file(state, tmp_path / "v2.safetensors")
    with pytest.raises(CheckpointError, match="--prediction"):
        convert_sources([tmp_path / "v2.safetensors"], tmp_path / "model")


def test_clip_ids_are_those_of_transformers(model: Bundle) -> None:
    """The hub's tokenizer, made from the same vocabulary, gives the same ids and padding."""
    from transformers import CLIPTokenizer

    from higen.tokenizer import build_clip_tokenizer

    vocabulary = json.loads(build_clip_tokenizer().to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in vocabulary["merges"]]
    theirs = CLIPTokenizer(vocab=vocabulary["vocab"], merges=merges)
    texts = [PROMPT, "", "A photo of an astronaut, riding a horse!!", "it's 20 meters high; naïve café", "x " * 100]
    wanted = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    with pytest.warns(PromptWarning):
        assert np.array_equal(tokens(model, *texts).numpy(), wanted)
