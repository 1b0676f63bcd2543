"""Distillation against the pipeline and closed forms: what teacher and student draw, what is learned and written."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from training_run import make_settings

import higen
from higen.bundle import Bundle
from higen.convert import convert_sources
from higen.errors import RequestError, SettingsError
from higen.families.higen import spec
from higen.families.higen.cues import appearance_cue, motion_cue
from higen.models.lora import Lora
from higen.noise import frame_noise
from higen.sampler import Step
from higen.train.batches import Batch, picture_cues
from higen.train.distil import Distillation, distilled, samplings
from higen.train.layers import LORA
from higen.train.networks import Networks, build
from higen.train.objective import v_loss
from higen.train.sections import DataSettings, DistilSettings, ModelSettings, RunSettings
from higen.train.settings import Settings
from higen.train.trainer import train

BOTH: dict[str, Any] = {"distil__steps": [2, 1], "objective__offset_noise": 0.0, "objective__text_dropout": 0.0}
TEACHER = DistilSettings(steps=(2, 1), teacher_steps=(4, 3), teacher_guidance=(3.0, 1.0))
PROMPT, SEED = "a red heart", 5


@pytest.fixture(scope="module")
def networks(preconditioned_model: Path) -> Networks:
    settings = Settings(ModelSettings(init=str(preconditioned_model)), DataSettings("-"), RunSettings("-", 1))
    return build(settings, [PROMPT])


def distillation(networks: Networks, distil: DistilSettings) -> Distillation:
    objective = Distillation(networks, distil, torch.from_numpy(networks.tokenizer.encode([""])))
    objective.denoiser.eval()  # without dropout
    for unet in objective.unets:
        unet.eval()
    return objective


def batch_of(networks: Networks, loop: int, prior: torch.Tensor | None = None) -> Batch:
    """One sample of PROMPT without cues, with the pipeline's noise for SEED. x0 is another noise."""
    unet, frames = networks.config.unet, 1 if loop == 0 else 4
    noise, x0 = (torch.from_numpy(frame_noise(SEED, p, unet.in_channels, frames, 8, 12))[None] for p in (loop, 7))
    cues = [motion_cue(None, frames, unet.base_channels), appearance_cue(None, frames, unet.appearance_columns)]
    motion, appearance = picture_cues(unet) if loop == 0 else (torch.from_numpy(cue) for cue in cues)
    last = networks.config.schedule.timesteps - 1
    tokens = torch.from_numpy(networks.tokenizer.encode([PROMPT]))
    prior = x0[:, :, 0] if prior is None else prior
    return Batch(x0, noise, torch.tensor([last]), prior, motion[None], appearance[None], tokens)


@pytest.mark.parametrize("teacher", [False, True])
def test_teacher_and_student_draw_as_the_pipeline_does(networks: Networks, teacher: bool) -> None:
    """From the same noise, prompt and prior; the teacher with guidance and DDIM, the model's default solver."""
    steps, scale, solver = ((4, 3), (3.0, 1.0), "ddim") if teacher else ((2, 1), (1.0, 1.0), "dpm++2m")
    options = {"frames": 4, "offset_noise": 0.0, "steps": steps, "guidance": scale, "solver": solver}
    with higen.load(networks.companions.path, "torch", device="cpu") as pipe:
        events = [e for e in pipe.stream(PROMPT, seed=SEED, **options) if isinstance(e, Step)]
    found = {e.loop: e for e in events if e.index == e.total - 1}
    objective = distillation(networks, TEACHER)
    prior = torch.as_tensor(found["spatial"].latents)[:, :, 0]
    for loop, name in enumerate(("spatial", "temporal")):
        drawn = objective.drawn(batch_of(networks, loop, prior), loop, teacher)
        np.testing.assert_allclose(drawn, np.asarray(found[name].previous), rtol=1e-4, atol=1e-4)


def test_a_single_step_towards_real_pictures_is_v_prediction_at_the_last_timestep(networks: Networks) -> None:
    """There alpha is 0, so v is -x0 and the estimate of x0 is minus the network's output."""
    objective = distillation(networks, DistilSettings(steps=(1, 1), target="clip"))
    batch = batch_of(networks, 0)
    loss, image, video = objective(batch, None)
    with torch.no_grad():
        context, embedding = objective.conditions(batch)
    alpha, sigma = torch.zeros(1), torch.ones(1)
    wanted = v_loss(objective.unets[1], batch.x0, batch.noise, batch.t, alpha, sigma, context, embedding, None)
    torch.testing.assert_close(loss, wanted.mean())
    assert (float(image), float(video)) == (float(loss.detach()), 0.0)


def test_the_loss_is_the_mean_error_of_the_rows_and_its_gradient_ends_at_each(networks: Networks) -> None:
    objective, batch = distillation(networks, TEACHER), batch_of(networks, 0)
    wanted = objective.drawn(batch, 0, teacher=True)
    first, second = objective._estimates(batch, 0, teacher=False)
    torch.testing.assert_close(
        objective(batch, None)[1], ((first - wanted).pow(2).mean() + (second - wanted).pow(2).mean()) / 2
    )
    torch.testing.assert_close(second.detach(), objective.drawn(batch, 0))
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, preconditioned_model: Path, training_clips: Path) -> Settings:
    """A finished run that distilled both loops into adapters."""
    changes = {**BOTH, "run__steps": 2, "lora__rank": 4, "optimiser__learning_rate": 5e-3, "optimiser__ema": 0.5}
    folder = tmp_path_factory.mktemp("distil")
    settings = make_settings(folder, preconditioned_model, training_clips, **changes)
    train(settings)
    return settings


def test_training_brings_the_student_to_the_teacher(networks: Networks) -> None:
    """On one batch, all weights of the student; those of the teacher stay."""
    objective = distillation(replace(networks, denoiser=copy.deepcopy(networks.denoiser)), TEACHER)
    batches = [batch_of(networks, loop) for loop in (0, 1)]
    wanted = [objective.drawn(batch, loop, teacher=True) for loop, batch in enumerate(batches)]

    def errors() -> list[float]:
        pairs = enumerate(zip(batches, wanted, strict=True))
        return [float((objective.drawn(batch, loop) - target).pow(2).mean()) for loop, (batch, target) in pairs]

    before, adam = errors(), torch.optim.Adam(objective.denoiser.parameters(), lr=5e-4)
    for _ in range(6):
        adam.zero_grad()
        objective(*batches)[0].backward()
        adam.step()
    assert all(after < 0.85 * first for after, first in zip(errors(), before, strict=True))
    again = [objective.drawn(batch, loop, teacher=True) for loop, batch in enumerate(batches)]
    torch.testing.assert_close(again, wanted)


def test_the_written_model_draws_in_few_plain_steps(run: Settings, preconditioned_model: Path, tmp_path: Path) -> None:
    """It draws what the original model draws with the adapters, these steps, and no guidance."""
    made = Path(run.run.output, "model")
    manifest = Bundle.open(made).manifest
    assert [(loop.guided, loop.steps, loop.guidance) for loop in manifest.loops] == [(None, 2, 1.0), (None, 1, 1.0)]
    assert not {"spatial_unet", "temporal_unet"} & set(manifest.stage_names)
    assert spec.manifest(spec.config(manifest)) == manifest
    lora = Lora(Path(run.run.output, LORA))
    convert_sources([preconditioned_model], tmp_path / "adapted", loras=[lora])
    options = {"frames": 4, "seed": 1}
    with higen.load(made, "torch", device="cpu") as few, higen.load(tmp_path / "adapted", "torch", device="cpu") as one:
        drawn = few(PROMPT, progress=False, **options).frames
        same = one(PROMPT, progress=False, steps=(2, 1), guidance=1.0, solver="dpm++2m", **options).frames
        with pytest.raises(RequestError, match="guidance=3: the loop spatial has no guidance"):
            few.request(PROMPT, guidance=3)
    assert np.abs(drawn.astype(int) - same).max() <= 1


def test_a_distilled_model_can_be_distilled_again(run: Settings) -> None:
    config = spec.config(Bundle.open(Path(run.run.output, "model")).manifest)
    (student, teacher), _ = samplings(config, DistilSettings(steps=(1, 1)))
    assert (student.stage.name, teacher.stage.name) == ("spatial_unet_plain", "spatial_unet_plain")
    with pytest.raises(SettingsError, match=r"the loop spatial of .* has no guidance; 1 is allowed"):
        samplings(config, DistilSettings(steps=(1, 1), teacher_guidance=(2.0, 1.0)))


def test_key_frames_can_stay_as_they_are() -> None:
    config = replace(TINY, defaults=replace(TINY.defaults, solver="dpm++2m", steps=(12, 3)))
    alone = DistilSettings(steps=(0, 1))
    kept, clips = spec.manifest(distilled(config, alone)).loops
    assert (kept.guided, kept.steps, kept.guidance) == ("spatial_unet", 12, 3.0)
    assert (clips.guided, clips.steps, clips.guidance) == (None, 1, 1.0)
    assert samplings(config, alone)[0] is None
    with pytest.raises(SettingsError, match="few steps need the solver 'dpm\\+\\+2m', but tiny draws its key frames"):
        distilled(TINY, alone)


@pytest.mark.parametrize(
    ("distil", "message"),
    [
        (DistilSettings(steps=(5, 1)), r"steps=\[5, 1\]: the teacher has only 4 steps in the loop spatial"),
        (DistilSettings(steps=(1, 1), teacher_steps=(2000, 1)), "the loop spatial: steps=2000: a whole number"),
    ],
)
def test_steps_that_do_not_fit_the_model_are_refused(distil: DistilSettings, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        samplings(TINY, distil)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distil__steps": [2]}, r"distil.steps=\[2\]: two numbers"),
        ({"distil__steps": [2, 0]}, r"steps=\[2, 0\]: 0 or more for key frames and 1 or more for clips"),
        ({"distil__steps": [-1, 1]}, r"steps=\[-1, 1\]: 0 or more"),
        ({"distil__teacher_steps": [4, 4]}, r"teacher_steps=\[4, 4\]: needs steps"),
        ({**BOTH, "distil__teacher_steps": [0, 4]}, r"teacher_steps=\[0, 4\]: 1 or more"),
        ({**BOTH, "distil__teacher_guidance": [-1.0, 1.0]}, r"teacher_guidance=\[-1.0, 1.0\]: finite"),
        ({**BOTH, "distil__target": "noise"}, "distil.target"),
        ({**BOTH, "data__images": 0}, "needs data.images from 1 and optimiser.layers='all'"),
        ({**BOTH, "data__videos": 0}, "needs data.videos from 1"),
        ({"distil__steps": [0, 1]}, "needs optimiser.layers='temporal'"),
        ({**BOTH, "lora__rank": 2, "lora__scales": True}, "lora.scales=True: not for a distillation"),
        ({**BOTH, "optimiser__train_text": True}, "optimiser.train_text=True: not for a distillation"),
        ({**BOTH, "codec__layers": "all"}, r"distil.steps=\(2, 1\): codec.layers='all' trains only the autoencoder"),
    ],
)
def test_bad_settings_are_named(
    tmp_path: Path, preconditioned_model: Path, training_clips: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings(tmp_path, preconditioned_model, training_clips, **changes)
