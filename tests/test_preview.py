"""Tiny decoders for previews: files in both layouts, frames as in diffusers' pipelines with AutoencoderTiny."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_animatediff as tiny_motion
import tiny_diffusers as tiny
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import save_file
from test_compose import FIRST, SECOND, write

import higen
from higen.backends.base import RecordingBackend
from higen.backends.onnx import OnnxBackend
from higen.bundle import Bundle
from higen.cli import main
from higen.convert import convert_sources
from higen.errors import CheckpointError, HigenError, ManifestError, ModelError, RequestError
from higen.export.model_graphs import export_model
from higen.families.composed import spec as composed
from higen.families.preview_rows import TinyDecoder, with_preview_rows
from higen.manifest import Manifest
from higen.models.tiny_decoder import PreviewStage, read_tiny_decoder, tiny_decoder
from higen.noise import frame_noise
from higen.pipeline import Pipeline
from higen.presets import Preset
from higen.preview_decoder import Preview
from higen.request import make_request
from higen.tokenizer import PromptTokenizer
from higen.typed_json import from_json, to_json

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPT, SEED, WIDTH, HEIGHT = "a red apple", 7, 32, 16
OPTIONS: dict[str, Any] = {"seed": SEED, "width": WIDTH, "height": HEIGHT, "steps": 2, "guidance": 3.0}


def autoencoder(**changes: Any) -> diffusers.AutoencoderTiny:
    """A tiny autoencoder with two pixels per latent cell, as those of `tiny.autoencoder`."""
    arguments: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "decoder_block_out_channels": (16, 16),
        "num_decoder_blocks": (2, 1),
    }
    return tiny.randomised(diffusers.AutoencoderTiny(**{**arguments, **changes}), 11)


def authors(part: torch.nn.Module, first: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of an encoder or decoder as the authors name them. `first`: the number of its first convolution."""
    found = {}
    for name, tensor in part.state_dict().items():
        _, place, rest = name.split(".", 2)
        found[f"{prefix}{int(place) + first}.{rest}"] = tensor.clone()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder as diffusers saves it."""
    path = tmp_path_factory.mktemp("tiny") / "taesd"
    autoencoder().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A Stable Diffusion model with this decoder."""
    scheduler = tiny.scheduler("DDIMScheduler", steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    saved = tiny.save(tiny.image_pipeline(scheduler), tmp_path_factory.mktemp("hub") / "sd")
    return convert_sources([saved], tmp_path_factory.mktemp("sd") / "model", dtype="fp32", preview=folder)


@pytest.fixture(scope="module")
def plain_clips(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An AnimateDiff model without a tiny decoder."""
    hub = tmp_path_factory.mktemp("hub")
    base = tiny.save(
        tiny.image_pipeline(tiny.scheduler("DDIMScheduler", steps_offset=1, clip_sample=False)), hub / "base"
    )
    motion = hub / "motion"
    tiny_motion.adapter().save_pretrained(motion)
    return convert_sources([base, motion], hub / "model", dtype="fp32")


@pytest.fixture(scope="module")
def clips(plain_clips: Bundle, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same model with a tiny decoder, added to the model directory."""
    return convert_sources([plain_clips.path], tmp_path_factory.mktemp("ad") / "model", dtype="fp32", preview=folder)


def embeddings(bundle: Bundle, encoder: torch.nn.Module) -> list[torch.Tensor]:
    """The text encoder's outputs for the prompt and for the empty text."""
    assert bundle.manifest.text is not None
    tokenizer = PromptTokenizer.from_file(bundle.path / "tokenizer.json", bundle.manifest.text)
    return [encoder(torch.from_numpy(tokenizer.encode([text]))).last_hidden_state for text in (PROMPT, "")]


def wanted_frames(bundle: Bundle, pipeline: Any, purpose: int, frames: int) -> NDArray[np.float64]:
    """The frames [F,H,W,3] of diffusers' pipeline with the tiny autoencoder, as bytes that are not yet rounded."""
    pipeline.vae = autoencoder()
    noise = torch.from_numpy(frame_noise(SEED, purpose, 4, frames, HEIGHT // 2, WIDTH // 2))[None]
    clip = frames > 1
    with torch.inference_mode():
        given, empty = embeddings(bundle, pipeline.text_encoder)
        made = pipeline(
            prompt_embeds=given,
            negative_prompt_embeds=empty,
            num_inference_steps=OPTIONS["steps"],
            guidance_scale=OPTIONS["guidance"],
            latents=noise.clone() if clip else noise[:, :, 0].clone(),
            output_type="np",
            **({"num_frames": frames} if clip else {}),
        )
    return 255.0 * np.asarray(made.frames[0] if clip else made.images, np.float64)


def apart(frames: NDArray[np.uint8], wanted: NDArray[np.float64]) -> float:
    """The largest difference, in steps of a byte."""
    assert frames.shape == wanted.shape
    return float(np.abs(frames - wanted).max())


def by_graph(bundle: Bundle) -> Pipeline:
    """The model with a graph of the tiny decoder only."""
    exported = export_model(bundle, stages=[f"{bundle.manifest.sizes.decoder}_preview"])
    return Pipeline(exported, OnnxBackend(exported))


def last_step(pipe: Pipeline, **options: Any) -> higen.Step:
    *_, last = (event for event in pipe.stream(PROMPT, **options) if isinstance(event, higen.Step))
    return last


# The same frames as diffusers.


def test_pictures_are_those_of_diffusers(pictures: Bundle) -> None:
    """On PyTorch and on ONNX Runtime. The frames of the full decoder stay what they are without the tiny one."""
    scheduler = tiny.scheduler("DDIMScheduler", steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    pipeline = tiny.image_pipeline(scheduler)
    wanted = wanted_frames(pictures, pipeline, 0, 1)
    pipe = higen.load(pictures.path, backend="torch")
    video = pipe(PROMPT, decoder="preview", **OPTIONS)
    assert apart(video.frames, wanted) <= 1.01
    assert video.metadata["decoder"] == "preview"
    latents = last_step(pipe, **OPTIONS).latents
    request = pipe.request(PROMPT, decoder="preview", **OPTIONS)
    graph = by_graph(pictures)
    assert apart(graph.decode(latents, request)[0], wanted) <= 1.01
    full = pipe(PROMPT, **OPTIONS).frames
    with torch.inference_mode():
        own = tiny.autoencoder()
        pixels = own.decode(torch.from_numpy(np.asarray(latents))[:, :, 0] / own.config.scaling_factor).sample
    assert apart(full, 255 * (pixels / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)) <= 1.01
    assert np.abs(full.astype(int) - video.frames).max() > 16


def test_clips_are_those_of_diffusers(clips: Bundle) -> None:
    """Five frames, which are decoded in chunks of two; the decoder was added to a model directory."""
    sampler = tiny.scheduler("DDIMScheduler", **{**tiny_motion.LINEAR, "beta_schedule": "linear"})
    wanted = wanted_frames(clips, tiny_motion.pipeline(sampler), 1, 5)
    pipe = higen.load(clips.path, backend="torch")
    stream = pipe.stream(PROMPT, decoder="preview", frames=5, **OPTIONS)
    events = list(stream)
    assert [len(event.frames) for event in events if isinstance(event, higen.Frames)] == [2, 2, 1]
    assert apart(stream.videos[0].frames, wanted) <= 1.01
    steps = [event for event in events if isinstance(event, higen.Step)]
    request = pipe.request(PROMPT, decoder="preview", frames=5, **OPTIONS)
    assert apart(by_graph(clips).decode(steps[-1].latents, request)[0], wanted) <= 1.01


def test_a_scaling_factor_divides_the_latents() -> None:
    vae = autoencoder(scaling_factor=0.5, act_fn="silu", upsampling_scaling_factor=3)
    names = (
        "latent_channels",
        "decoder_block_out_channels",
        "num_decoder_blocks",
        "act_fn",
        "upsampling_scaling_factor",
    )
    decoder = tiny_decoder({name: vae.config[name] for name in names})
    decoder.load_state_dict(vae.decoder.state_dict())
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(PreviewStage(decoder, 0.5)(latents), vae.decode(latents / vae.config.scaling_factor).sample)


# Previews of a running request.


def test_previews_are_drawn_by_the_tiny_decoder(clips: Bundle, plain_clips: Bundle) -> None:
    for bundle, decoder, wanted in ((clips, "full", "preview"), (clips, "preview", "preview"), (plain_clips, "", "")):
        backend = RecordingBackend(bundle.manifest)
        pipe = Pipeline(bundle, backend)
        stream = pipe.stream(
            PROMPT, frames=3, width=WIDTH, height=HEIGHT, steps=1, **({"decoder": decoder} if decoder else {})
        )
        next(iter(stream))
        before = len(backend.calls)
        assert stream.preview().shape == (1, 3, HEIGHT, WIDTH, 3)
        drawn = {name for name, _ in backend.calls[before:]}
        assert drawn == {"vae_decoder_preview" if wanted else "vae_decoder"}
        after = len(backend.calls)
        list(stream)
        last = "vae_decoder_preview" if decoder == "preview" else "vae_decoder"
        assert {name for name, _ in backend.calls[after:]} == {last}
        assert (last,) in pipe.stages(stream.request)


def test_previews_fall_back_to_the_decoder(clips: Bundle) -> None:
    """A backend that cannot run the tiny decoder draws previews as before; a request for it is an error."""

    class Without(RecordingBackend):
        def choose(self, *stages: str) -> str:
            return stages[-1]

    backend = Without(clips.manifest)
    stream = Pipeline(clips, backend).stream(PROMPT, frames=2, width=WIDTH, height=HEIGHT, steps=1)
    next(iter(stream))
    stream.preview()
    assert backend.calls[-1][0] == "vae_decoder"


def test_a_model_without_one_refuses_it(plain_clips: Bundle) -> None:
    pipe = Pipeline(plain_clips, RecordingBackend(plain_clips.manifest))
    with pytest.raises(RequestError, match="decoder: unknown"):
        pipe.request(PROMPT, decoder="preview")


def test_other_words_are_refused(clips: Bundle) -> None:
    pipe = Pipeline(clips, RecordingBackend(clips.manifest))
    with pytest.raises(RequestError, match="decoder='tiny': one of 'full', 'preview'"):
        pipe.request(PROMPT, decoder="tiny")


# Files.


@pytest.mark.parametrize("blocks", [(2, 1), (3, 0, 1), (1,)], ids=str)
@pytest.mark.parametrize(
    "kind", ["taesd_decoder.safetensors", "taesd_decoder.pth", "prefixed.safetensors", "both.safetensors"]
)
def test_each_layout_is_read(tmp_path: Path, kind: str, blocks: tuple[int, ...]) -> None:
    vae = autoencoder(decoder_block_out_channels=(24,) * len(blocks), num_decoder_blocks=blocks)
    vae.save_pretrained(tmp_path / "folder")
    wanted = read_tiny_decoder(tmp_path / "folder", print)
    assert wanted[0]["num_decoder_blocks"] == list(blocks)
    assert wanted[1] == 1.0
    if kind == "both.safetensors":
        state = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    else:
        state = authors(vae.decoder, 1, "taesd_decoder." if kind.startswith("prefixed") else "")
    (save_file if kind.endswith("safetensors") else torch.save)(state, tmp_path / kind)
    arguments, scale, found = read_tiny_decoder(tmp_path / kind, print)
    assert (arguments, scale) == wanted[:2]
    assert found.keys() == wanted[2].keys()
    assert all(torch.equal(tensor, vae.decoder.state_dict()[name]) for name, tensor in found.items())


def _without(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "other channels": ({"latent_channels": 16}, r"for 16 channels of latents, but .* has 4"),
    "another factor": (
        {"decoder_block_out_channels": (16,) * 3, "num_decoder_blocks": (1, 1, 1)},
        r"for 4 pixels per latent cell, but .* has 2",
    ),
}


@pytest.mark.parametrize("layout", ["folder", "file"])
@pytest.mark.parametrize("wrong", WRONG)
def test_decoders_for_other_latents_are_refused(plain_clips: Bundle, tmp_path: Path, wrong: str, layout: str) -> None:
    vae, path = autoencoder(**WRONG[wrong][0]), tmp_path / "taesd"
    if layout == "folder":
        vae.save_pretrained(path)
    else:
        path = tmp_path / "taesd_decoder.safetensors"
        save_file(authors(vae.decoder, 1), path)
    refused(plain_clips, tmp_path, path, WRONG[wrong][1])


FILES = {
    "encoder": (lambda vae: authors(vae.encoder, 0), "an encoder"),
    "missing": (lambda vae: _without(authors(vae.decoder, 1), "3.conv.2.weight"), "missing layers.2.conv.2.weight"),
    "no first": (lambda vae: _without(authors(vae.decoder, 1), "1.weight"), "first and last layers"),
    "no colours": (lambda vae: authors(vae.decoder, 1) | {"99.weight": torch.ones(4, 16, 3, 3)}, "4 channels"),
    "another network": (lambda vae: {"decoder.conv_in.weight": torch.ones(4, 4, 3, 3)}, "not a tiny decoder"),
    "infinite": (lambda vae: {n: t / 0 for n, t in authors(vae.decoder, 1).items()}, "not a number|infinite"),
}


@pytest.mark.parametrize("file", FILES)
def test_other_files_are_refused(plain_clips: Bundle, tmp_path: Path, file: str) -> None:
    state, said = FILES[file]
    path = tmp_path / "taesd_decoder.safetensors"
    save_file(state(autoencoder()), path)
    refused(plain_clips, tmp_path, path, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "AutoencoderKL"}, "an? AutoencoderKL"),
        ({"shift_factor": 0.1}, "shift_factor=0.1"),
        ({"scaling_factor": 0}, "scaling_factor=0"),
        ({"scaling_factor": "1"}, "scaling_factor='1'"),
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear'"),
        ({"act_fn": "sine"}, "diffusers refuses"),
        ({"decoder_block_out_channels": [16, 32]}, "equal widths"),
        ({"num_decoder_blocks": [2]}, "diffusers refuses"),
        ({"num_decoder_blocks": [2, -1]}, "num_decoder_blocks"),
        ({"num_decoder_blocks": [2, 2]}, "missing layers"),
        ({"latent_channels": None}, "latent_channels=None"),
        ({"out_channels": 4}, "out_channels=4"),
    ],
    ids=str,
)
def test_other_folders_are_refused(
    plain_clips: Bundle, folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = tmp_path / "taesd"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tiny.set_values(path, "config.json", **changes)
    refused(plain_clips, tmp_path, path, said)


@pytest.mark.parametrize(("name", "said"), [("no-such-file.pth", "no such file"), (".", "config.json")])
def test_no_decoder_at_all(plain_clips: Bundle, tmp_path: Path, name: str, said: str) -> None:
    refused(plain_clips, tmp_path, tmp_path / name, said)


def refused(model: Bundle, tmp_path: Path, preview: Path, said: str) -> None:
    """The error names the file, and nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=said) as error:
        convert_sources([model.path], tmp_path / "made", preview=preview)
    named = (str(preview), str(model.path)) if "family" in said else (str(preview),)
    assert str(error.value).startswith(named) or "infinite" in said  # of a damaged tensor, its name is enough
    assert sorted(tmp_path.rglob("*")) == before


# Model directories.


def test_the_files_of_the_model_stay(plain_clips: Bundle, clips: Bundle) -> None:
    assert set(clips.files) == {*plain_clips.files, "preview.safetensors"}
    assert all(clips.files[name] == record for name, record in plain_clips.files.items())
    assert [control.name for control in clips.manifest.controls][-1] == "decoder"


def test_a_model_takes_one_at_a_time(clips: Bundle, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already has a decoder for previews"):
        convert_sources([clips.path], tmp_path / "made", preview=folder)
    with pytest.raises(CheckpointError, match="one of the two"):
        convert_sources([clips.path], tmp_path / "made", preview=folder, control_kind="edges")
    with pytest.raises(ModelError, match="the model itself"):
        convert_sources([clips.path], clips.path, preview=folder, overwrite=True)
    assert not (tmp_path / "made").exists()


def test_families_without_previews_refuse_it(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(HigenError, match="preview: unknown; svd takes"):
        convert_sources([tmp_path], tmp_path / "made", family="svd", preview=folder)


def test_a_family_that_takes_none_is_named(tmp_path: Path) -> None:
    """Nothing is written, although the error is found only when the stage is built."""
    model, path = write(FIRST, tmp_path / "model"), tmp_path / "taesd_decoder.safetensors"
    save_file(authors(autoencoder(latent_channels=2).decoder, 1), path)
    refused(model, tmp_path, path, 'takes no tiny decoder: family="nobody\'s": not installed here')


def test_the_command_adds_it_to_a_model_of_higen(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    words = ["convert", str(tiny_model), str(output), "--preview", str(folder), "--dtype", "fp32", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "preview.safetensors" in json.loads(result.stdout.splitlines()[-1])["files"]
    pipe = higen.load(output, backend="torch")
    options: dict[str, Any] = {"seed": 3, "frames": 3, "steps": 1}
    stream = pipe.stream("a blue whale", decoder="preview", **options)
    *_, last = (event for event in stream if isinstance(event, higen.Step))
    latents = torch.from_numpy(np.asarray(last.latents, np.float32))[0].transpose(0, 1)
    with torch.inference_mode():
        pixels = autoencoder().decode(latents).sample
    assert apart(stream.videos[0].frames, 255 * (pixels / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)) <= 1.01


def with_tiny(manifest: Manifest) -> Manifest:
    """The tables with a tiny decoder for the model's latents."""
    channels = manifest.fixed["C"]
    arguments = {"latent_channels": channels, "decoder_block_out_channels": [8, 8], "upsampling_scaling_factor": 2}
    return with_preview_rows(manifest, TinyDecoder(arguments))


def test_a_composed_model_keeps_that_of_the_second() -> None:
    """The first model's picture is decoded by its own decoder."""
    made = composed.compose(with_tiny(FIRST), with_tiny(SECOND), same_tokenizer=True)
    assert made.sizes.preview == Preview("decoder", "preview", "paint_preview")
    assert made.stage("paint_preview").weights == "preview.safetensors"
    assert made.sizes.decoder == "second_paint"
    only = composed.compose(with_tiny(FIRST), SECOND, same_tokenizer=True)
    assert only.sizes.preview is None
    assert "decoder" not in [control.name for control in only.controls]


def test_the_choice_of_a_decoder_does_not_choose_how_to_draw() -> None:
    made = with_tiny(FIRST)
    loops = len(made.loops)
    made = replace(made, presets=(Preset("quick", (1,) * loops, (None,) * loops, (None,) * loops, usual=True),))
    how: dict[str, Any] = {"load": lambda *_: None, "frames": made.sizes.frames[0]}
    for given in ({}, {"decoder": "preview"}):
        request = make_request(made, "a", controls=given, **how)
        assert (request.settings.preset, request.steps) == ("quick", (1,) * loops)
    assert make_request(made, "a", controls={"decoder": "preview"}, steps=2, **how).settings.preset is None


def changed_row(**changes: Any) -> Manifest:
    """Tables whose row for previews has other values."""
    made = with_tiny(FIRST)
    assert made.sizes.preview is not None
    return replace(made, sizes=replace(made.sizes, preview=replace(made.sizes.preview, **changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder": "brush"}, r"sizes\.preview\.decoder='brush': the stages are"),
        ({"decoder": "mixer"}, r"sizes\.preview\.decoder='mixer': one input with the source state"),
        ({"decoder": "paint"}, r"sizes\.preview\.decoder='paint': another stage than sizes\.decoder"),
        ({"control": "shake"}, r"sizes\.preview\.control='shake': the controls of kind choice are"),
        ({"choice": "full"}, r"sizes\.preview\.choice='full': one of \['preview'\]"),
        ({"choice": "none"}, r"sizes\.preview\.choice='none': one of \['preview'\]"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        changed_row(**changes)


def test_a_decoder_of_other_latents_is_refused() -> None:
    made = with_tiny(FIRST)
    *others, tiny_stage = made.stages
    wrong = replace(tiny_stage, inputs=(replace(tiny_stage.inputs[0], shape=("N", 7, "H", "W")),))
    with pytest.raises(ManifestError, match=r"its latents have 7 channels"):
        replace(made, stages=(*others, wrong))


def test_the_tables_are_read_as_they_were_written() -> None:
    made = with_tiny(FIRST)
    text = json.loads(json.dumps(to_json(made)))
    assert text["sizes"]["preview"] == {"control": "decoder", "choice": "preview", "decoder": "paint_preview"}
    assert from_json(Manifest, text, whole=True) == made
    assert "preview" not in to_json(FIRST)["sizes"]
