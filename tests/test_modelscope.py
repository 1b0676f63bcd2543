"""ModelScope and ZeroScope: tiny random models in the hub's and the authors' formats, compared with diffusers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cpp_build
import diffusers
import numpy as np
import pytest
import tiny_diffusers as tiny
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from test_convert import ldm_state, text_state
from test_lora import adapted, of_peft

import higen
from higen.bundle import Bundle
from higen.convert import convert_sources, recognised
from higen.doctor import report
from higen.engines.triton.repository import Settings, write_repository
from higen.errors import CheckpointError, RequestError
from higen.export.model_graphs import export_model
from higen.families.modelscope.checkpoint import FILES, recognise
from higen.families.modelscope.vgen_names import vgen_name
from higen.models.lora import Lora
from higen.noise import frame_noise
from higen.pipeline import Pipeline
from higen.schedule import solver_table
from higen.tokenizer import PromptTokenizer

# a warning of diffusers under NumPy 2 about arrays made from tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

PROMPTS, NEGATIVE, SEEDS = ("a red apple", "a cat", "two dogs run"), "blurry", (7, 8, 9)
WEIGHTS = ("unet.safetensors", "text_encoder.safetensors", "vae.safetensors")


def ddim() -> Any:
    """The scheduler of the hub's folder."""
    return tiny.scheduler("DDIMScheduler", steps_offset=1, set_alpha_to_one=False, clip_sample=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the hub's, with a tiny model."""
    return tiny.save(tiny.video_pipeline(ddim()), tmp_path_factory.mktemp("hub") / "text-to-video-ms-1.7b", "!")


@pytest.fixture(scope="module")
def converted(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The model directory made from that folder."""
    return convert_sources([saved], tmp_path_factory.mktemp("converted") / "model", dtype="fp32")


@pytest.fixture(scope="module")
def model(converted: Bundle) -> Bundle:
    """The same with graphs."""
    return export_model(converted)


@pytest.fixture(scope="module")
def by_torch(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="torch")


@pytest.fixture(scope="module")
def by_graphs(model: Bundle) -> Pipeline:
    return higen.load(model.path, backend="onnx")


def last_latents(pipe: Pipeline, count: int = 1, **options: Any) -> NDArray[np.float32]:
    """The final latents [B,C,F,H,W] of our loop for the first prompts."""
    given = {"seed": SEEDS[:count], "negative_prompt": NEGATIVE, "width": 32, "height": 16, "frames": 5, **options}
    *_, last = (event for event in pipe.stream(PROMPTS[:count], **given) if isinstance(event, higen.Step))
    return np.asarray(last.latents, dtype=np.float32)


def hidden(model: Bundle, pipeline: Any, *texts: str) -> torch.Tensor:
    """The text encoder's output for our tokens."""
    assert model.manifest.text is not None
    tokenizer = PromptTokenizer.from_file(model.path / "tokenizer.json", model.manifest.text)
    with torch.inference_mode():
        encoded: torch.Tensor = pipeline.text_encoder(torch.from_numpy(tokenizer.encode(texts))).last_hidden_state
    return encoded


def noise_of(count: int, frames: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([frame_noise(seed, 0, 4, frames, height, width) for seed in SEEDS[:count]]))


def wanted(
    model: Bundle,
    scheduler: Any,
    steps: int,
    shape: tuple[int, int, int, int] = (1, 5, 16, 32),
    guidance: float = 9.0,
    output: str = "latent",
) -> Any:
    """diffusers' result from the noise of our seeds. `shape`: samples, frames, height, width in pixels."""
    count, frames, height, width = shape
    pipeline = tiny.video_pipeline(scheduler)
    with torch.inference_mode():
        made = pipeline(
            prompt_embeds=hidden(model, pipeline, *PROMPTS[:count]),
            negative_prompt_embeds=hidden(model, pipeline, *[NEGATIVE] * count),
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_frames=frames,
            height=height,
            width=width,
            latents=noise_of(count, frames, height // 2, width // 2).clone(),
            output_type=output,
        )
    return np.asarray(made.frames)


def apart(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The largest difference relative to the largest wanted value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


SAMPLERS = {"ddim": "DDIMScheduler", "dpm++2m": "DPMSolverMultistepScheduler"}


def sampler(solver: str) -> Any:
    """diffusers' scheduler of this kind, with the folder's configuration."""
    config = json.loads(ddim().to_json_string())
    return getattr(diffusers, SAMPLERS[solver]).from_config(config)


@pytest.mark.parametrize("steps", [8, 25])
@pytest.mark.parametrize("solver", SAMPLERS)
def test_final_latents_are_those_of_diffusers(
    model: Bundle, by_torch: Pipeline, by_graphs: Pipeline, solver: str, steps: int
) -> None:
    truth = wanted(model, sampler(solver), steps)
    for pipe in (by_torch, by_graphs):
        assert apart(last_latents(pipe, solver=solver, steps=steps, guidance=9.0), truth) < 1e-4


@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (1, 1, 32, 16), (3, 2, 16, 48), (2, 7, 24, 40)], ids=str)
def test_shapes(model: Bundle, by_torch: Pipeline, by_graphs: Pipeline, shape: tuple[int, int, int, int]) -> None:
    """Equal numbers of samples and frames, a single frame, and sizes at which no graph was traced."""
    count, frames, height, width = shape
    truth = wanted(model, ddim(), 3, shape)
    options = {"frames": frames, "height": height, "width": width, "steps": 3, "guidance": 9.0}
    for pipe in (by_torch, by_graphs):
        assert apart(last_latents(pipe, count, **options), truth) < 1e-4


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_a_step_is_that_of_diffusers_network(model: Bundle, by_graphs: Pipeline, frames: int) -> None:
    """Both branches of guidance, three samples, guidance per frame, and a row that uses two estimates."""
    unet, random = tiny.video_unet(), np.random.default_rng(frames)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape).astype(np.float32)

    loop = model.manifest.loops[0]
    table = solver_table(loop.schedule, loop.prediction, loop.solver("dpm++2m"), 8)
    row = {name: np.full(3, getattr(table, name)[4], np.float32) for name in ("t", "A", "B", "C", "alpha", "sigma")}
    x, previous = normal(3, 4, frames, 6, 4), normal(3, 4, frames, 6, 4)
    context, empty, guidance = normal(3, 77, 32), normal(3, 77, 32), np.abs(normal(3, frames)) + 1
    given = {"latents": x, "previous": previous, **row, "guidance": guidance}
    out = by_graphs.backend.run("temporal_unet", **given, context=context, empty_context=empty)
    with torch.inference_mode():
        time = torch.from_numpy(row["t"])
        m, without = (
            unet(torch.from_numpy(x), time, encoder_hidden_states=torch.from_numpy(text)).sample.numpy()
            for text in (context, empty)
        )
    m = without + guidance[:, None, :, None, None] * (m - without)
    a, b, c, alpha, sigma = (float(row[name][0]) for name in ("A", "B", "C", "alpha", "sigma"))
    assert apart(by_graphs.backend.to_numpy(out["latents"]), a * x + b * m + c * previous) < 2e-5
    assert apart(by_graphs.backend.to_numpy(out["previous"]), alpha * x - sigma * m) < 2e-5


def test_without_guidance_the_plain_step_runs(model: Bundle, by_torch: Pipeline, by_graphs: Pipeline) -> None:
    truth = wanted(model, ddim(), 8, guidance=1.0)
    for pipe in (by_torch, by_graphs):
        assert apart(last_latents(pipe, steps=8, guidance=1.0), truth) < 1e-4
        (step, *_) = (event for event in pipe.stream("a", guidance=1.0, steps=1) if isinstance(event, higen.Step))
        assert step.stage == "temporal_unet_plain"


def test_frames_are_those_of_diffusers(model: Bundle, by_torch: Pipeline, by_graphs: Pipeline) -> None:
    """Three samples at once: each equals a single generation. A single frame is a picture."""
    truth = np.trunc(255 * wanted(model, ddim(), 6, (3, 5, 16, 32), output="np"))
    options = {"negative_prompt": NEGATIVE, "width": 32, "height": 16, "steps": 6, "guidance": 9.0}
    for pipe in (by_torch, by_graphs):
        videos = pipe(PROMPTS, seed=SEEDS, frames=5, **options)
        assert all(np.abs(video.frames - truth[i]).max() <= 1 for i, video in enumerate(videos))
        picture = pipe.image(PROMPTS[0], seed=SEEDS[0], **options)
        one = np.trunc(255 * wanted(model, ddim(), 6, (1, 1, 16, 32), output="np"))[0, 0]
        assert np.abs(picture - one).max() <= 1


# The second pass: a video from a video.


CLIP = np.random.default_rng(0).integers(0, 256, (4, 16, 32, 3), np.uint8)


@pytest.mark.parametrize("solver", SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_video_to_video_is_that_of_diffusers(
    model: Bundle,
    by_torch: Pipeline,
    by_graphs: Pipeline,
    solver: str,
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = tiny.video_pipeline(sampler(solver), kind="VideoToVideoSDPipeline")
    noise = noise_of(1, 4, 8, 16)[0].swapaxes(0, 1)
    monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda *_, **__: noise)
    with torch.inference_mode():
        pixels = torch.from_numpy(CLIP.transpose(0, 3, 1, 2) / 127.5 - 1).float()
        latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        truth = pipeline(
            prompt_embeds=hidden(model, pipeline, PROMPTS[0]),
            negative_prompt_embeds=hidden(model, pipeline, NEGATIVE),
            video=latents[None],
            strength=strength,
            num_inference_steps=10,
            guidance_scale=4.0,
            output_type="latent",
        ).frames
    options = {"frames": 4, "solver": solver, "steps": 10, "guidance": 4.0, "video": CLIP, "strength": strength}
    for pipe in (by_torch, by_graphs):
        assert apart(last_latents(pipe, **options), np.asarray(truth)) < 1e-4


def test_a_second_pass_at_a_higher_size(by_torch: Pipeline, by_graphs: Pipeline) -> None:
    """The first video is scaled to the second video's size before encoding."""
    first = by_torch(PROMPTS[0], width=32, height=16, frames=3, steps=2)
    options = {"width": 64, "height": 32, "frames": 3, "steps": 5, "seed": 3}
    videos = [pipe(PROMPTS[0], video=first, strength=0.4, **options).frames for pipe in (by_torch, by_graphs)]
    assert videos[0].shape == (3, 32, 64, 3)
    assert np.abs(videos[0].astype(int) - videos[1]).max() <= 1
    with pytest.raises(RequestError, match="video has 3 frames: the request has 4"):
        by_torch(PROMPTS[0], video=first, **{**options, "frames": 4})


# Formats.


def test_the_tables_say_what_the_folder_says(saved: Path, converted: Bundle) -> None:
    manifest = converted.manifest
    assert recognised([saved]) == manifest.family == "modelscope"
    assert manifest.name == "text-to-video-ms-1.7b"
    assert manifest.licence.startswith("CC-BY-NC-4.0")
    assert (manifest.sizes.width, manifest.sizes.height, manifest.sizes.frames) == (16, 16, (1, 16, 256))
    assert manifest.text is not None
    assert manifest.text.pad_id == 0
    assert [loop.name for loop in manifest.loops] == ["temporal"]
    assert manifest.loops[0].solvers[0].name == "ddim"


@pytest.mark.parametrize(
    "how", [{"variant": "fp16"}, {"max_shard_size": "300KB"}, {"safe_serialization": False}], ids=str
)
def test_every_way_that_diffusers_saves(converted: Bundle, tmp_path: Path, how: dict[str, Any]) -> None:
    """Also a folder for video to video, as ZeroScope XL has it."""
    pipeline = tiny.video_pipeline(ddim(), kind="VideoToVideoSDPipeline")
    folder = tiny.save(pipeline, tmp_path / "hub", **how)
    same_weights(convert_sources([folder], tmp_path / "model", dtype="fp32"), converted)


def same_weights(got: Bundle, wanted: Bundle) -> None:
    for name in WEIGHTS:
        ours, theirs = load_file(got.path / name), load_file(wanted.path / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def vgen_state(unet: Any) -> dict[str, torch.Tensor]:
    """A U-Net in the authors' format: the projections of their temporal transformers are convolutions with kernel 1."""
    attends = [kind.startswith("Cross") for kind in unet.config.up_block_types]
    state = {}
    for name, tensor in unet.state_dict().items():
        temporal = name.startswith("transformer_in.") or ".temp_attentions." in name
        kernel = temporal and ".proj_" in f".{name}" and name.endswith("weight") and ".ff." not in name
        theirs = vgen_name(name, unet.config.layers_per_block, attends)
        state[theirs] = tensor[..., None] if kernel else tensor
    return state


@pytest.fixture(scope="module")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authors") / "text-to-video-synthesis"
    folder.mkdir()
    torch.save(vgen_state(tiny.video_unet()), folder / FILES[0])
    torch.save(text_state(), folder / FILES[1])
    torch.save({"state_dict": {f"first_stage_model.{n}": t for n, t in ldm_state().items()}}, folder / FILES[2])
    return folder


def test_the_authors_files_are_the_same_network(converted: Bundle, three_files: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    sources = [three_files / name for name in FILES]
    assert recognise(three_files)
    assert [recognise(path) for path in sources] == [True, False, False]
    got = convert_sources(sources, tmp_path / "files", dtype="fp32", on_note=notes.append)
    assert load_file(got.path / WEIGHTS[0]).keys() == load_file(converted.path / WEIGHTS[0]).keys()
    truth = tiny.video_unet().state_dict()
    assert all(torch.equal(tensor, truth[name]) for name, tensor in load_file(got.path / WEIGHTS[0]).items())
    loop, theirs = got.manifest.loops[0], converted.manifest.loops[0]
    assert (loop.schedule, loop.prediction) == (theirs.schedule, theirs.prediction)
    assert loop.solvers[0] == theirs.solvers[0]
    assert got.manifest.architecture["unet"].items() <= converted.manifest.architecture["unet"].items()
    assert got.manifest.text == converted.manifest.text
    assert (got.manifest.sizes.width, got.manifest.sizes.frames) == (256, (1, 16, 256))
    assert [note for note in notes if "no commercial use" in note] == notes[-1:]
    same_weights(convert_sources([three_files], tmp_path / "folder", dtype="fp32"), got)
    higen.load(got.path, backend="torch")("a cat", frames=2, width=16, height=16, steps=1)


def test_names_of_the_released_size(reference: Path) -> None:
    """HiGen's released denoiser contains this U-Net under the same names, and further tensors."""
    lines = (reference / "full_state_dict_keys.tsv").read_text(encoding="utf-8").splitlines()[1:]
    released = {name: tuple(json.loads(shape)) for name, shape, *_ in (line.split("\t") for line in lines)}
    with torch.device("meta"):
        unet = diffusers.UNet3DConditionModel()
    own = ("context_embedding.", "msim_embedding.", "asim_embedding.", "img_embedding.")
    wanted = {name: shape for name, shape in released.items() if not name.startswith(own)}
    assert {name: tuple(tensor.shape) for name, tensor in vgen_state(unet).items()} == wanted


def test_a_lora_is_merged_as_peft_does(saved: Path, tmp_path: Path) -> None:
    unet, notes = tiny.video_unet(), list[str]()
    layers = ["to_q", "to_v", "proj_in", "ff.net.0.proj", "conv_shortcut"]
    factors = {f"unet.{name}": tensor for name, tensor in adapted(unet, layers, 1).items()}
    file = tmp_path / "style.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6})}
    save_file({name: tensor.contiguous() for name, tensor in factors.items()}, file, metadata)
    got = convert_sources([saved], tmp_path / "model", dtype="fp32", on_note=notes.append, loras=[Lora(file, 0.7)])
    changed, truth = load_file(got.path / WEIGHTS[0]), of_peft(unet, 0.7)
    assert changed.keys() == truth.keys()
    assert all(torch.allclose(changed[name], truth[name], rtol=1e-5, atol=1e-6) for name in truth)
    assert f"{len(factors) // 2} layers changed" in notes[0]


def test_the_licence_is_the_model_cards(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "hub"))
    (folder / "README.md").write_text("---\ntags:\n- video\nlicense: cc-by-nc-4.0\n---\n# A model\n", encoding="utf-8")
    notes: list[str] = []
    manifest = convert_sources([folder], tmp_path / "model", on_note=notes.append).manifest
    assert manifest.licence == "cc-by-nc-4.0, as its model card says"
    assert f"licence: {manifest.licence}" in notes


# The other runtimes.


def test_doctor_and_triton_know_the_model(model: Bundle, tmp_path: Path) -> None:
    text = report(model.path).as_text()
    for stage in ("text_encoder", "temporal_unet", "vae_decoder"):
        assert stage in text
    write_repository(model, tmp_path / "repository", Settings())
    config = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "repository").rglob("config.pbtxt"))
    assert '"video"' in config
    assert '"strength"' in config


@pytest.mark.parametrize("video", [False, True])
def test_cpp_and_python_make_the_same_frames(
    built: Path, model: Bundle, by_graphs: Pipeline, tmp_path: Path, video: bool
) -> None:
    """From noise, and from the frames of a video of another size."""
    frames = np.random.default_rng(1).integers(0, 256, (3, 8, 16, 3), np.uint8)
    options: Mapping[str, Any] = {"video": frames, "strength": 0.6} if video else {}
    wanted = by_graphs(PROMPTS[0], seed=7, steps=6, frames=3, width=32, height=16, guidance=3.0, **options).frames
    flags = ["--seed=7", "--steps=6", "--frames=3", "--width=32", "--height=16", "--guidance=3"]
    if video:
        files = [tmp_path / f"{i}.png" for i in range(3)]
        for file, frame in zip(files, frames, strict=True):
            Image.fromarray(frame).save(file)
        flags += [f"--picture=video={','.join(map(str, files))}", "--control=strength=0.6"]
    output = tmp_path / "frames.npy"
    cpp_build.done(built / "higen-run", model.path, PROMPTS[0], "-q", "-o", output, *flags)
    assert np.abs(np.load(output).astype(int) - wanted).max() <= 1


# Bad input.


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ("unet/config.json", {"_class_name": "I2VGenXLUNet"}, "I2VGenXLUNet"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"num_attention_heads": 8}, "num_attention_heads"),
        ("unet/config.json", {"cross_attention_dim": 40}, "do not fit"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "dpm++2m"),
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


FOREIGN = {
    "context_embedding.tokens": ((1, 2), "HiGen"),
    "pre_image_condition.0.weight": ((2, 2), "TF-T2V"),
    "local_image_concat.0.weight": ((2, 2), "I2VGen-XL"),
    "depth_embedding.0.weight": ((2, 2), "VideoComposer"),
    "input_blocks.0.0.weight": ((32, 12, 3, 3), "VideoLCM"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_cousins_of_the_authors_are_refused_by_name(three_files: Path, tmp_path: Path, name: str) -> None:
    shape, said = FOREIGN[name]
    shutil.copytree(three_files, tmp_path / "authors")
    torch.save({**vgen_state(tiny.video_unet()), name: torch.zeros(shape)}, tmp_path / "authors" / FILES[0])
    with pytest.raises(CheckpointError, match=said):
        convert_sources([tmp_path / "authors" / file for file in FILES], tmp_path / "model", family="modelscope")
    assert not (tmp_path / "model").exists()


def test_a_file_of_another_name_does_not_say_what_it_predicts(three_files: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(three_files / FILES[0], tmp_path / "zs2_576w.pth"))
    sources = [other, *(three_files / name for name in FILES[1:])]
    for options in ({}, {"prediction": "v"}):
        with pytest.raises(CheckpointError, match=r"give --network, one of modelscope.*SR600"):
            convert_sources(sources, tmp_path / "model", **options)
    with pytest.raises(CheckpointError, match="predicts epsilon"):
        convert_sources(sources, tmp_path / "model", prediction="v", network="modelscope")
    assert not (tmp_path / "model").exists()
    assert convert_sources(sources, tmp_path / "model", prediction="epsilon").manifest.loops[0].prediction == "epsilon"


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (FILES[:1], "three files"),
        (FILES[:2], "three files"),
        ((FILES[0], FILES[2], FILES[1]), "OpenCLIP text tower"),
        ((FILES[1], FILES[0], FILES[2]), "not ModelScope's U-Net"),
    ],
    ids=str,
)
def test_files_that_are_missing_or_in_another_order(
    three_files: Path, tmp_path: Path, sources: tuple[str, ...], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        convert_sources([three_files / name for name in sources], tmp_path / "model")
    shutil.copytree(three_files, tmp_path / "authors")
    (tmp_path / "authors" / FILES[2]).unlink()
    with pytest.raises(CheckpointError, match=FILES[2]):
        convert_sources([tmp_path / "authors"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", ["cut", "nan", "shape", "missing", "extra", "parts"])
def test_damaged_files(three_files: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(three_files, tmp_path / "authors"))
    file, state, said = folder / FILES[0], vgen_state(tiny.video_unet()), FILES[0]
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:-1000])
        case "nan":
            state["out.2.bias"][0], said = float("nan"), "conv_out.bias"
        case "shape":
            state["time_embed.0.bias"], said = torch.zeros(3), r"time_embed\.0\.bias"
        case "missing":
            del state[said := "middle_block.0.temopral_conv.conv4.3.bias"]
        case "extra":
            state[said := "somebody.else"] = torch.zeros(1)
        case "parts":
            torch.save(text_state(64), folder / FILES[1])
            said = "text encoder's width"
    if damage != "cut":
        torch.save(state, file)
    with pytest.raises(CheckpointError, match=said):
        convert_sources([folder], tmp_path / "model")
    assert not (tmp_path / "model").exists()
