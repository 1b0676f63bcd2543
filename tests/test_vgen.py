"""VGen's networks with ModelScope's tensors (TF-T2V, VideoLCM, SR600), compared with a second implementation.

The second implementation follows the networks' description and uses the tensor names of the authors' files. It does not
use higen's code or diffusers' blocks. The published weights were not available.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import cpp_build
import diffusers
import numpy as np
import pytest
import tiny_diffusers as tiny
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from test_convert import ldm_state, text_state
from test_modelscope import FILES, apart, vgen_state

import higen
from higen.bundle import Bundle
from higen.compose import compose
from higen.convert import convert_sources
from higen.errors import CheckpointError, ManifestError, ModelError, RequestError
from higen.export.model_graphs import export_model
from higen.families.modelscope.predictors import UpscalingPredictor, weakened
from higen.manifest_file import read_manifest, write_manifest
from higen.noise import frame_noise, row_purpose
from higen.pipeline import Pipeline
from higen.sampler import Plan, denoise
from higen.schedule import solver_table
from higen.stages import Stage
from higen.tables import Tiles
from higen.tokenizer import PromptTokenizer

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

State = dict[str, torch.Tensor]

PROMPTS, NEGATIVE, SEEDS = ("a red apple", "two dogs run"), "blurry", (7, 8)
NAMES = {
    "tft2v": "tft2v_t2v_non_ema_512000.pth",
    "videolcm": "videolcm_t2v_non_ema_544000.pth",
    "sr600": "sr_step_110000_ema.pth",
}
HEAD = 16


class Truth:
    """VGen's U-Net, computed from its file's tensors: x [B,C,F,H,W], t [B], text [B,L,Dc] -> m."""

    def __init__(self, state: State, upscales: bool = False) -> None:
        self.state, self.upscales, self.clips = state, upscales, 1

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.state)

    def of(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.state[f"{name}.weight"], self.state.get(f"{name}.bias")

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.of(name)
        return F.linear(x, weight.flatten(1), bias)

    def norm(self, name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
        return F.group_norm(x, 32, *self.of(name), eps=eps)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.clips, _, frames, *_ = x.shape
        first = self.state["input_blocks.0.0.weight"]
        x = torch.cat([x, x.new_zeros(len(x), first.shape[1] - x.shape[1], *x.shape[2:])], dim=1)
        half = first.shape[0] // 2
        angle = t[:, None] * 10000.0 ** (-torch.arange(half) / half)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)
        e = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", waves)))
        e, text = e.repeat_interleave(frames, 0), text.repeat_interleave(frames, 0)
        x = x.transpose(1, 2).flatten(0, 1)
        x = self.temporal("input_blocks.0.1", F.conv2d(x, *self.of("input_blocks.0.0"), padding=1), heads=8)
        skips = [x]
        for i in count(1):
            if not self.has(f"input_blocks.{i}"):
                break
            x = self.block(f"input_blocks.{i}", x, e, text)
            skips.append(x)
        x = self.residual("middle_block.0", x, e)
        x = self.temporal("middle_block.2", self.spatial("middle_block.1", x, text))
        x = self.residual("middle_block.3", x, e)
        for i in count():
            if not self.has(f"output_blocks.{i}"):
                break
            skip = skips.pop()
            if self.upscales and i < 2:
                x[:, : x.shape[1] // 2] *= (1.1, 1.2)[i]
                skip = fourier_filter(skip, (0.6, 0.4)[i])
            x = self.block(f"output_blocks.{i}", torch.cat([x, skip], dim=1), e, text)
        x = F.conv2d(F.silu(self.norm("out.0", x)), *self.of("out.2"), padding=1)
        return x.unflatten(0, (self.clips, -1)).transpose(1, 2)

    def block(self, name: str, x: torch.Tensor, e: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        if self.has(f"{name}.op"):
            return F.conv2d(x, *self.of(f"{name}.op"), stride=2, padding=(2, 1) if self.upscales else 1)
        x = self.residual(f"{name}.0", x, e)
        if self.has(f"{name}.1.transformer_blocks"):
            x = self.temporal(f"{name}.2", self.spatial(f"{name}.1", x, text))
        for i in (1, 3):
            if self.has(f"{name}.{i}.conv"):
                x = F.interpolate(x, scale_factor=2, mode="nearest")
                x = F.conv2d(x[..., 1:-1, :] if self.upscales else x, *self.of(f"{name}.{i}.conv"), padding=1)
        return x

    def residual(self, name: str, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        h = F.conv2d(F.silu(self.norm(f"{name}.in_layers.0", x)), *self.of(f"{name}.in_layers.2"), padding=1)
        h = h + self.linear(f"{name}.emb_layers.1", F.silu(e))[..., None, None]
        h = F.conv2d(F.silu(self.norm(f"{name}.out_layers.0", h)), *self.of(f"{name}.out_layers.3"), padding=1)
        h = h + (F.conv2d(x, *self.of(f"{name}.skip_connection")) if self.has(f"{name}.skip_connection") else x)
        y = clip = h.unflatten(0, (self.clips, -1)).transpose(1, 2)
        for i in range(1, 5):
            part = f"{name}.temopral_conv.conv{i}"
            y = F.conv3d(F.silu(self.norm(f"{part}.0", y)), *self.of(f"{part}.{2 if i == 1 else 3}"), padding=(1, 0, 0))
        return (clip + y).transpose(1, 2).flatten(0, 1)

    def attend(self, name: str, x: torch.Tensor, to: torch.Tensor, heads: int) -> torch.Tensor:
        q, k, v = (
            self.linear(f"{name}.to_{part}", y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, y in (("q", x), ("k", to), ("v", to))
        )
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        return self.linear(f"{name}.to_out.0", (weights @ v).transpose(1, 2).flatten(2))

    def transformer(self, name: str, x: torch.Tensor, text: torch.Tensor | None, heads: int) -> torch.Tensor:
        def norm(i: int) -> torch.Tensor:
            return F.layer_norm(x, x.shape[-1:], *self.of(f"{name}.norm{i}"))

        y = norm(1)
        x = x + self.attend(f"{name}.attn1", y, y, heads)
        y = norm(2)
        x = x + self.attend(f"{name}.attn2", y, y if text is None else text, heads)
        value, gate = self.linear(f"{name}.ff.net.0.proj", norm(3)).chunk(2, dim=-1)
        return x + self.linear(f"{name}.ff.net.2", value * F.gelu(gate))

    def spatial(self, name: str, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        y = self.linear(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6).flatten(2).mT)
        y = self.transformer(f"{name}.transformer_blocks.0", y, text, x.shape[1] // HEAD)
        return x + self.linear(f"{name}.proj_out", y).mT.reshape(x.shape)

    def temporal(self, name: str, x: torch.Tensor, heads: int | None = None) -> torch.Tensor:
        clip = x.unflatten(0, (self.clips, -1)).transpose(1, 2)
        y = self.norm(f"{name}.norm", clip, 1e-6).permute(0, 3, 4, 2, 1).flatten(0, 2)  # [B H W, F, C]
        y = self.linear(f"{name}.proj_in", y)
        y = self.transformer(f"{name}.transformer_blocks.0", y, None, heads or x.shape[1] // HEAD)
        y = self.linear(f"{name}.proj_out", y).unflatten(0, (self.clips, *x.shape[-2:]))
        return (clip + y.permute(0, 4, 3, 1, 2)).transpose(1, 2).flatten(0, 1)


def fourier_filter(x: torch.Tensor, scale: float) -> torch.Tensor:
    """FreeU's filter, threshold 1: the four frequencies in the middle of the shifted spectrum, times `scale`."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.double(), dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones_like(spectrum.real)
    row, column = x.shape[-2] // 2, x.shape[-1] // 2
    mask[..., max(row - 1, 0) : row + 1, max(column - 1, 0) : column + 1] = scale
    made = torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1))
    return made.real.to(x.dtype)


def denoiser(kind: str) -> State:
    """A network's tensors, all random, with the names and shapes of its file."""
    state, random = vgen_state(tiny.video_unet()), torch.Generator().manual_seed(3)
    if kind != "sr600":
        first = state["input_blocks.0.0.weight"]
        guides = torch.randn(first.shape[0], 8, 3, 3, generator=random)
        state["input_blocks.0.0.weight"] = torch.cat([first, guides], dim=1)
    if kind == "tft2v":
        state |= {f"pre_image_condition.{i}.bias": torch.randn(4, generator=random) for i in (0, 2)}
    return state


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of all three networks and their shared files."""
    folder = tmp_path_factory.mktemp("vgen")
    for kind, name in NAMES.items():
        torch.save(denoiser(kind), folder / name)
    torch.save(text_state(), folder / FILES[1])
    torch.save({"state_dict": {f"first_stage_model.{n}": t for n, t in ldm_state().items()}}, folder / FILES[2])
    return folder


def sources(authors: Path, kind: str) -> list[Path]:
    return [authors / name for name in (NAMES[kind], *FILES[1:])]


@pytest.fixture(scope="module")
def models(authors: Path) -> dict[str, Bundle]:
    return {kind: convert_sources(sources(authors, kind), authors / kind, dtype="fp32") for kind in NAMES}


@pytest.fixture(scope="module")
def upscaler(models: dict[str, Bundle]) -> Bundle:
    """SR600 with the graphs of a guided video; the other two use ModelScope's graphs, and so does the plain step."""
    bundle = models["sr600"]
    return export_model(bundle, [name for name in bundle.manifest.stage_names if name != "temporal_unet_plain"])


@pytest.fixture(scope="module")
def by_graphs(upscaler: Bundle) -> Pipeline:
    return higen.load(upscaler.path, backend="onnx")


def hidden(model: Bundle, *texts: str) -> torch.Tensor:
    """The text encoder's output for texts, from the model's own stage."""
    assert model.manifest.text is not None
    tokens = PromptTokenizer.from_file(model.path / "tokenizer.json", model.manifest.text).encode(texts)
    backend = higen.load(model.path, backend="torch").backend
    return torch.cat(
        [torch.as_tensor(backend.to_numpy(backend.run("text_encoder", tokens=row[None])["hidden"])) for row in tokens]
    )


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def step_of(
    stage: Stage, model: Bundle, size: tuple[int, int], solver: str = ""
) -> tuple[dict[str, Any], NDArray[Any]]:
    """Inputs of a guided step for two clips of three frames, and the expected x' and x0, stacked."""
    loop = model.manifest.loops[0]
    table = solver_table(loop.schedule, loop.prediction, loop.solver(solver or loop.solvers[0].name), 4)
    row = {name: np.full(2, getattr(table, name)[2], np.float32) for name in ("t", "A", "B", "C", "alpha", "sigma")}
    x, previous = normal(1, 2, 4, 3, *size), normal(2, 2, 4, 3, *size)
    texts = {"context": normal(3, 2, 77, 32), "empty_context": normal(4, 2, 77, 32)}
    guidance = np.abs(normal(5, 2, 3)) + 1
    kind = "sr600" if model.manifest.architecture.get("upscales") else model.path.name
    truth = Truth(denoiser(kind), kind == "sr600")
    with torch.inference_mode():
        m, without = (
            truth(torch.from_numpy(x), torch.from_numpy(row["t"]), torch.from_numpy(text)).numpy()
            for text in texts.values()
        )
    m = without + guidance[:, None, :, None, None] * (m - without)
    a, b, c, alpha, sigma = (float(row[name][0]) for name in ("A", "B", "C", "alpha", "sigma"))
    given = {"latents": x, "previous": previous, **row, "guidance": guidance, **texts}
    assert {t.name for t in stage.inputs} == set(given)
    return given, np.stack([a * x + b * m + c * previous, alpha * x - sigma * m])


def stepped(pipe: Pipeline, given: dict[str, Any]) -> NDArray[Any]:
    out = pipe.backend.run("temporal_unet", **given)
    return np.stack([pipe.backend.to_numpy(out[name]) for name in ("latents", "previous")])


@pytest.mark.parametrize("kind", NAMES)
def test_a_step_is_that_of_the_second_implementation(models: dict[str, Bundle], kind: str) -> None:
    model = models[kind]
    given, wanted = step_of(model.manifest.stage("temporal_unet"), model, (10, 6))
    assert apart(stepped(higen.load(model.path, backend="torch"), given), wanted) < 2e-5


@pytest.mark.parametrize("size", [(10, 6), (4, 14), (2, 2)], ids=str)
def test_the_graph_of_sr600_is_that_of_the_second_implementation(
    upscaler: Bundle, by_graphs: Pipeline, size: tuple[int, int]
) -> None:
    given, wanted = step_of(upscaler.manifest.stage("temporal_unet"), upscaler, size, "dpm++2m")
    assert apart(stepped(by_graphs, given), wanted) < 2e-5


def test_odd_sides_are_kept(upscaler: Bundle, by_graphs: Pipeline) -> None:
    """The authors' network accepts only heights 2 more than a multiple of 8. The same layers accept any height here."""
    given, _ = step_of(upscaler.manifest.stage("temporal_unet"), upscaler, (10, 6))
    odd = {name: v[..., :9, :5] if name in ("latents", "previous") else v for name, v in given.items()}
    torch_ones = stepped(higen.load(upscaler.path, backend="torch"), odd)
    assert apart(stepped(by_graphs, odd), torch_ones) < 2e-5


def test_four_levels_as_the_released_network_has_them() -> None:
    """Heights 10, 6, 4, 3 and back, like 90, 46, 24, 13 for 720 rows."""
    kinds = {"down_block_types": ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",)}
    unet = tiny.video_unet(
        block_out_channels=(32,) * 4, up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3, **kinds
    )
    x, t, text = (
        torch.from_numpy(normal(1, 1, 4, 2, 10, 8)),
        torch.tensor([437.0]),
        torch.from_numpy(normal(2, 1, 7, 32)),
    )
    with torch.inference_mode():
        wanted = Truth(vgen_state(unet), upscales=True)(x, t, text).numpy()
        got = UpscalingPredictor(unet)(x, t, t, t, {"context": text}, 1).numpy()
    assert apart(got, wanted) < 2e-5


@pytest.mark.parametrize("size", [(2, 3), (13, 20), (1, 1), (1, 4), (5, 1), (6, 2)], ids=str)
def test_the_filter_is_the_fourier_transforms(size: tuple[int, int]) -> None:
    x = torch.from_numpy(normal(0, 2, 3, *size))
    assert torch.allclose(weakened(x, 0.4), fourier_filter(x, 0.4), rtol=0, atol=2e-6)


# Whole loops.


def clip_noise(frames: int, height: int, width: int, purpose: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.stack([frame_noise(SEEDS[0], purpose, 4, frames, height, width)]))


def last_latents(pipe: Pipeline, **options: Any) -> NDArray[np.float32]:
    given = {"seed": SEEDS[0], "negative_prompt": NEGATIVE, "frames": 3, **options}
    *_, last = (event for event in pipe.stream(PROMPTS[0], **given) if isinstance(event, higen.Step))
    return np.asarray(pipe.backend.to_numpy(last.latents), dtype=np.float32)


def guided(truth: Truth, model: Bundle, guidance: float) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    text, empty = hidden(model, PROMPTS[0], NEGATIVE).split(1)

    def predict(x: torch.Tensor, t: Any) -> torch.Tensor:
        time = torch.tensor([float(t)])
        with torch.inference_mode():
            m, without = truth(x, time, text), truth(x, time, empty)
        return without + guidance * (m - without)

    return predict


def abar(cosine: bool) -> NDArray[np.float64]:
    """VGen's cumulative signal variances: linear_sd or cosine, both with zero terminal SNR."""
    if cosine:
        f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    else:
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    return np.asarray(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def ddim(
    predict: Callable[[torch.Tensor, Any], torch.Tensor], x: torch.Tensor, times: list[int], signal: NDArray[np.float64]
) -> NDArray[np.float32]:
    """DDIM with v-prediction and eta 0. It ends at the signal of timestep `times[-1]`, or clean if that is below 0."""
    for t, after in pairwise(times):
        a, b = signal[t], signal[after] if after >= 0 else 1.0
        m = predict(x, t)
        z, n = a**0.5 * x - (1 - a) ** 0.5 * m, (1 - a) ** 0.5 * x + a**0.5 * m
        x = b**0.5 * z + (1 - b) ** 0.5 * n
    return x.numpy()


@pytest.mark.parametrize("steps", [8, 25])
def test_tft2v_is_vgens_ddim(models: dict[str, Bundle], steps: int) -> None:
    """Timesteps 1, 1 + 1000 // steps, and so on. Each step goes to the next lower timestep, the last to timestep 0."""
    model, stride = models["tft2v"], 1000 // steps
    times = [*range(1 + stride * (steps - 1), 0, -stride), 0]
    truth = ddim(guided(Truth(denoiser("tft2v")), model, 9.0), clip_noise(3, 8, 4), times, abar(cosine=False))
    got = last_latents(higen.load(model.path, backend="torch"), steps=steps, width=8, height=16)
    assert apart(got, truth) < 1e-4


def test_videolcm_equals_diffusers_scheduler(models: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps without guidance, with the scheduler that VGen's own script builds."""
    model, rows = models["videolcm"], count()
    scheduler = diffusers.LCMScheduler(
        prediction_type="v_prediction",
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="linspace",
        rescale_betas_zero_snr=True,
    )
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor",
        lambda *_, **__: clip_noise(3, 8, 4, row_purpose(0, next(rows))),
    )
    scheduler.set_timesteps(4)
    x, (text,) = clip_noise(3, 8, 4), hidden(model, PROMPTS[0]).split(1)
    unet = Truth(denoiser("videolcm"))
    for t in scheduler.timesteps:
        with torch.inference_mode():
            m = unet(x, torch.tensor([float(t)]), text)
        x = scheduler.step(m, t, x, return_dict=False)[0]
    pipe = higen.load(model.path, backend="torch")
    assert apart(last_latents(pipe, width=8, height=16), x.numpy()) < 1e-4
    assert pipe.request(PROMPTS[0]).steps == (4,)
    (step, *_) = (event for event in pipe.stream("a", frames=1, width=8, height=8) if isinstance(event, higen.Step))
    assert step.stage == "temporal_unet_plain"


CLIP = np.random.default_rng(0).integers(0, 256, (3, 20, 12, 3), np.uint8)


@pytest.mark.parametrize("steps", [10, 30])
def test_sr600_begins_at_noise_level_700(authors: Path, upscaler: Bundle, by_graphs: Pipeline, steps: int) -> None:
    """The tail, from timestep 699 on, of a grid over all timesteps of the cosine schedule with zero terminal SNR."""
    vae = tiny.autoencoder()
    vae.load_state_dict(diffusers_vae(authors, vae))
    with torch.inference_mode():
        pixels = torch.from_numpy(CLIP.transpose(0, 3, 1, 2) / 127.5 - 1).float()
        z = (vae.encode(pixels).latent_dist.mode() * 0.18215).transpose(0, 1)[None]
    signal, rows = abar(cosine=True), steps * 7 // 10
    times = [-(-1000 * (k + 1) // steps) - 1 for k in reversed(range(rows))]
    assert times[0] == 699
    x = signal[699] ** 0.5 * z + (1 - signal[699]) ** 0.5 * clip_noise(3, 10, 6)
    predict = guided(Truth(denoiser("sr600"), upscales=True), upscaler, 3.0)
    truth = ddim(predict, x.float(), [*times, -1], signal)
    options = {"video": CLIP, "steps": steps, "width": 12, "height": 20}
    for pipe in (by_graphs, higen.load(upscaler.path, backend="torch")):
        assert apart(last_latents(pipe, **options), truth) < 1e-4


def diffusers_vae(authors: Path, vae: Any) -> State:
    """The autoencoder's tensors under diffusers' names, from diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = torch.load(authors / FILES[2])["state_dict"]
    return dict(convert_ldm_vae_checkpoint(state, vae.config))


# Tiles.


def test_tiles_mix_steps_by_weights_that_sum_to_one(upscaler: Bundle) -> None:
    """A tiled step is the weighted sum of the tiles' steps, each on its own part of the state."""
    backend = higen.load(upscaler.path, backend="torch").backend
    stage = upscaler.manifest.stage("temporal_unet_plain")
    (loop,) = upscaler.manifest.loops
    table = solver_table(loop.schedule, loop.prediction, loop.solvers[0], 3)
    x, text = normal(1, 1, 4, 2, 10, 13), normal(3, 1, 77, 32)
    tiles = Tiles(height=6, width=8, stride=4)
    plan = Plan(
        "temporal",
        lambda _: stage,
        lambda _: {"context": text},
        table,
        np.ones((3, 1, 2), np.float32),
        [7],
        0,
        tiles=tiles,
    )
    first, *_ = denoise(backend, plan, x)
    row = {n: np.full(1, getattr(table, n)[0], np.float32) for n in ("t", "A", "B", "C", "alpha", "sigma")}

    def hill(length: int) -> NDArray[np.float64]:
        return np.minimum(np.arange(length) + 1, length - np.arange(length)).astype(float)

    total, wanted = np.zeros((10, 13)), np.zeros(x.shape)
    for top in (0, 4):
        for left in (0, 4, 5):
            part = np.ascontiguousarray(x[..., top : top + 6, left : left + 8])
            out = backend.run(stage.name, latents=part, previous=np.zeros_like(part), **row, context=text)
            weight = hill(6)[:, None] * hill(8)
            # The weights along each side sum to one, so their products do too.
            wanted[..., top : top + 6, left : left + 8] += weight * backend.to_numpy(out["latents"])
            total[top : top + 6, left : left + 8] += weight
    assert np.abs(backend.to_numpy(first.latents) - wanted / total).max() < 1e-5


def tiled(upscaler: Bundle, folder: Path) -> Bundle:
    """The same model with small tiles."""
    shutil.copytree(upscaler.path, folder)
    opened = read_manifest(folder)
    (loop,) = opened.manifest.loops
    manifest = replace(opened.manifest, loops=(replace(loop, tiles=Tiles(height=6, width=8, stride=4)),))
    write_manifest(folder, manifest, opened.files, opened.graphs)
    return Bundle.open(folder)


def test_cpp_and_python_make_the_same_frames_in_tiles(built: Path, upscaler: Bundle, tmp_path: Path) -> None:
    model = tiled(upscaler, tmp_path / "model")
    options: dict[str, Any] = {"seed": 7, "steps": 5, "frames": 3, "width": 26, "height": 20}
    wanted = higen.load(model.path, backend="onnx")(PROMPTS[0], video=CLIP, **options).frames
    whole = higen.load(upscaler.path, backend="onnx")(PROMPTS[0], video=CLIP, **options).frames
    assert np.abs(wanted.astype(int) - whole).max() > 1
    files = [tmp_path / f"{i}.png" for i in range(len(CLIP))]
    for file, frame in zip(files, CLIP, strict=True):
        Image.fromarray(frame).save(file)
    flags = [f"--{name}={value}" for name, value in options.items()]
    output = tmp_path / "frames.npy"
    run = (built / "higen-run", model.path, PROMPTS[0], "-q", "-o", output, *flags)
    cpp_build.done(*run, f"--picture=video={','.join(map(str, files))}")
    assert np.abs(np.load(output).astype(int) - wanted).max() <= 1
    with pytest.raises(AssertionError, match="video: the loop temporal needs one"):
        cpp_build.done(*run)


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"stride": 7}, {"height": 0}, {"width": 5000}], ids=str)
def test_impossible_tiles(wrong: dict[str, int]) -> None:
    with pytest.raises(ManifestError, match="a stride from 1 to the smaller one"):
        Tiles(**{"height": 6, "width": 8, "stride": 4, **wrong})


# Bad input, and its messages.


def test_the_tables_say_what_vgens_configurations_say(authors: Path, models: dict[str, Bundle]) -> None:
    loops = {kind: model.manifest.loops[0] for kind, model in models.items()}
    assert all(loop.prediction == "v" and loop.schedule.zero_terminal_snr for loop in loops.values())
    assert {kind: (loop.steps, loop.guidance) for kind, loop in loops.items()} == {
        "tft2v": (50, 9.0),
        "videolcm": (4, 1.0),
        "sr600": (40, 3.0),
    }
    sizes = {kind: (model.manifest.sizes.width, model.manifest.sizes.height) for kind, model in models.items()}
    assert sizes == {"tft2v": (448, 256), "videolcm": (448, 256), "sr600": (1280, 720)}
    notes: list[str] = []
    convert_sources(sources(authors, "tft2v"), authors / "said", on_note=notes.append)
    assert any(
        "last 8 input channels and 2 tensors pre_image_condition.* are left out, because only pictures use them" in n
        for n in notes
    )


def test_a_request_without_a_video_is_refused(models: dict[str, Bundle]) -> None:
    with pytest.raises(RequestError, match="video: the loop temporal needs one"):
        higen.load(models["sr600"].path, backend="torch").request("a cat")


def test_composing_with_sr600_is_refused(models: dict[str, Bundle], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"begins from a whole video.*second pass"):
        compose(models["tft2v"].path, models["sr600"].path, tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("kind", "name", "options", "said"),
    [
        ("sr600", "mine.pth", {}, r"give --network, one of modelscope .*videolcm .*sr600"),
        ("sr600", "mine.pth", {"network": "t2v"}, "network='t2v': one of modelscope, tft2v, videolcm, sr600"),
        ("sr600", "mine.pth", {"network": "videolcm"}, "4 input channels is not VideoLCM"),
        ("videolcm", "mine.pth", {"prediction": "epsilon"}, "12 input channels is TF-T2V or VideoLCM, not Model"),
        ("videolcm", NAMES["videolcm"], {"prediction": "epsilon"}, "12 input channels"),
        ("sr600", NAMES["sr600"], {"network": "sr600", "prediction": "epsilon"}, "SR600 predicts v"),
    ],
    ids=str,
)
def test_the_kind_of_network_must_be_known(
    authors: Path, tmp_path: Path, kind: str, name: str, options: dict[str, Any], said: str
) -> None:
    file = Path(shutil.copy(authors / NAMES[kind], tmp_path / name))
    with pytest.raises(CheckpointError, match=said):
        convert_sources([file, *sources(authors, kind)[1:]], tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_a_renamed_file_with_its_network_named(authors: Path, models: dict[str, Bundle], tmp_path: Path) -> None:
    file = Path(shutil.copy(authors / NAMES["videolcm"], tmp_path / "mine.pth"))
    got = convert_sources([file, *sources(authors, "videolcm")[1:]], tmp_path / "model", network="videolcm")
    assert got.manifest.loops == models["videolcm"].manifest.loops
