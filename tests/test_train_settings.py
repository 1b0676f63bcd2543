"""Settings of a training run: what a file may contain, and one clear error for everything else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from training_run import as_toml, write_settings

from higen.errors import SettingsError, TrainingError
from higen.train.data import IMAGE, VIDEO
from higen.train.processes import shares
from higen.train.settings import FREE, Settings, difference, flat, read_settings


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return read_settings(write_settings(tmp_path / "train.toml", Path("model"), Path("clips"), **changes))


def test_a_file_becomes_settings_with_absolute_paths(tmp_path: Path) -> None:
    read = settings(tmp_path, optimiser__betas=[0.9, 0.99], run__sample_prompts=["a whale"])
    assert read.model.init == str(tmp_path / "model")
    assert read.data.path == str(tmp_path / "clips")
    assert read.optimiser.betas == (0.9, 0.99)
    assert read.run.sample_prompts == ("a whale",)
    assert read.optimiser.ema == 0.9999
    assert read.model.architecture is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser__lr": 1e-3}, r"optimiser\.lr: unknown key; known are learning_rate, betas"),
        ({"run__steps": "many"}, r"run\.steps='many': a whole number is wanted"),
        ({"run__steps": True}, r"run\.steps=True: a whole number is wanted"),
        ({"run__steps": None}, r"run: has .* but needs output, steps"),
        ({"run__precision": "fp8"}, r"run\.precision='fp8': one of 'fp32', 'bf16'"),
        ({"run__keep": 0}, r"run\.keep=0: 1 or more"),
        ({"run__seed": -1}, r"run\.seed=-1: from 0 to 4294967295"),
        ({"run__seed": 2**32}, r"run\.seed=4294967296: from 0 to 4294967295"),
        ({"run__sample_every": 5}, r"run\.sample_every=5: needs sample_prompts"),
        ({"data__frames": 1}, r"data\.frames=1: 2 or more"),
        ({"data__images": -1}, r"data\.images=-1: 0 or more"),
        ({"data__images": 0, "data__videos": 0}, r"data\.images=0, videos=0"),
        ({"data__cache": "c", "data__crop": "random"}, r"data\.cache: needs crop = 'centre'"),
        ({"cues__dropout": 1.5}, r"cues\.dropout=1\.5: a part, from 0 to 1"),
        ({"cues__appearance": "openclip"}, r"cues\.appearance='openclip' and openclip"),
        ({"objective__text_dropout": float("nan")}, r"objective\.text_dropout=nan"),
        ({"optimiser__betas": [0.9]}, r"optimiser\.betas=\[0\.9\]"),
        ({"optimiser__betas": [0.9, 1.0]}, r"optimiser\.betas=\[0\.9, 1\.0\]"),
        ({"run__sample_prompts": ["a whale", "x" * 100_001]}, r"run\.sample_prompts=.*100001 characters: at most"),
        ({"model__init": None}, r"model\.init, architecture: give one of the two"),
        ({"model__architecture": "m.json"}, r"model\.init, architecture: give one of the two"),
        ({"model__tokenizer": "captions"}, r"model\.tokenizer='captions': needs optimiser\.train_text"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=rf"train\.toml: {message}") as caught:
        settings(tmp_path, **changes)
    assert isinstance(caught.value, TrainingError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", "cannot be read as TOML"),
        ("\x00", "cannot be read as TOML"),
        ('[data]\npath = "a\\u0000b"\n', r"data\.path='a\\x00b': line 1: the character U\+0000"),
        ("[modell]\n", r"section \[model\] is missing"),
        ("model = 3\n", "model: an object is wanted, not 3"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "train.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_settings(file)
    with pytest.raises(SettingsError, match="cannot be read as TOML"):
        read_settings(tmp_path / "absent.toml")


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    file = write_settings(tmp_path / "train.toml", Path("model"), Path("clips"))
    file.write_text(file.read_text() + as_toml({"optimizer": {"learning_rate": 1.0}}))
    with pytest.raises(SettingsError, match=r"toml: optimizer: unknown key; known are model, data, run, cues"):
        read_settings(file)


def test_the_difference_is_the_first_key_that_changes_what_is_learned(tmp_path: Path) -> None:
    first = settings(tmp_path / "a")
    assert difference(flat(first), settings(tmp_path / "b", run__keep=9, data__workers=4, run__log_every=7)) is None
    assert difference(flat(first), settings(tmp_path / "b", run__steps=7)) == "run.steps was 6 and is now 7"
    assert difference(flat(first), settings(tmp_path / "b", objective__text_dropout=0.0)) == (
        "objective.text_dropout was 0.1 and is now 0.0"
    )
    assert set(FREE) <= set(flat(first))


@pytest.mark.parametrize("key", ["data.path", "run.output", "model.init"])
def test_an_empty_path_is_not_the_files_own_folder(tmp_path: Path, key: str) -> None:
    values = {"model.init": "m", "data.path": "c", "run.output": "o", key: ""}
    lines = [f'[{name.split(".")[0]}]\n{name.split(".")[1]} = "{value}"' for name, value in values.items()]
    (tmp_path / "t.toml").write_text("\n".join(lines) + "\nsteps = 1\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=f"{key}='': a path is wanted"):
        read_settings(tmp_path / "t.toml")


def test_the_documented_settings_are_what_its_commands_take(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    file = tmp_path / "train.toml"
    file.write_text(text.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
    read = read_settings(file)
    assert read.run.sample_prompts == ("a whale splashing its tail",)
    assert read.cues.appearance == "openclip"  # the example fine-tunes the released model
    (processes,) = map(int, re.findall(r"torchrun --nproc-per-node (\d+) -m higen train train.toml", text))
    made = [shares(read, processes, index) for index in range(processes)]
    for kind, count in ((IMAGE, read.data.images), (VIDEO, read.data.videos)):
        assert [sample for share in made for sample in share[kind]] == list(range(count))
