"""The command `higen`: what it writes and prints, and meaningful exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result
from conftest import TINY, WORDS
from interpreter_model import MANIFEST as MADE_UP

import higen
from higen.api import default_model
from higen.backends.options import Options
from higen.backends.select import StageRouter, select_backend
from higen.bundle import Bundle, create_model, put_file, rewrite
from higen.cli import main
from higen.errors import BackendUnavailable, FixtureError, TrainingError
from higen.families.higen import spec
from higen.manifest import Manifest
from higen.parity import Case
from higen.tables import Control
from higen.terminal import OPTIONAL
from higen.tokenizer import build_clip_tokenizer, write_tokenizer
from higen.video import Video

ROOT = Path(__file__).resolve().parents[1]


def here() -> list[str]:
    """The names of the files in the current folder."""
    return sorted(path.name for path in Path().iterdir())


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def generate(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`higen generate` on the tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run("generate", *arguments, "--model", tiny_model)


def test_the_version_and_the_commands() -> None:
    assert run("--version").output == f"higen, version {higen.__version__}\n"
    listed = run("--help").output
    assert all(f"  {name} " in listed for name in ("generate", "convert", "doctor", "parity", "prompts", "train"))


def test_python_m_higen_is_the_command() -> None:
    command = [sys.executable, "-m", "higen", "--version"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert made.stdout == f"higen, version {higen.__version__}\n"


# generate


def test_generate_writes_the_file_and_says_so(generate: Any) -> None:
    result = generate("a blue whale", "-o", "whale.webp", "--seed", "7")
    assert result.exit_code == 0
    assert result.stdout.startswith("whale.webp: 4 frames, 24x16, 8 fps, ")
    assert result.stderr == ""
    video = Video.open("whale.webp")
    assert video.frames.shape == (4, 16, 24, 3)
    assert video.metadata["seed"] == 7
    assert here() == ["whale.webp"]


def test_generate_passes_every_option_on(generate: Any) -> None:
    result = generate(
        *("a red heart", "-o", "heart.npy", "--json", "--negative-prompt", "a star", "--seed", 2**64 - 1),
        *("--steps", "2,3", "--guidance", "1.5,0", "--solver", "dpm++2m", "--frames", "3", "--width", "12"),
        *("--height", "20", "--fps", "5", "--motion", "10,20", "--appearance", "0.5", "--device", "cpu"),
        *("--backend", "torch"),
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert np.load("heart.npy").shape == (3, 20, 12, 3)
    wanted = {
        "file": "heart.npy",
        "frames": 3,
        "width": 12,
        "height": 20,
        "fps": 5.0,
        "prompt": "a red heart",
        "negative_prompt": "a star",
        "seed": 2**64 - 1,
        "steps": [2, 3],
        "guidance": [1.5, 0.0],
        "solver": "dpm++2m",
        "motion": [10.0, 20.0],
        "appearance": 0.5,
        "model": "tiny",
    }
    assert {name: said[name] for name in wanted} == wanted
    assert sorted(said["seconds"]) == ["decode", "spatial", "temporal", "text"]


def test_options_follow_the_model(tmp_path: Path, tiny_model: Path) -> None:
    """Each control has an option. --help lists the controls of --model with range and default."""
    listed = run("generate", "--help").output
    assert all(f"--{name} " in listed for name in ("motion", "appearance", "offset-noise", "image"))
    mood = Control("mood_of_it", "choice", "bright or dark", "number", choices=("bright", "dark"), default="dark")
    rows = (*spec.manifest(TINY).controls, mood, Control("grain", "whole", "how coarse", "number", low=1.0, default=3))
    model = shutil.copytree(tiny_model, tmp_path / "model")
    write(model, replace(Bundle.open(tiny_model).manifest, controls=rows))
    for arguments in (("--model", model, "--help"), (f"--model={model}", "-h"), ("--help", "--model", model)):
        listed = " ".join(run("generate", *arguments).output.split())
        assert "--mood-of-it [bright|dark] Bright or dark [dark]" in listed
        assert "--grain INTEGER How coarse" in listed
    assert "mood-of-it" not in run("generate", "--help").output
    refused = run("generate", "a whale", "--mood-of-it", "dark")
    assert refused.exit_code == 2
    assert "No such option '--mood-of-it'" in " ".join(refused.stderr.split())
    made = run(
        *("generate", "a whale", "--model", model, "--mood-of-it", "bright", "--grain", "7", "--json", "--steps", "1"),
        *("-o", tmp_path / "x.npy"),
    )
    said = json.loads(made.stdout)
    assert (said["mood_of_it"], said["grain"]) == ("bright", 7)
    wrong = run("generate", "a whale", "--model", model, "--mood-of-it", "loud")
    assert wrong.exit_code == 2
    assert "'loud' is not one of 'bright', 'dark'" in wrong.stderr
    wrong = run("generate", "a whale", "--model", model, "--grain", "0", "-o", tmp_path / "y.npy")
    assert wrong.stderr == "RequestError: grain=0: a whole number from 1\n"


def write(model: Path, manifest: Manifest) -> None:
    """Replace the tables of a model directory."""
    rewrite(model, lambda opened: replace(opened, manifest=manifest))


def test_a_control_named_like_an_option_of_the_command_does_not_hide_it(tmp_path: Path, tiny_model: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    rows = (*spec.manifest(TINY).controls, Control("output", "number", "how much", "number", default=1.0))
    write(model, replace(Bundle.open(tiny_model).manifest, controls=rows))
    made = run("generate", "a whale", "--model", model, "--output", tmp_path / "x.npy", "--steps", "1")
    assert made.exit_code == 0, made.output
    assert (tmp_path / "x.npy").exists()


def test_help_of_a_model_that_cannot_be_read_still_lists_the_common_options(tmp_path: Path) -> None:
    result = run("generate", "--model", tmp_path / "nowhere", "--help")
    assert result.exit_code == 0
    assert "--guidance" in result.output
    assert "--motion" not in result.output


@pytest.mark.parametrize("word", ["unspecified", "0.5", "10,20,30"])
def test_a_curve_is_numbers_or_unspecified(tmp_path: Path, preconditioned_model: Path, word: str) -> None:
    arguments = ("a whale", "--model", preconditioned_model, "--motion", word, "--steps", "1", "--json")
    said = json.loads(run("generate", *arguments, "-o", tmp_path / "x.npy").stdout)
    assert said["motion"] == {"unspecified": None, "0.5": 0.5, "10,20,30": [10, 20, 30]}[word]


def test_a_drawn_seed_is_printed(generate: Any) -> None:
    said = json.loads(generate("a star", "-o", "star.npy", "--seed", "-1", "--steps", "1", "--json").stdout)
    assert 0 <= said["seed"] < 2**32


def test_generate_loads_only_what_the_request_needs(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from higen.backends.torch import TorchBackend

    loaded: list[str] = []
    module = TorchBackend.module

    def seen(self: TorchBackend, stage: str) -> Any:
        loaded.append(stage)
        return module(self, stage)

    monkeypatch.setattr(TorchBackend, "module", seen)
    assert generate("a star", "-o", "star.npy", "--frames", "1", "--steps", "1", "--guidance", "1").exit_code == 0
    assert set(loaded) == {"text_encoder", "conditioner", "spatial_unet_plain", "vae_decoder"}


def test_generate_equals_the_library(generate: Any, tiny_model: Path) -> None:
    generate("a star", "-o", "star.npy", "--seed", "3")
    with higen.load(tiny_model) as pipe:
        np.testing.assert_array_equal(np.load("star.npy"), pipe("a star", seed=3).frames)


def test_generate_says_how_stages_are_to_run(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []

    def select(bundle: Bundle, name: str, options: Options) -> StageRouter:
        seen.append(options)
        return select_backend(bundle, name, options)

    monkeypatch.setattr("higen.api.select_backend", select)
    chosen = ("--device", "cpu", "--precision", "fp32", "--threads", "1", "--low-memory")
    assert generate("a star", "-o", "star.gif", *chosen).exit_code == 0
    assert generate("a star", "-o", "star.gif").exit_code == 0
    assert seen == [Options("cpu", "fp32", 1, low_memory=True), Options()]


def test_generate_from_a_picture(generate: Any) -> None:
    PIL.Image.new("RGB", (40, 40), "red").save("red.png")
    result = generate("a star", "--image", "red.png", "-o", "star.gif", "--json")
    assert result.exit_code == 0
    assert "spatial" not in json.loads(result.stdout)["seconds"]


def test_our_warnings_are_lines_and_the_libraries_are_quiet(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Video.save

    def noisy(self: Video, path: Path, **sound: Any) -> Path:
        warnings.warn("a library's own business", UserWarning, stacklevel=2)
        return save(self, path, **sound)

    monkeypatch.setattr(Video, "save", noisy)
    result = generate("a purple star", "-o", "star.gif")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "PromptWarning: prompt: this model does not know 'purple'; `higen prompts` lists the words it knows"
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("", "-o", "x.mp4"), "RequestError", "prompt=''"),
        (("a", "-o", "x.avi"), "OutputError", "suffix '.avi' is unknown"),
        (("a", "-o", "x"), "OutputError", "suffix '' is unknown"),
        (("a", "-o", "nowhere/x.mp4"), "OutputError", "nowhere"),
        (("a", "-o", "x.mp4", "--steps", "0"), "RequestError", "steps=0"),
        (("a", "-o", "x.mp4", "--steps", "1001"), "RequestError", "steps=1001"),
        (("a", "-o", "x.mp4", "--steps", "2.5"), "RequestError", "steps=2.5"),
        (("a", "-o", "x.mp4", "--steps", "1,2,3"), "RequestError", "steps=[1, 2, 3]"),
        (("a", "-o", "x.mp4", "--guidance", "nan"), "RequestError", "guidance=nan"),
        (("a", "-o", "x.mp4", "--guidance", "-1"), "RequestError", "guidance=-1.0"),
        (("a", "-o", "x.mp4", "--seed", "-2"), "RequestError", "seed=-2"),
        (("a", "-o", "x.mp4", "--frames", "0"), "RequestError", "frames=0"),
        (("a", "-o", "x.mp4", "--frames", "10000"), "RequestError", "frames=10000"),
        (("a", "-o", "x.mp4", "--width", "25"), "RequestError", "width=25"),
        (("a", "-o", "x.mp4", "--motion", "1,2"), "RequestError", "motion has shape [2]"),
        (("a", "-o", "x.mp4", "--solver", "euler"), "RequestError", "solver='euler'"),
        (("a", "-o", "x.mp4", "--backend", "tpu"), "RequestError", "backend='tpu'"),
        (("a", "-o", "x.mp4", "--image", "nowhere.png"), "RequestError", "nowhere.png"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_wrong_input_is_one_line_and_exit_code_2_before_work(
    generate: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], error: str, message: str, as_json: bool
) -> None:
    for name in ("choose", "run"):
        monkeypatch.setattr(StageRouter, name, lambda *_, **__: pytest.fail("no weights are to be loaded"))
    result = generate(*arguments, *(["--json"] if as_json else []))
    assert result.exit_code == 2
    if as_json:
        said = json.loads(result.stdout)
        assert said["error"] == error
        assert message in said["message"]
        assert result.stderr == ""
    else:
        assert result.stdout == ""
        assert result.stderr.startswith(f"{error}: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert here() == []


def test_invalid_numbers_are_a_usage_error(generate: Any) -> None:
    result = generate("a", "--motion", "1,x")
    assert result.exit_code == 2
    assert "Invalid value for '--motion': '1,x': numbers separated by commas, or a clip or sound file" in result.stderr
    assert run("generate").exit_code == 2
    assert run("generate", "a", "--frobnicate").exit_code == 2


def test_a_broken_model_is_wrong_input(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "unet.safetensors").write_bytes(b"")
    result = run("generate", "a", "--model", model, "-o", tmp_path / "x.mp4", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "IntegrityError"
    result = run("generate", "a", "--model", tmp_path / "nowhere", "-o", tmp_path / "x.mp4")
    assert result.exit_code == 2
    assert result.stderr.startswith("ManifestError: ")


def test_a_backend_that_cannot_work_is_a_failure(generate: Any) -> None:
    result = generate("a whale", "-o", "x.mp4", "--device", "cuda:99", "--backend", "torch", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "BackendUnavailable"


def test_ctrl_c_leaves_nothing_and_exit_code_130(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("higen.pipeline.decoded", interrupt)
    result = generate("a whale", "-o", "x.mp4")
    assert result.exit_code == 130
    assert result.stderr == "stopped\n"
    assert here() == []


HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""Restores Ctrl-C, because a shell starts background processes and their children with SIGINT ignored."""
WATCHED = "import sys; sys.stderr.isatty = lambda: True; from higen.cli import main; main()"
"""The command with a standard error that looks like a terminal, so that it shows its bars."""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT can be sent to one process on POSIX only")
def test_a_real_sigint_stops_a_real_run(tiny_model: Path, tmp_path: Path) -> None:
    command = ["generate", "a whale", "--model", str(tiny_model), "-o", "x.mp4", "--steps", "1000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HEARING + WATCHED, *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    seen = ""
    while "spatial" not in seen:  # the first bar shows that the work has begun
        letter = process.stderr.read(1)
        assert letter, f"it ended by itself: {seen}"
        seen += letter
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 130
    assert rest.endswith("stopped\n")
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


# The other commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "train.toml"], r"higen train needs the package 'torch': pip install 'higen\[train\]'"),
        (["train", "default", "--work", "w", "--output", "o"], r"higen train needs .*'higen\[train\]'"),
        (["evaluate", "--data", "d", "--output", "o"], r"higen evaluate needs .*'higen\[train\]'"),
        (["parity", "fixtures"], r"higen parity needs .*'higen\[torch\]'"),
        (["convert", "m", "--denoiser", "d", "--text-encoder", "t", "--autoencoder", "a"], r"higen convert .*torch\]'"),
    ],
)
def test_without_torch_one_line_names_the_extra(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "train.toml").write_text('[model]\ninit = "m"\n[data]\npath = "d"\n[run]\noutput = "r"\nsteps = 1\n')
    core = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); from higen.cli import main; main({arguments})"
    made = subprocess.run([sys.executable, "-c", core], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (made.returncode, made.stdout) == (1, "")
    assert re.fullmatch(f"MissingExtra: {message}\n", made.stderr), made.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["train.toml"]


def test_prompts_and_the_words_they_are_made_of(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    words = sorted(set(WORDS) - {","})
    assert run("prompts", "--model", tiny_model).output.splitlines() == [
        *TINY.prompts,
        "",
        "It knows 9 words, and no others:",
        "a  beating  blue  green  heart",
        "red  star  swimming  whale",
    ]
    found = json.loads(run("prompts", "--model", tiny_model, "--json").stdout)
    assert found == {"prompts": list(TINY.prompts), "words": words}
    assert run("prompts", "--model", tiny_model.parent).exit_code == 2
    shutil.copytree(tiny_model, tmp_path / "clip")
    clip = Bundle.open(tmp_path / "clip")
    write_tokenizer(build_clip_tokenizer(), tmp_path / "clip" / ".tokenizer")
    put_file(clip, tmp_path / "clip" / ".tokenizer", spec.TOKENIZER)
    assert run("prompts", "--model", tmp_path / "clip").output.splitlines() == [*TINY.prompts, "", "It reads any word."]
    assert json.loads(run("prompts", "--model", tmp_path / "clip", "--json").stdout)["words"] is None


def test_prompts_of_a_model_that_reads_no_text(tmp_path: Path) -> None:
    reader = MADE_UP.stage("reader")
    silent = replace(reader, inputs=(replace(reader.inputs[0], source="noise:3", dtype="float32"),))
    manifest = replace(MADE_UP, text=None, stages=tuple(silent if s.name == "reader" else s for s in MADE_UP.stages))
    with create_model(tmp_path / "model", manifest):
        pass
    assert run("prompts", "--model", tmp_path / "model").output.splitlines() == [
        *("The model lists none.", "", "It reads no text.")
    ]


def test_the_built_in_model_lists_speeds_and_stillness() -> None:
    listed = run("prompts").output.split()
    assert {"slowly", "quickly", "fast", "standing", "still", "whale"} <= set(listed)


@pytest.mark.parametrize("arguments", [["--sed", "3"], ["--seed", "x"], []])
def test_a_usage_error_is_json_with_the_option_json(arguments: list[str]) -> None:
    result = run("generate", *(["a whale", *arguments] if arguments else []), "--json")
    assert result.exit_code == 2
    said = json.loads(result.stdout)
    assert set(said) == {"error", "message"}
    assert said["error"] in ("NoSuchOption", "BadParameter", "RequestError")
    assert run("doctor", "--json", "--help").output.startswith("Usage:")


@pytest.fixture
def built_in(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model in place of the built-in one."""
    monkeypatch.setattr("higen.doctor.default_model", lambda: tiny_model)


@pytest.mark.usefixtures("built_in")
def test_doctor(tiny_model: Path) -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert f"higen {higen.__version__}, Python {sys.version.split()[0]}" in result.output
    assert "\nbuilt-in model: tiny, " in result.output
    assert result.output.rstrip().endswith("intact")
    (torch,) = [line for line in result.output.splitlines() if line.split() == ["torch", "works"]]
    assert torch.startswith("  torch ")
    said = json.loads(run("doctor", "--json").stdout)
    assert said["healthy"] is True
    assert said["backends"]["torch"] == {"works": True, "reason": ""}
    assert said["packages"]["numpy"] == np.__version__
    assert said["packages"]["tensorrt"] is None
    assert said["cpus"] >= 1
    assert [(s["stage"], s["backend"], s["details"]) for s in said["stages"]] == [
        (n, "torch", "cpu, fp32") for n in Bundle.open(tiny_model).manifest.stage_names
    ]
    assert all("higen-export onnx" in stage["passed_over"]["onnx"] for stage in said["stages"])
    assert ["temporal_unet", "torch", "(cpu,", "fp32)"] in [line.split() for line in result.output.splitlines()]


@pytest.mark.usefixtures("built_in")
def test_doctor_says_why_a_backend_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    gone = ("torch", "diffusers", "onnxruntime")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest))
    result = run("doctor")
    assert result.exit_code == 1
    assert "no: not installed: torch, diffusers (pip install 'higen[torch]')" in result.output


def test_doctor_looks_at_any_model(tiny_model: Path) -> None:
    result = run("doctor", "--model", str(tiny_model))
    assert result.exit_code == 0
    assert result.output.rstrip().rpartition("\n")[2].startswith(f"{tiny_model}: tiny, ")


@pytest.mark.usefixtures("built_in")
def test_doctor_names_two_packages_that_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    assert "note: onnxruntime and onnxruntime-gpu are both installed" in run("doctor").output


def test_doctor_sees_a_broken_model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = (model / "vae.safetensors").read_bytes()
    (model / "vae.safetensors").write_bytes(weights[:-1] + b"x")
    monkeypatch.setattr("higen.doctor.default_model", lambda: model)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["healthy"] is False
    assert said["model"].startswith("built-in model: broken: ")
    assert said["stages"] == []
    assert "vae.safetensors" in said["model"]


def stub(monkeypatch: pytest.MonkeyPatch, *cases: Case) -> None:
    monkeypatch.setattr("higen.parity.run", lambda *_, **__: iter(cases))


def test_parity_of_good_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, Case("units/a", 1e-6, 1e-5, True, "x"), Case("forward/b", 0.0, 1e-4, True, "y"))
    result = run("parity", "anywhere")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[-1] == "2 cases, 0 over"
    assert lines[-3].split() == ["units/a", "1.00e-06", "1.00e-05", "ok"]


def test_parity_with_a_case_over_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, Case("units/a", 1e-6, 1e-5, True, "x"), Case("forward/b", float("nan"), 1e-4, False, "y"))
    result = run("parity", "anywhere")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "2 cases, 1 over"
    assert "OVER y" in result.output
    result = run("parity", "anywhere", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert said["passed"] is False
    assert [case["passed"] for case in said["cases"]] == [True, False]


def test_parity_without_fixtures(tmp_path: Path) -> None:
    result = run("parity", tmp_path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == FixtureError.__name__


def test_training_that_cannot_start_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TrainingError("npm is not installed")

    monkeypatch.setattr("higen.train.emoji.run.run", refuse)
    result = run("train", "default", "--work", tmp_path / "work", "--output", tmp_path / "model")
    assert result.exit_code == 1
    assert result.stderr == "TrainingError: npm is not installed\n"


def test_convert_of_missing_files(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.pth"
    result = run(
        *("convert", "--denoiser", missing, "--text-encoder", missing, "--autoencoder", missing),
        *(tmp_path / "model", "--json"),
    )
    assert result.exit_code == 2
    assert "nowhere.pth" in json.loads(result.stdout)["message"]
    assert list(tmp_path.iterdir()) == []


def test_exit_codes_tell_environment_from_input(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: Any, **__: Any) -> None:
        raise BackendUnavailable("torch: not installed")

    monkeypatch.setattr("higen.api.select_backend", unavailable)
    assert generate("a whale", "-o", "x.mp4").exit_code == 1


def test_the_built_in_model_is_where_the_package_is() -> None:
    assert default_model() == Path(higen.__file__).parent / "assets" / "default"
