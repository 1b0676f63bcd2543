"""The port agrees with the reference, and the comparison detects differences."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from higen.errors import FixtureError
from higen.families.higen.reference_names import reference_names
from higen.parity import Case, main_table, run
from higen.parity.compare import compare
from higen.parity.fixtures import assemble, recipe_salt, recipe_state, recipe_tensor, recorded_config

SUBSET = Path(__file__).parent / "reference" / "fixtures"
FORWARD, UNIT = "p1/spatial_b1_8x8_arbcond", "p1/out@s1"
GIGABYTE = 1e9


def small_copy(folder: Path) -> Path:
    """A copy of the fixtures with one forward case and one unit of p1."""
    record = json.loads((SUBSET / "fixtures.json").read_text())
    record = {
        "models": {"p1": record["models"]["p1"]},
        "forward": {FORWARD: record["forward"][FORWARD]},
        "units": {UNIT: record["units"][UNIT]},
    }
    (folder / "fixtures.json").write_text(json.dumps(record))
    for kind, name in (("forward", FORWARD), ("units", UNIT)):
        stored = load_file(SUBSET / f"p1.{kind}.safetensors")
        case = name.partition("/")[2]
        kept = {key: value for key, value in stored.items() if key.startswith(f"{case}/")}
        save_file(kept, folder / f"p1.{kind}.safetensors")
    return folder


def edit_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / "fixtures.json").read_text())
    change(record)
    (folder / "fixtures.json").write_text(json.dumps(record))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_committed_cases_pass() -> None:
    cases = list(run(SUBSET))
    assert [case.name for case in cases if not case.passed] == []
    record = json.loads((SUBSET / "fixtures.json").read_text())
    for kind in ("forward", "units", "sample", "train"):
        assert {f"{kind}/{name}" for name in record[kind]} == {c.name for c in cases if c.name.startswith(f"{kind}/")}
    assert {"weights/p1", "weights/p2", "misc/betas", "misc/sinusoid_dim320", "misc/timesteps_50"} <= {
        case.name for case in cases
    }


WHOLE = """
import sys, time
from higen.parity import main_table, run
cases, seconds = [], {}
for name in sys.argv[2:]:
    start = time.perf_counter()
    cases += run(sys.argv[1], only=name)
    seconds[name] = round(time.perf_counter() - start, 1)
print(main_table(cases))
peak = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(seconds, len(cases), sum(case.passed for case in cases), *peak)
"""


def available_memory() -> int:
    """Bytes of memory available without swapping; 0 if the system does not report them."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.skipif(available_memory() < 8 * GIGABYTE, reason="less than 8 GB of memory available")
def test_whole_reference_passes_within_8_gb(reference: Path) -> None:
    folders = ("fixtures/", "companions/", "full_size/")
    found = subprocess.run(
        [sys.executable, "-c", WHOLE, str(reference), *folders], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    table, _, summary = found.stdout.rstrip().rpartition("\n")
    print(table, summary, sep="\n")
    count, passed, peak = (int(n) for n in summary.rpartition("}")[2].split())
    assert count == passed == len(list(json_cases(reference)))
    assert peak < 8 * GIGABYTE, summary


def json_cases(reference: Path) -> list[str]:
    """The names of all cases of the whole reference, collected without higen's reader."""
    record = json.loads((reference / "fixtures" / "fixtures.json").read_text())
    full = json.loads((reference / "full_size" / "salt0.json").read_text())
    companions = json.loads((reference / "companions" / "companions.json").read_text())
    tables = set(load_file(reference / "fixtures" / "misc.safetensors")) - {"sinusoid_t"}
    grids = [n for n in record["misc"]["timesteps"] if 1000 % int(n) == 0]
    named = [name for kind in ("models", "forward", "units", "sample", "train") for name in record[kind]]
    return [*named, *tables, *grids, *full, *companions]  # the full-size record has one extra entry, for its weights


def test_only_and_progress(tmp_path: Path) -> None:
    started: list[str] = []
    cases = list(run(small_copy(tmp_path), only="units", progress=started.append))
    assert [case.name for case in cases] == started == [f"units/{UNIT}"]


def test_folders_are_found_below(tmp_path: Path) -> None:
    for name in ("one", "deep/two"):
        (tmp_path / name).mkdir(parents=True)
        small_copy(tmp_path / name)
    names = [case.name for case in run(tmp_path)]
    assert sorted(names) == sorted(
        f"{folder}/{case}"
        for folder in ("one", "deep/two")
        for case in ("weights/p1", f"forward/{FORWARD}", f"units/{UNIT}")
    )


@pytest.mark.parametrize(
    "tensor", ["out", "out_f64", "context", "time_emb", "motion_emb", "appearance_emb", "emb_sum", "input_blocks.0"]
)
def test_a_changed_tensor_fails_only_its_case(tmp_path: Path, tensor: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        values = tensors[f"spatial_b1_8x8_arbcond/{tensor}"].flatten()
        values[-1] += 1e-3 * values.abs().max()

    edit_tensors(small_copy(tmp_path) / "p1.forward.safetensors", change)
    failed = [case for case in run(tmp_path) if not case.passed]
    assert [(case.name, case.tensor) for case in failed] == [(f"forward/{FORWARD}", tensor)]
    assert failed[0].error > failed[0].allowed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_stored_tensor_that_is_not_finite_fails(tmp_path: Path, value: float) -> None:
    edit_tensors(small_copy(tmp_path) / "p1.units.safetensors", lambda t: t["out@s1/out"].flatten()[3].fill_(value))
    assert [case.passed for case in run(tmp_path, only="units")] == [False]


def test_stored_weights_are_used_and_a_wrong_one_is_noticed(tmp_path: Path) -> None:
    small_copy(tmp_path)
    edit_json(tmp_path, lambda record: record["models"]["p1"].update(stored=True, weight_recipe="by another"))
    record = json.loads((tmp_path / "fixtures.json").read_text())["models"]["p1"]
    config = recorded_config(record["kwargs"], "p1")
    names = reference_names(config)
    weights = {names[ours]: tensor for ours, tensor in recipe_state(config, 0)}
    weights["input_blocks.0.1.proj_in.weight"] = weights["input_blocks.0.1.proj_in.weight"][..., None]  # as released
    save_file(weights, tmp_path / "p1.weights.safetensors")
    assert all(case.passed for case in run(tmp_path))

    weights["time_embed.0.weight"][0, 0] += 0.01
    save_file(weights, tmp_path / "p1.weights.safetensors")
    assert {case.name: case.passed for case in run(tmp_path)} == {
        "weights/p1": False,
        f"forward/{FORWARD}": False,
        f"units/{UNIT}": True,
    }


def test_another_model_salt_and_names(tmp_path: Path) -> None:
    kwargs = {"dim": 64, "y_dim": 24, "dim_mult": [1, 1], "num_heads": 3, "head_dim": 32, "num_res_blocks": 3}
    kwargs |= {"attn_scales": [0.5], "num_tokens": 3, "context_embedding_depth": 1}
    config = recorded_config(kwargs, "q")
    denoiser = assemble(config, recipe_state(config, 0xBEEF))
    g = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(2, 4, 3, 8, 6, generator=g), torch.tensor([5, 700]), torch.randn(2, 4, 24, generator=g)
    prior, appearance = torch.randn(2, 4, 8, 6, generator=g), torch.rand(2, 3, 32, generator=g)
    motion = torch.tensor([[30.0, 40.0, 1.0], [500.0, 0.0, 7.0]])
    angles = motion[..., None] * 10000.0 ** (-torch.arange(32) / 32)
    with torch.no_grad():
        context, embedding = denoiser.conditioner(y, torch.cat([angles.cos(), angles.sin()], -1), appearance)
        out = denoiser.unet(x, t, context, embedding, prior)
    tensors = {"x": x, "t": t, "y": y, "spat_prior": prior, "motion_cond": motion, "appearance_cond": appearance}
    tensors["out"] = out.contiguous()
    save_file({f"a case/{name}": tensor for name, tensor in tensors.items()}, tmp_path / "q.7.forward.safetensors")
    record = {
        "models": {"q.7": {"kwargs": kwargs, "stored": False, "weight_recipe": "oracle.fill_tensor(key, salt=0xbeef)"}},
        "forward": {"q.7/a case": {"fp32_vs_fp64_max_abs": 3e-6}},
        "note": {"made by": "this test"},
    }
    (tmp_path / "fixtures.json").write_text(json.dumps(record))
    assert [case.passed for case in run(tmp_path, only="forward")] == [True]
    edit_json(tmp_path, lambda record: record["models"]["q.7"].update(weight_recipe="salt=48878"))
    assert [case.passed for case in run(tmp_path, only="forward")] == [False]


MALFORMED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no json": ("no fixtures", lambda f: (f / "fixtures.json").unlink()),
    "broken json": ("not readable as JSON", lambda f: (f / "fixtures.json").write_text('{"models": {')),
    "json of another kind": ("a JSON object", lambda f: (f / "fixtures.json").write_text("[]")),
    "no cases": ("no fixtures", lambda f: (rewrite(f, {"models": {}}), [p.unlink() for p in f.glob("*.safetensors")])),
    "no tensor file": ("p1.units", lambda f: (f / "p1.units.safetensors").unlink()),
    "truncated tensors": ("p1.forward", lambda f: truncate(f / "p1.forward.safetensors", 1000)),
    "truncated header": ("p1.forward", lambda f: truncate(f / "p1.forward.safetensors", 20)),
    "empty tensor file": ("p1.forward", lambda f: truncate(f / "p1.forward.safetensors", 0)),
    "no tensor file of a kind that is listed": (
        "p1.sample",
        lambda f: edit_json(f, lambda r: r.update(sample={"p1/a": {}})),
    ),
    "a case that is not listed": ("out@s1", lambda f: edit_json(f, lambda r: r.update(units={}))),
    "a listed case without tensors": (
        "ghost",
        lambda f: edit_json(f, lambda r: r["units"].update({"p1/ghost@s1": {}})),
    ),
    "an unknown kind": ("unknown kind of case", lambda f: edit_json(f, lambda r: r.update(dreams={"p1/a": {}}))),
    "an unknown file": ("p1.dreams", lambda f: shutil.copy(f / "p1.units.safetensors", f / "p1.dreams.safetensors")),
    "an unknown model": ("not listed", lambda f: edit_json(f, lambda r: r["forward"].update({"p9/a": {}}))),
    "a kind that is not an object": ("forward", lambda f: edit_json(f, lambda r: r.update(forward=[1]))),
    "no salt": ("salt", lambda f: edit_json(f, lambda r: r["models"]["p1"].update(weight_recipe="by hand"))),
    "a missing argument": ("kwargs", lambda f: edit_json(f, lambda r: r["models"]["p1"]["kwargs"].pop("dim_mult"))),
    "a wrong argument": ("kwargs", lambda f: edit_json(f, lambda r: r["models"]["p1"]["kwargs"].update(dim=33))),
    "no weights": ("p1.weights", lambda f: edit_json(f, lambda r: r["models"]["p1"].update(stored=True))),
    "no noise floor": (
        "fp32_vs_fp64",
        lambda f: edit_json(f, lambda r: r["units"][UNIT].pop("fp32_vs_fp64_max_abs")),
    ),
    "a noise floor without bound": (
        "fp32_vs_fp64",
        lambda f: edit_json(f, lambda r: r["units"][UNIT].update(fp32_vs_fp64_max_abs=math.inf)),
    ),
    "an unknown tensor": (
        "unknown",
        lambda f: edit_tensors(f / "p1.forward.safetensors", lambda t: rename(t, "/context", "/contents")),
    ),
    "an unknown block": (
        "block/input_blocks.99.0",
        lambda f: edit_tensors(
            f / "p1.forward.safetensors", lambda t: rename(t, "/emb_sum", "/block/input_blocks.99.0")
        ),
    ),
    "a missing input": (
        "spat_prior",
        lambda f: edit_tensors(f / "p1.forward.safetensors", lambda t: rename(t, "/spat_prior", "/out_again")),
    ),
    "an input of another shape": (
        "cannot be run",
        lambda f: edit_tensors(f / "p1.forward.safetensors", lambda t: reshape(t, "/y", (1, 1, -1))),
    ),
    "an unknown module": ("input_blocks.77", lambda f: rename_unit(f, "input_blocks.77@s1")),
    "a misplaced weights file": ("p1.weights", lambda f: stored_weights(f, {"a": torch.zeros(1)})),
}


def rewrite(folder: Path, record: dict[str, Any]) -> None:
    (folder / "fixtures.json").write_text(json.dumps(record))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if name.endswith(old)]:
        tensors[name.removesuffix(old) + new] = tensors.pop(name)


def reshape(tensors: dict[str, Tensor], end: str, shape: tuple[int, ...]) -> None:
    for name in [name for name in tensors if name.endswith(end)]:
        tensors[name] = tensors[name].reshape(shape)


def rename_unit(folder: Path, name: str) -> None:
    edit_json(folder, lambda r: r.update(units={f"p1/{name}": r["units"][UNIT]}))
    stored = load_file(folder / "p1.units.safetensors")
    renamed = {f"{name}/{key.partition('/')[2]}": tensor for key, tensor in stored.items()}
    save_file(renamed, folder / "p1.units.safetensors")


def stored_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    edit_json(folder, lambda r: r["models"]["p1"].update(stored=True))
    save_file(weights, folder / "p1.weights.safetensors")


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_directory(tmp_path: Path, name: str) -> None:
    message, spoil = MALFORMED[name]
    spoil(small_copy(tmp_path))
    with pytest.raises(FixtureError, match=message):
        list(run(tmp_path))


def test_structure_is_checked_before_the_first_case_runs(tmp_path: Path) -> None:
    truncate(small_copy(tmp_path) / "p1.units.safetensors", 100)
    with pytest.raises(FixtureError, match=r"p1\.units"):
        run(tmp_path)


@pytest.mark.parametrize("where", ["nothing here", "fixtures.json"])
def test_not_a_directory(tmp_path: Path, where: str) -> None:
    with pytest.raises(FixtureError, match="not a directory"):
        run(small_copy(tmp_path) / where)


def test_empty_directory_does_not_pass(tmp_path: Path) -> None:
    with pytest.raises(FixtureError, match="no fixtures"):
        run(tmp_path)


def test_only_without_a_match_does_not_pass(tmp_path: Path) -> None:
    with pytest.raises(FixtureError, match="only='temporal'"):
        run(small_copy(tmp_path), only="temporal")


@pytest.mark.parametrize(
    ("recipe", "salt"),
    [("oracle.fill_tensor(key, salt=4660)", 4660), ("(key, salt=0x0) on every key; gain 1", 0), ("salt = 0X1f", 31)],
)
def test_salt(recipe: str, salt: int) -> None:
    assert recipe_salt(recipe, "") == salt


@pytest.mark.parametrize("recipe", ["", "salt=", "salt=-1", "salt=4294967296", "pepper=3"])
def test_no_salt(recipe: str) -> None:
    with pytest.raises(FixtureError, match="salt"):
        recipe_salt(recipe, "")


def test_recipe_is_one_stream_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recipe_tensor("a.weight", (7, 5, 3, 1), 9)
    monkeypatch.setattr("higen.parity.fixtures.CHUNK", 11)
    assert torch.equal(recipe_tensor("a.weight", (7, 5, 3), 9).reshape(whole.shape), whole)
    assert abs(float(whole.std()) * 15**0.5 - 1) < 0.15  # fan_in 5 x 3


def test_recipe_of_the_first_numbers() -> None:
    # time_embed.0.weight of the full-size model with salt 0 begins with these (full_size/salt0.json)
    first = recipe_tensor("time_embed.0.weight", (1280, 320), 0).flatten()[:4]
    expected = [0.024342495948076248, 0.05561761558055878, -0.021338317543268204, -0.0713614746928215]
    assert np.array_equal(first.numpy(), np.array(expected, np.float32))


def test_compare() -> None:
    stored = torch.tensor([1.0, -4.0])
    assert compare("x", stored + torch.tensor([0.0, 7e-5]), stored).allowed == pytest.approx(8e-5)
    assert compare("x", stored, stored, noise=1e-4).allowed == pytest.approx(1e-3)
    assert not compare("x", stored + 1e-4, stored).passed
    assert compare("x", stored[None], stored).error == math.inf
    assert compare("x", torch.tensor([math.inf, -4.0]), stored).error == math.inf
    infinite = torch.tensor([math.inf, 1.0])
    assert compare("x", infinite, infinite).passed
    assert not compare("x", -infinite, infinite).passed
    undefined = torch.tensor([math.nan, 1.0])
    assert not compare("x", undefined, undefined).passed


def test_cases_are_values_and_the_table_says_which_tensor_is_over() -> None:
    cases = [Case("forward/a", 1e-6, 2e-5, True, "out"), Case("units/b", 3e-3, 2e-5, False, "context")]
    with pytest.raises(FrozenInstanceError):
        cases[0].error = 0.0  # type: ignore[misc]
    assert [line.split() for line in main_table(cases).splitlines()] == [
        ["case", "max", "error", "allowed", "ok"],
        ["forward/a", "1.00e-06", "2.00e-05", "ok"],
        ["units/b", "3.00e-03", "2.00e-05", "OVER", "context"],
    ]
    assert Case("a", math.inf, 1.0, False, "out").as_json()["error"] is None
