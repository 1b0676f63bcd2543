"""Checkpoints as people have them: their wrapping, splitting and naming, and other files in place of a checkpoint."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from higen.convert import recognised
from higen.errors import CheckpointError, OutOfMemory
from higen.families.higen.checkpoint import _autoencoder_of_folder
from higen.models.checkpoint_files import folder_state, read_names, read_state

STATE = {"time_embed.0.weight": torch.ones(2, 2), "out.2.bias": torch.arange(2.0)}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor] = STATE) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


# How training loops wrap weights.


def renamed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": STATE, "loss": np.float64(0.5)},
        {"state_dict": STATE, "losses": [np.float32(1), np.int64(3), np.bool_(True)]},
        {"state_dict": STATE, "history": np.arange(3), "names": np.array(["a", "bc"]), "rows": np.zeros((2, 2), "f2")},
        {"state_dict": STATE, "arguments": argparse.Namespace(lr=1e-4, output=Path("runs"))},
        renamed("module."),
        renamed("_orig_mod."),
        renamed("module._orig_mod."),
        renamed("_orig_mod.module."),
        {"module.time_embed._orig_mod.0.weight": STATE["time_embed.0.weight"], "out.2.bias": STATE["out.2.bias"]},
        {"state_dict": renamed("module.")},
        {"model": STATE, "step": torch.tensor(5)},
        {"ema_state_dict": STATE},
        {"model_state_dict": STATE, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        {"module": STATE},
        {"ema": {"decay": 0.999, "shadow": STATE}},
        {"model": {"state_dict": OrderedDict(STATE)}},
        {"state_dict": {name: nn.Parameter(tensor) for name, tensor in STATE.items()}},
    ],
    ids=str,
)
def test_wrapped_weights_are_found(tmp_path: Path, content: object, legacy: bool) -> None:
    file = saved(tmp_path / "x.pth", content, _use_new_zipfile_serialization=not legacy)
    found = read_state(file)
    assert same(found)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert read_names(file) == STATE.keys()


def test_numpys_names_are_those_it_pickles_itself_under() -> None:
    """The list of harmless pickled names fits this NumPy. The test fails if a new version moves its functions."""
    from higen.models.pickles import _HARMLESS

    for value in (np.float64(1), np.float32(1), np.int32(1), np.bool_(True), np.str_("x"), np.arange(2), np.zeros(0)):
        for protocol in (2, 4):
            parts = pickle.dumps(value, protocol)
            names = {f"{f.__module__}.{f.__qualname__}" for f in (value.__reduce__()[0], type(value.dtype), np.ndarray)}
            assert parts
            assert names <= {*_HARMLESS}, names - {*_HARMLESS}


def test_a_rule_says_which_weights_are_taken(tmp_path: Path) -> None:
    averages = {name: tensor + 1 for name, tensor in STATE.items()}
    notes: list[str] = []
    both = saved(tmp_path / "both.pth", {"model": renamed("module."), "ema": averages})
    assert same(read_state(both, notes.append), averages)
    assert notes == [f"{both}: the weights under 'ema' are used; 'model' is left out"]
    part = saved(tmp_path / "part.pth", {"state_dict": STATE, "ema": {"out.2.bias": torch.zeros(2)}})
    assert same(read_state(part, notes.append))
    assert notes[1:] == [f"{part}: the weights under 'state_dict' are used; 'ema' is left out"]
    read_state(saved(tmp_path / "one.pth", {"state_dict": STATE}), notes.append)
    assert len(notes) == 2


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pth", {**STATE, **renamed("module.")})
    with pytest.raises(CheckpointError, match=r"x\.pth: two tensors are called time_embed\.0\.weight without"):
        read_state(file)


def test_the_error_says_what_was_found(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pth", {"epoch": 3, "optimizer": {"lr": 0.1}, "unet": STATE})
    with pytest.raises(
        CheckpointError, match=r"holds no tensors by name.*'epoch' \(int\), 'optimizer' \(dict\), 'unet'"
    ):
        read_state(file)
    save_file(STATE, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no installed family.*it has 2 tensors: out\.2\.bias, time_embed"):
        recognised([tmp_path / "other.safetensors"])
    (tmp_path / "page.pth").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match=r"page\.pth: a web page"):
        recognised([tmp_path / "page.pth"])


# Several files and their names.


def shard(folder: Path, stem: str, suffix: str, index: str | None = None) -> Path:
    """The weights in two files with an index."""
    where = {}
    for i, (name, tensor) in enumerate(sorted(STATE.items()), 1):
        where[name] = f"{stem}-{i:05d}-of-00002{suffix}"
        part = {name: tensor}
        save_file(part, folder / where[name]) if suffix == ".safetensors" else torch.save(part, folder / where[name])
    path = folder / (index or f"{stem}{suffix}.index.json")
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_divided_checkpoints_are_read(tmp_path: Path, suffix: str) -> None:
    index = shard(tmp_path, "model", suffix)
    assert same(read_state(index))
    assert read_names(index) == STATE.keys()
    assert same(folder_state(tmp_path, ("model",)))


@pytest.mark.parametrize(
    ("variant", "index"),
    [
        ("fp16", None),
        ("fp16", "model.safetensors.index.fp16.json"),
        ("fp16", "model.fp16.safetensors.index.json"),
        ("non_ema", None),
    ],
)
def test_variants_are_read_where_there_is_nothing_else(tmp_path: Path, variant: str, index: str | None) -> None:
    if index is None:
        save_file(STATE, tmp_path / f"model.{variant}.safetensors")
    else:
        shard(tmp_path, f"model.{variant}", ".safetensors", index)
    notes: list[str] = []
    assert same(folder_state(tmp_path, ("model",), notes.append))
    assert variant in notes[0]
    plain = {name: tensor + 1 for name, tensor in STATE.items()}
    torch.save(plain, tmp_path / "model.bin")
    assert same(folder_state(tmp_path, ("model",)), plain)


def test_variants_without_a_rule_are_named(tmp_path: Path) -> None:
    for variant in ("ema", "non_ema"):
        save_file(STATE, tmp_path / f"model.{variant}.safetensors")
    with pytest.raises(
        CheckpointError, match=r"several variants, model\.ema\.safetensors, model\.non_ema\.safetensors"
    ):
        folder_state(tmp_path, ("model",))
    save_file({name: tensor + 1 for name, tensor in STATE.items()}, tmp_path / "model.fp32.safetensors")
    assert not same(folder_state(tmp_path, ("model",)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda folder: next(folder.glob("*00002-of*")).unlink(), r"00002-of-00002\.safetensors: no such file"),
        (lambda folder: save_file({"a": torch.ones(1)}, next(folder.glob("*00001*"))), r"has no out\.2\.bias, which"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no 'weight_map'"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.bin"}}'),
            r"weight_map\.a='\.\./x\.bin': the name of a file beside it",
        ),
    ],
)
def test_a_divided_checkpoint_with_a_hole_is_refused(
    tmp_path: Path, change: Callable[[Path], object], match: str
) -> None:
    index = shard(tmp_path, "model", ".safetensors")
    change(tmp_path)
    with pytest.raises(CheckpointError, match=match):
        read_state(index)


def test_a_folder_of_diffusers_in_each_of_its_ways(tmp_path: Path) -> None:
    """As diffusers itself writes a folder, also with the .bin files of earlier versions."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    kl = AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, **blocks)
    for name, options in {"plain": {}, "variant": {"variant": "fp16"}, "parts": {"max_shard_size": "300KB"}}.items():
        kl.save_pretrained(tmp_path / name / "vae", **options)
        assert same(_autoencoder_of_folder(tmp_path / name)[1], kl.state_dict())
    file = tmp_path / "plain/vae/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert same(_autoencoder_of_folder(tmp_path / "plain")[1], kl.state_dict())


def test_a_file_is_read_as_what_it_is(tmp_path: Path) -> None:
    for length in (0x0280, 0x4B50, 0x8B1F):  # these lengths begin like a pickle, a zip archive and gzip data
        header = json.dumps({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).ljust(length).encode()
        (tmp_path / "header.bin").write_bytes(length.to_bytes(8, "little") + header)
        assert list(read_state(tmp_path / "header.bin")) == ["a"]
    save_file(STATE, tmp_path / "renamed.ckpt")
    assert same(read_state(tmp_path / "renamed.ckpt"))
    assert same(read_state(saved(tmp_path / "renamed.safetensors", STATE)))


# Other files in place of a checkpoint.


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return file.getvalue()


def as_saved(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def as_safetensors(tmp_path: Path) -> bytes:
    save_file(STATE, tmp_path / "whole.safetensors")
    return (tmp_path / "whole.safetensors").read_bytes()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "an empty file: fetch it again"),
        (LFS, "a Git LFS pointer .*git lfs pull"),
        (b"<!DOCTYPE html><html><head>", r"a web page \(HTML\)"),
        (b"\n  <html lang='en'>", r"a web page \(HTML\)"),
        (b"Access to this model is restricted", "a text file that begins 'Access to this"),
        (b'{"error": "Repository not found"}', "a text file that begins"),
        (bytes(4096), "4096 bytes that begin with zeros"),
        (gzip.compress(b"weights"), "gzip data: unpack it"),
        (tarred(), "a tar archive: unpack it"),
        (zipped(unet_dot_safetensors=b"x"), r"a zip archive that is not a checkpoint \(it holds 'unet\.safetensors'\)"),
        (zipped(archive__constants_dot_pkl=b"x", archive__data_dot_pkl=b"x"), "a TorchScript program, which is code"),
        (as_saved(STATE)[:-40], r"cut off after \d+ bytes \(a zip archive without its end\)"),
        (as_saved(STATE, legacy=True)[:-20], "cut off"),
        (b"\x12\x34\x56 something else", "neither safetensors nor a PyTorch checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_a_checkpoint_is_named(tmp_path: Path, suffix: str, content: bytes, match: str) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_state(file)
    said = str(caught.value)
    assert said.startswith(str(file))
    assert "\n" not in said
    assert "run code" not in said
    assert not read_names(file)


def test_the_error_says_that_a_safetensors_file_is_cut_off(tmp_path: Path) -> None:
    whole = as_safetensors(tmp_path)
    for size in (len(whole) - 1, len(whole) - 20, 60):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"cut\.safetensors: .*(cut off: {size} bytes of|cannot be read)"):
            read_state(tmp_path / "cut.safetensors")


def test_a_damaged_archive_is_found_by_its_own_checksums(tmp_path: Path) -> None:
    """PyTorch itself reads the changed number without an error."""
    file = saved(tmp_path / "x.pth", {"a": torch.arange(1000.0)})
    content = bytearray(file.read_bytes())
    content[content.index(np.float32(500).tobytes())] ^= 0x40
    file.write_bytes(content)
    assert not torch.equal(torch.load(file)["a"], torch.arange(1000.0))
    with pytest.raises(CheckpointError, match=r"x\.pth: 'x/data/0' is damaged \(Bad CRC-32.*\): fetch it again"):
        read_state(file)


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        assert same(read_state(saved(tmp_path / "x.pth", STATE)))
    finally:
        torch.serialization.set_crc32_options(True)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    "content",
    [{"a": Harmful()}, nn.Linear(2, 2), {"state_dict": STATE, "hook": print}],
    ids=["object", "module", "function"],
)
def test_code_in_a_file_is_named_without_advice_to_run_it(tmp_path: Path, content: object) -> None:
    file = saved(tmp_path / "x.pth", content)
    with pytest.raises(CheckpointError, match=r"reading it could run code \(it names [\w.]+\).*save_file") as caught:
        read_state(file)
    said = str(caught.value)
    assert "\n" not in said
    for advice in ("weights_only", "add_safe_globals", "torch.load"):
        assert advice not in said


def test_one_of_several_files_is_not_a_checkpoint(tmp_path: Path) -> None:
    shard(tmp_path, "model", ".safetensors")
    with pytest.raises(
        CheckpointError, match=r"00001-of-00002\.safetensors: one of 2 files .*give its \.index\.json file"
    ):
        read_state(tmp_path / "model-00001-of-00002.safetensors")
    save_file(STATE, tmp_path / "whole-00001-of-00001.safetensors")
    assert same(read_state(tmp_path / "whole-00001-of-00001.safetensors"))


def test_the_error_for_a_folder_lists_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a folder; name the checkpoint in it: model\.pth"):
        read_state(tmp_path)


def test_too_little_memory_is_not_reported_as_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    file = saved(tmp_path / "x.pth", STATE)
    monkeypatch.setattr(torch, "load", short)
    with pytest.raises(OutOfMemory, match=r"x\.pth: there is too little memory"):
        read_state(file)


@pytest.mark.parametrize("content", [{"a": torch.eye(3).to_sparse()}, {"a": torch.empty(2, device="meta")}])
def test_tensors_without_plain_values_are_named(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth: a (is sparse|has no values)"):
        read_state(saved(tmp_path / "x.pth", content))


class Command:
    """The textbook pickle that runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".bin", ".safetensors"])
def test_a_command_in_a_pickle_is_named(tmp_path: Path, suffix: str) -> None:
    for number, protocol in enumerate((0, 2, 4)):
        (file := tmp_path / f"{number}{suffix}").write_bytes(pickle.dumps(Command(), protocol))
        with pytest.raises(CheckpointError, match="could run code"):
            read_state(file)
    torch.save({"state_dict": STATE, "x": Command()}, file := tmp_path / f"zip{suffix}")
    with pytest.raises(CheckpointError, match=r"could run code \(it names (posix|nt)\.system\)"):
        read_state(file)


@pytest.mark.parametrize("key", ["generator", "network", "g_ema"])
def test_other_names_of_the_weights(tmp_path: Path, key: str) -> None:
    assert same(read_state(saved(tmp_path / "x.pth", {key: STATE, "epoch": 1})))


def test_arrays_in_place_of_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="an array or object, and no tensor"):
        read_state(saved(tmp_path / "x.pth", {name: tensor.numpy() for name, tensor in STATE.items()}))
