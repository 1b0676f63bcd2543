"""Known frames as a condition: the network's inputs, the frames in the loss, and the random choices of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import TINY
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from higen.api import load
from higen.errors import ManifestError, SettingsError
from higen.export.model_graphs import export_model
from higen.export.weights import stored_tensors
from higen.families.higen import spec
from higen.families.higen import unet as unet_module
from higen.families.higen.network import VelocityPredictor
from higen.families.higen.unet import Known, UNet
from higen.models.solver_step import SolverStep
from higen.tables import Variant
from higen.train.batches import Batch
from higen.train.checkpoints import Checkpoints
from higen.train.draws import draw_known, noisy_known
from higen.train.emoji.clips import Clips, Selection
from higen.train.emoji.configuration import architecture, recipe
from higen.train.emoji.denoiser import make_loop, networks_of
from higen.train.emoji.subjects import SUBJECTS
from higen.train.layers import denoiser_weights, temporal_names, trained_parameters, whole_weights
from higen.train.networks import Networks, Objective, build, write_model
from higen.train.objective import residual_v_loss, v_loss
from higen.train.sections import KNOWN_SETS, ModelSettings, ObjectiveSettings
from higen.train.settings import Settings, read_settings

CONFIG = replace(TINY.unet, prior_preconditioning=True, pooled_context=True, known_frames=True)
B, F, H, W = 2, 5, 4, 4


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=random(seed))


@pytest.fixture(scope="module")
def pair() -> tuple[UNet, UNet]:
    """A network that takes known frames, and the same network without them. Neither has a zero-initialised layer."""
    torch.manual_seed(0)
    whole, plain = UNet(CONFIG).eval(), UNet(replace(CONFIG, known_frames=False)).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = whole.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return whole, plain


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    return {
        "x0": normal(B, CONFIG.in_channels, F, H, W),
        "noise": normal(B, CONFIG.in_channels, F, H, W, seed=1),
        "t": torch.tensor([900, 300]),
        "alpha": torch.tensor([0.3, 0.8]),
        "sigma": torch.tensor([1 - 0.3**2, 1 - 0.8**2]).sqrt(),
        "context": normal(B, CONFIG.context_tokens, CONFIG.context_dim, seed=2),
        "frame_embedding": normal(B, F, CONFIG.embedding_dim, seed=3),
        "prior": normal(B, CONFIG.in_channels, H, W, seed=4),
    }


def mask(*rows: str) -> Tensor:
    return torch.tensor([[float(c) for c in row] for row in rows])


NOTHING = mask("0" * F, "0" * F)
SOME = mask("10001", "11000")


def test_a_clip_of_which_nothing_is_given_is_drawn_as_before(pair: tuple[UNet, UNet], given: dict[str, Tensor]) -> None:
    """Also in a batch with a clip that has given frames."""
    whole, plain = pair
    rest = given["t"], given["context"], given["frame_embedding"], given["prior"]
    with torch.no_grad():
        expected = plain(given["x0"], *rest)
        told = whole(given["x0"], *rest, Known(given["noise"], mask("00000", "00100")))
    torch.testing.assert_close(told[0], expected[0])
    assert (told[1] - expected[1]).abs().max() > 0.01
    with pytest.raises(TypeError, match="no known frames"):
        plain(given["x0"], *rest, Known(given["x0"], SOME))
    assert {"unet.known.weight", "unet.known_out.weight"} <= set(temporal_names(CONFIG))


def test_the_blend_is_linear_between_the_given_frames() -> None:
    """Against numpy's interpolation."""
    latents = normal(1, 3, 9, 2, 2)
    for row in ("100000001", "101010101", "111000000", "000010000", "001000110"):
        given = [i for i, c in enumerate(row) if c == "1"]
        found = Known(latents, mask(row)).blend()
        for channel, y, x in ((0, 0, 1), (2, 1, 0)):
            values = latents[0, channel, :, y, x].numpy()
            expected = np.interp(range(9), given, values[given])
            np.testing.assert_allclose(found[0, channel, :, y, x], expected, atol=1e-6)
    assert not Known(latents, mask("0" * 9)).blend().any()


def test_an_untrained_network_gives_the_blend_at_any_step(given: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    fresh = UNet(CONFIG).eval()
    stage = SolverStep(spec.stages(known_frames=True)[5], VelocityPredictor(fresh).eval())
    assert stage.inputs[-2:] == ("known", "known_mask")
    columns = [given["t"].float(), *(torch.ones(B) for _ in range(3)), given["alpha"], given["sigma"]]
    known = Known(given["x0"], SOME)
    with torch.no_grad():
        _, x0 = stage(
            given["noise"], given["noise"], *columns, given["context"], given["frame_embedding"], given["prior"], *known
        )
    torch.testing.assert_close(x0, known.blend(), atol=1e-5, rtol=1e-5)


def test_the_noise_of_a_given_frame_changes_nothing(pair: tuple[UNet, UNet], given: dict[str, Tensor]) -> None:
    stage = SolverStep(spec.stages(known_frames=True)[5], VelocityPredictor(pair[0]).eval())
    columns = [given["t"].float(), *(torch.ones(B) for _ in range(3)), given["alpha"], given["sigma"]]
    rest = [given["context"], given["frame_embedding"], given["prior"], given["x0"], SOME]
    x = given["noise"]
    other, elsewhere = x.clone(), x.clone()
    other[0, :, 4] += 1
    elsewhere[0, :, 2] += 1
    with torch.no_grad():
        (_, before), (_, same), (_, moved) = (stage(noisy, x, *columns, *rest) for noisy in (x, other, elsewhere))
    torch.testing.assert_close(same, before, atol=1e-5, rtol=1e-5)
    assert (moved[0, :, 1] - before[0, :, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("loss", [v_loss, residual_v_loss])
def test_the_loss_is_that_of_the_frames_to_draw(
    pair: tuple[UNet, UNet], given: dict[str, Tensor], loss: Callable[..., Tensor]
) -> None:
    """The noise of a known frame does not matter. With nothing known, the loss is the plain loss."""
    whole, plain = pair
    other = given["noise"].clone()
    other[0, :, 0] += 1
    other[1, :, 1] -= 1
    elsewhere = given["noise"].clone()
    elsewhere[:, :, 2] += 1
    with torch.no_grad():
        found = loss(whole, **given, known=Known(given["x0"], NOTHING))
        torch.testing.assert_close(found, loss(plain, **given))
        found, same, different = (
            loss(whole, **{**given, "noise": noise}, known=Known(given["x0"], SOME))
            for noise in (given["noise"], other, elsewhere)
        )
    torch.testing.assert_close(found, same)
    assert (found - different).abs().min() > 1e-3


def test_sets_are_drawn_with_the_given_frequencies() -> None:
    settings = ObjectiveSettings(known={"none": 0.5, "ends": 0.25, "second": 0.25})
    drawn = [draw_known(settings, 6, random(seed)).int().tolist() for seed in range(300)]
    assert {tuple(d) for d in drawn} == {(0,) * 6, (1, 0, 0, 0, 0, 1), (1, 0, 1, 0, 1, 0)}
    assert drawn.count([0] * 6) / 300 == pytest.approx(0.5, abs=0.1)
    for name in KNOWN_SETS:
        for frames in (2, 5):
            masks = [draw_known(ObjectiveSettings(known={name: 1.0}), frames, random(seed)) for seed in range(40)]
            assert all(m.shape == (frames,) and not m.all() for m in masks)
            assert name in ("none", "some") or all(m.any() for m in masks)
    lengths = {int(draw_known(ObjectiveSettings(known={"prefix": 1.0}), 4, random(seed)).sum()) for seed in range(60)}
    assert lengths == {1, 2, 3}


def test_given_frames_may_be_noisy() -> None:
    clip = normal(4, 3, 2, 2)
    assert noisy_known(clip, ObjectiveSettings(), random()) is clip
    noise = torch.cat([noisy_known(clip, ObjectiveSettings(known_noise=0.3), random(i)) - clip for i in range(50)])
    assert 0.1 < float(noise.std()) < 0.25


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"known": {"middle": 1.0}}, "known.middle: one of none, first, ends"),
        ({"known": {"first": 0.5}}, "add up to 1"),
        ({"known": {"first": 1.5, "none": -0.5}}, "add up to 1"),
        ({"known_noise": -1.0}, "known_noise"),
    ],
)
def test_wrong_sets_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ObjectiveSettings(**wrong)  # type: ignore[arg-type]


def test_only_an_existing_model_gets_inputs_for_known_frames() -> None:
    with pytest.raises(SettingsError, match="only with init"):
        ModelSettings(architecture="a.toml", companions="m", known_frames=True)


def test_the_recipe_gives_frames_of_clips_at_any_phase_and_trains_on_them(tmp_path: Path) -> None:
    """Each latent is the number of its frame in the loop, so a clip shows its position in the loop."""
    numbers = torch.arange(72.0)[None, :, None, None, None].expand(10, 72, 32, 8, 8) / 72
    save_file({f"latents/{SUBJECTS[0].name}": numbers.half().contiguous()}, tmp_path / "l")
    objective = ObjectiveSettings(
        known={"none": 0.5, "ends": 0.5}, gain_clips=4, windows=(4,), high_part=0.5, clip_levels="high"
    )
    chosen = recipe()
    run = replace(chosen.run, steps=2)
    data = replace(chosen.data, images=2, videos=2)
    chosen = replace(chosen, objective=objective, run=run, data=data)
    config = replace(architecture().unet, channel_multipliers=(1, 1), known_frames=True)
    clips = Clips(tmp_path / "l", config, Selection(subjects=(0,)), chosen)
    starts, keys = {True: set[int](), False: set[int]()}, set[int]()
    for seed in range(12):
        drawn = clips.known(random(seed), 0.1)
        assert drawn.mask is not None
        assert drawn.known is not None
        assert torch.equal(drawn.known, drawn.x0)
        for mask_row, x0, prior in zip(drawn.mask, drawn.x0, drawn.prior, strict=True):
            assert mask_row.tolist() in ([0, 0, 0, 0], [1, 0, 0, 1])
            starts[bool(mask_row.any())].add(round(float(x0[0, 0, 0, 0]) * 72))
            keys.add(round(float(prior[0, 0, 0]) * 72))
    assert keys == {SUBJECTS[0].key_frame}  # the prior is the canonical pose at any phase
    assert len(starts[True]) > 1.3 * len(starts[False])
    loop = make_loop(networks_of(config, 0), clips, Checkpoints(tmp_path / "c", 1))
    assert all(torch.isfinite(value) for value in loop.advance().values())


def test_a_model_that_gets_known_frames_starts_unchanged(tmp_path: Path, preconditioned_model: Path) -> None:
    text = '[model]\ninit = "{}"\nknown_frames = true\n[data]\npath = "clips"\n[run]\noutput = "run"\nsteps = 1\n'
    (tmp_path / "train.toml").write_text(text.format(preconditioned_model.as_posix()), encoding="utf-8")
    networks = build(read_settings(tmp_path / "train.toml"), ())
    before = load_file(preconditioned_model / spec.UNET)
    after = networks.denoiser.state_dict()
    assert {name: after[name].shape for name in after.keys() - before.keys()}.keys() == {
        "unet.known.weight",
        "unet.known_out.weight",
        "unet.known_out.bias",
    }
    assert all(torch.equal(after[name], before[name].float()) for name in before)
    assert not any(after[name].any() for name in after.keys() - before.keys())
    assert networks.own is not None
    manifest = spec.manifest(networks.own)
    assert spec.config(manifest).unet.known_frames
    assert manifest.stage("temporal_unet").input("known_mask").source == "known:mask"
    assert manifest.stage("spatial_unet").inputs == spec.stages()[2].inputs


OWN = """
[model]
init = "{}"
known_frames = true
[data]
path = "clips"
images = 0
[objective]
known = {{ ends = 0.5, prefix = 0.5 }}
[optimiser]
layers = "known"
[run]
output = "run"
steps = 1
"""


def own_settings(folder: Path, model: Path, *changes: tuple[str, str]) -> Settings:
    text = OWN.format(model.as_posix())
    for old, new in changes:
        text = text.replace(old, new)
    (folder / "train.toml").write_text(text, encoding="utf-8")
    return read_settings(folder / "train.toml")


@pytest.fixture
def own_layers(tmp_path: Path, preconditioned_model: Path) -> tuple[Networks, Settings]:
    """A model with layers of its own for known frames, all of them trained by a little, and the settings."""
    settings = own_settings(tmp_path, preconditioned_model)
    networks = build(settings, ())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in networks.denoiser.known.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return networks, settings


def test_layers_of_their_own_begin_as_the_temporal_layers(tmp_path: Path, preconditioned_model: Path) -> None:
    networks = build(own_settings(tmp_path, preconditioned_model), ())
    before, after = load_file(preconditioned_model / spec.UNET), networks.denoiser.state_dict()
    own = {name.removeprefix("known."): tensor for name, tensor in after.items() if name.startswith("known.")}
    assert own.keys() == set(unet_module.temporal_names(replace(networks.config.unet, known_layers=False))) | {
        "known.weight",
        "known_out.weight",
        "known_out.bias",
    }
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(
        not tensor.any() if name.startswith("known") else torch.equal(tensor, after[f"unet.{name}"])
        for name, tensor in own.items()
    )


def test_only_layers_of_their_own_are_trained(own_layers: tuple[Networks, Settings]) -> None:
    networks, settings = own_layers
    objective = Objective(networks, gain_weight=0.1)
    trained = trained_parameters(objective, settings)
    assert {name.split(".")[1] for name in trained} == {"known"}
    c, f = networks.config.unet.in_channels, 4
    batch = Batch(
        normal(2, c, f, 4, 4, seed=1),
        normal(2, c, f, 4, 4, seed=2),
        torch.tensor([900, 500]),
        normal(2, c, 4, 4, seed=3),
        normal(2, f, networks.config.unet.base_channels, seed=4),
        normal(2, f, networks.config.unet.appearance_columns, seed=5),
        torch.zeros(2, networks.config.text.context_length, dtype=torch.int64),
        normal(2, c, f, 4, 4, seed=6),
        torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0]]),
    )
    loss, _, video = objective(None, batch)
    assert float(loss.detach()) == float(video)  # there is no gain to train
    loss.backward()
    gradients = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    assert gradients <= trained.keys()
    assert {"denoiser.known.known.weight", "denoiser.known.prior.weight"} <= gradients


def test_a_model_with_layers_of_their_own_draws_as_one_trained_as_a_whole(
    tmp_path: Path, own_layers: tuple[Networks, Settings]
) -> None:
    """Its steps with known frames are those of a model with the same weights and `known_frames`. Its steps without
    known frames are those of the model before."""
    networks, settings = own_layers
    made = write_model(networks, whole_weights(denoiser_weights(networks), {}, settings), tmp_path / "own")
    assert made.manifest.loops[1].variant == Variant("keyframes", "temporal_unet_known", "temporal_unet_known_plain")
    assert spec.config(made.manifest).unet.known_layers
    weights = load_file(made.file(spec.UNET))
    own = {f"unet.{name.removeprefix('known.')}": t for name, t in weights.items() if name.startswith("known.")}
    whole = replace(networks, own=replace(networks.config, unet=unet_module.with_known_inputs(networks.config.unet)))
    rest = {f"denoiser.{n}": t for n, t in {**weights, **own}.items() if not n.startswith("known.")}
    other = write_model(whole, rest, tmp_path / "whole")
    before = build(own_settings(tmp_path, Path(settings.model.init or "")), ()).companions
    pictures = {0: np.full((32, 32, 3), 200, np.uint8), -1: np.full((32, 32, 3), 90, np.uint8)}
    common = {"frames": 4, "width": 32, "height": 32, "seed": 3, "steps": 2, "progress": False}
    with load(made.path, "torch") as ours, load(other.path, "torch") as theirs, load(before.path, "torch") as earlier:
        told = [pipe("a", keyframes=pictures, **common).frames for pipe in (ours, theirs, earlier)]
        plain = [pipe("a", **common).frames for pipe in (ours, earlier)]
    # Tensors lie at other places in the files, so sums may be rounded in another way.
    assert farthest(told[0], told[1]) <= 1
    assert farthest(told[0], told[2]) > 1
    assert farthest(*plain) <= 1


def farthest(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    return int(np.abs(a.astype(int) - b).max())


def test_a_graph_takes_the_layers_of_their_own(tmp_path: Path, own_layers: tuple[Networks, Settings]) -> None:
    """The gate compares the graph with the network; here the graph's tensors are looked up in the file."""
    networks, settings = own_layers
    made = write_model(networks, whole_weights(denoiser_weights(networks), {}, settings), tmp_path / "own")
    made = export_model(made, ("temporal_unet_known_plain",))
    stored = stored_tensors(made.file(spec.UNET))
    places = {tensor.offset: name for name, tensor in stored.items()}
    graph = ir.load(made.file("temporal_unet_known_plain.onnx")).graph
    used = {places[v.const_value.offset] for v in graph.initializers.values() if hasattr(v.const_value, "offset")}
    assert {name for name in used if name.startswith("known.")} >= {"known.known.weight", "known.known_out.weight"}
    assert not used & {f"unet.{name}" for name in unet_module.temporal_names(networks.config.unet)}
    assert "unet.conv_in.weight" in used


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("images = 0", "images = 1", "optimiser.layers='known': needs data.images = 0"),
        ("known = {{ ends = 0.5, prefix = 0.5 }}", "", "optimiser.layers='known': needs objective.known, and no lora"),
        ("known_frames = true", "", "has no layers of its own for known frames; model.known_frames = true adds them"),
    ],
)
def test_settings_that_do_not_fit_layers_of_their_own_are_refused(
    tmp_path: Path, preconditioned_model: Path, old: str, new: str, said: str
) -> None:
    change = (old.replace("{{", "{").replace("}}", "}"), new)
    with pytest.raises(SettingsError, match=re.escape(said)):
        build(own_settings(tmp_path, preconditioned_model, change), ())


def test_known_frames_of_a_model_with_layers_of_their_own_are_trained_there(
    tmp_path: Path, own_layers: tuple[Networks, Settings]
) -> None:
    networks, settings = own_layers
    made = write_model(networks, whole_weights(denoiser_weights(networks), {}, settings), tmp_path / "own")
    assert build(own_settings(tmp_path, made.path), ()).config.unet.known_layers  # it can be trained further
    usual = ("known_frames = true", ""), ("known = { ends = 0.5, prefix = 0.5 }", ""), ('layers = "known"', "")
    without = build(own_settings(tmp_path, made.path, *usual), ())
    assert without.denoiser.known is None
    assert not without.config.unet.known_layers
    assert "the new model has no layers for known frames" in without.notes[0]
    before = networks.denoiser.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in without.denoiser.state_dict().items())
    usual = ("known_frames = true", ""), ('layers = "known"', "")
    with pytest.raises(SettingsError, match=re.escape("optimiser.layers = 'known' trains them")):
        build(own_settings(tmp_path, made.path, *usual), ())


def test_a_model_has_one_kind_of_layers_for_known_frames() -> None:
    with pytest.raises(ManifestError, match="known_frames, known_layers: at most one of them"):
        replace(CONFIG, known_layers=True)
