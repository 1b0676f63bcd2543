"""Prior preconditioning: a network that knows the residual gives the velocity of the clip itself, for any gain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn

from higen.families.higen import spec
from higen.families.higen.network import VelocityPredictor
from higen.families.higen.preconditioning import precondition, velocity
from higen.families.higen.unet import UNet
from higen.models.solver_step import SolverStep
from higen.train.objective import diffuse, gain_loss, residual_square, residual_v_loss, v_target

CONFIG = replace(TINY.unet, prior_preconditioning=True, pooled_context=True)
B, F, H, W = 2, 3, 4, 4


class KnowsTheAnswer(UNet):
    """Returns the velocity of the unit-variance residual r = (z - p) / g, computed from z, p and the noise."""

    def __init__(self, z: Tensor, prior: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> None:
        super().__init__(CONFIG)
        self.z, self.p, self.noise, self.alpha, self.sigma = z, prior[:, :, None], noise, alpha, sigma

    def forward(self, latents: Tensor, t: Tensor, context: Tensor, frame_embedding: Tensor, prior: Tensor | None = None) -> Tensor:  # fmt: skip  # noqa: E501
        g = self.log_gain(context, frame_embedding).exp()[:, None, :, None, None]
        a, s = (column[:, None, None, None, None] for column in (self.alpha, self.sigma))
        c = 1 / (a**2 * g**2 + s**2).sqrt()
        torch.testing.assert_close(latents, c * (a * (self.z - self.p) + s * self.noise))  # the network's input
        return a * g * c * self.noise - s * c * (self.z - self.p) / g


@pytest.fixture
def parts() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    angle = torch.tensor([0.4, 1.2])
    return {
        "z": torch.randn(B, CONFIG.in_channels, F, H, W, generator=random),
        "prior": torch.randn(B, CONFIG.in_channels, H, W, generator=random),
        "noise": torch.randn(B, CONFIG.in_channels, F, H, W, generator=random),
        "context": torch.randn(B, CONFIG.context_tokens, CONFIG.context_dim, generator=random),
        "embedding": torch.randn(B, F, CONFIG.embedding_dim, generator=random),
        "alpha": angle.cos(),
        "sigma": angle.sin(),
    }


def answering(parts: dict[str, Tensor]) -> KnowsTheAnswer:
    torch.manual_seed(0)
    unet = KnowsTheAnswer(*(parts[name] for name in ("z", "prior", "noise", "alpha", "sigma")))
    assert unet.residual_gain is not None
    nn.init.normal_(unet.residual_gain.weight, std=0.1)
    return unet.eval()


@torch.no_grad()
def test_velocity_is_that_of_the_clip(parts: dict[str, Tensor]) -> None:
    unet, t = answering(parts), torch.tensor([300, 800])
    x = diffuse(parts["z"], parts["noise"], parts["alpha"], parts["sigma"])
    v = velocity(
        unet, x, t, parts["alpha"], parts["sigma"], parts["context"], parts["embedding"], parts["prior"]
    )  # fmt: skip
    torch.testing.assert_close(v, v_target(parts["z"], parts["noise"], parts["alpha"], parts["sigma"]))


@torch.no_grad()
def test_the_loss_is_zero_for_the_right_answer(parts: dict[str, Tensor]) -> None:
    loss = residual_v_loss(
        answering(parts), parts["z"], parts["noise"], torch.tensor([300, 800]), parts["alpha"], parts["sigma"],
        parts["context"], parts["embedding"], parts["prior"],
    )  # fmt: skip
    assert loss.max() < 1e-10


def test_the_gain_is_learned_from_the_text_and_moves_no_cue(parts: dict[str, Tensor]) -> None:
    """One text has a still clip, the other a moving clip. The cues are the same for both."""
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    prior, context = parts["prior"], parts["context"]
    z = prior[:, :, None] + torch.tensor([0.0, 0.5])[:, None, None, None, None] * parts["noise"]
    cues = torch.zeros(B, F, CONFIG.embedding_dim, requires_grad=True)
    optimiser = torch.optim.Adam(unet.parameters(), lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        gain_loss(unet, context, cues, residual_square(z, prior)).backward()
        optimiser.step()
    still, moving = unet.log_gain(context, cues).exp().mean(dim=1).tolist()
    assert still == pytest.approx(1e-3**0.5, rel=0.2)  # the lower limit of the gain
    assert moving == pytest.approx(0.5, rel=0.2)
    assert cues.grad is None


def test_a_plain_network_has_no_gain() -> None:
    with torch.device("meta"):
        plain = UNet(TINY.unet)
    with pytest.raises(TypeError, match="no prior preconditioning"):
        plain.log_gain(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))


@torch.no_grad()
def test_guidance_sees_one_gain_in_both_branches(parts: dict[str, Tensor]) -> None:
    """With two gains the difference of the branches would contain a multiple of x, which strong guidance would magnify.

    A network that returns zero leaves v = alpha sigma c^2 (1 - g^2) (x - alpha p) - sigma p. It is equal in both
    branches, so guidance does not change it.
    """
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    assert unet.residual_gain is not None
    nn.init.normal_(unet.residual_gain.weight, std=0.3)
    for parameter in unet.conv_out.parameters():
        nn.init.zeros_(parameter)
    step = SolverStep(spec.manifest(replace(TINY, unet=CONFIG)).stage("temporal_unet"), VelocityPredictor(unet))
    given = {
        **{name: torch.zeros(B) for name in ("A", "B", "C")},
        **{name: parts[name] for name in ("alpha", "sigma", "context", "prior")},
        "latents": parts["z"],
        "previous": parts["z"],
        "t": torch.tensor([300.0, 800.0]),
        "empty_context": parts["context"].flip(0),
        "frame_embedding": parts["embedding"],
    }
    found = [
        step(*({**given, "guidance": torch.full((B, F), guidance)}[name] for name in step.inputs))[1]
        for guidance in (0.0, 1.0, 12.0)
    ]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[1], found[2])


def test_under_autocast_the_gain_is_in_float32_and_still_learns(parts: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    unet, t = UNet(CONFIG), torch.tensor([300, 800])
    assert unet.residual_gain is not None
    nn.init.normal_(unet.residual_gain.weight, std=0.1)
    seen: list[Tensor] = []
    unet.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    context, embedding = parts["context"].bfloat16(), parts["embedding"].bfloat16()  # as autocast passes them
    x = diffuse(parts["z"], parts["noise"], parts["alpha"], parts["sigma"])
    with torch.no_grad():
        wanted, *_ = precondition(
            unet, x, parts["alpha"], parts["sigma"], context.float(), embedding.float(), parts["prior"]
        )
    with torch.autocast("cpu", torch.bfloat16):
        residual_v_loss(
            unet, parts["z"], parts["noise"], t, parts["alpha"], parts["sigma"], context, embedding, parts["prior"]
        )
        gain_loss(unet, context, embedding, residual_square(parts["z"], parts["prior"])).backward()
    assert torch.equal(seen[0], wanted)
    assert unet.residual_gain.weight.grad is not None
    assert unet.residual_gain.weight.grad.any()
