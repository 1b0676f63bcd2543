"""The denoiser as one network with one set of weights, for any number of frames and any size."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from higen.errors import CheckpointError, ManifestError
from higen.families.higen.reference_names import config_from_reference, from_reference, reference_names
from higen.families.higen.spec import UNetConfig
from higen.families.higen.unet import Conditioner, Denoiser, UNet
from higen.models.layers import ResBlock, TemporalConv, TemporalTransformer
from higen.parity.fixtures import assemble, recipe_state

CONFIG = UNetConfig(
    base_channels=32,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    attention_levels=(True, True),
    head_dim=16,
    first_temporal_heads=3,
    text_dim=24,
    context_dim=40,
    context_tokens=3,
    context_depth=1,
    context_heads=4,
)
FULL = {  # the reference's parameter counts by role (full_param_counts.json)
    "time_embed": 2_050_560,
    "context_embedding": 68_223_744,
    "asim_embedding": 1_681_920,
    "msim_embedding": 2_050_560,
    "img_embedding": 11_840,
    "conv_in": 11_840,
    "temporal_transformer": 278_431_616,
    "resblock2d": 537_670_400,
    "temporal_conv": 266_891_520,
    "spatial_transformer": 273_629_120,
    "downsample": 19_355_840,
    "upsample": 33_180_800,
    "head": 12_164,
}
TOTAL, TEMPORAL, TENSORS = 1_483_201_924, 545_323_136, 1535


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return assemble(CONFIG, recipe_state(CONFIG, salt=1))


def inputs(
    batch: int, frames: int, height: int, width: int, seed: int = 0, config: UNetConfig = CONFIG
) -> list[Tensor]:
    """Random latents, t, context, frame_embedding and prior."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, 4, frames, height, width, generator=g),
        torch.randint(0, 1000, (batch,), generator=g),
        torch.randn(batch, config.context_tokens, config.context_dim, generator=g),
        torch.randn(batch, frames, config.embedding_dim, generator=g),
        torch.randn(batch, 4, height, width, generator=g),
    ]


def test_spatial_network_shares_the_very_same_parameters(denoiser: Denoiser) -> None:
    own, spatial = dict(denoiser.unet.named_parameters()), dict(denoiser.spatial_unet().named_parameters())
    assert all(parameter is own[name] for name, parameter in spatial.items())
    left_out = set(own) - set(spatial)
    assert left_out == {name for name in own if ".temporal." in name or name.startswith("temporal_in.")}


def test_spatial_network_has_no_temporal_module(denoiser: Denoiser) -> None:
    assert not [m for m in denoiser.spatial_unet().modules() if isinstance(m, (TemporalConv, TemporalTransformer))]


def test_spatial_network_follows_training_mode(denoiser: Denoiser) -> None:
    assert not denoiser.spatial_unet().training
    assert Denoiser(CONFIG).train().spatial_unet().training


def test_temporal_network_without_its_branches_is_the_spatial_one(denoiser: Denoiser) -> None:
    x, spatial = inputs(2, 1, 8, 6), denoiser.spatial_unet()
    silenced = assemble(CONFIG, ((name, tensor.clone()) for name, tensor in recipe_state(CONFIG, salt=1)))
    for module in silenced.modules():
        if isinstance(module, TemporalTransformer):
            torch.nn.init.zeros_(module.proj_out.weight)
            torch.nn.init.zeros_(module.proj_out.bias)
        elif isinstance(module, TemporalConv):
            torch.nn.init.zeros_(module.convs[3].weight)
            torch.nn.init.zeros_(module.convs[3].bias)
    with torch.no_grad():
        assert torch.equal(silenced.unet(*x), spatial(*x))
        assert not torch.allclose(denoiser.unet(*x), spatial(*x), atol=0.01)


def test_a_new_network_starts_as_its_spatial_one() -> None:
    torch.manual_seed(0)
    fresh = Denoiser(CONFIG).eval()
    torch.nn.init.normal_(fresh.unet.conv_out.weight)
    x = inputs(1, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(fresh.unet(*x), fresh.spatial_unet()(*x))


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
def test_samples_of_a_batch_do_not_meet(denoiser: Denoiser, frames: int) -> None:
    unet = denoiser.spatial_unet() if frames == 1 else denoiser.unet
    x = inputs(3, frames, 4, 6)
    with torch.no_grad():
        together = unet(*x)
        alone = torch.cat([unet(*(tensor[i : i + 1] for tensor in x)) for i in range(3)])
    assert together.shape == x[0].shape
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 8), (6, 4), (16, 10)])
def test_latent_sizes(denoiser: Denoiser, height: int, width: int) -> None:
    x = inputs(1, 2, height, width)
    with torch.no_grad():
        assert denoiser.unet(*x).shape == x[0].shape


def test_latent_size_that_is_not_a_multiple_is_refused(denoiser: Denoiser) -> None:
    assert CONFIG.size_multiple == 2
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        denoiser.unet(*inputs(1, 2, 5, 4))


def test_frames_exchange_information_and_their_order_matters(denoiser: Denoiser) -> None:
    x = inputs(1, 5, 4, 4)
    changed = [x[0].clone(), *x[1:]]
    changed[0][:, :, 0] += 1.0
    backwards = [x[0].flip(2), *x[1:3], x[3].flip(1), x[4]]
    with torch.no_grad():
        out, reached, mirrored = denoiser.unet(*x), denoiser.unet(*changed), denoiser.unet(*backwards)
    assert ((out - reached).abs().amax(dim=(0, 1, 3, 4)) > 1e-4).all()
    assert not torch.allclose(mirrored.flip(2), out, atol=1e-3)  # temporal convolutions distinguish before and after


def test_temporal_transformer_does_not_know_the_order_of_frames(denoiser: Denoiser) -> None:
    transformer = denoiser.unet.middle.temporal
    assert transformer is not None
    x = torch.randn(2, 5, 64, 3, 2, generator=torch.Generator().manual_seed(3))
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        out = transformer(x.flatten(0, 1), 5).unflatten(0, (2, 5))
        shuffled = transformer(x[:, order].flatten(0, 1), 5).unflatten(0, (2, 5))
    torch.testing.assert_close(shuffled, out[:, order], atol=1e-5, rtol=1e-4)


def test_no_prior_is_a_prior_of_zeros(denoiser: Denoiser) -> None:
    x = inputs(2, 1, 4, 4)
    spatial = denoiser.spatial_unet()
    with torch.no_grad():
        torch.testing.assert_close(spatial(*x[:4]), spatial(*x[:4], torch.zeros_like(x[4])), atol=1e-6, rtol=1e-5)
        without_bias = spatial.conv_in(x[0][:, :, 0])
        assert not torch.allclose(spatial._enter(x[0], None), without_bias, atol=1e-3)


@pytest.mark.parametrize("frames", [1, 3])
def test_gradients_reach_every_parameter_that_acts(frames: int) -> None:
    denoiser = assemble(CONFIG, recipe_state(CONFIG, salt=2))
    unet = denoiser.spatial_unet() if frames == 1 else denoiser.unet
    x = inputs(2, frames, 4, 4)
    g = torch.Generator().manual_seed(4)
    context, embedding = denoiser.conditioner(
        torch.randn(2, 9, 24, generator=g),
        torch.randn(2, frames, 32, generator=g),
        torch.rand(2, frames, 32, generator=g),
    )
    unet(x[0], x[1], context, embedding, x[4]).square().mean().backward()
    missing = {name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    temporal = {name for name, _ in denoiser.named_parameters() if ".temporal" in name}
    assert missing == (temporal if frames == 1 else set())
    assert all(float(p.grad.abs().max()) > 0 for p in unet.parameters() if p.grad is not None)


def test_dropout_acts_in_training_only(denoiser: Denoiser) -> None:
    training = assemble(CONFIG, recipe_state(CONFIG, salt=1)).train()
    x = inputs(1, 2, 4, 4)
    with torch.no_grad():
        assert torch.equal(denoiser.unet(*x), denoiser.unet(*x))
        assert not torch.equal(training.unet(*x), training.unet(*x))


def test_pooled_context_and_prior_preconditioning_add_their_layers_only() -> None:
    with torch.device("meta"):
        plain, extended = UNet(CONFIG), UNet(replace(CONFIG, pooled_context=True, prior_preconditioning=True))
        spatial = UNet(replace(CONFIG, pooled_context=True, prior_preconditioning=True), temporal=False)
    added = set(extended.state_dict()) - set(plain.state_dict())
    layers = {
        f"{name}.{leaf}" for name, leaf in itertools.product(("context_pool", "residual_gain"), ("weight", "bias"))
    }
    assert added == layers
    assert "context_pool.weight" in spatial.state_dict()
    assert "residual_gain.weight" not in spatial.state_dict()


def role(reference_name: str) -> str:
    """The reference's role of a tensor, from the tensor's name."""
    first = reference_name.split(".")[0]
    if first in ("time_embed", "context_embedding", "asim_embedding", "msim_embedding", "img_embedding"):
        return first
    if reference_name.startswith(("input_blocks.0.0.", "out.")):
        return "head" if first == "out" else "conv_in"
    if "temopral_conv" in reference_name:
        return "temporal_conv"
    if re.search(r"\.(transformer_blocks|norm|proj_in|proj_out)\.", reference_name):
        temporal = re.match(r"input_blocks\.0\.1\.|(middle_block|\w+_blocks\.\d+)\.2\.", reference_name)
        return "temporal_transformer" if temporal else "spatial_transformer"
    if ".op." in reference_name:
        return "downsample"
    return "upsample" if ".conv." in reference_name else "resblock2d"


def test_full_size_counts() -> None:
    with torch.device("meta"):
        full = Denoiser(UNetConfig())
    sizes = {name: parameter.numel() for name, parameter in full.named_parameters()}
    assert (sum(sizes.values()), len(sizes)) == (TOTAL, TENSORS)
    names = reference_names(UNetConfig())
    counts = dict.fromkeys(FULL, 0)
    for ours, theirs in names.items():
        counts[role(theirs)] += sizes[ours]
    assert counts == FULL
    assert sum(size for name, size in sizes.items() if ".temporal" in name) == TEMPORAL
    with torch.device("meta"):
        spatial = sum(p.numel() for p in UNet(UNetConfig(), temporal=False).parameters())
        conditioner = sum(p.numel() for p in Conditioner(UNetConfig()).parameters())
    assert spatial + conditioner == TOTAL - TEMPORAL


def test_full_size_counts_equal_the_references(reference: Path) -> None:
    counts = json.loads((reference / "full_param_counts.json").read_text())
    assert (counts["total"], counts["temporal"], counts["n_keys"]) == (TOTAL, TEMPORAL, TENSORS)
    assert counts["by_role"] == FULL


def test_every_released_tensor_has_its_place(reference: Path) -> None:
    lines = (reference / "full_state_dict_keys.tsv").read_text().splitlines()
    released = {line.split("\t")[0]: json.loads(line.split("\t")[1]) for line in lines[1:]}
    assert len(released) == TENSORS
    state = {name: torch.empty(shape, device="meta") for name, shape in released.items()}
    converted = from_reference(state, UNetConfig())
    with torch.device("meta"):
        ours = Denoiser(UNetConfig()).state_dict()
    assert {name: tensor.shape for name, tensor in converted.items()} == {n: tensor.shape for n, tensor in ours.items()}
    by_role = dict.fromkeys(FULL, 0)
    for line in lines[1:]:
        name, _, _, numel, their_role, *_ = line.split("\t")
        assert role(name) == their_role, name
        by_role[their_role] += int(numel)
    assert by_role == FULL


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    names = reference_names(CONFIG)
    state = {names[ours]: tensor for ours, tensor in recipe_state(CONFIG, salt=1)}
    state["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"][:, :3]
    state["extra.weight"] = state.pop("out.2.bias")
    with pytest.raises(CheckpointError, match="3 tensors do not fit") as refused:
        from_reference(state, CONFIG)
    for part in ("missing out.2.bias [4]", "extra extra.weight [4]", "input_blocks.0.0.weight is [32, 3, 3, 3]"):
        assert part in str(refused.value)


def test_converted_tensors_are_views() -> None:
    names = reference_names(CONFIG)
    state = {names[ours]: tensor for ours, tensor in recipe_state(CONFIG, salt=1)}
    state["input_blocks.1.0.temopral_conv.conv1.2.weight"] = torch.rand(32, 32, 3, 1, 1)
    converted = from_reference(state, CONFIG)
    assert all(tensor.data_ptr() == state[names[ours]].data_ptr() for ours, tensor in converted.items())
    assert converted["unet.encoder.0.blocks.0.resnet.temporal.convs.0.weight"].shape == (32, 32, 3, 1)


def test_released_configuration_is_the_default() -> None:
    arguments = {"dim": 320, "dim_mult": [1, 2, 4, 4], "attn_scales": [1.0, 0.5, 0.25], "context_embedding_depth": 2}
    assert config_from_reference(arguments) == UNetConfig()
    with pytest.raises(CheckpointError, match="dim='wide'"):
        config_from_reference({**arguments, "dim": "wide"})


@pytest.mark.parametrize(
    "change",
    [{"base_channels": 40}, {"head_dim": 24}, {"attention_levels": (True,)}],
    ids=["norm groups", "heads", "levels"],
)
def test_impossible_configurations_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ManifestError):
        replace(CONFIG, **change)


def test_residual_block_adds_its_temporal_part_to_the_sum(denoiser: Denoiser) -> None:
    block = denoiser.unet.encoder[0].blocks[0].resnet
    assert isinstance(block, ResBlock)
    x, embedding = torch.randn(6, 32, 4, 4), torch.randn(6, 128)
    with torch.no_grad():
        whole, temporal = block(x, embedding, 3), block.temporal
        block.temporal = None
        plain = block(x, embedding, 3)
        block.temporal = temporal
        torch.testing.assert_close(whole, temporal(plain, 3))
