"""DDIM inversion: a picture or clip is carried up the noise levels and then denoised with another text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from interpreter_model import FORMULAS, Formulas, changed, linear, step
from known_model import MANIFEST
from numpy.typing import NDArray

from higen import bundle as files
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.errors import RequestError
from higen.loop_settings import LoopSettings
from higen.manifest import Manifest
from higen.noise_schedule import NoiseSchedule, Solver
from higen.pipeline import Pipeline
from higen.sampler import Step
from higen.schedule import alphas_cumprod, inversion_table, solver_table
from higen.stages import Tensor
from higen.tokenizer import build_word_tokenizer, write_tokenizer

CLIP = np.random.default_rng(3).integers(0, 256, (7, 8, 12, 3), np.uint8)
LEADING = Solver("ddim", "leading", offset=1)
TRAILING = Solver("ddim", "trailing", final="zero")
Array = NDArray[Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "inverted"
    with files.create_model(path, MANIFEST) as inside:
        write_tokenizer(build_word_tokenizer(("a", "red", "kite", "climbs")), inside / "words.json")
    return path


def pipeline_of(folder: Path, manifest: Manifest = MANIFEST, formulas: Any = FORMULAS) -> tuple[Pipeline, Formulas]:
    backend = Formulas(manifest, formulas)
    return Pipeline(replace(Bundle.open(folder), manifest=manifest), backend), backend


# The table.


def rows(table: Any, x: Array, network: Any) -> Array:
    """A loop over a table of first-order rows, in float64."""
    for i in range(len(table)):
        x = table.A[i] * x + table.B[i] * network(x, table.t[i])
    return x


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("prediction", "zero_snr"), [("epsilon", False), ("v", False), ("v", True)])
@pytest.mark.parametrize("solver", [LEADING, TRAILING])
def test_rows_are_those_of_diffusers(prediction: str, solver: Solver, zero_snr: bool, steps: int) -> None:
    schedule = NoiseSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=zero_snr)
    theirs = DDIMInverseScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=solver.final == "zero",
        steps_offset=solver.offset,
        prediction_type={"v": "v_prediction"}.get(prediction, prediction),
        timestep_spacing=solver.spacing,
        rescale_betas_zero_snr=zero_snr,
    )
    theirs.set_timesteps(steps)
    table = inversion_table(schedule, prediction, solver, steps)
    assert table.t.tolist() == theirs.timesteps.tolist()

    def network(x: Any, t: Any) -> Any:
        return 0.3 * x + 0.1 * (x * 3 + 0.01 * float(t))

    x = torch.linspace(-2, 2, 9)
    ours = rows(table, x.numpy().astype(np.float64), network)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t), int(t), x).prev_sample
    np.testing.assert_allclose(ours, x.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("first", [0, 1, 4, 8])
@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "heun", "euler"])
def test_rows_end_at_the_noise_level_where_the_solver_begins(name: str, first: int) -> None:
    """With the true noise of every state, first-order rows are exact."""
    schedule = NoiseSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012)
    solver = Solver(name, "trailing" if name in ("ddim", "dpm++2m") else "linspace", final="zero")
    down = solver_table(schedule, "epsilon", solver, 10)
    up = inversion_table(schedule, "epsilon", solver, 10, first)
    z, noise = 0.8, -1.3
    wanted = down.start_alpha[first] * z + down.start_sigma[first] * noise
    assert rows(up, np.float64(z), lambda x, t: noise) == pytest.approx(wanted)
    assert len(up) == 10 - ((first + 1) // 2 if name == "heun" else first)


# A loop.


def film_latents(pipeline: Pipeline, **options: Any) -> Array:
    given: dict[str, Any] = {"footage": CLIP, "frames": 7, "push": 1.0, "glow": 0.0, **options}
    *_, last = (e for e in pipeline.stream("a kite", **given) if isinstance(e, Step) and e.loop == "film")
    return np.asarray(last.latents)


@pytest.mark.parametrize("options", [{}, {"windows": (4, 2)}, {"solver": "ddim"}])
def test_the_same_text_without_guidance_gives_the_clip_back(folder: Path, options: dict[str, Any]) -> None:
    """The error is of first order: it halves with twice as many steps."""
    still = changed(
        MANIFEST, "film_one", inputs=tuple(t for t in MANIFEST.stage("film_one").inputs if t.name != "still")
    )
    still = changed(still, "film_two", inputs=tuple(t for t in MANIFEST.stage("film_two").inputs if t.name != "still"))
    formula = {**FORMULAS, "film_one": step(linear), "film_two": step(linear)}
    pipeline, _ = pipeline_of(folder, still, formula)
    source = pipeline.start_latents(pipeline.request("a kite", footage=CLIP, frames=7), still.loop("film"))

    def error(steps: int) -> float:
        made = film_latents(pipeline, steps=[1, steps], guidance=1.0, inversion="a kite", **options)
        return float(np.abs(made - source).max())

    coarse, fine = error(8), error(32)
    assert fine < 0.4 * coarse
    assert fine < 0.1 * float(np.abs(source).max())


def test_the_way_up_has_the_other_text_the_middle_frame_and_no_guidance(folder: Path) -> None:
    pipeline, backend = pipeline_of(folder)
    options: dict[str, Any] = {"footage": CLIP, "frames": 7, "push": 0.5, "steps": 4, "guidance": 3.0, "seed": 5}
    stream = pipeline.stream("a kite", inversion="a red kite", **options)
    assert stream.loops == [("draft", 4), ("film", 4), ("decode", 7)]
    steps = [(s.stage, s.index, s.total) for s in stream if isinstance(s, Step) and s.loop == "film"]
    assert steps == [("film_one", 0, 4), ("film_one", 1, 4), ("film_two", 2, 4), ("film_two", 3, 4)]
    assert stream.videos[0].metadata["inversion"] == "a red kite"
    up, down = backend.of("film_one"), backend.of("film_two")
    clean = pipeline.start_latents(pipeline.request("a kite", footage=CLIP, frames=7), MANIFEST.loop("film"))
    np.testing.assert_array_equal(up[0]["latents"], clean)
    np.testing.assert_array_equal(up[0]["still"], clean[:, :, 3])
    np.testing.assert_array_equal([c["t"][0] for c in up], [c["t"][0] for c in down][::-1])
    pipeline, backend = pipeline_of(folder)
    pipeline("a red kite", frames=7, steps=4, guidance=1.0)
    np.testing.assert_array_equal(up[0]["hints"], backend.of("film_one")[0]["hints"])
    assert np.abs(up[0]["hints"] - down[0]["hints"]).max() > 0
    assert np.abs(down[0]["still"] - up[0]["still"]).max() > 0  # the way down has the drawn key frame


def test_samples_of_a_batch_and_noise_seeds(folder: Path) -> None:
    """Each sample equals a single one. No noise is drawn for the clip: only the key frame depends on the seed."""
    pipeline, _ = pipeline_of(folder)
    picture = CLIP[2]
    given: dict[str, Any] = {"footage": CLIP, "frames": 7, "steps": 4, "inversion": True, "sketch": picture}
    both = pipeline(["a kite", "a red kite"], seed=[1, 2], **given)
    alone = pipeline("a red kite", seed=9, **given)
    np.testing.assert_array_equal(both[1].frames, alone.frames)
    assert np.abs(both[0].frames.astype(int) - alone.frames).max() > 0


def test_an_edit_by_inversion(folder: Path) -> None:
    """A mask keeps its black parts, as without inversion."""
    pipeline, _ = pipeline_of(folder)
    made = pipeline.edit(CLIP, "a red kite", inversion="a kite", strength=1.0, steps=4, sway=3.0)
    wanted = pipeline("a red kite", footage=CLIP, frames=7, push=1.0, steps=4, sway=3.0, inversion="a kite")
    np.testing.assert_array_equal(made.frames, wanted.frames)
    pipeline.edit(CLIP, "a red kite", inversion=True, key="drawn", steps=1)
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:] = 255
    masked = pipeline.edit(CLIP, "a red kite", inversion=True, strength=1.0, mask=mask, steps=4)
    known = pipeline("a kite", frames=7, keyframes=dict(enumerate(CLIP)), seed=9)
    np.testing.assert_array_equal(masked.frames[:, :, :6], known.frames[:, :, :6])
    assert np.abs(masked.frames[:, :, 6:].astype(int) - known.frames[:, :, 6:]).max() > 0


class Kept(TorchBackend):
    """Keeps the inputs of the steps."""

    def run(self, stage: str, /, **tensors: Any) -> Any:
        if "latents" in tensors and "previous" in tensors:
            self.__dict__.setdefault("given", []).append((stage, tensors))
        return super().run(stage, **tensors)


def test_higen_is_inverted_as_by_diffusers(tiny_model: Path) -> None:
    """The network's prediction v is what a step with the coefficients A = 0, B = 1 returns."""
    bundle = Bundle.open(tiny_model)
    backend = Kept(bundle)
    pipeline = Pipeline(bundle, backend)
    clip = np.random.default_rng(1).integers(0, 256, (3, 16, 24, 3), np.uint8)
    options: dict[str, Any] = {
        "video": clip,
        "frames": 3,
        "strength": 1.0,
        "inversion": "a red heart",
        "solver": "ddim",
    }
    states = [s for s in pipeline.stream("a blue whale", steps=[1, 10], **options) if isinstance(s, Step)][1:]
    stage, given = backend.given[1]
    assert (stage, len(states)) == ("temporal_unet_plain", 20)
    loop = bundle.manifest.loop("temporal")
    theirs = DDIMInverseScheduler(
        beta_start=loop.schedule.beta_start,
        beta_end=loop.schedule.beta_end,
        beta_schedule=loop.schedule.kind,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=loop.schedule.zero_terminal_snr,
    )
    theirs.set_timesteps(10)
    theirs.alphas_cumprod = torch.from_numpy(alphas_cumprod(loop.schedule))  # theirs are rounded to float32
    theirs.initial_alpha_cumprod = theirs.alphas_cumprod[0]
    columns = {name: np.full(1, value, np.float32) for name, value in {"A": 0, "B": 1, "C": 0}.items()}
    request = pipeline.request("a blue whale", **options)
    x = torch.from_numpy(pipeline.start_latents(request, loop))
    np.testing.assert_array_equal(given["prior"], x[:, :, 1])
    for t in theirs.timesteps:
        state = {"latents": x.numpy(), "t": np.full(1, float(t), np.float32)}
        v = backend.to_numpy(TorchBackend.run(backend, stage, **{**given, **columns, **state})["latents"])
        x = theirs.step(torch.from_numpy(np.asarray(v)), int(t), x).prev_sample.float()
    got = np.asarray(backend.to_numpy(states[9].latents))
    assert np.abs(got - x.numpy()).max() < 1e-4 * np.abs(x.numpy()).max()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inversion": 3}, "inversion=3: a text that describes the clip, or True"),
        ({"inversion": "a \ud800"}, "inversion=.*not valid Unicode"),
        ({"inversion": True, "footage": None}, "no loop of this request begins from a picture or clip; give footage"),
        ({"inversion": True, "frames": 1}, "no loop of this request begins"),
        ({"inversion": True, "solver": "lcm"}, "the solver 'lcm' adds noise, so its steps cannot be run backwards"),
        ({"inversion": True, "solver": "euler_ancestral"}, "the solver 'euler_ancestral' adds noise"),
        ({"inversion": True, "free_init": 2}, "free_init=2: the loop film begins from a picture or clip"),
    ],
)
def test_wrong_requests_are_refused_before_work_starts(folder: Path, options: dict[str, Any], said: str) -> None:
    pipeline, backend = pipeline_of(folder)
    with pytest.raises(RequestError, match=said):
        pipeline("a kite", **{"footage": CLIP, "frames": 7, **options})
    assert backend.names == []


def test_models_that_cannot_invert(folder: Path) -> None:
    sample = changed(MANIFEST, "film", prediction="sample", solvers=(replace(LEADING, final="zero"),))
    with pytest.raises(RequestError, match="ends without noise, where a network that predicts the sample"):
        pipeline_of(folder, sample)[0]("a kite", footage=CLIP, frames=7, inversion=True)
    where = Tensor("where", ("B", "F"), source="places:keyframes")
    placed = changed(MANIFEST, "film_one", inputs=(*MANIFEST.stage("film_one").inputs, where))
    with pytest.raises(RequestError, match="the loop film needs keyframes, and while a clip is inverted"):
        pipeline_of(folder, placed)[0]("a kite", footage=CLIP, frames=7, keyframes={0: CLIP[0]}, inversion=True)
    none = changed(MANIFEST, "film", start=None)
    with pytest.raises(RequestError, match="no loop of tables alone can do so"):
        pipeline_of(folder, none)[0]("a kite", frames=7, inversion=True)


def test_inversion_is_off_by_default(folder: Path) -> None:
    request = pipeline_of(folder)[0].request("a kite", footage=CLIP, frames=7, inversion=False)
    assert request.settings == LoopSettings()
