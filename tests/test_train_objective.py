"""The training code against the reference's training step. `tests/reference` has both cases of the whole reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, WORDS
from torch import Tensor, nn

from higen.bundle import Bundle
from higen.families.higen import spec
from higen.families.higen.cues import motion_cue
from higen.families.higen.reference_names import reference_names
from higen.families.higen.spec import ModelConfig
from higen.models.companion_stages import EncoderStage
from higen.parity.fixtures import CaseTensors, assemble, read_json, recipe_salt, recipe_state, recorded_config
from higen.tokenizer import PromptTokenizer, build_word_tokenizer
from higen.train.batches import Batch, Batches
from higen.train.cues import appearance_similarity, motion_of
from higen.train.data import IMAGE, VIDEO
from higen.train.latents import Encoded
from higen.train.networks import Networks, Objective
from higen.train.objective import diffuse, v_loss, v_target
from higen.train.reader import Sample
from higen.train.settings import CueSettings, ObjectiveSettings

FIXTURES = Path(__file__).parent / "reference" / "fixtures"
RECORD = read_json(FIXTURES / "fixtures.json")


class Told(nn.Module):
    """A text encoder that returns the reference's text features for any tokens."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden[: len(input_ids)])


def objective_of(model: str, hidden: Tensor) -> tuple[Objective, ModelConfig]:
    made = RECORD["models"][model]
    unet = replace(recorded_config(made["kwargs"], model), dropout=0.0)  # the reference's numbers are without dropout
    config = replace(TINY, unet=unet)
    denoiser = assemble(unet, recipe_state(unet, recipe_salt(made["weight_recipe"], model)))
    tokenizer = PromptTokenizer(build_word_tokenizer(WORDS), config.text.rules)
    unused = EncoderStage(nn.Identity(), config.autoencoder.shift, config.autoencoder.scale)
    networks = Networks(
        config, denoiser, Told(hidden), unused, tokenizer, Bundle(Path(), spec.manifest(config), {}, {})
    )
    return Objective(networks, gain_weight=0.1), config


def batch_of(config: ModelConfig, tensors: dict[str, Tensor], kind: int) -> Batch:
    """A batch that the training code makes from the case's clean clips, with the case's noise and timesteps."""
    tokenizer = PromptTokenizer(build_word_tokenizer(WORDS), config.text.rules)
    batches = Batches(config, tokenizer, CueSettings(), ObjectiveSettings(), seed=0)
    encoded = (
        Encoded(x0, features=features)
        for x0, features in zip(tensors["x0"], tensors["clip_feats_normalised"], strict=True)
    )
    samples = [Sample("a whale", each) for each in encoded]
    made = batches.batch(samples, kind, 0, range(len(samples)))
    return replace(made, noise=tensors["noise"], t=tensors["t"])


def near(ours: Tensor, stored: Tensor, part: float = 2e-5) -> None:
    """Check that the difference is at most `part` of the largest value."""
    torch.testing.assert_close(ours.double(), stored.double(), rtol=0, atol=part * float(stored.abs().max()))


@pytest.mark.parametrize("case", sorted(RECORD["train"]))
def test_a_training_step_equals_the_references(case: str) -> None:
    """Compares cues and prior of the clean clip, noisy latents and target, the loss per sample, and every gradient."""
    model, _, name = case.partition("/")
    record, tensors = RECORD["train"][case], CaseTensors(FIXTURES / f"{model}.train.safetensors").read(name)
    frames = record["f"]
    objective, config = objective_of(model, tensors["y"])
    batch = batch_of(config, tensors, IMAGE if frames == 1 else VIDEO)
    near(batch.prior, tensors["spat_prior"])
    near(appearance_similarity(tensors["clip_feats_normalised"]), tensors["sim"])
    near(batch.appearance, tensors["appearance_cond"])
    if frames > 1:
        assert motion_of(tensors["x0"]).tolist() == tensors["motion_cond"].tolist()
    for row, told in zip(batch.motion, tensors["motion_cond"], strict=True):
        assert torch.equal(row, torch.from_numpy(motion_cue(told.numpy(), frames, config.unet.base_channels)))

    alpha, sigma = objective.alpha[batch.t], objective.sigma[batch.t]
    near(diffuse(batch.x0, batch.noise, alpha, sigma), tensors["xt"])
    near(v_target(batch.x0, batch.noise, alpha, sigma), tensors["v_target"])
    context, embedding = objective.denoiser.conditioner(tensors["y"], batch.motion, batch.appearance)
    with torch.no_grad():
        unet, prior = objective.denoiser.spatial_unet() if frames == 1 else objective.denoiser.unet, batch.prior
        near(v_loss(unet, batch.x0, batch.noise, batch.t, alpha, sigma, context, embedding, prior), tensors["loss"])

    loss, *parts = objective(*((batch, None) if frames == 1 else (None, batch)))
    near(parts[frames > 1], tensors["loss"].mean())
    loss.backward()
    found = {}  # by the reference's names, with zeros for unused parameters as in the reference
    for ours, reference in reference_names(config.unet).items():
        parameter = objective.denoiser.get_parameter(ours)
        found[reference] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    # Some sums nearly cancel. This is the reference's own float32 error against float64 (see higen.parity.diffusion).
    worst = record["worst_grad_rel_err_fp32_vs_fp64"]
    stored = {key.removeprefix("grad/"): tensor for key, tensor in tensors.items() if key.startswith("grad/")}
    assert len(stored) == 6
    for key, tensor in stored.items():
        near(found[key].reshape(tensor.shape), tensor, min(worst / 10, 1e-3))  # ours lack kernel axes of length 1
    norms = record["grad_l2"]
    assert found.keys() == norms.keys()
    floor = 2e-5 * max(norms.values())
    for key, norm in norms.items():
        assert float(found[key].double().norm()) == pytest.approx(norm, rel=worst, abs=floor), key
