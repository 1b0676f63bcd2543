"""SparseCtrl in AnimateDiff's steps, compared with diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import test_animatediff as clips
import tiny_animatediff as tiny_motion
import tiny_diffusers as tiny
import torch
from deep_truth import Reused
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray
from safetensors.torch import save_file
from test_control import base, drawn, module, per_frame, scheduler
from test_stable_diffusion import apart

import higen
from higen.bundle import Bundle
from higen.convert import convert_sources
from higen.engines.triton.interface import read_request
from higen.errors import CheckpointError, RequestError
from higen.families.animatediff.sparse_control import read_sparse_control
from higen.families.stable_diffusion.control_source import control_class
from higen.generate_command import _frame, _given
from higen.images import load_frames
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


def wanted_latents(
    model: Bundle, kind: str, base: Path, places: tuple[int, ...], every: int = 1
) -> NDArray[np.float32]:
    """The final latents [C,F,H,W] of diffusers' pipeline. `every`: steps from one whole step to the next."""
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
    with Reused(pipeline.unet, lambda count: count % every == 0):
        return clips.wanted_latents(model, pipeline.scheduler, 3, 7.5, call, frames=clips.FRAMES)


def test_a_clip_with_pictures_of_two_frames_is_that_of_diffusers(
    model: Bundle, kind: str, by_torch: Pipeline, base: Path
) -> None:
    got = clips.last_latents(by_torch, control=given(), control_scale=SCALES, steps=3, guidance=7.5)
    assert apart(got, wanted_latents(model, kind, base, PLACES)) < 1e-4
    assert apart(clips.last_latents(by_torch, steps=3, guidance=7.5), got) > 1e-2


def test_a_step_is_that_of_diffusers(model: Bundle, kind: str, by_torch: Pipeline, base: Path) -> None:
    """A guided step of two samples with other frames and sizes, which returns only the prediction."""
    b, f, h, w = 2, 5, 4, 2
    random = np.random.default_rng(1)
    x = random.standard_normal((b, 4, f, h, w)).astype(np.float32)
    texts = random.standard_normal((2, b, 77, 32)).astype(np.float32)
    t, scale = random.uniform(0, 999, b).astype(np.float32), random.uniform(0, 2, (b, f)).astype(np.float32)
    places = (random.uniform(size=(b, f)) > 0.5).astype(np.float32)
    shape = (b, 4, f, h, w) if kind == "rgb" else (b, 3, f, 2 * h, 2 * w)
    shown = random.uniform(-1, 1, shape).astype(np.float32)
    zero, one = np.zeros(b, np.float32), np.ones(b, np.float32)
    row = {"latents": x, "previous": x, "t": t, "A": zero, "B": one, "C": zero, "alpha": zero, "sigma": -one}
    named = {"control": shown, "control_scale": scale, "control_places": places}
    guidance = random.uniform(1, 9, (b, f)).astype(np.float32)
    given = {**row, "guidance": guidance, "context": texts[0], "empty_context": texts[1], **named}
    pipeline = truth(kind, base, scale.flatten().tolist())
    pictures_of, mask = (torch.from_numpy(array) for array in (shown, places[:, None, :, None, None]))
    pictures_of = pictures_of if kind == "rgb" else (pictures_of + 1) / 2
    mask = mask.expand(-1, -1, -1, *pictures_of.shape[3:])
    m = []
    with torch.inference_mode():
        for text in texts:
            told = torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(text.repeat(f, axis=0))
            down, middle = pipeline.controlnet(*told, pictures_of, conditioning_mask=mask, return_dict=False)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            m.append(pipeline.unet(*told, **more).sample.numpy())
    wanted = m[1] + guidance[:, None, :, None, None] * (m[0] - m[1])
    outputs = by_torch.backend.run("temporal_unet_control", **given)
    assert apart(by_torch.backend.to_numpy(outputs["latents"]), wanted) < 2e-5


def test_reused_features_are_those_of_diffusers_with_hooks(
    model: Bundle, kind: str, by_torch: Pipeline, base: Path
) -> None:
    wanted = wanted_latents(model, kind, base, PLACES, every=2)
    options: dict[str, Any] = {"control": given(), "control_scale": SCALES, "steps": 3, "guidance": 7.5}
    assert apart(clips.last_latents(by_torch, reuse=2, **options), wanted) < 1e-4


def test_a_clip_gives_every_frame(by_torch: Pipeline) -> None:
    shown = pictures()
    options: dict[str, Any] = {"steps": 1, "guidance": 1}
    got = clips.last_latents(by_torch, control=shown, **options)
    np.testing.assert_array_equal(got, clips.last_latents(by_torch, control=dict(enumerate(shown)), **options))
    two = clips.last_latents(by_torch, control=shown[:2], **options)
    np.testing.assert_array_equal(two, clips.last_latents(by_torch, control={0: shown[0], 1: shown[1]}, **options))


def test_a_folder_gives_every_frame(tmp_path: Path) -> None:
    for i, picture in enumerate(pictures()):
        PIL.Image.fromarray(picture).save(tmp_path / f"{i}.png")
    assert _given("control", (_frame(str(tmp_path)),)) == tmp_path  # as an option of `higen generate`
    read = load_frames(tmp_path, 2, clips.WIDTH, clips.HEIGHT, "control")
    assert read.places == (0, 1)
    np.testing.assert_array_equal(np.rint((read.pixels + 1) * 127.5), pictures()[:2].transpose(0, 3, 1, 2))


def test_tritons_tensors_give_the_same_request(model: Bundle) -> None:
    indices, shown = np.array(PLACES, np.int32), pictures()[list(PLACES)]
    tensors = {"prompt": np.array([b"a fox"]), "control": shown, "control_index": indices}
    values, _ = read_request(model.manifest, tensors | {"control_scale": np.array(SCALES, np.float32)})
    assert values["control"].keys() == set(PLACES)
    assert all(np.array_equal(values["control"][place], pictures()[place]) for place in PLACES)


def authors_file(path: Path, network: Any) -> Path:
    """A SparseCtrl network as its authors publish it: motion modules with their own names, the rest as in diffusers."""
    state = network.state_dict()
    motion = {name: tensor for name, tensor in state.items() if ".motion_modules." in name}
    named = tiny_motion.authors_names(SimpleNamespace(state_dict=lambda: motion), "module.")
    named |= {f"module.{name}": tensor for name, tensor in state.items() if name not in motion}
    torch.save({"controlnet": named, "animatediff_config": {"set_noisy_sample_input_to_zero": True}}, path)
    return path


UNET = dict(tiny_motion.pipeline(None).unet.config)
"""The arguments of the U-Net with motion modules; one latent cell is 2x2 pixels."""


@pytest.mark.parametrize("masked", [True, False])
def test_the_authors_file_is_the_same_network(kind: str, masked: bool, tmp_path: Path) -> None:
    network = tiny_motion.sparse_control(**KINDS[kind], concat_conditioning_mask=masked)
    file = authors_file(tmp_path / "v3_sd15_sparsectrl.ckpt", network)
    assert control_class(file) == "SparseControlNetModel"
    found, wanted = read_sparse_control(file, UNET, 2, []), network.state_dict()
    assert found.state.keys() == wanted.keys()
    assert all(torch.equal(found.state[name], wanted[name]) for name in wanted)
    for name, value in found.arguments.items():
        if name not in ("num_attention_heads", "temporal_transformer_layers_per_block"):
            same = network.config[name]
            assert value == same or list(value) == list(same), name
    rebuilt = diffusers.SparseControlNetModel(**found.arguments)
    rebuilt.load_state_dict(found.state)
    x, text = torch.randn(1, 4, 3, 4, 4), torch.randn(3, 77, 32)
    shown = torch.randn((1, 4, 3, 4, 4) if kind == "rgb" else (1, 3, 3, 8, 8))
    told = {"conditioning_mask": shown[:, :1], "return_dict": False}
    with torch.inference_mode():
        down, middle = rebuilt.eval()(x, torch.tensor(7), text, shown, **told)
        same_down, same_middle = network(x, torch.tensor(7), text, shown, **told)
    assert torch.equal(middle, same_middle)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(down, same_down, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("block_out_channels", (32, 32), "the control network is for another base; this base has"),
        ("cross_attention_dim", 64, "the control network is for another base"),
        ("conditioning_embedding_out_channels", (16, 16, 32), "for 4 pixels per latent cell, but this model has 2"),
        ("conditioning_channels", 4, "3 are wanted, those of a picture"),
        ("global_pool_conditions", True, "False is wanted"),
        ("controlnet_conditioning_channel_order", "bgr", "'rgb' is wanted"),
    ],
)
def test_a_network_for_another_model(tmp_path: Path, name: str, value: Any, said: str) -> None:
    network = tiny_motion.sparse_control(**tiny_motion.SHOWN_PIXELS)
    network.save_pretrained(tmp_path)
    tiny.set_values(tmp_path, "config.json", **{name: value})
    with pytest.raises(CheckpointError, match=f"{name}=.*{said}"):
        read_sparse_control(tmp_path, UNET, 2, [])


def test_incomplete_files(tmp_path: Path) -> None:
    network = tiny_motion.sparse_control()
    file = tmp_path / "half.safetensors"
    for part, said in (
        ("controlnet_down_blocks.1", "missing controlnet_down_blocks"),
        ("motion_modules.0.proj", "fit"),
    ):
        save_file({name: tensor for name, tensor in network.state_dict().items() if part not in name}, file)
        with pytest.raises(CheckpointError, match=rf"half.*not a SparseCtrl network for this U-Net(.|\n)*{said}"):
            read_sparse_control(file, UNET, 2, [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"control": {3: 0}}, "control: frame 3: the clip has 3 frames"),
        ({"control": {0: 0}, "frames": 1}, "control: a request for 1 frames takes no pictures by index"),
        ({"control": {}}, "control={}: a picture for each known frame"),
        ({"control": 0}, "control is one picture: say for which frame"),
        ({"control": {0: 0}, "control_scale": [1] * 4}, r"control_scale has shape \[4\]"),
    ],
)
def test_requests_that_are_refused(by_torch: Pipeline, options: dict[str, Any], said: str) -> None:
    given = options["control"]
    given = pictures()[0] if given == 0 else {place: pictures()[i] for place, i in given.items()}
    sizes = {"width": clips.WIDTH, "height": clips.HEIGHT, "frames": clips.FRAMES}
    with pytest.raises(RequestError, match=said):
        by_torch.request("a fox", **{**sizes, **options, "control": given})
