"""LoRA merged when a model is converted, compared with the results of diffusers and PEFT for the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from higen.convert import convert_sources
from higen.errors import CheckpointError
from higen.models.lora import Lora, merged, parse_lora

RANK, ALPHA = 4, 6

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj", "conv_shortcut"]
"""Linear layers, convolutions of 3x3 and of 1x1."""

State = dict[str, torch.Tensor]


def pipeline() -> StableDiffusionPipeline:
    return tiny.image_pipeline(
        tiny.scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    )


def adapted(module: Any, layers: list[str], seed: int) -> State:
    """A random adapter of a network, under PEFT's names."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, init_lora_weights=False)
    inject_adapter_in_model(config, module)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=random)
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(module).items()}


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """A pipeline that gets adapters on its networks."""
    return pipeline()


@pytest.fixture(scope="module")
def factors(pipe: StableDiffusionPipeline) -> tuple[State, State]:
    """The adapters' factors of the U-Net and of the text encoder."""
    return adapted(pipe.unet, LAYERS, 1), adapted(pipe.text_encoder, ["q_proj", "v_proj", "fc1"], 2)


def of_peft(module: Any, scale: float) -> State:
    """A network's weights with its adapter, as PEFT computes them, because transformers' fusion needs a newer PEFT."""
    found: State = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "get_delta_weight"):
            found[f"{name}.weight"] = layer.base_layer.weight + scale * layer.get_delta_weight("default")
    state = {name.replace(".base_layer", ""): tensor for name, tensor in module.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if "lora_" not in name} | found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(pipeline(), tmp_path_factory.mktemp("hub") / "sd")


def _kohya(prefix: str, state: State) -> State:
    found: State = {}
    for name, tensor in state.items():
        module, _, factor = name.partition(".lora_")
        base = prefix + module.replace(".", "_")
        found[f"{base}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
        found[f"{base}.alpha"] = torch.tensor(float(ALPHA))
    return found


def peft_file(path: Path, unet: State, text: State) -> Path:
    """An adapter file as diffusers saves it today, with alpha in the metadata."""
    configs = [LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["x"]).to_dict() for _ in range(2)]
    StableDiffusionPipeline.save_lora_weights(
        path.parent,
        unet_lora_layers=unet,
        text_encoder_lora_layers=text or None,
        weight_name=path.name,
        unet_lora_adapter_metadata=configs[0],
        text_encoder_lora_adapter_metadata=configs[1] if text else None,
    )
    return path


def kohya_file(path: Path, unet: State, text: State) -> Path:
    save_file({**_kohya("lora_unet_", unet), **_kohya("lora_te_", text)}, path)
    return path


FILES = {"peft": peft_file, "kohya": kohya_file}


@pytest.mark.parametrize("scale", [1.0, 0.6, -0.5])
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore")  # diffusers' warnings about PEFT's versions
def test_merged_as_diffusers_fuses(
    source: Path, pipe: StableDiffusionPipeline, factors: tuple[State, State], kind: str, scale: float, tmp_path: Path
) -> None:
    file = FILES[kind](tmp_path / "style.safetensors", *factors)
    fused = pipeline()
    before = {name: tensor.clone() for name, tensor in fused.unet.state_dict().items()}
    fused.load_lora_weights(FILES[kind](tmp_path / "unet.safetensors", factors[0], {}))
    fused.fuse_lora(lora_scale=scale)
    fused.unload_lora_weights()
    notes: list[str] = []
    loras = [Lora(file, scale)]
    model = convert_sources([source], tmp_path / "model", dtype="fp32", loras=loras, on_note=notes.append)
    assert any("layers changed" in note and "not used" not in note for note in notes)
    for name, wanted in (("unet", fused.unet.state_dict()), ("text_encoder", of_peft(pipe.text_encoder, scale))):
        ours = load_file(model.path / f"{name}.safetensors")
        wanted = {key.removeprefix("text_model."): tensor for key, tensor in wanted.items()}
        for key, tensor in ours.items():
            assert torch.allclose(tensor, wanted[key], rtol=0, atol=2e-6 * float(wanted[key].abs().max())), key
    changed = [
        key for key, tensor in load_file(model.path / "unet.safetensors").items() if not tensor.equal(before[key])
    ]
    assert len(changed) == len(factors[0]) // 2


def test_the_names_before_peft(factors: tuple[State, State], tmp_path: Path) -> None:
    """`attn1.processor.to_q_lora.down.weight`, as in diffusers' first training scripts. An absent alpha is the rank."""
    unet = pipeline().unet.state_dict()
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    old: State = {}
    for layer in ("to_q", "to_out.0"):
        for new, name in (("A", "down"), ("B", "up")):
            tensor = factors[0][f"{module}.{layer}.lora_{new}.weight"]
            old[f"unet.{module}.processor.{layer.removesuffix('.0')}_lora.{name}.weight"] = tensor
    save_file(old, tmp_path / "old.safetensors")
    notes: list[str] = []
    got = merged({"unet": unet}, [Lora(tmp_path / "old.safetensors", 0.5)], notes)["unet"]
    for layer in ("to_q", "to_out.0"):
        up, down = (factors[0][f"{module}.{layer}.lora_{factor}.weight"] for factor in "BA")
        wanted = unet[f"{module}.{layer}.weight"] + 0.5 * up @ down
        assert torch.allclose(got[f"{module}.{layer}.weight"], wanted, atol=1e-6)
    assert notes == ["old.safetensors: 2 layers changed, scale 0.5"]


def test_nothing_of_it_changes_nothing_and_two_add(factors: tuple[State, State], tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "a.safetensors", *factors)
    unet = pipeline().unet.state_dict()
    none = merged({"unet": unet}, [Lora(file, 0.0)], [])["unet"]
    assert all(none[name].equal(tensor) for name, tensor in unet.items())
    two = merged({"unet": unet}, [Lora(file, 0.25), Lora(file, 0.75)], [])["unet"]
    one = merged({"unet": unet}, [Lora(file)], [])["unet"]
    assert all(torch.allclose(two[name], one[name], atol=1e-6) for name in unet)


def test_what_is_not_used_is_named(factors: tuple[State, State], tmp_path: Path) -> None:
    strange = {"lora_unet_nowhere.lora_down.weight": torch.ones(4, 8), "logit_scale": torch.ones(())}
    save_file({**_kohya("lora_unet_", factors[0]), **strange}, tmp_path / "a.safetensors")
    notes: list[str] = []
    merged({"unet": pipeline().unet.state_dict()}, [Lora(tmp_path / "a.safetensors")], notes)
    assert "not used: logit_scale, lora_unet_nowhere.lora_down.weight" in notes[0]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"conv_in.weight": torch.ones(2, 2)}, "not a LoRA"),
        ({"lora_unet_nowhere.lora_down.weight": torch.ones(4, 8)}, "does not fit any layer"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(4, 4, 3, 3)}, "one of a LoRA's two factors"),
        (
            {
                "unet.conv_in.lora_A.weight": torch.ones(4, 8, 3, 3),
                "unet.conv_in.lora_B.weight": torch.ones(32, 4, 1, 1),
            },
            "for another model",
        ),
        (
            {
                "unet.conv_in.lora_A.weight": torch.full((4, 4, 3, 3), torch.nan),
                "unet.conv_in.lora_B.weight": torch.ones(32, 4, 1, 1),
            },
            "not a number",
        ),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(4, 4)}, "LoHa"),
        ({"lora_unet_conv_in.dora_scale": torch.ones(4, 4)}, "DoRA"),
    ],
    ids=["weights", "nowhere", "half", "shape", "nan", "loha", "dora"],
)
def test_other_files_are_refused(source: Path, tmp_path: Path, state: State, said: str) -> None:
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=said) as error:
        convert_sources([source], tmp_path / "model", loras=[Lora(tmp_path / "x.safetensors")])
    assert str(tmp_path / "x.safetensors") in str(error.value)
    assert not (tmp_path / "model").exists()


def test_how_it_is_named_on_the_command_line() -> None:
    assert parse_lora("a.safetensors") == Lora(Path("a.safetensors"), 1.0)
    assert parse_lora("a.safetensors:0.5") == Lora(Path("a.safetensors"), 0.5)
    assert parse_lora("C:\\a.safetensors") == Lora(Path("C:\\a.safetensors"), 1.0)
    assert parse_lora("a:b.safetensors:-1") == Lora(Path("a:b.safetensors"), -1.0)
    with pytest.raises(CheckpointError, match="finite"):
        parse_lora("a.safetensors:nan")
