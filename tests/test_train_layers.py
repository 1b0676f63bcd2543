"""Training a part of the layers, low-rank adapters, and adding adapters to another model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_run import MODEL, make_settings, write_clips

import higen
from higen.bundle import Bundle
from higen.cli import main
from higen.convert import convert_sources
from higen.errors import CheckpointError, ModelError, SettingsError
from higen.families.higen import spec
from higen.families.higen.network import load_denoiser
from higen.models.lora import Lora
from higen.train.data import list_items
from higen.train.layers import set_strength, temporal_names
from higen.train.networks import spatial_names
from higen.train.record import read_losses
from higen.train.settings import Settings
from higen.train.trainer import Trainer, export, train


@pytest.fixture(scope="module")
def model(training_model: Path) -> Path:
    return training_model


@pytest.fixture(scope="module")
def clips(training_clips: Path) -> Path:
    return training_clips


TEMPORAL = {"optimiser__layers": "temporal", "data__images": 0}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, model: Path, clips: Path) -> Settings:
    """A finished run that trained adapters of the temporal layers."""
    folder = tmp_path_factory.mktemp("lora")
    settings = make_settings(folder, model, clips, run__steps=3, lora__rank=2, lora__alpha=3.0, **TEMPORAL)
    train(settings)
    return settings


def unet_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / spec.UNET)


def output(settings: Settings, name: str) -> Path:
    return Path(settings.run.output, name)


@pytest.mark.parametrize("layers", ["spatial", "temporal"])
def test_only_the_chosen_layers_change(tmp_path: Path, model: Path, clips: Path, layers: str) -> None:
    changes: dict[str, Any] = TEMPORAL if layers == "temporal" else {"optimiser__layers": layers}
    settings = make_settings(tmp_path, model, clips, run__steps=2, **changes)
    train(settings)
    before, after = unet_of(model), unet_of(output(settings, "model"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    names = spatial_names(MODEL.unet) if layers == "spatial" else temporal_names(MODEL.unet)
    assert changed <= set(names)
    still = {name for name in set(names) - changed if "key" not in name}  # a key's bias cancels in the softmax
    assert still == set()
    assert (
        export(settings, tmp_path / "again").files[spec.UNET] == Bundle.open(output(settings, "model")).files[spec.UNET]
    )
    if layers == "temporal":  # key frames equal those of the starting model
        first = [_key_frame(folder) for folder in (model, output(settings, "model"))]
        np.testing.assert_allclose(*first, atol=2e-5)  # rounding depends on the weights' memory layout


def _key_frame(model: Path) -> Any:
    with higen.load(model, "torch") as pipe:
        return next(
            e.latents for e in pipe.stream("a blue whale", seed=1, steps=2) if e.loop == "spatial" and e.index == 1
        )


def test_every_weight_is_spatial_temporal_or_of_the_cues() -> None:
    names, spatial, temporal = unet_names(), set(spatial_names(MODEL.unet)), set(temporal_names(MODEL.unet))
    assert not spatial & temporal
    rest = names - spatial - temporal
    assert all(
        name.startswith(("conditioner.", "unet.time.", "unet.context_pool.", "unet.prior.bias")) for name in rest
    )


def unet_names() -> set[str]:
    from higen.families.higen.unet import Denoiser

    return {name for name, _ in Denoiser(MODEL.unet).named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser__layers": "temporal"}, r"layers='temporal': needs data\.images = 0"),
        ({"optimiser__layers": "upper"}, r"optimiser\.layers='upper': one of 'all', 'spatial', 'temporal'"),
        ({"optimiser__layers": "spatial", "optimiser__train_text": True}, r"train_text: only where all layers"),
        ({"optimiser__layers": "spatial", "optimiser__spatial_gradient": 0.5}, r"spatial_gradient: only where all"),
        ({"lora__rank": -1}, r"lora\.rank=-1: 0 or more"),
        ({"lora__rank": 2, "lora__alpha": 0.0}, r"lora\.alpha=0\.0: more than 0"),
        ({"lora__alpha": 2.0}, r"lora\.alpha=2\.0: needs rank"),
        ({"lora__rank": 2, "optimiser__train_text": True}, r"train_text: only where all layers .* without lora"),
        ({"run__held_out_every": 2}, r"run\.held_out_every and data\.held_out go together"),
        ({"run__threads": 0}, r"run\.threads=0: 1 or more"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, model: Path, clips: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings(tmp_path, model, clips, **changes)


# LoRA


def test_an_adapter_has_the_names_and_values_of_peft(adapted: Settings, model: Path) -> None:
    """PEFT itself loads the file into the network. The weights then equal those of the model that the run wrote."""
    path = output(adapted, "lora.safetensors")
    factors = load_file(path)
    with safe_open(path, framework="pt") as file:
        known = json.loads(file.metadata()["lora_adapter_metadata"])
    assert known == {"unet.r": 2, "unet.lora_alpha": 3.0}
    denoiser = load_denoiser(model / spec.UNET, MODEL.unet, torch.device("cpu"), torch.float32)
    layers = sorted({name.removeprefix("unet.").rpartition(".lora_")[0] for name in factors})
    assert {f"{name}.weight" for name in layers} <= set(temporal_names(MODEL.unet))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=layers), denoiser)
    found = set_peft_model_state_dict(denoiser, {name.removeprefix("unet."): t for name, t in factors.items()})
    assert not found.unexpected_keys
    written = unet_of(output(adapted, "model"))
    for name, layer in denoiser.named_modules():
        if hasattr(layer, "get_delta_weight"):
            wanted = layer.base_layer.weight + layer.get_delta_weight("default")
            torch.testing.assert_close(written[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-7)
    before = unet_of(model)
    changed = {name for name, tensor in written.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in layers}


def test_converting_adds_adapters_to_another_model_directory(adapted: Settings, model: Path, tmp_path: Path) -> None:
    path, said = output(adapted, "lora.safetensors"), list[str]()
    one = convert_sources([model], tmp_path / "one", loras=[Lora(path, 1.0)], on_note=said.append)
    assert said == [f"lora.safetensors: {len(load_file(path)) // 2} layers changed, scale 1"]
    assert one.manifest.name == "tiny with lora (1)"
    trained, base = unet_of(output(adapted, "model")), unet_of(model)
    for name, tensor in unet_of(one.path).items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-6, atol=1e-7)
    others = {name for name in one.files if name != spec.UNET}
    assert all(one.files[name] == Bundle.open(model).files[name] for name in others)
    # Scale 0 changes nothing, and two adapters add up.
    none = convert_sources([model], tmp_path / "none", loras=[Lora(path, 0.0)])
    assert {p.name: p.read_bytes() for p in none.path.iterdir()} == {p.name: p.read_bytes() for p in model.iterdir()}
    two = unet_of(convert_sources([model], tmp_path / "two", loras=[Lora(path, 0.5), Lora(path, 1.0)]).path)
    for name, tensor in two.items():
        torch.testing.assert_close(tensor - base[name], 1.5 * (trained[name] - base[name]), rtol=1e-4, atol=1e-6)
    with higen.load(one.path) as pipe:
        pipe("a blue whale", steps=1, progress=False)


def test_the_command_adds_an_adapter(adapted: Settings, model: Path, tmp_path: Path) -> None:
    path = output(adapted, "lora.safetensors")
    arguments = ["convert", str(model), str(tmp_path / "one"), "--lora", f"{path}:0.5"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert Bundle.open(tmp_path / "one").manifest.name == "tiny with lora (0.5)"
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_what_cannot_be_added_is_refused_and_leaves_nothing(adapted: Settings, model: Path, tmp_path: Path) -> None:
    path, out = output(adapted, "lora.safetensors"), tmp_path / "out"
    huge = tmp_path / "huge.safetensors"
    save_file({name: torch.full_like(t, 1e30) for name, t in load_file(path).items()}, huge)
    other = tmp_path / "other.safetensors"
    save_file({"unet.nowhere.lora_A.weight": torch.ones(1, 4), "unet.nowhere.lora_B.weight": torch.ones(4, 1)}, other)
    for loras, message in (
        ([], r"is already a model directory; --lora FILE"),
        (
            [Lora(huge)],
            r"has values that are not finite in torch\.float32 after merging the adapters; use a smaller scale",
        ),
        ([Lora(other)], r"does not fit any layer of the model"),
        ([Lora(tmp_path / "absent")], r"absent"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_sources([model], out, loras=loras)
        assert not out.exists()
    with pytest.raises(ModelError, match="the model itself"):
        convert_sources([model], model, loras=[Lora(path)], overwrite=True)
    with pytest.raises(CheckpointError, match="it takes adapters"):
        convert_sources([model], out, loras=[Lora(path)], prediction="v")


def test_adapters_are_resumed_bit_for_bit(adapted: Settings, tmp_path: Path, model: Path, clips: Path) -> None:
    settings = make_settings(tmp_path, model, clips, run__steps=3, lora__rank=2, lora__alpha=3.0, **TEMPORAL)
    from higen.train.trainer import Trainer

    made = Trainer(settings)
    made.start()
    made.loop.advance()
    made.loop.advance()
    made.loop.save()
    made.close()
    train(settings)
    ours, theirs = (output(each, "lora.safetensors").read_bytes() for each in (settings, adapted))
    assert ours == theirs


def test_adapters_of_all_layers_learn_from_pictures_and_clips(tmp_path: Path, model: Path, clips: Path) -> None:
    settings = make_settings(tmp_path, model, clips, run__steps=3, lora__rank=1, run__recompute=True)
    train(settings)
    factors = load_file(output(settings, "lora.safetensors"))
    still = [name for name, t in factors.items() if "lora_B" in name and not t.any() and ".key." not in name]
    assert still == []
    assert {name.partition(".")[0] for name in factors} == {"unet"}


# Held-out clips, threads


def test_held_out_losses_are_logged_and_change_nothing(tmp_path: Path, model: Path, clips: Path) -> None:
    other = write_clips(tmp_path / "other", ("a green heart", "a blue star"))
    plain = make_settings(tmp_path / "plain", model, clips)
    watched = make_settings(
        tmp_path / "watched", model, clips, data__held_out=other, run__held_out_every=2, data__held_out_steps=2,
        run__threads=1,
    )  # fmt: skip
    train(plain)
    threads = torch.get_num_threads()
    train(watched)
    assert torch.get_num_threads() == threads
    lines = read_losses(output(watched, "losses.jsonl"))
    held_out = [line for line in lines if "held-out video" in line]
    assert [line["step"] for line in held_out] == [2, 4, 6]
    assert all(np.isfinite([line["held-out image"], line["held-out video"]]).all() for line in held_out)
    assert len({line["held-out video"] for line in held_out}) == 3
    assert [line for line in lines if "held-out video" not in line] == read_losses(output(plain, "losses.jsonl"))
    assert (output(watched, "model") / spec.UNET).read_bytes() == (output(plain, "model") / spec.UNET).read_bytes()


def test_a_held_out_set_that_cannot_be_used_is_one_error(tmp_path: Path, model: Path, clips: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        settings = make_settings(
            tmp_path, model, clips, data__held_out=tmp_path / folder, run__held_out_every=1
        )  # fmt: skip
        with pytest.raises(SettingsError, match=r"data\.held_out"):
            train(settings)


def test_each_clip_has_adapters_of_its_own_strength(tmp_path: Path, model: Path, clips: Path) -> None:
    """Gradients of clips at scales 2 and -1, compared with models that have the adapters added at these scales."""
    rows = [{"path": str(clips / f"clip{i}.webm"), "caption": "a red heart"} for i in range(3)]
    rows = [{**row, "scale": scale} for row, scale in zip(rows, (2, -1, "0.5"), strict=True)]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"lora__rank": 2, "lora__scales": True, "data__videos": 3, **TEMPORAL}
    trainer = Trainer(make_settings(tmp_path, model, tmp_path / "clips.jsonl", **changes))
    try:
        with torch.no_grad():
            for name, parameter in trainer.optimiser.parameters.items():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        (batch,) = (trainer.source.batches(0).videos,)
        assert batch is not None
        assert sorted(batch.strength.tolist()) == [-1.0, 0.5, 2.0]
        losses = trainer.gradients(0, torch.Generator())
        mixed = {name: p.grad.clone() for name, p in trainer.optimiser.parameters.items() if p.grad is not None}
        wanted, alone = {name: torch.zeros_like(g) for name, g in mixed.items()}, []
        for i, strength in enumerate(batch.strength.tolist()):
            trainer.optimiser.clear()
            set_strength(trainer.objective, strength)
            loss, *_ = trainer.objective(None, batch.chosen(torch.tensor([i])))
            loss.backward()
            alone.append(float(loss.detach()))
            for name, gradient in wanted.items():
                own = trainer.optimiser.parameters[name].grad
                gradient += 0 if own is None else own / 3
        for name, gradient in wanted.items():
            assert torch.allclose(mixed[name], gradient, rtol=1e-4, atol=1e-6), name
        assert len(set(alone)) == 3
        assert float(losses["video"]) > 0
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"scale": "loud"}, r"line 1: scale='loud': a number from -10 to 10"),
        ({"scale": 11}, r"line 1: scale=11: a number from -10 to 10"),
        ({"scale": True}, r"line 1: scale=True: a number from -10 to 10"),
    ],
)
def test_an_invalid_scale_is_named(tmp_path: Path, rows: dict[str, Any], said: str) -> None:
    file = tmp_path / "clips.jsonl"
    file.write_text(json.dumps({"path": "a.mp4", "caption": "a", **rows}) + "\n")
    assert list_items(file).items[0].scale == 1  # a foreign column if no adapter is trained
    with pytest.raises(SettingsError, match=said):
        list_items(file, scales=True)
    with pytest.raises(SettingsError, match=r"lora\.scales=true: data\.path=.* is a folder"):
        list_items(tmp_path, scales=True)


def test_scales_need_an_adapter(tmp_path: Path, model: Path, clips: Path) -> None:
    with pytest.raises(SettingsError, match=r"lora\.scales=true: needs rank"):
        make_settings(tmp_path, model, clips, lora__scales=True)
