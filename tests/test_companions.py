"""The companions against the reference's outputs, and their checkpoints' names against the released key lists."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from higen.errors import CheckpointError, IntegrityError, ManifestError, MissingExtra
from higen.families.higen.checkpoint import kl_config
from higen.models.companion_checkpoints import (
    autoencoder_arguments_from_ldm,
    autoencoder_from_diffusers,
    autoencoder_from_ldm,
    shapes_of,
    text_arguments_from_openclip,
    text_from_openclip,
    text_from_transformers,
)
from higen.models.companions import autoencoder, load_autoencoder, load_text_encoder, text_encoder

State = dict[str, Tensor]
HEADS = 4  # of the reference's tiny tower; shapes do not show the number of heads


def under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def close(given: Tensor, wanted: Tensor) -> None:
    error = (given - wanted).abs().max().item()
    assert error <= 2e-5 * wanted.abs().max().item(), error


@pytest.fixture(scope="module")
def tower_file() -> State:
    return load_file(Path(__file__).parent / "reference" / "companions" / "companions.safetensors")


@pytest.fixture
def tower(tower_file: State) -> State:
    """The reference's tower of three blocks, plus the other tensors of a whole OpenCLIP checkpoint."""
    return {**under(tower_file, "text_w/"), "logit_scale": torch.zeros(()), "visual.proj": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def companions(reference: Path) -> State:
    return load_file(reference / "companions" / "companions.safetensors")


@pytest.fixture
def vae(companions: State) -> State:
    return under(companions, "vae_w/")


def tiny_text_arguments(state: State) -> dict[str, Any]:
    return {**text_arguments_from_openclip(state), "num_attention_heads": HEADS}


def test_text_encoder_gives_the_penultimate_tokens_of_the_reference(
    tower_file: State, tower: State, tmp_path: Path
) -> None:
    path = tmp_path / "text.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in text_from_openclip(tower).items()}, path)
    encoder = load_text_encoder(path, tiny_text_arguments(tower))
    with torch.inference_mode():
        hidden = encoder(input_ids=tower_file["text/tokens"]).last_hidden_state
    close(hidden, tower_file["text/penultimate_tokens"])
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_last_block_is_read_where_it_should_not_be(companions: State) -> None:
    """The comparison is strict enough to distinguish the penultimate tokens from the last ones."""
    last, penultimate = companions["text/last_tokens"], companions["text/penultimate_tokens"]
    with pytest.raises(AssertionError):
        close(last, penultimate)


def test_autoencoder_gives_the_moments_and_pixels_of_the_reference(
    companions: State, vae: State, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    arguments = autoencoder_arguments_from_ldm(vae)
    save_file({name: tensor.contiguous() for name, tensor in autoencoder_from_ldm(vae).items()}, path)
    network = load_autoencoder(path, "AutoencoderKL", arguments)
    with torch.inference_mode():
        moments = network.encode(companions["vae/img"], return_dict=False)[0].parameters
        pixels = network.decode(companions["vae/z"], return_dict=False)[0]
    close(moments, companions["vae/moments"])
    close(pixels, companions["vae/dec"])
    config = kl_config(arguments)
    assert (config.factor, config.scale, config.shift) == (4, (0.18215,), (0.0,))


def released(reference: Path, name: str) -> State:
    lines = (reference / name).read_text(encoding="utf-8").splitlines()
    return {
        key: torch.empty([int(n) for n in shape.strip("[]").split(",") if n], device="meta")
        for key, shape, _ in (line.split("\t") for line in lines)
    }


@pytest.mark.parametrize("prefix", ["", "cond_stage_model.model."])
def test_every_tensor_of_the_released_text_tower_has_its_place(reference: Path, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in released(reference, "full_openclip_vith14_keys.tsv").items()}
    if prefix:
        state["model.diffusion_model.out.0.weight"] = torch.empty(320, device="meta")
    clip = text_arguments_from_openclip(state)
    assert clip["num_hidden_layers"] == 23
    assert clip["num_attention_heads"] == 16
    assert (clip["bos_token_id"], clip["eos_token_id"], clip["max_position_embeddings"]) == (49406, 49407, 77)
    converted = text_from_openclip(state)
    assert {name: tuple(t.shape) for name, t in converted.items()} == dict(shapes_of(lambda: text_encoder(clip)))
    # open_clip's tower of 24 blocks without its projection has 352,984,064 parameters, and one block has 12,596,224.
    assert sum(tensor.numel() for tensor in converted.values()) == 352_984_064 - 12_596_224


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_every_tensor_of_the_released_autoencoder_has_its_place(reference: Path, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in released(reference, "full_vae_keys.tsv").items()}
    arguments = autoencoder_arguments_from_ldm(state)
    assert arguments["block_out_channels"] == [128, 256, 512, 512]
    assert (arguments["layers_per_block"], kl_config(arguments).factor) == (2, 8)
    converted = autoencoder_from_ldm(state)
    wanted = shapes_of(lambda: autoencoder("AutoencoderKL", arguments))
    assert {name: tuple(t.shape) for name, t in converted.items()} == dict(wanted)
    assert sum(tensor.numel() for tensor in converted.values()) == 83_653_863


def change(state: State, missing: str, misshaped: str) -> State:
    changed = {name: tensor for name, tensor in state.items() if name != missing}
    return {**changed, misshaped: torch.zeros(3, 5), "surplus": torch.zeros(2)}


def test_a_text_tower_that_does_not_fit_is_listed(tower: State) -> None:
    missing, misshaped = "transformer.resblocks.0.ln_2.bias", "transformer.resblocks.2.mlp.c_proj.bias"
    with pytest.raises(CheckpointError) as caught:
        text_from_openclip(change(tower, missing, misshaped))
    for line in (f"missing {missing} [64]", "extra surplus [2]", f"{misshaped} is [3, 5], wanted [64]"):
        assert line in str(caught.value)


def test_an_autoencoder_that_does_not_fit_is_listed(vae: State) -> None:
    missing, misshaped = "decoder.up.1.block.1.conv2.weight", "encoder.mid.attn_1.q.weight"
    with pytest.raises(CheckpointError) as caught:
        autoencoder_from_ldm(change(vae, missing, misshaped))
    for line in (
        f"missing {missing} [64, 64, 3, 3]",
        "extra surplus [2]",
        f"{misshaped} is [3, 5], wanted [64, 64, 1, 1]",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize("convert", [text_from_openclip, autoencoder_from_ldm])
@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(3)}, {"token_embedding.weight": torch.zeros(3)}])
def test_something_else_is_refused(convert: Callable[[State], State], state: State) -> None:
    with pytest.raises(CheckpointError, match=r"not an? "):
        convert(state)


def test_older_names_of_diffusers_and_transformers(vae: State, tower: State) -> None:
    today = autoencoder_from_ldm(vae)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(name: str) -> str:
        for new, old in names.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        return name

    assert autoencoder_from_diffusers({older(name): tensor for name, tensor in today.items()}).keys() == today.keys()
    assert autoencoder_from_diffusers(today).keys() == today.keys()
    text = text_from_openclip(tower)
    nested = {f"text_model.{name}": tensor for name, tensor in text.items()}
    nested["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    assert text_from_transformers(nested).keys() == text.keys()


TINY = {"block_out_channels": [32], "layers_per_block": 1}


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    save_file(autoencoder("AutoencoderKL", TINY).state_dict(), tmp_path / "vae.safetensors")
    return tmp_path / "vae.safetensors"


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_loading_casts(tiny_file: Path, dtype: torch.dtype | None) -> None:
    loaded = load_autoencoder(tiny_file, "AutoencoderKL", TINY, dtype)
    stored = load_file(tiny_file)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (dtype or torch.float32)
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name


def test_a_file_that_does_not_fit_the_manifest_is_listed(tiny_file: Path) -> None:
    save_file(change(load_file(tiny_file), "quant_conv.bias", "decoder.conv_in.weight"), tiny_file)
    with pytest.raises(IntegrityError) as caught:
        load_autoencoder(tiny_file, "AutoencoderKL", TINY)
    for line in ("3 tensors", "missing quant_conv.bias [8]", "extra surplus [2]", "decoder.conv_in.weight is [3, 5]"):
        assert line in str(caught.value)


def test_a_damaged_file_is_refused(tiny_file: Path) -> None:
    tiny_file.write_bytes(tiny_file.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="cannot be read as safetensors"):
        load_autoencoder(tiny_file, "AutoencoderKL", TINY)
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_text_encoder(tiny_file.with_name("none"), {})


def test_wrong_configurations_are_the_manifests_fault() -> None:
    with pytest.raises(ManifestError, match=r"kind='Linear': one of AutoencoderKL, AutoencoderDC"):
        autoencoder("Linear", {})
    with pytest.raises(ManifestError, match="diffusers refuses it"):
        autoencoder("AutoencoderKL", {"block_out_channels": [33]})
    with pytest.raises(ManifestError, match="transformers refuses it"), torch.device("meta"):
        text_encoder({"hidden_size": 10, "num_attention_heads": 3})


def test_nothing_is_left_on_the_meta_device(tower: State, tmp_path: Path) -> None:
    arguments = tiny_text_arguments(tower)
    torch.manual_seed(0)
    fresh = text_encoder(arguments)
    save_file(fresh.state_dict(), tmp_path / "text.safetensors")
    loaded = load_text_encoder(tmp_path / "text.safetensors", arguments)
    buffers = dict(fresh.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), fresh.parameters(), strict=True))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        MissingExtra, match=r"the autoencoder needs the package 'diffusers': pip install 'higen\[torch\]'"
    ):
        autoencoder("AutoencoderKL", TINY)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match="transformers"):
        text_encoder({})


def test_building_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("transformers").level
    text_encoder({"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1})
    autoencoder("AutoencoderKL", {"block_out_channels": [32]})
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == level
