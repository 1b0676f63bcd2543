"""Conversion of released checkpoints: the numbers stay the same, and a failed conversion leaves nothing behind."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import types
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import full_disk
from safetensors.torch import load_file, save_file
from torch import Tensor

from higen.bundle import Bundle
from higen.convert import convert, convert_sources, read_state, write_safetensors
from higen.errors import CheckpointError, ModelError, OutputError, UnknownFamily
from higen.families.higen import checkpoint, spec
from higen.families.higen.reference_names import from_reference, reference_names
from higen.families.higen.spec import AutoencoderConfig, TextConfig, UNetConfig
from higen.families.higen.unet import Denoiser
from higen.models.companion_checkpoints import autoencoder_from_ldm, text_from_openclip
from higen.models.companions import autoencoder, load_autoencoder, load_text_encoder
from higen.tokenizer import PromptTokenizer, build_clip_tokenizer

State = dict[str, Tensor]

UNET = UNetConfig(
    base_channels=64,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    attention_levels=(True, False),
    first_temporal_heads=2,
    text_dim=32,
    context_dim=32,
    context_tokens=3,
    context_depth=1,
)
TEXT_WIDTH = 32


def filled(shapes: Mapping[str, tuple[int, ...]]) -> State:
    """Small random weights that depend only on their names."""

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        values = np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape) - 0.5
        return torch.as_tensor(values, dtype=torch.float32) * 0.2

    return {name: tensor(name, shape) for name, shape in shapes.items()}


def denoiser_state(config: UNetConfig = UNET) -> State:
    """Weights with the reference's names and shapes, including kernel axes of length 1."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Denoiser(config).state_dict().items()}

    def theirs(ours: str, name: str) -> tuple[int, ...]:
        temporal_linear = ".proj_" in ours and "temporal" in ours and name.endswith("weight")
        temporal_conv = "temopral_conv" in name and len(shapes[ours]) == 4
        return shapes[ours] + (1,) * (temporal_linear or temporal_conv)

    return filled({name: theirs(ours, name) for ours, name in reference_names(config).items()})


def text_state(width: int = TEXT_WIDTH, blocks: int = 3) -> State:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
        "visual.proj": (width, width),
        "logit_scale": (),
    }
    sizes = {"ln_1": (width,), "ln_2": (width,), "attn.out_proj": (width, width)}
    sizes |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    for i in range(blocks):
        block = f"transformer.resblocks.{i}"
        for name, shape in sizes.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
    return filled(shapes)


def ldm_state() -> State:
    """The smallest latent-diffusion autoencoder: two levels of 32 channels, one block each."""
    width, z = 32, 4
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name: str) -> None:
        for i in (1, 2):
            add(f"{name}.norm{i}", width)
            add(f"{name}.conv{i}", width, width, 3, 3)

    for side, blocks, samples in (("encoder.down", 1, "1.downsample"), ("decoder.up", 2, "1.upsample")):
        for level in range(2):
            for i in range(blocks):
                block(f"{side}.{level}.block.{i}")
        sampled = 0 if side == "encoder.down" else 1
        add(f"{side}.{sampled}.{samples[2:]}.conv", width, width, 3, 3)
    for side, channels_in, channels_out in (("encoder", 3, 2 * z), ("decoder", z, 3)):
        add(f"{side}.conv_in", width, channels_in, 3, 3)
        block(f"{side}.mid.block_1")
        block(f"{side}.mid.block_2")
        add(f"{side}.mid.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{side}.mid.attn_1.{part}", width, width, 1, 1)
        add(f"{side}.norm_out", width)
        add(f"{side}.conv_out", channels_out, width, 3, 3)
    add("quant_conv", 2 * z, 2 * z, 1, 1)
    add("post_quant_conv", z, z, 1, 1)
    return filled(shapes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    torch.save({"state_dict": denoiser_state(), "step": 725000}, folder / "higen.pth")
    torch.save(text_state(), folder / "open_clip.bin")
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in ldm_state().items()}
    torch.save({"state_dict": {**prefixed, "model.diffusion_model.out.0.bias": torch.zeros(3)}}, folder / "sd.ckpt")
    return folder


def make(sources: Path, output: Path, **changed: Any) -> Bundle:
    parts = {"denoiser": sources / "higen.pth", "text": sources / "open_clip.bin", "autoencoder": sources / "sd.ckpt"}
    parts |= {name: changed.pop(name) for name in list(changed) if name in parts}
    return convert(parts["denoiser"], parts["text"], parts["autoencoder"], output, **changed)


def loaded_denoiser(bundle: Bundle) -> Denoiser:
    denoiser = Denoiser(spec.config(bundle.manifest).unet)
    denoiser.load_state_dict(load_file(bundle.file("unet.safetensors")))
    return denoiser.eval()


def outputs(denoiser: Denoiser) -> tuple[Tensor, ...]:
    config, generator = denoiser.config, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.inference_mode():
        hidden, motion = normal(1, 5, config.text_dim), normal(1, 3, config.base_channels)
        context, embedding = denoiser.conditioner(hidden, motion, normal(1, 3, config.appearance_columns))
        v = denoiser.unet(normal(1, 4, 3, 8, 8), torch.tensor([500]), context, embedding, normal(1, 4, 8, 8))
    return context, embedding, v


def test_a_converted_model_is_whole(sources: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    bundle = make(sources, tmp_path / "model", dtype="fp32", progress=lambda *report: seen.append(report))
    bundle = Bundle.open(bundle.path)
    assert sorted(bundle.files) == ["text_encoder.safetensors", "tokenizer.json", "unet.safetensors", "vae.safetensors"]
    assert spec.config(bundle.manifest).unet == UNET
    assert bundle.manifest.name == "higen"
    assert seen[-1][0] == "vae.safetensors"
    assert seen[-1][1] == seen[-1][2] == sum(tensor_bytes(bundle.path / name) for name in bundle.files)
    tokenizer = PromptTokenizer.from_file(bundle.file("tokenizer.json"), bundle.manifest.text)
    assert tokenizer.encode(["a dog"])[0, :4].tolist() == [49406, 320, 1929, 49407]
    encoder = load_text_encoder(bundle.file("text_encoder.safetensors"), spec.text_config(bundle.manifest).clip)
    assert encoder(input_ids=torch.zeros(1, 77, dtype=torch.int64)).last_hidden_state.shape == (1, 77, TEXT_WIDTH)
    wanted = text_from_openclip(text_state())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in encoder.state_dict().items())
    vae_config = spec.autoencoder_config(bundle.manifest)
    vae = load_autoencoder(bundle.file("vae.safetensors"), vae_config.kind, vae_config.arguments)
    wanted = autoencoder_from_ldm(ldm_state())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in vae.state_dict().items())


def tensor_bytes(path: Path) -> int:
    if path.suffix != ".safetensors":
        return 0
    return sum(tensor.numel() * tensor.itemsize for tensor in load_file(path).values())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_weights_of_the_reference_give_identical_outputs(
    reference: Path, sources: Path, tmp_path: Path, suffix: str
) -> None:
    state = load_file(reference / "fixtures" / "p1.weights.safetensors")
    kwargs = json.loads((reference / "fixtures" / "fixtures.json").read_text(encoding="utf-8"))["models"]["p1"][
        "kwargs"
    ]
    source = tmp_path / f"p1{suffix}"
    torch.save({"state_dict": state}, source) if suffix == ".pth" else save_file(state, source)
    torch.save(text_state(width=40), tmp_path / "text.bin")
    bundle = make(
        sources,
        tmp_path / "model",
        denoiser=source,
        text=tmp_path / "text.bin",
        dtype="fp32",
        arguments=kwargs if suffix == ".pth" else {"head_dim": 16},
    )
    config = spec.unet_config(bundle.manifest)
    assert (config.head_dim, config.first_temporal_heads) == (16, 3)
    direct = Denoiser(config).eval()
    direct.load_state_dict(from_reference(state, config))
    converted = loaded_denoiser(bundle)
    assert all(torch.equal(a, b) for a, b in zip(outputs(converted), outputs(direct), strict=True))


@pytest.mark.parametrize(("dtype", "wanted"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_precisions(sources: Path, tmp_path: Path, dtype: str, wanted: torch.dtype) -> None:
    bundle = make(sources, tmp_path / "model", dtype=dtype)
    source = from_reference(denoiser_state(), UNET)
    for name, tensor in load_file(bundle.path / "unet.safetensors").items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, source[name].to(wanted)), name
    with pytest.raises(OutputError, match="dtype='fp8': one of 'fp16', 'bf16', 'fp32'"):
        make(sources, tmp_path / "other", dtype="fp8")


def released_shapes(reference: Path) -> State:
    lines = (reference / "full_state_dict_keys.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return {row[0]: torch.empty(json.loads(row[1]), device="meta") for row in rows}


def test_the_released_denoiser_is_recognised(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "read_state", lambda path, *_: released_shapes(reference))
    config, state = checkpoint._denoiser(Path("higen.pth"), {})
    assert config == UNetConfig()
    assert sum(tensor.numel() for tensor in state.values()) == 1_483_201_924


# Faulty sources, which leave nothing behind.


def change(state: State, missing: str, misshaped: str) -> State:
    changed = {name: tensor for name, tensor in state.items() if name != missing}
    return {**changed, misshaped: torch.zeros(3, 5), "surplus": torch.zeros(2)}


def refused(sources: Path, folder: Path, match: str, **changed: Any) -> str:
    """Convert, expecting a CheckpointError and no trace of an output; returns the message."""
    target = folder / "made"
    target.mkdir()
    with pytest.raises(CheckpointError, match=match) as caught:
        make(sources, target / "model", **changed)
    assert list(target.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "missing", "misshaped"),
    [
        ("denoiser", "out.0.bias", "middle_block.1.norm.bias"),
        ("denoiser", "input_blocks.1.1.norm.bias", "output_blocks.0.0.skip_connection.bias"),
        ("text", "ln_final.bias", "transformer.resblocks.1.ln_1.bias"),
        ("autoencoder", "quant_conv.bias", "decoder.conv_out.bias"),
    ],
)
def test_what_does_not_fit_is_listed(sources: Path, tmp_path: Path, part: str, missing: str, misshaped: str) -> None:
    state = {"denoiser": denoiser_state, "text": text_state, "autoencoder": ldm_state}[part]()
    source = tmp_path / "changed.safetensors"
    save_file(change(state, missing, misshaped), source)
    message = refused(sources, tmp_path, "3 tensors", **{part: source})
    assert message.startswith(str(source))
    for line in (f"missing {missing}", "extra surplus [2]", f"{misshaped} is [3, 5]"):
        assert line in message


@pytest.mark.parametrize(
    "missing", ["time_embed.0.weight", "input_blocks.0.1.proj_in.weight", "context_embedding.tokens"]
)
def test_a_tensor_that_tells_the_size_is_named_too(sources: Path, tmp_path: Path, missing: str) -> None:
    torch.save({n: t for n, t in denoiser_state().items() if n != missing}, tmp_path / "cut.pth")
    refused(sources, tmp_path, f"missing {missing}", denoiser=tmp_path / "cut.pth")


def test_an_unknown_head_size_is_asked_for(sources: Path, tmp_path: Path) -> None:
    torch.save({**denoiser_state(), "input_blocks.0.1.proj_in.weight": torch.zeros(48, 64)}, tmp_path / "odd.pth")
    refused(sources, tmp_path, r"head_dim=64 does not divide.*arguments=\{'head_dim'", denoiser=tmp_path / "odd.pth")


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(sources: Path, tmp_path: Path, legacy: bool) -> None:
    mark, source = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"state_dict": denoiser_state(), "hook": Malicious(mark)}
    torch.save(content, source, _use_new_zipfile_serialization=not legacy)
    message = refused(sources, tmp_path, "refused, because it holds more than tensors", denoiser=source)
    assert "safetensors" in message
    assert not mark.exists()


def test_a_bare_pickle_is_refused(sources: Path, tmp_path: Path) -> None:
    mark, source = tmp_path / "executed", tmp_path / "evil.bin"
    source.write_bytes(pickle.dumps(Malicious(mark)))
    refused(sources, tmp_path, "refused|cannot be read", text=source)
    assert not mark.exists()


def test_training_leftovers_of_stable_diffusion_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints name a pytorch_lightning class. The class is neither needed nor imported."""
    path = "pytorch_lightning.callbacks.model_checkpoint"
    checkpoint = type("ModelCheckpoint", (), {"__module__": path})
    with monkeypatch.context() as patched:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", path):
            patched.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[path])["ModelCheckpoint"] = checkpoint
        torch.save({"callbacks": {checkpoint: {"best": checkpoint()}}, "state_dict": ldm_state()}, tmp_path / "sd.ckpt")
    assert read_state(tmp_path / "sd.ckpt").keys() == ldm_state().keys()
    assert path not in sys.modules


def test_legacy_files_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / "old.pt")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.zip", "missing.pth", "empty.bin", "list.pt"])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "list.pt":
        torch.save([torch.zeros(2)], path)
    elif name != "missing.pth":
        path.write_bytes(b"" if name == "empty.bin" else b"PK\x03\x04 this is no checkpoint")
    with pytest.raises(CheckpointError, match=name):
        read_state(path)


@pytest.mark.parametrize(("value", "match"), [(float("nan"), "damaged"), (1e30, "too great for fp16"), (None, "type")])
def test_weights_must_be_finite(sources: Path, tmp_path: Path, value: float | None, match: str) -> None:
    state = ldm_state()
    bias = torch.zeros(3)
    bias[1] = value or 0.0
    state["decoder.conv_out.bias"] = bias if value else bias.long()
    save_file(state, tmp_path / "vae.safetensors")
    message = refused(sources, tmp_path, match, autoencoder=tmp_path / "vae.safetensors")
    assert "decoder.conv_out.bias" in message


def test_parts_must_belong_together(sources: Path, tmp_path: Path) -> None:
    torch.save(text_state(width=64), tmp_path / "wide.bin")
    refused(sources, tmp_path, "text encoder's width: 64, but .* want 32", text=tmp_path / "wide.bin")


def test_no_room_on_the_disk(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10 * 2**20))
    with pytest.raises(OutputError, match=r"takes 0\.0\d GiB, but the disk has 0\.01 GiB free"):
        make(sources, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(sources: Path, tmp_path: Path) -> None:
    with full_disk(2**16), pytest.raises(ModelError, match=r"model: cannot be written: .*File too large"):
        make(sources, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_overwriting(sources: Path, tmp_path: Path) -> None:
    make(sources, tmp_path / "model")
    with pytest.raises(ModelError, match="exists already"):
        make(sources, tmp_path / "model")
    before = (tmp_path / "model" / "unet.safetensors").read_bytes()

    def cancel(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(sources, tmp_path / "model", overwrite=True, dtype="fp32", progress=cancel)
    assert (tmp_path / "model" / "unet.safetensors").read_bytes() == before
    make(sources, tmp_path / "model", overwrite=True, dtype="fp32")
    assert (tmp_path / "model" / "unet.safetensors").stat().st_size > 1.9 * len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# A diffusers folder.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Stable Diffusion 2 folder in miniature, as old versions of the libraries wrote it."""
    root = tmp_path / "sd2"
    for name in ("text_encoder", "vae", "tokenizer"):
        (root / name).mkdir(parents=True)
    text = {f"text_model.{name}": tensor.contiguous() for name, tensor in text_from_openclip(text_state()).items()}
    save_file(
        {**text, "text_model.embeddings.position_ids": torch.arange(77)[None]}, root / "text_encoder/model.safetensors"
    )
    write_json(root / "text_encoder" / "config.json", text_config())
    write_json(root / "tokenizer" / "vocab.json", build_clip_tokenizer().get_vocab())
    torch.save(autoencoder_from_ldm(ldm_state()), root / "vae" / "diffusion_pytorch_model.bin")
    kl = AutoencoderConfig(arguments={"block_out_channels": [32, 32], "latent_channels": 4, "layers_per_block": 1})
    types_ = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    written = {"_class_name": "AutoencoderKL", "sample_size": 768, "scaling_factor": 0.3, **kl.arguments, **types_}
    write_json(root / "vae" / "config.json", written)
    return root


def text_config(**changed: object) -> dict[str, object]:
    sizes = {"vocab_size": 49408, "hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77}
    return {"_name_or_path": "x", "model_type": "clip_text_model", "hidden_act": "gelu", **sizes, **shape, **changed}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_a_diffusers_folder(sources: Path, folder: Path, tmp_path: Path) -> None:
    bundle = make(sources, tmp_path / "model", text=folder, autoencoder=folder, dtype="fp32")
    clip, vae_config = spec.text_config(bundle.manifest).clip, spec.autoencoder_config(bundle.manifest)
    assert clip["num_hidden_layers"] == 2
    assert "model_type" not in clip
    assert (vae_config.factor, vae_config.scale) == (2, (0.3,))
    load_text_encoder(bundle.file("text_encoder.safetensors"), clip)
    vae = load_autoencoder(bundle.file("vae.safetensors"), vae_config.kind, vae_config.arguments)
    wanted = autoencoder_from_ldm(ldm_state())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
        ({"hidden_size": 1024, "num_hidden_layers": 24}, "24 layers"),
        ({"num_hidden_layers": 3}, "16 tensors do not fit"),
        ({"num_attention_heads": 5}, "transformers refuses it"),
    ],
)
def test_a_folder_of_another_text_encoder(
    sources: Path, folder: Path, tmp_path: Path, changed: dict[str, object], match: str
) -> None:
    write_json(folder / "text_encoder" / "config.json", text_config(**changed))
    refused(sources, tmp_path, match, text=folder)


def test_an_incomplete_folder(sources: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.bin").unlink()
    refused(sources, tmp_path, r"has none of diffusion_pytorch_model\.safetensors", autoencoder=folder)
    (tmp_path / "made").rmdir()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    refused(sources, tmp_path, "not CLIP's vocabulary", text=folder)
    (tmp_path / "made").rmdir()
    (folder / "text_encoder" / "config.json").unlink()
    refused(sources, tmp_path, "a diffusers folder needs it", text=folder)


def test_the_written_files_are_plain_safetensors(tmp_path: Path) -> None:
    state = {"scalar": torch.tensor(1.5), "view": torch.arange(12.0).reshape(3, 4).t(), "é": torch.ones(2, 0, 3)}
    sizes: list[int] = []
    write_safetensors(tmp_path / "x.safetensors", state, "bf16", sizes.append)
    read = load_file(tmp_path / "x.safetensors")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {n: t.tolist() for n, t in state.items()}
    assert sizes == [2, 24, 0]


def test_configurations_survive_the_manifest(sources: Path, tmp_path: Path) -> None:
    bundle = make(sources, tmp_path / "model")
    assert isinstance(spec.config(bundle.manifest).text, TextConfig)
    vae_config = spec.autoencoder_config(bundle.manifest)
    assert spec.config(bundle.manifest).text.clip["num_hidden_layers"] == 2
    assert (
        autoencoder(vae_config.kind, vae_config.arguments).state_dict().keys()
        == load_file(tmp_path / "model/vae.safetensors").keys()
    )


# The family of a checkpoint


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_denoiser_is_recognised_by_its_names(sources: Path, folder: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"unnamed{suffix}"
    torch.save(denoiser_state(), path) if suffix == ".pth" else save_file(denoiser_state(), path)
    assert checkpoint.recognise(path)
    for other in (
        sources / "open_clip.bin",
        sources / "sd.ckpt",
        folder,
        folder / "vae/config.json",
        tmp_path / "none",
    ):
        assert not checkpoint.recognise(other)
    path.write_bytes(b"PK\x03\x04 this is no checkpoint")
    assert not checkpoint.recognise(path)


def test_the_family_need_not_be_named(sources: Path, tmp_path: Path) -> None:
    given = [sources / name for name in ("higen.pth", "open_clip.bin", "sd.ckpt")]
    found, named = convert_sources(given, tmp_path / "found"), make(sources, tmp_path / "named")
    assert (found.manifest, found.files) == (named.manifest, named.files)
    with pytest.raises(CheckpointError, match=r"sd\.ckpt: no installed family recognises this; installed are .*higen"):
        convert_sources(given[1:], tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"missing\.pth: no such file"):
        convert_sources([sources / "missing.pth"], tmp_path / "other")
    with pytest.raises(UnknownFamily, match=r"family='marsh': not installed here; installed are .*higen"):
        convert_sources(given, tmp_path / "other", family="marsh")
    with pytest.raises(CheckpointError, match="three sources are wanted: denoiser, text encoder, autoencoder"):
        convert_sources(given[:2], tmp_path / "other")
    with pytest.raises(CheckpointError, match="lora: unknown; higen takes arguments"):
        convert_sources(given, tmp_path / "other", lora="x")
    assert not (tmp_path / "other").exists()


def test_notes_for_the_user_are_passed_on(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.convert
    monkeypatch.setattr(checkpoint, "convert", lambda *given: replace(original(*given), notes=("for study only",)))
    notes: list[str] = []
    given = [sources / name for name in ("higen.pth", "open_clip.bin", "sd.ckpt")]
    convert_sources(given, tmp_path / "model", on_note=notes.append)
    assert notes == ["for study only"]
