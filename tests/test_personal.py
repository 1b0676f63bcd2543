"""A personalised Stable Diffusion 2.1 in HiGen's spatial layers, checked tensor by tensor against closed forms."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from click.testing import CliRunner
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert import UNET, denoiser_state, ldm_state, text_state
from test_lora import adapted, of_peft

from higen.bundle import Bundle
from higen.cli import main
from higen.convert import convert_sources
from higen.errors import CheckpointError
from higen.families.higen.personal import diffusers_names, with_difference, with_loras
from higen.families.higen.reference_names import from_reference
from higen.families.higen.spec import UNetConfig
from higen.families.higen.unet import UNet
from higen.families.stable_diffusion.ldm_names import PREFIX, ldm_name
from higen.models.lora import Lora
from higen.models.weights import let_go, unmade

State = dict[str, torch.Tensor]

ARGUMENTS: dict[str, Any] = {
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 32,
}
"""Arguments of a U-Net like the tiny HiGen's spatial layers, with heads of 64 channels as in version 2.1."""


def pipeline(seed: int, prediction: str = "v_prediction", **changes: Any) -> Any:
    unet = tiny.randomised(tiny.image_unet(**{**ARGUMENTS, **changes}), seed)
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = tiny.scheduler("DDIMScheduler", prediction_type=prediction, **settings)
    return tiny.image_pipeline(scheduler, unet)


def ldm(unet: Any) -> State:
    """A U-Net under the names of a single file, without their prefix."""
    attends = [kind.startswith("Cross") for kind in unet.config.up_block_types]
    return {ldm_name(name, 1, attends): tensor for name, tensor in unet.state_dict().items()}


def vgen_name(theirs: str) -> str:
    """The name in HiGen's own files of a single file's tensor. HiGen's temporal layers change the numbers."""
    renamed = re.sub(r"^middle_block\.2\.", "middle_block.3.", theirs)
    renamed = re.sub(r"^(input_blocks\.\d+)\.0\.op\.", r"\1.op.", renamed)
    return re.sub(r"^(output_blocks\.\d+)\.2\.conv\.", r"\1.3.conv.", renamed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with HiGen's three files and the models that are added to them."""
    folder = tmp_path_factory.mktemp("sources")
    torch.save(denoiser_state(), folder / "higen.pth")
    torch.save(text_state(), folder / "text.bin")
    torch.save({"state_dict": {f"first_stage_model.{n}": t for n, t in ldm_state().items()}}, folder / "vae.ckpt")
    for name, seed in (("base", 11), ("fine", 12)):
        unet = pipeline(seed).unet
        tiny.save(pipeline(seed), folder / name)
        save_file({PREFIX + n: t.contiguous() for n, t in ldm(unet).items()}, folder / f"{name}.safetensors")
    tiny.save(pipeline(13, "epsilon"), folder / "epsilon")
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Bundle:
    return made(folder, folder / "plain")


def made(folder: Path, output: Path, **options: Any) -> Bundle:
    sources = [folder / name for name in ("higen.pth", "text.bin", "vae.ckpt")]
    return convert_sources(sources, output, dtype="fp32", **options)


def denoiser(bundle: Bundle) -> State:
    return load_file(bundle.path / "unet.safetensors")


def expected(difference: State) -> State:
    """HiGen's denoiser plus a difference under a single file's names."""
    state = denoiser_state()
    for name, tensor in difference.items():
        theirs = vgen_name(name)
        assert state[theirs].numel() == tensor.numel()
        state[theirs] = state[theirs] + tensor.reshape(state[theirs].shape)
    return from_reference(state, UNET)


@pytest.mark.parametrize("form", ["folder", "file", "mixed"])
def test_the_difference_is_added(folder: Path, plain: Bundle, tmp_path: Path, form: str) -> None:
    fine, base = pipeline(12).unet, pipeline(11).unet
    # diffusers reads the names of the test's single files.
    assert convert_ldm_unet_checkpoint({PREFIX + n: t for n, t in ldm(fine).items()}, dict(fine.config)).keys() == (
        fine.state_dict().keys()
    )
    notes: list[str] = []
    options: dict[str, Any] = {
        "spatial": folder / ("fine" if form == "folder" else "fine.safetensors"),
        "base": folder / ("base.safetensors" if form == "file" else "base"),
        "prediction": None if form == "folder" else "v",
    }
    got = made(folder, tmp_path / "model", on_note=notes.append, **options)
    state, truth = denoiser(got), expected({name: t - ldm(base)[name] for name, t in ldm(fine).items()})
    untouched = denoiser(plain)
    assert state.keys() == truth.keys() == untouched.keys()
    assert all(torch.allclose(state[name], truth[name], rtol=0, atol=1e-6) for name in truth)
    changed = {name for name in state if not torch.equal(state[name], untouched[name])}
    assert changed == diffusers_names(UNET).keys()
    for name in ("text_encoder.safetensors", "vae.safetensors"):
        assert (got.path / name).read_bytes() == (plain.path / name).read_bytes()
    said = "\n".join(notes)
    count = len(fine.state_dict())
    assert f"{count} of {count} spatial tensors changed: " in said
    assert "encoder.0 " in said
    assert "quality of what it draws was not verified" in said
    assert options["spatial"].name in got.manifest.licence


def test_the_changed_tensors_are_reported(folder: Path, plain: Bundle, tmp_path: Path) -> None:
    state = load_file(folder / "base.safetensors")
    state[f"{PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight"] += 1
    state[f"{PREFIX}out.2.bias"] += 1
    save_file(state, tmp_path / "style.safetensors")
    notes: list[str] = []
    options: dict[str, Any] = {"spatial": tmp_path / "style.safetensors", "base": folder / "base", "prediction": "v"}
    got, before = denoiser(made(folder, tmp_path / "model", on_note=notes.append, **options)), denoiser(plain)
    names = {"unet.conv_out.bias", "unet.middle.spatial.block.attention2.key.weight"}
    assert {name for name in got if not torch.equal(got[name], before[name])} == names
    assert any("spatial tensors changed: middle 1, conv_out 1" in note for note in notes)


def test_names_are_those_of_the_same_network() -> None:
    """HiGen's spatial network with Stable Diffusion's tensors computes what diffusers' U-Net does."""
    theirs = pipeline(11).unet
    spatial, names = UNet(UNET, temporal=False).eval(), diffusers_names(UNET)
    assert sorted(names.values()) == sorted(theirs.state_dict())
    state = {name: torch.zeros_like(tensor) for name, tensor in spatial.state_dict().items()}
    given = theirs.state_dict()
    spatial.load_state_dict({name: given[names[f"unet.{name}"]] if f"unet.{name}" in names else t
                             for name, t in state.items()})  # fmt: skip
    random = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=random) for shape in ((2, 4, 1, 8, 6), (2, 3, 32)))
    t = torch.tensor([900.0, 3.0])
    with torch.inference_mode():
        ours = spatial(x, t, context, torch.zeros(2, 1, UNET.embedding_dim))[:, :, 0]
        wanted = theirs(x[:, :, 0], t, encoder_hidden_states=context).sample
    assert (ours - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_names_and_shapes_of_the_released_size() -> None:
    """Stable Diffusion 2.1's U-Net has 686 tensors, and each has its place in HiGen."""
    import diffusers

    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ).state_dict()
        ours = UNet(UNetConfig(), temporal=False).state_dict()
    names = diffusers_names(UNetConfig())
    assert len(names) == 686
    assert {names[f"unet.{name}"]: t.shape for name, t in ours.items() if f"unet.{name}" in names} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


# LoRA.


@pytest.fixture(scope="module")
def adapter(folder: Path) -> tuple[Path, State]:
    """An adapter for a U-Net shaped like version 2.1, and the difference that PEFT computes at scale 0.5."""
    unet = pipeline(11).unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    factors = adapted(unet, ["to_q", "to_v", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut"], 3)
    state = {f"unet.{name}": t.contiguous() for name, t in factors.items()}
    state["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)
    state["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(32, 4)
    save_file(state, folder / "style.safetensors")
    after = of_peft(unet, 0.5 * 4 / 6)  # PEFT's alpha is 6; the file has no alpha, so it is the rank, 4
    return folder / "style.safetensors", {name: after[name] - before[name] for name in before}


def test_a_lora_is_added(folder: Path, plain: Bundle, adapter: tuple[Path, State], tmp_path: Path) -> None:
    file, difference = adapter
    notes: list[str] = []
    got = made(folder, tmp_path / "model", on_note=notes.append, loras=[Lora(file, 0.5)])
    unet = pipeline(11).unet
    attends = [kind.startswith("Cross") for kind in unet.config.up_block_types]
    truth = expected({ldm_name(name, 1, attends): tensor for name, tensor in difference.items()})
    state = denoiser(got)
    assert all(torch.allclose(state[name], truth[name], rtol=0, atol=2e-6) for name in truth)
    said = "\n".join(notes)
    assert "not used: text_encoder.text_model" in said
    changed = sum(bool(tensor.count_nonzero()) for tensor in difference.values())
    assert f"adapters: {changed} of {len(difference)} spatial tensors changed" in said
    assert "not verified" in said


def test_both_on_the_command_line(folder: Path, adapter: tuple[Path, State], tmp_path: Path) -> None:
    both = made(
        folder, tmp_path / "model", spatial=folder / "fine", base=folder / "base", loras=[Lora(adapter[0], 0.5)]
    )
    files = [folder / name for name in ("higen.pth", "text.bin", "vae.ckpt")]
    flags = ["--spatial", folder / "fine", "--base", folder / "base", "--lora", f"{adapter[0]}:0.5", "--dtype", "fp32"]
    result = CliRunner().invoke(main, ["convert", *map(str, [*files, tmp_path / "other", *flags])])
    assert result.exit_code == 0, result.output
    assert "quality of what it draws was not verified" in result.output
    one, other = denoiser(both), load_file(tmp_path / "other" / "unet.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


# Bad input.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"spatial": "epsilon", "base": "base"}, r"epsilon: it predicts epsilon: HiGen predicts v"),
        ({"spatial": "fine", "base": "epsilon"}, r"epsilon: it predicts epsilon"),
        ({"spatial": "fine.safetensors", "base": "base"}, r"fine\.safetensors: a single file .* --prediction v"),
        ({"spatial": "fine.safetensors", "base": "base", "prediction": "epsilon"}, r"it predicts epsilon"),
        ({"spatial": "fine", "base": "base", "prediction": "epsilon"}, r"its scheduler says 'v'"),
        ({"spatial": "fine"}, r"--base BASE: give both"),
        ({"base": "fine"}, r"--base BASE: give both"),
        ({"prediction": "v"}, r"prediction='v'"),
        ({"spatial": "base", "base": "base"}, r"changes nothing"),
        ({"spatial": "none.ckpt", "base": "base"}, r"none\.ckpt: no such file"),
        ({"spatial": "vae.ckpt", "base": "base"}, r"vae\.ckpt: not a Stable Diffusion U-Net"),
    ],
    ids=str,
)
def test_what_is_refused(folder: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    given = {name: value if name == "prediction" else folder / value for name, value in options.items()}
    with pytest.raises(CheckpointError, match=said):
        made(folder, tmp_path / "model", **given)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cross_attention_dim": 48}, "do not fit"),
        ({"use_linear_projection": False}, "do not fit"),
        ({"block_out_channels": (64, 64)}, "do not fit"),
        ({"layers_per_block": 2}, "do not fit"),
        ({"in_channels": 9}, "inpainting"),
    ],
    ids=str,
)
def test_other_models_are_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    tiny.save(pipeline(1, **changes), tmp_path / "other")
    with pytest.raises(CheckpointError, match=said) as error:
        made(folder, tmp_path / "model", spatial=tmp_path / "other", base=folder / "base")
    assert str(tmp_path / "other") in str(error.value)
    assert not (tmp_path / "model").exists()


def test_weights_that_are_not_numbers(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "fine", tmp_path / "fine")
    file = next((tmp_path / "fine" / "unet").glob("*.safetensors"))
    state = load_file(file)
    state["conv_in.bias"][0] = float("nan")
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"fine: conv_in\.bias"):
        made(folder, tmp_path / "model", spatial=tmp_path / "fine", base=folder / "base")
    assert not (tmp_path / "model").exists()


def test_an_adapter_of_a_model_that_predicts_epsilon(folder: Path, adapter: tuple[Path, State], tmp_path: Path) -> None:
    save_file(load_file(adapter[0]), tmp_path / "lora.safetensors", {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: an adapter of a model that predicts epsilon"):
        made(folder, tmp_path / "model", loras=[Lora(tmp_path / "lora.safetensors")])
    with pytest.raises(CheckpointError, match="predicts epsilon"):
        made(folder, tmp_path / "model", loras=[Lora(adapter[0])], prediction="epsilon")


def test_sums_are_made_where_they_are_written(folder: Path, tmp_path: Path) -> None:
    """Memory holds no second copy of the network, because each tensor is made again at every access."""
    held = from_reference(denoiser_state(), UNET)
    options = {"finetune": folder / "fine.safetensors", "base": folder / "base.safetensors", "prediction": "v"}
    state = with_difference(held, UNET, notes=[], **options)
    lora = tmp_path / "style.safetensors"
    save_file(adapted(pipeline(11).unet, ["to_q"], 1), lora)
    state = with_loras(state, UNET, [Lora(lora, 0.5)], "v", [])
    assert all(unmade(state)[name] is tensor for name, tensor in held.items())
    name = "unet.middle.spatial.block.attention2.query.weight"
    made = state[name]
    assert made is not state[name]
    assert made.equal(state[name])
    fine, base = (load_file(folder / f"{which}.safetensors") for which in ("fine", "base"))
    theirs = f"{PREFIX}middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    assert not made.allclose(held[name] + fine[theirs] - base[theirs])  # it also includes the adapter


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone is told")
def test_what_was_read_leaves_memory_and_keeps_its_values(tmp_path: Path) -> None:
    """The pages of a mapped file are released; other memory stays."""
    values = torch.arange(2**22, dtype=torch.float32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        mapped = file.get_tensor("a")
    for tensor in (mapped, mapped[3:1001], torch.ones(3), values):
        let_go(tensor)
    assert mapped.equal(values)
    assert values[-1] == 2**22 - 1
