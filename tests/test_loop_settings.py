"""A request's settings for its loops: windows of a long clip and their noise, guidance intervals, FreeInit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers.models.attention import FreeNoiseTransformerBlock
from diffusers.pipelines.free_init_utils import FreeInitMixin
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from interpreter_model import FORMULAS, LINEAR, MANIFEST, Formulas, changed

from higen import noise
from higen.axes import frames_of
from higen.bundle import Bundle, create_model
from higen.engines.triton.interface import read_request
from higen.errors import ManifestError, RequestError
from higen.free_init import FILTERS, FreeInit, low_pass, renewed
from higen.generate_command import generate
from higen.loop_settings import guidance_rows, loop_settings
from higen.manifest import Manifest
from higen.pipeline import Pipeline
from higen.sampler import Step, window_weights
from higen.schedule import NoiseSchedule, last_level, solver_table
from higen.tables import Mix, NoiseRule, Windows
from higen.tokenizer import build_word_tokenizer, write_tokenizer
from higen.typed_json import from_json, to_json

WINDOWED = changed(MANIFEST, "film", windows=Windows(4, 2, most=6, noise="shuffled"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "made-up"
    with create_model(path, MANIFEST) as inside:
        write_tokenizer(build_word_tokenizer(("a", "red", "kite", "climbs")), inside / "words.json")
    return path


def pipeline_of(folder: Path, manifest: Manifest = MANIFEST) -> tuple[Pipeline, Formulas]:
    backend = Formulas(manifest, FORMULAS, ())
    return Pipeline(replace(Bundle.open(folder), manifest=manifest), backend), backend


def film(pipeline: Pipeline, **options: Any) -> list[Step]:
    steps = [event for event in pipeline.stream("a kite", **options) if isinstance(event, Step)]
    return [step for step in steps if step.loop == "film"]


# Windows


def test_a_request_says_its_windows(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    video = pipeline("a kite", frames=11, windows=(4, 3), seed=5)
    assert {given["latents"].shape[2] for given in backend.of("film_two")} == {4}
    assert backend.names.count("film_two") == 3 * 4  # at 0, 3, 6 and 7
    assert video.metadata["windows"] == {"film": [4, 3, "shuffled"]}
    assert [call["guidance"].shape for call in backend.of("film_two")] == [(1, 4)] * 12
    pipeline("a kite", frames=11, windows=6)
    assert backend.of("film_two")[-1]["latents"].shape[2] == 6
    whole, _ = pipeline_of(folder, WINDOWED)
    assert "windows" not in whole("a kite", frames=4).metadata
    assert "windows" not in whole("a kite", frames=6, windows=0).metadata


def test_conditions_are_cut_to_each_window(folder: Path) -> None:
    """A curve belongs to the clip, not to a window: frame i of the clip gets its own value in every window."""
    pipeline, backend = pipeline_of(folder)
    curve = [0.1 * i for i in range(9)]
    pipeline("a kite", frames=9, windows=(4, 2), shake=curve, steps=1)
    hints = [call["hints"][0, :, 0] for call in backend.of("film_two")]
    for start, seen in zip((0, 2, 4, 5), hints, strict=True):
        np.testing.assert_allclose(seen - hints[0][0], np.array(curve)[start : start + 4], atol=1e-6)


@pytest.mark.parametrize("kind", ["fresh", "shuffled", "repeated"])
def test_the_noise_of_a_long_clip(folder: Path, kind: str) -> None:
    manifest = changed(WINDOWED, "film", start=None)
    pipeline, backend = pipeline_of(folder, manifest)
    pipeline("a kite", frames=9, window_noise=kind, seed=8, steps=1)
    calls = {start: call["latents"][0] for start, call in zip((0, 2, 4, 5), backend.of("film_two"), strict=True)}
    state = np.concatenate([calls[0], calls[4], calls[5][:, 3:]], axis=1)
    order = noise.frame_order(8, 22, 9, 4, 2, kind)
    unit = noise.frame_noise(8, 22, 2, 9, 4, 6) + 0.25 * noise.offset_noise(8, 23, 2, 9)
    np.testing.assert_allclose(state, unit[:, order], atol=1e-6)
    windows = [calls[start] for start in (0, 2, 4, 5)]
    if kind != "repeated":
        assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(windows) for b in windows[:i])


@pytest.mark.parametrize(("frames", "length", "stride"), [(25, 8, 4), (30, 8, 3), (17, 16, 4), (64, 16, 8), (9, 4, 4)])
def test_shuffled_noise_equals_diffusers_free_noise(
    frames: int, length: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same permutations, FreeNoise takes the same frames."""
    count = len(range(length, frames, stride))
    raw = np.random.Philox(key=np.array([7, 3 + 2**31], np.uint64)).random_raw(count * stride).reshape(-1, stride)
    orders = iter(np.argsort(raw, kind="stable"))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.from_numpy(next(orders)[:n].copy()))
    theirs = AnimateDiffFreeNoiseMixin()
    theirs._free_noise_context_length, theirs._free_noise_context_stride = length, stride
    theirs._free_noise_noise_type, theirs.vae_scale_factor = "shuffle_context", 8
    given = torch.zeros(1, 4, frames + 1, 2, 2)  # diffusers asks for context-length frames but writes beyond them
    given[:, :, :length] = torch.arange(length, dtype=torch.float32)[:, None, None]
    monkeypatch.setattr("diffusers.pipelines.free_noise_utils.randn_tensor", lambda *_, **__: given)
    made = theirs._prepare_latents_free_noise(1, 4, frames, 16, 16, torch.float32, torch.device("cpu"))
    np.testing.assert_array_equal(made[0, 0, :, 0, 0].numpy(), noise.frame_order(7, 3, frames, length, stride))


@pytest.mark.parametrize(("frames", "length", "stride"), [(24, 16, 4), (12, 4, 2), (15, 5, 5)])
def test_weights_equal_diffusers_pyramid(frames: int, length: int, stride: int) -> None:
    """Only for windows that end with the clip. Otherwise diffusers' last window covers only the remaining frames."""
    theirs = FreeNoiseTransformerBlock(8, 1, 8, context_length=length, context_stride=stride)
    hill = np.array(theirs._get_frame_weights(length, "pyramid"), float)
    total = np.zeros(frames)
    for start, end in theirs._get_frame_indices(frames):
        total[start:end] += hill
    ours = window_weights(frames, Windows(length, stride))
    assert [start for start, _ in ours] == [start for start, _ in theirs._get_frame_indices(frames)]
    for start, weight in ours:
        np.testing.assert_allclose(weight, hill / total[start : start + length], atol=1e-6)


def test_stages_that_take_more_than_a_window() -> None:
    assert frames_of(WINDOWED, "film_two") == (2, 6)
    assert frames_of(changed(MANIFEST, "film", windows=Windows(4, 2)), "film_two") == (2, 4)
    with pytest.raises(ManifestError, match="most=3: at least length=4"):
        Windows(4, 2, most=3)
    with pytest.raises(ManifestError, match="noise='old': one of 'fresh', 'shuffled', 'repeated'"):
        Windows(4, 2, noise="old")  # type: ignore[arg-type]


def test_windows_in_the_manifest_are_read_back() -> None:
    """Newer keys with default values are not written, so that older readers accept the file."""
    for windows, keys in ((Windows(4, 2), 2), (Windows(4, 2, 6, "shuffled"), 4)):
        assert len(to_json(windows)) == keys
        assert from_json(Windows, to_json(windows), whole=True) == windows


# Guidance


def test_guidance_holds_in_an_interval(folder: Path) -> None:
    """Outside the interval guidance is 1: the plain stage runs. The result equals that of guidance given row by row."""
    pipeline, backend = pipeline_of(folder)
    steps = film(pipeline, steps=(2, 10), guidance=4.0, guidance_interval=(0.25, 0.7), seed=2)
    assert [step.stage for step in steps] == ["film_one"] * 2 + ["film_two"] * 5 + ["film_one"] * 3
    assert backend.names.count("draft_two") == 1
    needed = pipeline.stages(pipeline.request("a kite", guidance=4.0, guidance_interval=(0.25, 0.7)))
    assert {("film_two",), ("film_one", "film_two")} <= set(needed)
    everywhere = film(pipeline, steps=(2, 10), guidance=4.0, seed=2)
    assert np.abs(steps[1].latents - everywhere[1].latents).max() > 1e-3
    alone = film(pipeline, steps=(2, 10), guidance=4.0, guidance_interval=(0, 1), seed=2)
    np.testing.assert_array_equal(alone[-1].latents, everywhere[-1].latents)
    one = film(pipeline, steps=(2, 10), guidance=[4.0, 1.0], guidance_interval=[(0, 1), None], seed=2)
    none = film(pipeline, steps=(2, 10), guidance=4.0, guidance_interval=[None, (0.5, 0.5)], seed=2)
    np.testing.assert_array_equal(one[-1].latents, none[-1].latents)


def test_an_interval_by_numpy() -> None:
    made = guidance_rows(np.array([1, 2, 3], np.float32), (5, 2, 3), (0.2, 0.6))
    assert made[:, 1, 2].tolist() == [1, 3, 3, 1, 1]
    assert made[1, 0].tolist() == [1, 2, 3]


# FreeInit


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("shape", [(6, 8, 10), (5, 7, 4), (1, 3, 3)])
def test_filters_equal_diffusers(kind: str, shape: tuple[int, int, int]) -> None:
    settings = FreeInit(2, 0.3, 0.2, 3, kind)
    mask = FreeInitMixin()._get_free_init_freq_filter((1, 1, *shape), "cpu", kind, 3, 0.3, 0.2)
    random = np.random.default_rng(1)
    noisy, fresh = (random.standard_normal((2, 3, *shape)).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(np.fft.fftshift(low_pass(shape, settings)), mask[0, 0].numpy(), atol=1e-6)
    wanted = FreeInitMixin()._apply_freq_filter(torch.from_numpy(noisy), torch.from_numpy(fresh), mask)
    np.testing.assert_allclose(renewed(noisy, fresh, settings), wanted.numpy(), atol=1e-5)
    still = replace(settings, temporal=0.0)
    np.testing.assert_array_equal(renewed(noisy, fresh, still), fresh)


def test_the_gaussian_filter_is_three_circulant_matrices() -> None:
    shape, d = (6, 8, 10), 0.25
    values = np.random.default_rng(0).standard_normal((1, 1, *shape)).astype(np.float32)
    matrices = []
    for n in shape:
        g = np.fft.ifft(np.fft.ifftshift(np.exp(-((2 * np.arange(n) / n - 1) ** 2) / (2 * d**2)))).real
        matrices.append(np.array([[g[(i - j) % n] for j in range(n)] for i in range(n)]))
    wanted = np.einsum("ai,bj,ck,ijk->abc", *matrices, values[0, 0])
    made = renewed(values, np.zeros_like(values), FreeInit(2, d, d, 4, "gaussian"))
    np.testing.assert_allclose(made[0, 0], wanted, atol=1e-6)


class Theirs(FreeInitMixin):
    """diffusers' FreeInit around a plain denoising loop with its scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def run(self, latents: torch.Tensor, steps: int, iterations: int, network: Any) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        for k in range(iterations):
            latents, timesteps = self._apply_free_init(latents, k, steps, torch.device("cpu"), torch.float32, None)
            for t in timesteps:
                latents = self.scheduler.step(network(latents, t), t, latents).prev_sample
        return latents


@pytest.mark.parametrize("kind", FILTERS)
def test_a_loop_that_runs_again_equals_diffusers(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = changed(MANIFEST, "film", noise=NoiseRule(22), start=None)
    pipeline, backend = pipeline_of(folder, manifest)
    made = film(pipeline, frames=6, steps=4, seed=3, guidance=1.0, free_init=(3, 0.4, 0.3, 2), free_init_filter=kind)
    assert [(step.index, step.total) for step in made] == [(i, 12) for i in range(12)]
    hints = float(backend.of("film_one")[0]["hints"][0, 0].mean())
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=100, beta_start=0.001, beta_end=0.04, beta_schedule="linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    theirs, draws = Theirs(scheduler), iter(range(1, 3))
    theirs.enable_free_init(3, method=kind, order=2, spatial_stop_frequency=0.4, temporal_stop_frequency=0.3)

    def drawn(k: int) -> torch.Tensor:
        return torch.from_numpy(noise.frame_noise(3, noise.again(22, k), 2, 6, 4, 6))[None]

    monkeypatch.setattr("diffusers.pipelines.free_init_utils.randn_tensor", lambda **_: drawn(next(draws)))
    wanted = theirs.run(drawn(0), 4, 3, lambda x, t: 0.3 * x + t / 1000 + hints)
    np.testing.assert_allclose(made[-1].latents, wanted.numpy(), atol=1e-4)


def test_free_init_of_a_long_clip_with_fresh_noise_in_every_row(folder: Path) -> None:
    """FreeInit works with windows and stochastic solvers. Each iteration draws from its own streams."""
    pipeline, backend = pipeline_of(folder)
    options = {"frames": 7, "windows": (4, 2), "solver": "euler_ancestral", "steps": 3, "seed": 4}
    stream = pipeline.stream("a kite", free_init=2, **options)
    assert stream.loops == [("draft", 3), ("film", 6), ("decode", 7)]
    assert len([event for event in stream if isinstance(event, Step)]) == 9
    video = stream.videos[0]
    assert video.metadata["free_init"]["iterations"] == 2
    given = [call["previous"] for call in backend.of("film_two")]
    assert np.abs(given[0] - given[len(given) // 2]).max() > 0.1
    once = film(pipeline, free_init=1, **options)
    np.testing.assert_array_equal(once[-1].latents, film(pipeline, **options)[-1].latents)


def test_the_last_level_of_a_schedule() -> None:
    table = solver_table(LINEAR, "epsilon", MANIFEST.loop("film").solver("euler_ancestral"), 5)
    np.testing.assert_allclose(last_level(LINEAR), (table.start_alpha[0], table.start_sigma[0]), atol=1e-9)
    assert last_level(NoiseSchedule("flow")) == (0.0, 1.0)
    np.testing.assert_allclose(last_level(NoiseSchedule("edm", sigma_max=700.0))[0], 1 / 700, rtol=1e-5)


# The appearance noise prior


def test_the_noise_mix_is_its_closed_form(folder: Path) -> None:
    """MicroCinema: a linear model's clip from mixed noise is the clip from the noise plus the path of the mix."""
    mixed = changed(MANIFEST, "film", noise=NoiseRule(22, mix=Mix("draft", 0.3)), start=None)
    plain = changed(MANIFEST, "film", noise=NoiseRule(22), start=None)
    options = {"seed": 6, "frames": 3, "steps": 4, "windows": (2, 1)}
    steps = [e for e in pipeline_of(folder, mixed)[0].stream("a kite", **options) if isinstance(e, Step)]
    without = film(pipeline_of(folder, plain)[0], **options)
    draft = [step for step in steps if step.loop == "draft"][-1].latents
    loop = MANIFEST.loop("film")
    table = solver_table(loop.schedule, "epsilon", loop.solvers[0], 4)
    factor = np.prod(table.A + 0.3 * table.B)  # m = 0.3 x + ..., and C is 0 for DDIM
    path = np.broadcast_to(0.3 * factor * draft, without[-1].latents.shape)
    np.testing.assert_allclose(steps[-1].latents - without[-1].latents, path, atol=1e-5)


# The same settings through other interfaces


def test_triton_takes_the_settings_and_a_curve_of_guidance() -> None:
    tensors = {
        "prompt": np.array([b"a kite"], object),
        "guidance": np.array([2.0], np.float32),
        "guidance_curve": np.array([1, 2, 3, 4, 5], np.float32),
        "guidance_interval": np.array([0.2, 0.7, 0.0, 1.0]),
        "windows": np.array([4, 2], np.int32),
        "window_noise": np.array([b"fresh"], object),
        "free_init": np.array([3.0]),
    }
    given, _ = read_request(MANIFEST, tensors)
    assert given.pop("guidance") == [2.0, [1.0, 2.0, 3.0, 4.0, 5.0]]
    assert given == {
        "prompt": "a kite",
        "guidance_interval": [0.2, 0.7, 0.0, 1.0],
        "windows": [4, 2],
        "window_noise": "fresh",
        "free_init": 3.0,
    }
    settings = loop_settings(MANIFEST, 9, lambda _: False, **{name: given[name] for name in given if name != "prompt"})
    assert settings.intervals == {"draft": (0.2, 0.7), "film": (0.0, 1.0)}
    assert settings.windows == {"film": Windows(4, 2, 24, "fresh")}
    with pytest.raises(RequestError, match=r"guidance has 3 numbers: one, or one per loop \(2\)"):
        read_request(MANIFEST, {**tensors, "guidance": np.ones(3, np.float32)})


def test_the_command_line_passes_the_settings_on(tmp_path: Path) -> None:
    flags = ["--windows=40,8", "--guidance-interval=0.2,0.8", "--window-noise=fresh", f"-o{tmp_path / 'a.npy'}"]
    result = CliRunner().invoke(generate, ["a whale", "--frames=64", *flags, "--free-init=2"])
    assert result.exit_code == 2
    assert "free_init=2.0: the loop temporal begins without any signal" in result.output


# Bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"windows": 25}, r"windows=25: a length from 2 to 24 frames and a stride from 1 to the length, or 0 for"),
    ({"windows": 1}, r"windows=1: a length from 2 to 24"),
    ({"windows": (4, 5)}, r"windows=\(4, 5\): a length"),
    ({"windows": (4, 0)}, r"windows=\(4, 0\): a length"),
    ({"windows": (4, 2, 1)}, r"windows=\(4, 2, 1\): a length"),
    ({"windows": []}, r"windows=\[\]: a length"),
    ({"windows": True}, r"windows=True: a length"),
    ({"windows": 4.0}, r"windows=4.0: a length"),
    ({"windows": "long"}, r"windows='long': a length"),
    ({"window_noise": "old"}, r"window_noise='old': one of 'fresh', 'shuffled', 'repeated'"),
    ({"guidance_interval": 0.5}, r"guidance_interval=0.5: two numbers, 0 <= from <= to <= 1"),
    ({"guidance_interval": (0.7, 0.2)}, r"guidance_interval=\(0.7, 0.2\): two numbers"),
    ({"guidance_interval": (-0.1, 0.2)}, r"two numbers, 0 <= from"),
    ({"guidance_interval": (0, float("nan"))}, r"two numbers, 0 <= from"),
    ({"guidance_interval": [(0, 1)]}, r"or 2 pairs \(one per loop: draft, film\)"),
    ({"free_init": 0}, r"free_init=0: iterations from 1 to 100"),
    ({"free_init": 2.5}, r"free_init=2.5: iterations"),
    ({"free_init": (3, 2)}, r"free_init=\(3, 2\): iterations"),
    ({"free_init": (3, 0.1, 0.1, 0)}, r"iterations from 1"),
    ({"free_init": (3, 0.1, 0.1, 4, 5)}, r"iterations from 1"),
    ({"free_init": "often"}, r"free_init='often': iterations"),
    ({"window_noise": "fresh"}, r"window_noise='fresh': the loop film has no windows; set windows too"),
    ({"free_init_filter": "gaussian"}, r"free_init_filter='gaussian': free_init is not given"),
    ({"free_init": 3, "free_init_filter": "box"}, r"free_init_filter='box': one of 'butterworth', 'gaussian', 'ideal'"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_wrong_settings_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        loop_settings(MANIFEST, 5, lambda _: False, **options)


def test_settings_that_a_model_cannot_have() -> None:
    with pytest.raises(RequestError, match="windows=0: the loop film takes at most 6 frames at once, not 7"):
        loop_settings(WINDOWED, 7, lambda _: False, windows=0)
    with pytest.raises(RequestError, match=r"free_init=3: the loop film begins from a picture or clip"):
        loop_settings(MANIFEST, 5, lambda _: True, free_init=3)
    silent = changed(MANIFEST, "film", schedule=replace(LINEAR, zero_terminal_snr=True), prediction="v",
                     solvers=MANIFEST.loop("film").solvers[:1])  # fmt: skip
    with pytest.raises(RequestError, match=r"free_init=3: the loop film begins without any signal"):
        loop_settings(silent, 5, lambda _: False, free_init=3)
    sizes = replace(MANIFEST.sizes, frames=(1, 1, 1))
    still = replace(MANIFEST, sizes=sizes, loops=MANIFEST.loops[:1], stages=MANIFEST.stages)
    for name, value in (("windows", 4), ("window_noise", "fresh"), ("free_init", 2)):
        with pytest.raises(RequestError, match=f"{name}=.*tables alone has no loop over frames"):
            loop_settings(still, 1, lambda _: False, **{name: value})
