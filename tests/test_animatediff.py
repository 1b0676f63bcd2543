"""AnimateDiff: tiny random models in every published format, compared with diffusers' own pipeline."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cpp_build
import diffusers
import numpy as np
import prompt_truth
import pytest
import tiny_animatediff as tiny_motion
import tiny_diffusers as tiny
import torch
from deep_truth import Reused
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from test_stable_diffusion import apart, inverted, single_file, tokens

import higen
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.convert import convert_sources, recognised
from higen.errors import CheckpointError, ManifestError, RequestError
from higen.export.model_graphs import export_model
from higen.export.precision import rounded
from higen.families.animatediff.spec import networks
from higen.noise import again, frame_noise, row_purpose
from higen.pipeline import Pipeline
from higen.tables import Windows
from higen.tokenizer import build_clip_tokenizer

# a warning of diffusers under NumPy 2 about arrays made from tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

PROMPT, NEGATIVE, SEED = "waves on a beach", "blurry", 7
WIDTH, HEIGHT, FRAMES = 16, 8, 3  # pixels: 8x4 latent cells
SIZES = {"width": WIDTH, "height": HEIGHT}
PURPOSE = 1  # of a clip's noise

BASE = {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the hub's Stable Diffusion 1.5, also with the scheduler PNDM."""
    pipeline = tiny.image_pipeline(tiny.scheduler("PNDMScheduler", **BASE))
    folder = tiny.save(pipeline, tmp_path_factory.mktemp("hub") / "stable-diffusion-v1-5")
    return tiny.set_values(folder, "scheduler/scheduler_config.json", clip_sample=False)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the hub's, with a motion adapter that has a middle block."""
    folder = tmp_path_factory.mktemp("hub") / "motion-adapter-v1-5-2"
    tiny_motion.adapter().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base: Path, module: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The model directory of both folders, with graphs. HIGEN_FAMILY_MODEL names a folder that keeps it for Triton."""
    bundle = convert_sources([base, module], tmp_path_factory.mktemp("converted") / "model", dtype="fp32")
    exported = export_model(bundle)
    if kept := os.environ.get("HIGEN_FAMILY_MODEL"):
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(exported.path, kept)
    return exported


@pytest.fixture(scope="module")
def by_torch(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="torch")


@pytest.fixture(scope="module")
def by_graphs(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="onnx")


def last_latents(pipe: Pipeline, **options: Any) -> NDArray[np.float32]:
    """The final latents [C,F,H,W] of our loop."""
    given = {"seed": SEED, "frames": FRAMES, "negative_prompt": NEGATIVE, **SIZES, **options}
    *_, last = (e for e in pipe.stream(given.pop("prompt", PROMPT), **given) if isinstance(e, higen.Step))
    return np.asarray(last.latents, dtype=np.float32)[0]


def sampler(base: Path, kind: str, **changes: Any) -> Any:
    """diffusers' scheduler of this kind, with the base's configuration changed as diffusers' documentation says."""
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
    texts: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> NDArray[np.float32]:
    """The final latents [C,F,H,W] of diffusers' pipeline on the noise of our seed; height and width in cells.

    texts: the text encoder's outputs for prompt and negative prompt, if they differ from the plain ones
    """
    pipeline = pipeline or tiny_motion.pipeline(scheduler)
    pipeline.scheduler = scheduler
    noise = torch.from_numpy(frame_noise(SEED, PURPOSE, 4, frames, height, width))[None]
    rows = iter(range(1000))

    def drawn(*_: Any, **__: Any) -> torch.Tensor:
        return torch.from_numpy(frame_noise(SEED, row_purpose(PURPOSE, next(rows)), 4, frames, height, width))[None]

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", drawn, raising=False)
        given, empty = texts or (
            pipeline.text_encoder(tokens(model, text)).last_hidden_state for text in (PROMPT, NEGATIVE)
        )
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


@pytest.mark.parametrize(("solver", "reuse"), [("dpm++2m", 2), ("euler_ancestral", 3)])
def test_reused_features_are_those_of_diffusers_with_hooks(
    base: Path, model: Bundle, by_torch: Pipeline, solver: str, reuse: int
) -> None:
    pipeline = tiny_motion.pipeline(None)
    with Reused(pipeline.unet, lambda count: count % reuse == 0):
        wanted = wanted_latents(model, sampler(base, SAMPLERS[solver]), 8, 7.5, pipeline)
    options = {"solver": solver, "steps": 8, "guidance": 7.5}
    assert apart(last_latents(by_torch, reuse=reuse, **options), wanted) < 1e-4
    assert apart(last_latents(by_torch, **options), wanted) > 1e-3


def test_words_have_weights_and_prompts_have_chunks(
    base: Path, model: Bundle, by_torch: Pipeline, by_graphs: Pipeline
) -> None:
    prompt = "a (red:1.3) apple BREAK [on] a table"
    encoder = tiny_motion.pipeline(None).text_encoder
    texts = prompt_truth.pair(encoder, build_clip_tokenizer(), prompt, NEGATIVE)
    wanted = wanted_latents(model, sampler(base, "DDIMScheduler"), 4, 7.5, texts=texts)
    for pipe in (by_torch, by_graphs):
        assert apart(last_latents(pipe, prompt=prompt, steps=4, guidance=7.5), wanted) < 1e-4


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


def test_without_guidance_the_plain_step_runs(model: Bundle, base: Path, by_graphs: Pipeline) -> None:
    """LCM, the sampler of AnimateLCM: each row except the last uses fresh noise in place of `previous`."""
    options = {"solver": "lcm", "steps": 4, "guidance": 1.0, "frames": FRAMES, **SIZES}
    steps = [event for event in by_graphs.stream(PROMPT, **options) if isinstance(event, higen.Step)]
    assert {event.stage for event in steps} == {"temporal_unet_plain"}
    assert {event.loop for event in steps} == {"temporal"}
    wanted = wanted_latents(model, sampler(base, "LCMScheduler"), 4, 1.0)
    assert apart(last_latents(by_graphs, solver="lcm", steps=4, guidance=1.0), wanted) < 1e-4


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (1, 1, 4, 4), (2, 24, 4, 4), (3, 8, 8, 4)], ids=str)
def test_the_step_is_that_of_diffusers(model: Bundle, by_torch: Pipeline, by_graphs: Pipeline, shape: Any) -> None:
    """A guided step that returns only the prediction. The tracer saw none of these values of B, F, H and W."""
    b, f, h, w = shape
    random = np.random.default_rng(0)
    x = random.standard_normal((b, 4, f, h, w)).astype(np.float32)
    texts = random.standard_normal((2, b, 77, 32)).astype(np.float32)
    t, scale = random.uniform(0, 999, b).astype(np.float32), random.uniform(1, 9, (b, f)).astype(np.float32)
    columns = {name: np.full(b, value, np.float32) for name, value in {"A": 0, "B": 1, "C": 0}.items()}
    given = {"latents": x, "previous": x, "t": t, **columns, "alpha": columns["A"], "sigma": -columns["B"]}
    given |= {"guidance": scale, "context": texts[0], "empty_context": texts[1]}
    unet = tiny_motion.pipeline(None).unet
    with torch.inference_mode():
        m = [
            unet(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(one.repeat(f, axis=0))).sample.numpy()
            for one in texts
        ]
    wanted = m[1] + scale[:, None, :, None, None] * (m[0] - m[1])
    for pipe in (by_torch, by_graphs):
        outputs = pipe.backend.run("temporal_unet", **given)
        for name in ("latents", "previous"):
            assert apart(pipe.backend.to_numpy(outputs[name]), wanted) < 2e-5


def test_frames_are_those_of_diffusers(model: Bundle, base: Path, by_torch: Pipeline, by_graphs: Pipeline) -> None:
    """Also a batch of three: each of its samples equals a single generation."""
    scheduler = sampler(base, "DDIMScheduler")
    pipeline = tiny_motion.pipeline(scheduler)
    latents = torch.from_numpy(wanted_latents(model, scheduler, 8, 7.5, pipeline))[None]
    with torch.inference_mode():
        video = pipeline.decode_latents(latents)
    wanted = np.trunc(((video / 2 + 0.5).clamp(0, 1) * 255).numpy()[0].transpose(1, 2, 3, 0))
    options = {"negative_prompt": NEGATIVE, **SIZES, "frames": FRAMES, "steps": 8, "guidance": 7.5}
    for pipe in (by_torch, by_graphs):
        one, *others = pipe([PROMPT, "a cat", "a dog"], seed=[SEED, 1, 2], **options)
        assert len(one) == len(others[0]) == FRAMES
        assert np.abs(one.frames - wanted).max() <= 1
        assert np.abs(pipe(PROMPT, seed=SEED, **options).frames.astype(int) - one.frames).max() <= 1


def test_inversion_is_that_of_diffusers(base: Path, model: Bundle, by_torch: Pipeline, by_graphs: Pipeline) -> None:
    """A clip is inverted with the empty text. Its timesteps are those of the way down, in reverse order."""
    clip = np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    forwards = sampler(base, "DDIMScheduler")
    backwards = diffusers.DDIMInverseScheduler.from_config(forwards.config, timestep_spacing="leading")
    forwards.set_timesteps(8)
    backwards.set_timesteps(8)
    pipeline = tiny_motion.pipeline(forwards)
    with torch.inference_mode():
        pixels = torch.from_numpy(clip.transpose(0, 3, 1, 2) / 127.5 - 1).float()
        clean = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        text = pipeline.text_encoder(tokens(model, "")).last_hidden_state.repeat(FRAMES, 1, 1)
        network = lambda x, t: pipeline.unet(x, t, encoder_hidden_states=text).sample  # noqa: E731
        wanted = inverted(backwards, network, clean.transpose(0, 1)[None], forwards.timesteps.flip(0)).numpy()
    options = {"steps": 8, "frames": FRAMES, "video": clip, "strength": 1.0, "inversion": True, **SIZES}
    for pipe in (by_torch, by_graphs):
        states = [np.asarray(e.latents) for e in pipe.stream(PROMPT, **options) if isinstance(e, higen.Step)]
        assert len(states) == 16
        assert apart(states[7], wanted) < 1e-4


def test_one_frame_equals_stable_diffusion(base: Path, model: Bundle, by_torch: Pipeline, by_graphs: Pipeline) -> None:
    """Its weights are those of AnimateDiff without the motion modules."""
    alone = convert_sources([base], model.path.parent / "alone", dtype="fp32")
    wanted = higen.load(alone.path, backend="torch").image(PROMPT, seed=SEED, steps=4, **SIZES)
    for pipe in (by_torch, by_graphs):
        assert np.abs(pipe.image(PROMPT, seed=SEED, steps=4, **SIZES).astype(int) - wanted).max() <= 1
        events = [event for event in pipe.stream(PROMPT, frames=1, steps=2, **SIZES) if isinstance(event, higen.Step)]
        assert {(event.loop, event.stage) for event in events} == {("spatial", "spatial_unet")}


def test_a_clip_is_drawn_only_by_its_own_loop(model: Bundle, by_torch: Pipeline) -> None:
    clip, frame = (by_torch.request(PROMPT, frames=frames) for frames in (2, 1))
    assert [loop.name for loop in model.manifest.wanted(2)] == ["temporal"]
    assert [loop.name for loop in model.manifest.wanted(1)] == ["spatial"]
    named = [[name for ways in by_torch.stages(one) for name in ways] for one in (clip, frame)]
    assert named == [["text_encoder", loop, "vae_decoder"] for loop in ("temporal_unet", "spatial_unet")]


def test_both_loops_share_one_copy_of_the_weights(model: Bundle) -> None:
    backend = TorchBackend(model, Options(device="cpu"))
    clip, frame = (backend.module(f"{name}_unet").predictor.unet.state_dict() for name in ("temporal", "spatial"))
    assert 0 < len(frame) < len(clip)
    assert {clip[name].data_ptr() for name in frame} == {tensor.data_ptr() for tensor in frame.values()}


def test_more_frames_than_the_motion_modules_know_are_made_in_windows(model: Bundle, by_torch: Pipeline) -> None:
    assert model.manifest.sizes.frames == (1, 16, 512)
    assert model.manifest.loop("temporal").windows == Windows(16, 8, 24, "shuffled")
    assert by_torch.request(PROMPT, frames=25).settings.windows["temporal"].length == 16
    assert not by_torch.request(PROMPT, frames=24, windows=0).settings.windows
    for options, said in (
        ({"frames": 25, "windows": 0}, "windows=0: the loop temporal takes at most 24 frames at once, not 25"),
        ({"frames": 30, "windows": 25}, "windows=25: a length from 2 to 24 frames"),
        ({"frames": 513}, "frames=513: a whole number from 1 to 512"),
    ):
        with pytest.raises(RequestError, match=said):
            by_torch.request(PROMPT, **options)


@pytest.mark.parametrize("kind", ["ddim", "dpm++2m"])
def test_free_init_equals_diffusers(model: Bundle, base: Path, by_torch: Pipeline, kind: str) -> None:
    pipeline, draws = tiny_motion.pipeline(None), iter((1, 2))
    pipeline.enable_free_init(3, method="gaussian", spatial_stop_frequency=0.3, temporal_stop_frequency=0.2)

    def drawn(**_: Any) -> torch.Tensor:
        purpose = again(PURPOSE, next(draws))
        return torch.from_numpy(frame_noise(SEED, purpose, 4, FRAMES, HEIGHT // 2, WIDTH // 2))[None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.pipelines.free_init_utils.randn_tensor", drawn)
        wanted = wanted_latents(model, sampler(base, SAMPLERS[kind]), 4, 7.5, pipeline)
    options = {"free_init": (3, 0.3, 0.2), "free_init_filter": "gaussian"}
    made = last_latents(by_torch, steps=4, guidance=7.5, solver=kind, **options)
    np.testing.assert_allclose(made, wanted, atol=1e-4 * np.abs(wanted).max())


# The group norm's axis.


def by_frame(norm: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """Group norm with the statistics of each frame, written out in float64: x [B,C,F,H,W]."""
    grouped = x.double().unflatten(1, (norm.num_groups, -1))
    axes = (2, 4, 5)
    mean, variance = grouped.mean(axes, keepdim=True), grouped.var(axes, correction=0, keepdim=True)
    normal = ((grouped - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
    shape = (1, -1, 1, 1, 1)
    return (normal * norm.weight.double().reshape(shape) + norm.bias.double().reshape(shape)).float()


def authors_pipeline(scheduler: Any, motion: Any = None, unet: Any = None) -> Any:
    """diffusers' pipeline with the authors' group norm."""
    pipeline = tiny_motion.pipeline(scheduler, motion, unet)
    for name, norm in pipeline.unet.named_modules():
        if name.endswith(".norm") and ".motion_modules." in name:
            norm.register_forward_hook(lambda norm, given, _: by_frame(norm, given[0]))
    return pipeline


def test_group_norm_over_each_frame_equals_the_authors_code(base: Path, module: Path, tmp_path: Path) -> None:
    scheduler = sampler(base, "DDIMScheduler")
    file = tiny_motion.checkpoint(tmp_path / "mm_sd_v15_v2.ckpt", tiny_motion.adapter())
    authors = convert_sources([base, file], tmp_path / "authors", dtype="fp32")
    same = convert_sources([module, base], tmp_path / "same", dtype="fp32", group_norm="frame")
    other = convert_sources([base, file], tmp_path / "other", dtype="fp32", group_norm="clip")
    assert [m.manifest.architecture["group_norm"] for m in (authors, same, other)] == ["frame", "frame", "clip"]
    wanted = wanted_latents(authors, scheduler, 8, 7.5, authors_pipeline(scheduler))
    for bundle in (authors, same):
        assert apart(last_latents(higen.load(bundle.path, backend="torch"), steps=8, guidance=7.5), wanted) < 1e-4
    theirs = wanted_latents(other, scheduler, 8, 7.5)
    assert apart(last_latents(higen.load(other.path, backend="torch"), steps=8, guidance=7.5), theirs) < 1e-4
    assert apart(theirs, wanted) > 0.01


def test_the_graph_of_a_group_norm_over_each_frame(tmp_path: Path) -> None:
    """One level of the network: every norm of a motion module is in a block like these."""
    level: dict[str, Any] = {"block_out_channels": (32,)}
    unet = tiny.image_unet(**level, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    motion = tiny_motion.adapter(**level)
    scheduler = tiny.scheduler("DDIMScheduler", **tiny_motion.LINEAR)
    base = tiny.save(tiny.image_pipeline(scheduler, unet), tmp_path / "stable-diffusion-v1-5")
    file = tiny_motion.checkpoint(tmp_path / "mm_sd_v15_v2.ckpt", motion)
    bundle = convert_sources([base, file], tmp_path / "authors", dtype="fp32")
    exported = export_model(bundle, ["temporal_unet_plain"])
    x, t, context = (torch.randn(*shape) for shape in ((3, 4, 3, 4, 8), (3,), (3, 77, 32)))
    with torch.inference_mode():
        network = authors_pipeline(scheduler, motion, unet).unet
        m = network(x, t, context.repeat_interleave(3, dim=0)).sample.numpy()
        other = tiny_motion.pipeline(scheduler, motion, unet).unet
        assert apart(other(x, t, context.repeat_interleave(3, dim=0)).sample.numpy(), m) > 0.01
    columns = {name: np.full(3, value, np.float32) for name, value in {"A": 0, "B": 1, "C": 0}.items()}
    given = {"latents": x.numpy(), "previous": x.numpy(), "t": t.numpy(), "context": context.numpy(), **columns}
    backend = OnnxBackend(exported, Options(device="cpu"))
    outputs = backend.run("temporal_unet_plain", **given, alpha=columns["A"], sigma=columns["A"])
    assert apart(backend.to_numpy(outputs["latents"]), m) < 2e-5


# Formats.


def unet_of(bundle: Bundle) -> dict[str, torch.Tensor]:
    return load_file(bundle.path / "unet.safetensors")


def assert_same(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []


@pytest.mark.parametrize("wrapper", ["module.", ""])
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_the_authors_files(base: Path, tmp_path: Path, version: str, wrapper: str) -> None:
    """Compared with diffusers' own converter; v1 knows 24 frames, v2 has a middle block."""
    frames = 24 if version == "v1" else 32
    motion = tiny_motion.adapter(use_motion_mid_block=version == "v2", motion_max_seq_length=frames)
    file = tiny_motion.checkpoint(tmp_path / f"mm_{version}.ckpt", motion, wrapper)
    theirs = convert_animatediff_checkpoint_to_diffusers(tiny_motion.authors_names(motion, ""))
    motion.load_state_dict(theirs, strict=False)
    got = convert_sources([file, base], tmp_path / "model", dtype="fp32")
    assert_same(unet_of(got), tiny_motion.pipeline(None, motion).unet.state_dict())
    assert got.manifest.loop("temporal").windows == Windows(16, 8, frames, "shuffled")
    assert got.manifest.name == f"stable-diffusion-v1-5-mm_{version}"
    assert "Apache-2.0" in got.manifest.licence
    assert "OpenRAIL-M" in got.manifest.licence


@pytest.mark.parametrize("how", [{}, {"variant": "fp16"}, {"safe_serialization": False}], ids=str)
def test_every_way_that_diffusers_saves_an_adapter(model: Bundle, base: Path, tmp_path: Path, how: Any) -> None:
    tiny_motion.adapter().save_pretrained(tmp_path / "adapter", **how)
    got = convert_sources([base, tmp_path / "adapter"], tmp_path / "model", dtype="fp32")
    assert_same(unet_of(got), unet_of(model))


def test_one_file_of_an_adapter_and_of_the_base(model: Bundle, tmp_path: Path) -> None:
    """diffusers' names, as in the published AnimateDiff-Lightning; also without the adapter's table of positions."""
    file = single_file(tmp_path / "personalised.safetensors")
    state = tiny_motion.adapter().state_dict()
    save_file(state, tmp_path / "motion.safetensors")
    got = convert_sources([file, tmp_path / "motion.safetensors"], tmp_path / "model", dtype="fp32")
    assert_same(unet_of(got), unet_of(model))
    assert got.manifest.architecture["group_norm"] == "clip"
    save_file({k: t for k, t in state.items() if "pos_embed" not in k}, tmp_path / "bare.safetensors")
    notes: list[str] = []
    got = convert_sources([file, tmp_path / "bare.safetensors"], tmp_path / "bare", dtype="fp32", on_note=notes.append)
    assert got.manifest.loop("temporal").windows == Windows(16, 8, 32, "shuffled")
    assert any("no table of positions" in note for note in notes)
    tables = [tensor for name, tensor in unet_of(got).items() if name.endswith("pos_embed.pe")]
    theirs = [tensor for name, tensor in unet_of(model).items() if name.endswith("pos_embed.pe")]
    assert all(torch.allclose(a[:, :24], b, atol=1e-6) for a, b in zip(tables, theirs, strict=True))


WIDE: dict[str, Any] = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}


@pytest.mark.parametrize("how", [{}, {"safe_serialization": False}], ids=str)
def test_a_whole_pipeline_of_another_depth(base: Path, tmp_path: Path, how: Any) -> None:
    """No middle block, two blocks per level, two layers per motion module. The folder's scheduler is the default."""
    motion = tiny_motion.adapter(
        block_out_channels=WIDE["block_out_channels"],
        motion_layers_per_block=2,
        motion_transformer_layers_per_block=2,
        motion_num_attention_heads=4,
        use_motion_mid_block=False,
    )
    scheduler = sampler(base, "EulerDiscreteScheduler", timestep_spacing="trailing")
    pipeline = tiny_motion.pipeline(scheduler, motion, tiny.image_unet(**WIDE))
    folder = tiny.save(pipeline, tmp_path / "hub", **how)
    got = convert_sources([folder], tmp_path / "model", dtype="fp32")
    loop = got.manifest.loop("temporal")
    assert (loop.solvers[0].name, loop.solvers[0].spacing) == ("euler", "trailing")
    wanted = wanted_latents(got, scheduler, 8, 3.0, pipeline)
    assert apart(last_latents(higen.load(got.path, backend="torch"), steps=8, guidance=3.0), wanted) < 1e-4


def test_sources_are_recognised(base: Path, module: Path) -> None:
    assert recognised([base, module]) == recognised([module, base]) == "animatediff"
    assert recognised([base]) == "stable_diffusion"


# C++ makes the same clips.


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_cpp_and_python_make_the_same_frames(
    built: Path, model: Bundle, by_graphs: Pipeline, tmp_path: Path, frames: int
) -> None:
    wanted = by_graphs(PROMPT, seed=SEED, steps=4, frames=frames, guidance=3.0, **SIZES).frames
    flags = [f"--seed={SEED}", "--steps=4", f"--width={WIDTH}", f"--height={HEIGHT}", f"--frames={frames}"]
    output = tmp_path / "clip.npy"
    cpp_build.done(built / "higen-run", model.path, PROMPT, "-q", "-o", output, "--guidance=3", *flags)
    assert np.abs(np.load(output).astype(int) - wanted).max() <= 1


def test_cpp_runs_windows_intervals_and_free_init(
    built: Path, model: Bundle, by_graphs: Pipeline, tmp_path: Path
) -> None:
    settings = {"windows": (3, 2), "guidance_interval": (0.3, 0.7), "free_init": (2, 0.3, 0.2, 3)}
    options = {"seed": SEED, "steps": 4, "frames": 7, "guidance": 3.0, "free_init_filter": "ideal", **settings}
    wanted = by_graphs(PROMPT, **options, **SIZES).frames
    given = {**options, "width": WIDTH, "height": HEIGHT}
    flags = [f"--{name.replace('_', '-')}={str(value).strip('()').replace(' ', '')}" for name, value in given.items()]
    output = tmp_path / "clip.npy"
    cpp_build.done(built / "higen-run", model.path, PROMPT, "-q", "-o", output, *flags)
    assert np.abs(np.load(output).astype(int) - wanted).max() <= 1


# Bad input.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_out_channels": (32, 32)}, "but this one has levels of"),
        ({"block_out_channels": (32, 64, 64)}, "but this one has levels of"),
        ({"motion_layers_per_block": 2}, "but this one has levels of"),
        ({"conv_in_channels": 9}, "PIA"),
        ({"motion_mid_block_layers_per_block": 2}, "motion_mid_block_layers_per_block=2"),
    ],
    ids=str,
)
def test_adapters_for_another_model_are_refused(base: Path, tmp_path: Path, changes: Any, said: str) -> None:
    folder = tmp_path / "adapter"
    tiny_motion.adapter(**changes).save_pretrained(folder)
    refused(tmp_path, [base, folder], said, folder)


def refused(tmp_path: Path, sources: list[Path], said: str, named: Path | None = None, **options: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        convert_sources(sources, tmp_path / "model", **options)
    assert said in str(error.value)
    assert named is None or str(named) in str(error.value)
    assert not (tmp_path / "model").exists()


def _lora(state: Any) -> Any:
    return {name.replace(".weight", "_lora.down.weight"): tensor for name, tensor in state.items() if "to_q" in name}


def _without(*parts: str) -> Any:
    return lambda state: {name: t for name, t in state.items() if not any(part in name for part in parts)}


def _nan(state: Any) -> Any:
    return {name: torch.full_like(t, torch.nan) if "to_q" in name else t for name, t in state.items()}


def _other_table(state: Any) -> Any:
    return {name: t + 1 if "attention_blocks.1.pos_encoder" in name else t for name, t in state.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_lora, "--lora"),
        (lambda state: state | {"input_hint_block.0.weight": torch.ones(1)}, "is a control network"),
        (lambda state: state | {"conv_in.weight": torch.ones(4, 9, 3, 3)}, "PIA"),
        (lambda state: state | {"time_embedding.weight": torch.ones(4)}, "time_embedding.weight"),
        (_without("down_blocks.1"), "but this one has levels of"),
        (_without("down_blocks.0"), "every level"),
        (_without("up_blocks.1.motion_modules.1"), "do not fit"),
        (_without("to_k"), "do not fit"),
        (_nan, "not a number"),
        (_other_table, "table of positions"),
    ],
    ids=["lora", "sparse", "pia", "more", "level", "first", "block", "layer", "nan", "tables"],
)
def test_other_files_are_refused(base: Path, tmp_path: Path, change: Any, said: str) -> None:
    file = tmp_path / "mm.ckpt"
    torch.save(change(tiny_motion.authors_names(tiny_motion.adapter(), "")), file)
    refused(tmp_path, [base, file], said, None if change is _nan else file)


def test_sources_that_are_not_a_pair(base: Path, module: Path, tmp_path: Path) -> None:
    refused(tmp_path, [module], "a Stable Diffusion 1.5 model and one motion module", module)
    refused(tmp_path, [base, module, module], "one motion module")
    refused(tmp_path, [base, base, module], "one motion module")
    refused(tmp_path, [base, module], "group_norm='video'", group_norm="video")
    refused(tmp_path, [base, module], "steps: unknown", steps=3)
    (tmp_path / "cut.ckpt").write_bytes(
        tiny_motion.checkpoint(tmp_path / "mm.ckpt", tiny_motion.adapter()).read_bytes()[:-900]
    )
    refused(tmp_path, [base, tmp_path / "cut.ckpt"], "cut.ckpt")
    refused(tmp_path, [base, tmp_path / "nowhere.ckpt"], "no such file")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "scheduler"])
def test_a_pipeline_with_a_missing_part(base: Path, tmp_path: Path, part: str) -> None:
    folder = tiny.save(tiny_motion.pipeline(sampler(base, "DDIMScheduler")), tmp_path / "hub")
    shutil.rmtree(folder / part)
    refused(tmp_path, [folder], part, folder)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "AnimateDiffSDXLPipeline"}, "AnimateDiffSDXLPipeline"),
        ("model_index.json", {"_class_name": "AnimateDiffSparseControlNetPipeline"}, "Sparse"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "SDXL"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"cross_attention_dim": 40}, "do not fit"),
        ("unet/config.json", {"mid_block_layers": 2}, "mid_block_layers=2"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "dpm++2m"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample"),
    ],
    ids=str,
)
def test_other_pipelines_are_refused(base: Path, tmp_path: Path, file: str, changes: Any, said: str) -> None:
    folder = tiny.save(tiny_motion.pipeline(sampler(base, "DDIMScheduler")), tmp_path / "hub")
    refused(tmp_path, [tiny.set_values(folder, file, **changes)], said, folder)


def test_version_2_is_refused(module: Path, tmp_path: Path) -> None:
    unet = tiny.image_unet(cross_attention_dim=1024, use_linear_projection=True)
    scheduler = tiny.scheduler("DDIMScheduler", clip_sample=False, prediction_type="v_prediction", steps_offset=1)
    folder = tiny.save(tiny.image_pipeline(scheduler, unet, tiny.text_encoder(1024, "gelu")), tmp_path / "sd2")
    refused(tmp_path, [folder, module], "made for version 1.5", folder)


def test_a_manifest_that_allows_more_frames_than_are_known(model: Bundle, tmp_path: Path) -> None:
    spatial, temporal = model.manifest.loops
    for windows in (None, Windows(25, 8), Windows(16, 8, 32)):
        with pytest.raises(ManifestError, match="positions of 24 frames"):
            networks(replace(model.manifest, loops=(spatial, replace(temporal, windows=windows))))


def test_a_table_among_the_weights_is_rounded_with_them() -> None:
    """The gate of an fp16 graph compares with the stored (rounded) weights, including the tables of positions."""
    unet = tiny_motion.pipeline(None).unet
    rounded(unet, "fp16")
    table = unet.down_blocks[0].motion_modules[0].transformer_blocks[0].pos_embed.pe
    assert torch.equal(table, table.half().float())
