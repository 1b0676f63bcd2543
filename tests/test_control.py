"""Spatial control: ControlNets in the step's graph, compared with diffusers' pipelines; edges by OpenCV's rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import test_animatediff as clips
import test_stable_diffusion as pictures
import tiny_animatediff as tiny_motion
import tiny_diffusers as tiny
import torch
from deep_truth import Reused
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from test_stable_diffusion import apart, tokens

import higen
from higen.bundle import Bundle
from higen.convert import convert_sources
from higen.edges import edges
from higen.errors import CheckpointError, RequestError
from higen.families.stable_diffusion.control_source import _authors_name, is_control, read_control
from higen.images import load_picture
from higen.noise import frame_noise
from higen.pipeline import Pipeline
from higen.request import make_request

# a warning of diffusers under NumPy 2 about arrays made from tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Frames = NDArray[np.uint8]
SCALES = [0.2, 1.0, 0.7]


def drawn(frames: int, width: int, height: int, seed: int = 0) -> Frames:
    """Blocks of random colours, uint8 [frames,height,width,3]."""
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, height // 4, width // 4, 3), dtype=np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the hub's Stable Diffusion 1.5."""
    return tiny.save(
        tiny.image_pipeline(tiny.scheduler("DDIMScheduler", steps_offset=1, set_alpha_to_one=False, clip_sample=False)),
        tmp_path_factory.mktemp("hub") / "stable-diffusion-v1-5",
    )


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the hub's, with a ControlNet."""
    folder = tmp_path_factory.mktemp("hub") / "control_v11p_sd15_canny"
    tiny.control_net().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "motion-adapter-v1-5-2"
    tiny_motion.adapter().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def still(base: Path, control: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Stable Diffusion with a ControlNet for edges, which higen detects in the picture."""
    output = tmp_path_factory.mktemp("converted") / "still"
    return convert_sources([base, control], output, dtype="fp32", control_kind="edges")


@pytest.fixture(scope="module")
def moving(base: Path, module: Path, control: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """AnimateDiff with a ControlNet for given maps."""
    output = tmp_path_factory.mktemp("converted") / "moving"
    return convert_sources([control, base, module], output, dtype="fp32", control_kind="given")


@pytest.fixture(scope="module")
def still_pipe(still: Bundle) -> Pipeline:
    return higen.load(still.path, backend="torch")


@pytest.fixture(scope="module")
def moving_pipe(moving: Bundle) -> Pipeline:
    return higen.load(moving.path, backend="torch")


def scheduler(folder: Path, **changes: Any) -> Any:
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return diffusers.DDIMScheduler.from_config({**config, **changes})


def wanted_still(model: Bundle, folder: Path, shown: Frames, scale: float, every: int = 1) -> NDArray[np.float32]:
    """The final latents [C,1,H,W] of diffusers' pipeline, 4 steps, guidance 7.5. `every`: distance of whole steps."""
    pipeline: Any = diffusers.StableDiffusionControlNetPipeline(
        vae=tiny.autoencoder(),
        text_encoder=tiny.text_encoder(32),
        tokenizer=None,
        unet=tiny.image_unet(),
        controlnet=tiny.control_net(),
        scheduler=scheduler(folder),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = frame_noise(pictures.SEED, 0, 4, 1, pictures.HEIGHT // 2, pictures.WIDTH // 2)
    with torch.inference_mode(), Reused(pipeline.unet, lambda count: count % every == 0):
        texts = (pictures.PROMPT, pictures.NEGATIVE)
        given, empty = (pipeline.text_encoder(tokens(model, text)).last_hidden_state for text in texts)
        made = pipeline(
            prompt_embeds=given,
            negative_prompt_embeds=empty,
            image=PIL.Image.fromarray(shown),
            controlnet_conditioning_scale=scale,
            num_inference_steps=4,
            guidance_scale=7.5,
            latents=torch.from_numpy(noise[:, 0])[None],
            output_type="latent",
        )
    latents: NDArray[np.float32] = made.images.numpy().swapaxes(0, 1)
    return latents


def test_a_picture_with_the_edges_of_another_one_is_that_of_diffusers(
    still: Bundle, still_pipe: Pipeline, base: Path
) -> None:
    (shown,) = drawn(1, pictures.WIDTH, pictures.HEIGHT)
    given = {"control": shown, "control_scale": 0.7, "steps": 4, "guidance": 7.5}
    got = pictures.last_latents(still_pipe, **given)
    assert apart(got, wanted_still(still, base, edges(shown), 0.7)) < 1e-4
    assert apart(pictures.last_latents(still_pipe, steps=4, guidance=7.5), got) > 1e-2


def test_reused_features_are_those_of_diffusers_with_hooks(still: Bundle, still_pipe: Pipeline, base: Path) -> None:
    (shown,) = drawn(1, pictures.WIDTH, pictures.HEIGHT)
    given = {"control": shown, "control_scale": 0.7, "steps": 4, "guidance": 7.5}
    got = pictures.last_latents(still_pipe, reuse=2, **given)
    assert apart(got, wanted_still(still, base, edges(shown), 0.7, every=2)) < 1e-4
    assert apart(pictures.last_latents(still_pipe, **given), got) > 1e-3


def test_a_model_without_shallow_steps_with_control_refuses_to_reuse(still: Bundle) -> None:
    rows = [replace(row, deep=None) if "control" in row.name else row for row in still.manifest.stages]
    manifest = replace(still.manifest, stages=tuple(rows))
    (shown,) = drawn(1, pictures.WIDTH, pictures.HEIGHT)
    with pytest.raises(RequestError, match=r"reuse=2: the loop spatial of .* no shallow steps with control; leave out"):
        make_request(manifest, "a fox", controls={"control": shown}, load=load_picture, reuse=2)


def per_frame(controlnet: Any, scales: list[float]) -> Any:
    """diffusers' ControlNet with one scale per frame, for both branches."""
    forward = controlnet.forward

    def scaled(*arguments: Any, **named: Any) -> Any:
        down, middle = forward(*arguments, **named)
        factor = torch.tensor(scales).repeat(len(middle) // len(scales))[:, None, None, None]
        return [factor * one for one in down], factor * middle

    controlnet.forward = scaled
    return controlnet


def wanted_moving(model: Bundle, folder: Path, shown: Frames, scales: list[float]) -> NDArray[np.float32]:
    """The final latents [C,F,H,W] of diffusers' pipeline."""
    pipeline: Any = diffusers.AnimateDiffControlNetPipeline(
        vae=tiny.autoencoder(),
        text_encoder=tiny.text_encoder(32),
        tokenizer=None,
        unet=tiny.image_unet(),
        motion_adapter=tiny_motion.adapter(),
        controlnet=per_frame(tiny.control_net(), scales),
        scheduler=scheduler(folder, **tiny_motion.LINEAR),
    )
    pipeline.set_progress_bar_config(disable=True)

    def call(**named: Any) -> Any:
        return type(pipeline).__call__(
            pipeline,
            conditioning_frames=[PIL.Image.fromarray(frame) for frame in shown],
            width=clips.WIDTH,
            height=clips.HEIGHT,
            **named,
        )

    call.text_encoder = pipeline.text_encoder  # type: ignore[attr-defined]
    return clips.wanted_latents(model, pipeline.scheduler, 3, 7.5, call, frames=len(shown))


def test_a_clip_with_a_map_for_each_frame_is_that_of_diffusers(
    moving: Bundle, moving_pipe: Pipeline, base: Path
) -> None:
    shown = drawn(clips.FRAMES, clips.WIDTH, clips.HEIGHT)
    got = clips.last_latents(moving_pipe, control=shown, control_scale=SCALES, steps=3, guidance=7.5)
    assert apart(got, wanted_moving(moving, base, shown, SCALES)) < 1e-4


def test_the_drawn_key_frame_of_an_edit_follows_the_middle_frame_of_the_map(moving_pipe: Pipeline) -> None:
    shown, clip = (drawn(clips.FRAMES, clips.WIDTH, clips.HEIGHT, seed) for seed in (0, 1))
    middle = clips.FRAMES // 2
    usual: dict[str, Any] = {"seed": 3, "steps": 3}
    curves: dict[str, Any] = {"control_scale": SCALES, "guidance": [4.0, [7.5, 3.0, 2.0]]}
    single = {"control_scale": SCALES[middle], "guidance": 4.0}
    key = moving_pipe(
        "a fox", frames=1, control=shown[middle], width=clips.WIDTH, height=clips.HEIGHT, **usual, **single
    )
    usual |= {"control": shown, "strength": 0.5}
    wanted = moving_pipe.edit(clip, "a fox", key=key.frames[0], **usual, **curves)
    made = moving_pipe.edit(clip, "a fox", key="drawn", **usual, **curves)
    np.testing.assert_array_equal(made.frames, wanted.frames)


def authors_file(path: Path, network: Any, levels: int, prefix: str = "control_model.") -> Path:
    """A ControlNet as its authors publish it. `levels`: number of levels of the network that reads the pictures."""
    state = {prefix + _authors_name(name, 1, levels): tensor for name, tensor in network.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def test_the_authors_names_are_those_that_diffusers_knows(tmp_path: Path) -> None:
    network = tiny.control_net(conditioning_embedding_out_channels=(16, 16, 32, 32))
    file = authors_file(tmp_path / "control_v11p_sd15_canny.safetensors", network, 4)
    found, wanted = convert_controlnet_checkpoint(load_file(file), {"layers_per_block": 1}), network.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


UNET = dict(tiny.image_unet().config)
"""The arguments of the base's U-Net; one latent cell is 2x2 pixels."""


@pytest.mark.parametrize("names", ["authors", "bare", "diffusers"])
def test_a_single_file_is_the_same_network(tmp_path: Path, names: str) -> None:
    file, network = tmp_path / "control.safetensors", tiny.control_net()
    if names == "diffusers":
        save_file(network.state_dict(), file)
    else:
        authors_file(file, network, 2, "control_model." if names == "authors" else "")
    assert is_control(file)
    found, wanted = read_control(file, "edges", UNET, 2, []), network.state_dict()
    assert found.edges
    assert found.state.keys() == wanted.keys()
    assert all(torch.equal(found.state[name], wanted[name]) for name in wanted)
    assert {name: found.arguments[name] for name in ("cross_attention_dim", "attention_head_dim")} == {
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    }


def test_the_other_stages_are_those_without_a_controlnet(base: Path, still: Bundle, tmp_path: Path) -> None:
    plain = convert_sources([base], tmp_path / "model", dtype="fp32")
    ours, wanted = load_file(still.path / "unet.safetensors"), load_file(plain.path / "unet.safetensors")
    assert {name for name in ours if not name.startswith("control.")} == wanted.keys()
    rows = {stage.name: stage for stage in still.manifest.stages}
    assert [rows[stage.name] for stage in plain.manifest.stages] == [*plain.manifest.stages]


def test_bad_sources(base: Path, module: Path, control: Path, tmp_path: Path) -> None:
    sparse, output = tmp_path / "sparse", tmp_path / "model"
    sparse.mkdir()
    (sparse / "config.json").write_text(json.dumps({"_class_name": "SparseControlNetModel"}))
    for sources, kind, said in (
        ([base, control], None, "the files do not say what input the ControlNet takes: --control-kind edges"),
        ([base, control], "pose", "control_kind='pose': --control-kind"),
        ([base], "edges", "control_kind='edges': no ControlNet is among the sources"),
        ([base, module], "edges", "no ControlNet is among the sources"),
        ([control], "edges", "nothing: one folder or file is wanted beside the ControlNet"),
        ([base, control, control], "edges", "2 ControlNets: one is wanted"),
        ([base, sparse], "given", "one motion module are wanted.*sparse is a control network"),
        ([base, module, sparse], "edges", "control_kind='edges': a SparseCtrl model is shown pictures as they are"),
        ([base, module, sparse, control], "given", "2 ControlNets: one is wanted"),
        ([base, module, sparse], None, "diffusion_pytorch_model"),
    ):
        with pytest.raises(CheckpointError, match=said):
            convert_sources(sources, output, control_kind=kind)
        assert not output.exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("block_out_channels", (32, 32), "the control network is for another base; this base has"),
        ("cross_attention_dim", 64, "the control network is for another base"),
        ("conditioning_embedding_out_channels", (16, 16, 32), "for 4 pixels per latent cell, but this model has 2"),
        ("conditioning_channels", 4, "3 are wanted, those of a picture"),
        ("class_embed_type", "timestep", "class condition"),
    ],
)
def test_a_controlnet_for_another_base(tmp_path: Path, name: str, value: Any, said: str) -> None:
    config = {**tiny.control_net().config, "_class_name": "ControlNetModel", name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tiny.control_net().state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}=.*{said}"):
        read_control(tmp_path, "given", UNET, 2, [])


def test_an_incomplete_file(tmp_path: Path) -> None:
    file = authors_file(tmp_path / "half.safetensors", tiny.control_net(), 2)
    state = load_file(file)
    save_file({name: tensor for name, tensor in state.items() if "zero_convs.1" not in name}, file)
    with pytest.raises(CheckpointError, match=r"half.*missing zero_convs\.1\.0\."):
        read_control(file, "given", UNET, 2, [])
