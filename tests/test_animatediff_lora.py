"""LoRA merged into AnimateDiff's U-Net and motion modules, compared with diffusers' fusion of the same numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_animatediff as tiny_motion
import tiny_diffusers as tiny
import torch
from click.testing import CliRunner
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_lora import ALPHA, RANK, adapted

from higen.cli import main
from higen.convert import convert_sources
from higen.errors import CheckpointError
from higen.models.lora import Lora

# diffusers' warnings about PEFT's versions and the old names of adapters
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::diffusers", "ignore::FutureWarning")

State = dict[str, torch.Tensor]

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def pipeline() -> Any:
    scheduler = tiny.scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return tiny_motion.pipeline(scheduler)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(pipeline(), tmp_path_factory.mktemp("hub") / "animatediff")


@pytest.fixture(scope="module")
def factors() -> State:
    """Factors for every attention of the U-Net and its motion modules, and for some other layers; PEFT's names."""
    return adapted(pipeline().unet, [*PROJECTIONS, "proj_in", "ff.net.0.proj", "conv1"], 1)


def old_names(factors: State) -> State:
    """The projections' factors under the names used before PEFT, which have no alpha."""
    found: State = {}
    for name, tensor in factors.items():
        if match := re.fullmatch(r"(.+\.attn\d)\.(to_q|to_k|to_v|to_out)(\.0)?\.lora_(A|B)\.weight", name):
            found[f"{match[1]}.processor.{match[2]}_lora.{'down' if match[4] == 'A' else 'up'}.weight"] = tensor
    return found


def authors_names(factors: State, motion: bool) -> State:
    """A MotionLoRA, or a domain adapter, as the authors publish it."""
    found: State = {}
    for name, tensor in old_names(factors).items():
        if (".motion_modules." in name) is motion:
            name = re.sub(r"(motion_modules\.\d+)\.", r"\1.temporal_transformer.", name)
            if motion:
                name = re.sub(r"\.attn(\d)\.", lambda m: f".attention_blocks.{int(m[1]) - 1}.", name)
            found[f"module.{name}"] = tensor
    return found


def fused(state: State, path: Path, scale: float, **metadata: Any) -> State:
    """The U-Net's weights after diffusers has fused an adapter."""
    truth = pipeline()
    if metadata:
        truth.save_lora_weights(path.parent, unet_lora_layers=state, weight_name=path.name, **metadata)
    else:
        save_file({f"unet.{name}": tensor for name, tensor in state.items()}, path)
    truth.load_lora_weights(path)
    truth.fuse_lora(lora_scale=scale)
    truth.unload_lora_weights()
    found: State = truth.unet.state_dict()
    return found


def assert_near(ours: State, wanted: State) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=2e-6 * float(tensor.abs().max())), name


@pytest.mark.parametrize("motion", [True, False], ids=["motion", "domain"])
def test_the_authors_files(source: Path, factors: State, tmp_path: Path, motion: bool) -> None:
    file = tmp_path / "lora.ckpt"
    torch.save({"epoch": 0, "state_dict": authors_names(factors, motion)}, file)
    old = {name: t for name, t in old_names(factors).items() if (".motion_modules." in name) is motion}
    notes: list[str] = []
    loras = [Lora(file, 0.7)]
    got = convert_sources([source], tmp_path / "model", dtype="fp32", loras=loras, on_note=notes.append)
    assert f"lora.ckpt: {len(old) // 2} layers changed, scale 0.7" in notes
    ours, before = load_file(got.path / "unet.safetensors"), pipeline().unet.state_dict()
    assert_near(ours, fused(old, tmp_path / "old.safetensors", 0.7))
    changed = [name for name in before if not torch.equal(before[name], ours[name])]
    assert len(changed) == len(old) // 2
    assert {".motion_modules." in name for name in changed} == {motion}


def kohya(factors: State) -> State:
    found: State = {}
    for name, tensor in factors.items():
        module, _, factor = name.partition(".lora_")
        base = "lora_unet_" + module.replace(".", "_")
        found[f"{base}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
        found[f"{base}.alpha"] = torch.tensor(float(ALPHA))
    return found


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_the_spellings_of_peft_and_kohya(source: Path, factors: State, tmp_path: Path, kind: str) -> None:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["x"]).to_dict()
    wanted = fused(factors, tmp_path / "peft.safetensors", 0.5, unet_lora_adapter_metadata=config)
    save_file(kohya(factors), tmp_path / "kohya.safetensors")
    loras = [Lora(tmp_path / f"{kind}.safetensors", 0.5)]
    got = convert_sources([source], tmp_path / "model", dtype="fp32", loras=loras)
    assert_near(load_file(got.path / "unet.safetensors"), wanted)


def test_several_on_the_command_line(source: Path, factors: State, tmp_path: Path) -> None:
    """A camera move, and a domain adapter with eight tensors that fit nowhere."""
    move, domain = tmp_path / "v2_lora_ZoomIn.ckpt", tmp_path / "v3_sd15_adapter.ckpt"
    torch.save(authors_names(factors, True), move)
    strange = [f"nowhere.{i}.processor.to_q_lora.up.weight" for i in range(8)]
    torch.save({**authors_names(factors, False), **{f"module.{name}": torch.ones(2) for name in strange}}, domain)
    given = ["--lora", f"{move}:0.5", "--lora", str(domain), "--dtype", "fp32", "--group-norm", "frame"]
    result = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "model"), *given])
    assert result.exit_code == 0, result.output
    for said in (
        "v2_lora_ZoomIn.ckpt:",
        "v3_sd15_adapter.ckpt:",
        f"not used: {', '.join(strange)}",
        "group norms take their statistics over each frame",
        "Apache-2.0",
        "at most 24 frames",
    ):
        assert said in result.output
    ours = load_file(tmp_path / "model" / "unet.safetensors")
    layer = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_out.0"
    up, down = (factors[f"{layer}.lora_{factor}.weight"] for factor in "BA")
    wanted = pipeline().unet.state_dict()[f"{layer}.weight"] + 0.5 * up @ down
    assert torch.allclose(ours[f"{layer}.weight"], wanted, atol=1e-6)


def test_one_for_another_model_is_refused(source: Path, factors: State, tmp_path: Path) -> None:
    file = tmp_path / "lora.ckpt"
    state = {name: torch.ones(t.shape[0], 2 * t.shape[1]) for name, t in authors_names(factors, True).items()}
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="for another model") as error:
        convert_sources([source], tmp_path / "model", loras=[Lora(file)])
    assert str(file) in str(error.value)
    assert not (tmp_path / "model").exists()
