"""Stable Video Diffusion: a tiny random model in every published format, compared with diffusers' own pipeline."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cpp_build
import numpy as np
import PIL.Image
import pytest
import tiny_diffusers as tiny
import tiny_svd
import torch
from deep_truth import Reused
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import higen
from higen.backends.external_data import external_files
from higen.bundle import Bundle
from higen.compose import compose
from higen.convert import convert_sources
from higen.engines.triton.client import request_tensors
from higen.engines.triton.service import Limits, Service
from higen.errors import CheckpointError, HigenError, MissingExtra, RequestError
from higen.export.model_graphs import export_model
from higen.families.stable_diffusion import checkpoint as stable_diffusion
from higen.families.svd.checkpoint import recognise
from higen.families.svd.ldm_names import codec_ldm_name, unet_ldm_name
from higen.families.svd.spec import AUGMENTATION, NOISE
from higen.noise import frame_noise, shaped
from higen.pipeline import Pipeline

# warnings of diffusers under NumPy 2 about arrays made from tensors, and of transformers about torchvision
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

SEED = 7
WIDTH, HEIGHT = 32, 16  # pixels: 16x8 latent cells
CHUNK = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the hub's, with a tiny model."""
    return tiny_svd.save(tiny_svd.pipeline(), tmp_path_factory.mktemp("hub") / "stable-video-diffusion-img2vid")


@pytest.fixture(scope="module")
def model(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The model directory made from that folder, with the graphs of all stages except the plain step."""
    bundle = convert_sources([saved], tmp_path_factory.mktemp("converted") / "model", dtype="fp32", chunk=CHUNK)
    return export_model(bundle, [name for name in bundle.manifest.stage_names if name != "temporal_unet_plain"])


@pytest.fixture(scope="module")
def by_torch(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="torch")


@pytest.fixture(scope="module")
def by_graphs(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="onnx")


def picture(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """A picture with colours that change slowly and noise on them."""
    random = np.random.default_rng(seed)
    waves = np.sin(np.arange(height)[:, None, None] / 3 + np.arange(width)[None, :, None] / 5 + random.random(3) * 6)
    return np.clip(127 + 90 * waves + random.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)


def apart(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The largest difference relative to the largest wanted value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@contextlib.contextmanager
def our_noise(pipeline: Any, noise: NDArray[np.float32]) -> Iterator[None]:
    """Make diffusers' pipeline draw the picture's noise from our stream, and read the picture contiguous in memory.

    diffusers itself passes a channels-last picture; PyTorch's GroupNorm of such a picture on a CPU is off by 1e-4.
    """
    module = sys.modules[type(pipeline).__module__]
    before, preprocess = module.randn_tensor, pipeline.video_processor.preprocess  # type: ignore[attr-defined]
    module.randn_tensor = lambda *_, **__: torch.from_numpy(noise)  # type: ignore[attr-defined]
    pipeline.video_processor.preprocess = lambda *a, **k: preprocess(*a, **k).contiguous()
    try:
        yield
    finally:
        module.randn_tensor = before  # type: ignore[attr-defined]
        pipeline.video_processor.preprocess = preprocess


def wanted(
    pictures: Sequence[NDArray[np.uint8]],
    seeds: Sequence[int],
    steps: int,
    frames: int,
    output: str = "latent",
    pipeline: Any = None,
    **options: Any,
) -> NDArray[np.float32]:
    """diffusers' final latents [B,C,F,H,W], or its frames [B,F,Y,X,3] from 0 to 255, from the noise of our seeds."""
    pipeline = pipeline or tiny_svd.pipeline()
    height, width = pictures[0].shape[:2]
    noise = np.stack([frame_noise(seed, NOISE, 4, frames, height // 2, width // 2) for seed in seeds])
    on_picture = np.concatenate([shaped(seed, AUGMENTATION, (1, 3, height, width), None) for seed in seeds])
    given = {"min_guidance_scale": 1.0, "max_guidance_scale": 3.0, **options}
    with torch.inference_mode(), our_noise(pipeline, on_picture):
        made = pipeline(
            [PIL.Image.fromarray(one) for one in pictures],
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            latents=torch.from_numpy(noise.swapaxes(1, 2)),
            output_type="latent" if output == "latent" else "pt",
            decode_chunk_size=CHUNK,
            **given,
        ).frames
    return made.numpy().swapaxes(1, 2) if output == "latent" else 255 * made.numpy().transpose(0, 1, 3, 4, 2)


def last_latents(pipe: Pipeline, pictures: Sequence[NDArray[np.uint8]], **options: Any) -> NDArray[np.float32]:
    """The final latents [B,C,F,H,W] of our loop."""
    height, width = pictures[0].shape[:2]
    given = {"image": list(pictures), "width": width, "height": height, "seed": SEED, **options}
    *_, last = (e for e in pipe.stream([""] * len(pictures), **given) if isinstance(e, higen.Step))
    return np.asarray(last.latents, dtype=np.float32)


@pytest.mark.parametrize("steps", [8, 25])
def test_final_latents_are_those_of_diffusers(by_torch: Pipeline, by_graphs: Pipeline, steps: int) -> None:
    given = [picture()]
    truth = wanted(given, [SEED], steps, 5)
    for pipe in (by_torch, by_graphs):
        assert apart(last_latents(pipe, given, steps=steps, frames=5), truth) < 1e-4


@pytest.mark.parametrize(
    ("samples", "frames", "width", "height"), [(3, 3, 32, 16), (1, 1, 16, 16), (1, 6, 16, 48), (3, 2, 24, 40)]
)
def test_shapes(by_torch: Pipeline, by_graphs: Pipeline, samples: int, frames: int, width: int, height: int) -> None:
    """Equal numbers of samples and frames, one frame, not square, samples with their own seeds and pictures."""
    pictures = [picture(i, width, height) for i in range(samples)]
    seeds = list(range(samples))
    # With one frame, the guidance ramp is only its low end. diffusers takes 1 for no guidance and then fails.
    truth = wanted(pictures, seeds, 3, frames, min_guidance_scale=1.5, max_guidance_scale=2.5)
    options = {"seed": seeds, "steps": 3, "frames": frames, "guidance": np.linspace(1.5, 2.5, frames).tolist()}
    for pipe in (by_torch, by_graphs):
        assert apart(last_latents(pipe, pictures, **options), truth) < 1e-4


def test_reused_features_are_those_of_diffusers_with_hooks(by_torch: Pipeline) -> None:
    pipeline = tiny_svd.pipeline()
    with Reused(pipeline.unet, lambda count: count % 2 == 0):
        truth = wanted([picture()], [SEED], 6, 4, pipeline=pipeline)
    assert apart(last_latents(by_torch, [picture()], steps=6, frames=4, reuse=2), truth) < 1e-4
    assert apart(last_latents(by_torch, [picture()], steps=6, frames=4), truth) > 1e-3


def test_controls_are_those_of_diffusers(by_torch: Pipeline, by_graphs: Pipeline) -> None:
    """Frames per second, motion bucket, noise on the picture and the ramp of guidance."""
    given = [picture(3)]
    theirs = {"fps": 12, "motion_bucket_id": 40, "noise_aug_strength": 0.3, "min_guidance_scale": 1.5}
    truth = wanted(given, [SEED], 4, 4, **theirs, max_guidance_scale=2.5)
    ours = {"fps": 12, "motion": 40.0, "augmentation": 0.3, "guidance": np.linspace(1.5, 2.5, 4).tolist()}
    for pipe in (by_torch, by_graphs):
        assert apart(last_latents(pipe, given, steps=4, frames=4, **ours), truth) < 1e-4


def test_without_guidance_the_plain_step_runs(by_torch: Pipeline) -> None:
    given = [picture(4)]
    truth = wanted(given, [SEED], 4, 3, min_guidance_scale=1.0, max_guidance_scale=1.0)
    options = {"steps": 4, "frames": 3, "guidance": 1.0}
    assert apart(last_latents(by_torch, given, **options), truth) < 1e-4
    steps = by_torch.stream(image=given[0], width=WIDTH, height=HEIGHT, **options)
    assert {event.stage for event in steps if isinstance(event, higen.Step)} == {"temporal_unet_plain"}


@pytest.mark.parametrize("frames", [1, 4, 6])
def test_frames_are_those_of_diffusers(by_torch: Pipeline, by_graphs: Pipeline, frames: int) -> None:
    """Frames are decoded in chunks of the manifest's size; the last chunk is shorter."""
    truth = np.trunc(wanted([picture()], [SEED], 4, frames, output="frames", min_guidance_scale=2.0)[0])
    scale = np.linspace(2, 3, frames).tolist()
    for pipe in (by_torch, by_graphs):
        video = pipe(image=picture(), seed=SEED, steps=4, frames=frames, width=WIDTH, height=HEIGHT, guidance=scale)
        assert np.abs(video.frames - truth).max() <= 1


def test_curves_over_frames(by_torch: Pipeline, by_graphs: Pipeline) -> None:
    """Each frame gets its own numbers: a constant curve equals a single number, other curves do not."""
    options = {"steps": 2, "frames": 3, "augmentation": 0.1}
    for pipe in (by_torch, by_graphs):
        plain = last_latents(pipe, [picture()], motion=50.0, **options)
        assert np.array_equal(last_latents(pipe, [picture()], motion=[50.0] * 3, **options), plain)
        curved = last_latents(pipe, [picture()], motion=[50.0, 90.0, 130.0], **options)
        assert apart(curved, plain) > 1e-3
        told = last_latents(pipe, [picture()], motion=50.0, **{**options, "augmentation": [0.1, 0.5, 0.9]})
        assert apart(told, plain) > 1e-3


def test_the_step_is_that_of_diffusers(model: Bundle, by_graphs: Pipeline) -> None:
    """One step's graph compared with diffusers' U-Net and scheduler, with the same conditions for both."""
    random, batch, frames = torch.Generator().manual_seed(3), 2, 5
    unet, scheduler = tiny_svd.unet(), tiny_svd.scheduler()
    scheduler.set_timesteps(25)
    x = torch.randn(batch, frames, 4, 8, 16, generator=random)
    context, prior = torch.randn(batch, 1, 24, generator=random), torch.randn(batch, 4, 8, 16, generator=random)
    ids = torch.tensor([[6.0, 127.0, 0.02], [11.0, 30.0, 0.2]])
    scale = torch.linspace(1, 3, frames)[None, :, None, None, None]
    zeros = torch.cat([torch.zeros_like(prior), prior])[:, None].expand(-1, frames, -1, -1, -1)
    row, t = 10, scheduler.timesteps[10]
    ratio = float(scheduler.sigmas[row])
    with torch.inference_mode():
        m = unet(
            torch.cat([torch.cat([x, x]), zeros], dim=2),
            t,
            encoder_hidden_states=torch.cat([torch.zeros_like(context), context]),
            added_time_ids=torch.cat([ids, ids]),
            return_dict=False,
        )[0]
        empty, given = m.chunk(2)
        scheduler._init_step_index(t)
        state = x * (ratio**2 + 1) ** 0.5
        after = scheduler.step(empty + scale * (given - empty), t, state).prev_sample
    truth = (after / (float(scheduler.sigmas[row + 1]) ** 2 + 1) ** 0.5).transpose(1, 2).numpy()
    manifest = model.manifest
    loop = manifest.loops[0]
    table = higen.schedule.solver_table(loop.schedule, loop.prediction, loop.solvers[0], 25)
    embedding = by_graphs.backend.run(
        "conditioner",
        fps=(ids[:, 0] + 1).numpy(),
        motion=ids[:, 1:2].expand(-1, frames).contiguous().numpy(),
        augmentation=ids[:, 2:].expand(-1, frames).contiguous().numpy(),
    )["frame_embedding"]
    columns = {name: np.full(batch, getattr(table, name)[row], np.float32) for name in ("t", "A", "B", "C")}
    columns |= {name: np.full(batch, getattr(table, name)[row], np.float32) for name in ("alpha", "sigma")}
    latents = np.ascontiguousarray(x.transpose(1, 2).numpy())
    got = by_graphs.backend.run(
        "temporal_unet",
        latents=latents,
        previous=np.zeros_like(latents),
        **columns,
        guidance=np.tile(np.linspace(1, 3, frames, dtype=np.float32), (batch, 1)),
        context=context.numpy(),
        prior=prior.numpy(),
        frame_embedding=by_graphs.backend.to_numpy(embedding),
    )["latents"]
    assert apart(by_graphs.backend.to_numpy(got), truth) < 2e-5


def test_tables(model: Bundle, saved: Path) -> None:
    """The tables equal those of the published model, except for its sizes."""
    manifest = model.manifest
    assert manifest.family == "svd"
    assert manifest.name == saved.name
    assert manifest.text is None
    assert manifest.loops[0].guidance == (1.0, 3.0)
    assert manifest.loops[0].steps == 25
    assert manifest.sizes.chunk == CHUNK
    assert manifest.sizes.frames[1] == 6
    lowest = {stage.name: stage.lowest for stage in manifest.stages}
    assert lowest["vae_encoder"] == lowest["vae_decoder"] == "fp32"
    assert lowest["temporal_unet"] == "fp16"
    assert "non-commercial" in manifest.licence


# Formats.


@pytest.mark.parametrize(
    "how", [{"variant": "fp16"}, {"max_shard_size": "300KB"}, {"safe_serialization": False}], ids=str
)
def test_every_way_that_diffusers_saves(model: Bundle, tmp_path: Path, how: dict[str, Any]) -> None:
    folder = tiny_svd.save(tiny_svd.pipeline(), tmp_path / "hub", **how)
    assert recognise(folder)
    notes: list[str] = []
    got = convert_sources([folder], tmp_path / "model", dtype="fp32", on_note=notes.append)
    for name in ("unet.safetensors", "image_encoder.safetensors", "vae.safetensors"):
        ours, theirs = load_file(got.path / name), load_file(model.path / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert sum("licence" in note for note in notes) == 1
    assert got.manifest.sizes.chunk == 14


def test_another_width(tmp_path: Path) -> None:
    """Three levels, two blocks per level, other heads, another picture encoder, an autoencoder with a factor of 4."""
    parts = {
        "unet": tiny_svd.unet(
            block_out_channels=(32, 64, 64),
            down_block_types=(
                "CrossAttnDownBlockSpatioTemporal",
                "CrossAttnDownBlockSpatioTemporal",
                "DownBlockSpatioTemporal",
            ),
            up_block_types=(
                "UpBlockSpatioTemporal",
                "CrossAttnUpBlockSpatioTemporal",
                "CrossAttnUpBlockSpatioTemporal",
            ),
            layers_per_block=2,
            num_attention_heads=(1, 2, 4),
            cross_attention_dim=40,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            num_frames=3,
        ),
        "image_encoder": tiny_svd.image_encoder(projection_dim=40, hidden_size=48, patch_size=32, num_hidden_layers=3),
        "scheduler": tiny_svd.scheduler(sigma_min=0.01, sigma_max=80.0),
    }
    made = tiny_svd.pipeline(**parts)
    folder = tiny_svd.save(made, tmp_path / "hub")
    pipe = higen.load(convert_sources([folder], tmp_path / "model", dtype="fp32").path, backend="torch")
    given = [picture(5, 32, 32)]
    truth = wanted(given, [SEED], 6, 3, pipeline=made)
    assert apart(last_latents(pipe, given, steps=6), truth) < 1e-4


def single_file(path: Path, folder: Path) -> Path:
    """The tiny model of `folder` in the authors' format, with the other tensors in their files."""
    unet, vision, codec = (
        load_file(next((folder / part).glob("*.safetensors"))) for part in ("unet", "image_encoder", "vae")
    )
    attends = [kind.startswith("Cross") for kind in tiny_svd.unet().config.up_block_types]
    state = {f"model.diffusion_model.{unet_ldm_name(n, 1, attends)}": tensor for n, tensor in unet.items()}
    state |= _openclip(vision)
    for name, tensor in codec.items():
        where = "first_stage_model." if name.startswith("decoder.") else "conditioner.embedders.3.encoder."
        old = codec_ldm_name(name, 2)
        state[where + old] = tensor[:, :, None, None] if ".attn_1." in old and tensor.ndim == 2 else tensor
    unused = ("conditioner.embedders.0.open_clip.model.logit_scale", "conditioner.embedders.3.encoder.decoder.x.weight")
    state |= {name: torch.zeros(1) for name in (*unused, "first_stage_model.encoder.conv_in.bias")}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def _openclip(vision: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' picture encoder under OpenCLIP's names, written by hand."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
    }
    for leaf in ("weight", "bias"):
        names |= {f"pre_layrnorm.{leaf}": f"ln_pre.{leaf}", f"post_layernorm.{leaf}": f"ln_post.{leaf}"}
        for i in range(2):
            ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
            parts["self_attn.out_proj"] = "attn.out_proj"
            names |= {f"{ours}.{new}.{leaf}": f"{theirs}.{old}.{leaf}" for new, old in parts.items()}
    made = {old: vision[f"vision_model.{new}"] for new, old in names.items()}
    for i in range(2):
        for leaf in ("weight", "bias"):
            split = [vision[f"vision_model.encoder.layers.{i}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            made[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = torch.cat(split)
    made["proj"] = vision["visual_projection.weight"].T
    return {f"conditioner.embedders.0.open_clip.model.visual.{name}": tensor for name, tensor in made.items()}


@pytest.fixture(scope="module")
def of_published_widths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the hub's with heads as wide as in the published model, because a file does not state the width."""
    parts = {
        "unet": tiny_svd.unet(num_attention_heads=(1, 1)),
        "image_encoder": tiny_svd.image_encoder(hidden_size=80, num_attention_heads=1),
        "vae": tiny_svd.autoencoder(layers_per_block=2),
    }
    return tiny_svd.save(tiny_svd.pipeline(**parts), tmp_path_factory.mktemp("published") / "hub")


def test_a_single_file_is_the_same_model(of_published_widths: Path, tmp_path: Path) -> None:
    """The folder's tensors under the authors' names give the same model as the folder itself."""
    file = single_file(tmp_path / "svd_xt.safetensors", of_published_widths)
    assert recognise(file)
    assert not stable_diffusion.recognise(file)
    wanted = convert_sources([of_published_widths], tmp_path / "folder", dtype="fp32")
    got = convert_sources([file], tmp_path / "file", dtype="fp32", frames=6)
    for name in ("unet.safetensors", "image_encoder.safetensors", "vae.safetensors"):
        ours, theirs = load_file(got.path / name), load_file(wanted.path / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert got.manifest.loops == wanted.manifest.loops
    assert got.manifest.stages == wanted.manifest.stages
    assert got.manifest.sizes.frames == wanted.manifest.sizes.frames
    assert got.manifest.name == "svd_xt"
    options = {"steps": 2, "frames": 2, "guidance": 2.0}
    latents = [last_latents(higen.load(made.path, "torch"), [picture()], **options) for made in (wanted, got)]
    assert np.array_equal(*latents)


def test_a_single_file_that_does_not_fit(of_published_widths: Path, tmp_path: Path) -> None:
    file = single_file(tmp_path / "svd.safetensors", of_published_widths)
    with pytest.raises(CheckpointError, match="--frames 14"):
        convert_sources([file], tmp_path / "model")
    state = load_file(file)
    for name in (
        "model.diffusion_model.input_blocks.1.0.time_mixer.mix_factor",
        "first_stage_model.decoder.mid.block_2.mix_factor",
        "conditioner.embedders.3.encoder.quant_conv.weight",
        "conditioner.embedders.0.open_clip.model.visual.ln_post.bias",
    ):
        save_file({key: tensor for key, tensor in state.items() if key != name}, file)
        with pytest.raises(CheckpointError, match=r"(?s)svd\.safetensors.*missing"):
            convert_sources([file], tmp_path / "model", frames=14)
    save_file(state, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"svd\.safetensors"):
        convert_sources([file], tmp_path / "model", frames=14, family="svd")
    assert not (tmp_path / "model").exists()


# C++ makes the same frames.


def test_cpp_and_python_make_the_same_frames(built: Path, model: Bundle, by_graphs: Pipeline, tmp_path: Path) -> None:
    PIL.Image.fromarray(picture(6, 40, 30)).save(tmp_path / "picture.png")
    options: dict[str, Any] = {"seed": SEED, "steps": 4, "frames": 5, "width": WIDTH, "height": HEIGHT, "fps": 9}
    controls: dict[str, Any] = {"motion": [60.0, 70.0, 80.0, 90.0, 100.0], "augmentation": 0.05}
    video = by_graphs(image=tmp_path / "picture.png", **options, **controls)
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += ["--control=motion=60,70,80,90,100", "--control=augmentation=0.05"]
    flags += [f"--image={tmp_path / 'picture.png'}"]
    output = tmp_path / "clip.npy"
    cpp_build.done(built / "higen-run", model.path, "", "-q", "-o", output, *flags)
    assert np.abs(np.load(output).astype(int) - video.frames).max() <= 1


# Behind a model that draws pictures: text to video.


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny Stable Diffusion of one level, with the graphs that text to image needs."""
    folder = tmp_path_factory.mktemp("drawing")
    scheduler = tiny.scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    unet = tiny.image_unet(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )
    saved = tiny.save(tiny.image_pipeline(scheduler, unet), folder / "hub")
    bundle = convert_sources([saved], folder / "model", dtype="fp32")
    return export_model(bundle, ["text_encoder", "spatial_unet", "vae_decoder"])


@pytest.fixture(scope="module")
def composed(drawing: Bundle, model: Bundle) -> Bundle:
    return compose(drawing.path, model.path, drawing.path.parent / "composed")


TEXT = {"seed": SEED, "width": WIDTH, "height": HEIGHT, "steps": 3}
RAMP = [1.5, 2.0, 2.5]


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_composed_model_gives_the_frames_of_both(
    drawing: Bundle, model: Bundle, composed: Bundle, backend: str
) -> None:
    """The two models share no stream of noise, so the frames equal those of running the two models separately."""
    first, second, both = (higen.load(bundle.path, backend=backend) for bundle in (drawing, model, composed))
    drawn = first.image("a red apple", guidance=4.0, **TEXT)
    wanted = second(image=drawn, frames=3, guidance=RAMP, **TEXT).frames
    got = both("a red apple", frames=3, guidance=[4.0, RAMP], **TEXT)
    assert np.array_equal(got.frames, wanted)
    assert got.metadata["licence"] == f"{drawing.manifest.licence}; then {model.manifest.licence}"


def test_cpp_runs_a_composed_model(built: Path, composed: Bundle, tmp_path: Path) -> None:
    video = higen.load(composed.path, backend="onnx")("a red apple", frames=3, guidance=2.0, **TEXT)
    flags = [f"--{name}={value}" for name, value in TEXT.items()]
    output = tmp_path / "clip.npy"
    cpp_build.done(
        built / "higen-run", composed.path, "a red apple", "-q", "-o", output, "--frames=3", "--guidance=2", *flags
    )
    assert np.abs(np.load(output).astype(int) - video.frames).max() <= 1


class Reply:
    """Collects the answers of Triton's model to one request."""

    def __init__(self) -> None:
        self.frames: list[NDArray[np.uint8]] = []
        self.error: HigenError | None = None
        self.ended = threading.Event()

    def send(self, event: dict[str, NDArray[Any]]) -> None:
        if "frames" in event:
            self.frames.append(event["frames"])

    def finish(self) -> None:
        self.ended.set()

    def fail(self, error: HigenError) -> None:
        self.error = error
        self.ended.set()

    def cancelled(self) -> bool:
        return False


@pytest.mark.parametrize("which", ["model", "composed"])
def test_triton_gives_the_same_frames(which: str, request: pytest.FixtureRequest) -> None:
    """The model `higen` of a Triton repository, without the server."""
    pipe = higen.load(request.getfixturevalue(which).path, backend="onnx")
    service = Service(pipe, pipe.backend, Limits(slots=1, line=1, rows=dict.fromkeys(pipe.manifest.stage_names, 1)))
    prompt = "a red apple" if which == "composed" else ""
    options: dict[str, Any] = {**TEXT, "frames": 3, "guidance": 2.0, "motion": 60.0}
    options |= {} if prompt else {"image": picture()}
    reply = Reply()
    service.accept({name: array for name, (_, array) in request_tensors(prompt, **options).items()}, reply)
    assert reply.ended.wait(60)
    service.close()
    assert reply.error is None
    assert np.array_equal(np.concatenate(reply.frames), pipe(prompt, **options).frames)


def test_graphs_point_to_the_weights_by_their_new_names(drawing: Bundle, model: Bundle, composed: Bundle) -> None:
    wanted = {
        "spatial_unet": "unet.safetensors",
        "vae_decoder": "vae.safetensors",
        "temporal_unet": "second_unet.safetensors",
        "conditioner": "second_unet.safetensors",
        "second_vae_decoder": "second_vae.safetensors",
        "second_vae_encoder": "second_vae.safetensors",
        "image_encoder": "image_encoder.safetensors",
    }
    for stage, weights in wanted.items():
        assert external_files(composed.path / f"{stage}.onnx") == {weights}
        assert composed.manifest.stage(stage).weights == weights
    for name, file in (("unet", "second_unet"), ("vae", "second_vae")):
        assert (model.path / f"{name}.safetensors").samefile(composed.path / f"{file}.safetensors")
    assert (drawing.path / "unet.safetensors").samefile(composed.path / "unet.safetensors")


def test_a_graph_that_cannot_be_rewritten(
    drawing: Bundle, model: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(MissingExtra, match="export"):
        compose(drawing.path, model.path, tmp_path / "both")
    assert not list(tmp_path.iterdir())


# Bad input.


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
        ("unet/config.json", {"in_channels": 9}, "9 input"),
        ("unet/config.json", {"num_frames": None}, "num_frames=None"),
        ("unet/config.json", {"cross_attention_dim": 40}, "projection_dim: 24"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 40}, "addition_time_embed_dim=16"),
        ("unet/config.json", {"block_out_channels": [32, 96]}, "do not fit"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "dpm++2m"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type='epsilon'"),
        ("scheduler/scheduler_config.json", {"timestep_type": "discrete"}, "timestep_type='discrete'"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": False}, "use_karras_sigmas=False"),
        ("scheduler/scheduler_config.json", {"sigma_max": None}, "sigma_max=None"),
        ("scheduler/scheduler_config.json", {"sigma_max": 0.001}, "sigma_min < sigma_max"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "AutoencoderKLTemporalDecoder"),
        ("vae/config.json", {"latent_channels": 8}, "latent channels: 8"),
        ("image_encoder/config.json", {"architectures": ["CLIPVisionModel"]}, "CLIPVisionModelWithProjection"),
        ("image_encoder/config.json", {"num_hidden_layers": 5}, "do not fit"),
        ("feature_extractor/preprocessor_config.json", {"image_std": [0.2, 0.0, 0.2]}, "image_std"),
        ("model_index.json", {"_class_name": "StableVideoDiffusionControlNetPipeline"}, "no installed family"),
    ],
    ids=str,
)
def test_other_models_are_refused(saved: Path, tmp_path: Path, file: str, changes: dict[str, Any], said: str) -> None:
    tiny.assert_refused(saved, tmp_path, said, file, **changes)


@pytest.mark.parametrize("part", ["unet", "image_encoder", "vae", "scheduler"])
def test_a_folder_with_a_missing_part(saved: Path, tmp_path: Path, part: str) -> None:
    tiny.assert_refused(saved, tmp_path, part)


def test_a_pickle_that_runs_code(saved: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = Path(shutil.copytree(saved, tmp_path / "hub"))
    next((folder / "unet").glob("*.safetensors")).unlink()
    torch.save({"conv_in.weight": Code()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin"):
        convert_sources([folder], tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


def test_weights_that_are_not_numbers(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "hub")
    file = next((tmp_path / "hub" / "image_encoder").glob("*.safetensors"))
    state = load_file(file)
    state["visual_projection.weight"][0] = float("nan")
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"visual_projection\.weight"):
        convert_sources([tmp_path / "hub"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_options_that_are_unknown(saved: Path, tmp_path: Path) -> None:
    for options, said in (({"prediction": "v"}, "prediction"), ({"chunk": 0}, "chunk=0"), ({"frames": 9}, "frames=9")):
        with pytest.raises(CheckpointError, match=said):
            convert_sources([saved], tmp_path / "model", **options)


def test_a_picture_is_needed(by_torch: Pipeline) -> None:
    with pytest.raises(RequestError, match="image"):
        by_torch.request()
    for name, value in (("motion", -1.0), ("augmentation", float("nan")), ("frames", 25)):
        with pytest.raises(RequestError, match=name):
            by_torch.request(image=picture(), **{name: value})
