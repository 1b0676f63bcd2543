"""A foreign family (tests/outside_family), installed from a wheel in a fresh environment, through the whole chain.

The chain is checkpoint, model directory, PyTorch, graphs with their gate, ONNX Runtime, engines for RTX, and the C++
runtime; test_outside_family_triton.py serves the model. Results are compared with tidepool_truth.py, which does not use
higen's runtime.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cpp_build
import diffusers
import numpy as np
import PIL.Image
import pytest
import tidepool_truth as truth
import torch
from safetensors.torch import load_file, save_file

from higen import families
from higen.backends.base import Backend
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.select import select_backend
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.convert import convert_sources
from higen.errors import BackendUnavailable, CheckpointError, IntegrityError, RequestError, UnknownFamily
from higen.export.model_graphs import export_model
from higen.manifest_file import read_manifest
from higen.pipeline import Pipeline
from higen.sampler import Step

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

diffusers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' warning

FOLDER = Path(__file__).resolve().parent / "outside_family"
PROMPT = "a crab waits"

Options_ = dict[str, Any]


# ---- The environment, the checkpoint and its products, made once for all tests ----


@dataclass(frozen=True)
class Environment:
    """A separate virtual environment with the family's wheel and a path to the packages installed here."""

    python: Path
    site: Path

    def run(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` in a folder without a checkout."""
        return run(self.python, *arguments, check=check, cwd=self.site)

    def higen(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The command higen."""
        return self.run("-m", "higen", *arguments, check=check)

    def export(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The command higen-export."""
        return self.run("-c", "from higen.exporter import main; main()", *arguments, check=check)


def run(program: object, *arguments: object, check: bool = True, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=cwd, timeout=600)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("outside")
    source = folder / "source"  # a copy, because building writes into the tree
    shutil.copytree(FOLDER, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = ("-m", "pip", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("tidepool-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    found = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    site = Path(found.stdout.strip())
    here = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(here)]
    (site / "here.pth").write_text("\n".join(lines) + "\n")
    run(sys.executable, *pip, "--python", python, "install", "-q", "--no-index", "--no-deps", wheel, cwd=folder)
    return Environment(python, site)


@pytest.fixture(scope="module")
def tidepool(outside: Environment) -> Iterator[SimpleNamespace]:
    """Makes the installed package and its entry point visible in this process too."""
    sys.path.insert(0, str(outside.site))
    importlib.invalidate_caches()
    families._packages.cache_clear()
    try:
        names = ("spec", "network", "checkpoint")
        yield SimpleNamespace(**{name: importlib.import_module(f"tidepool.{name}") for name in names})
    finally:
        sys.path.remove(str(outside.site))
        families._packages.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "tidepool"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def source(tidepool: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random nonzero weights. The decoder's are small, so few pixels are black or white."""
    random = torch.Generator().manual_seed(0)
    state = {}
    for make in tidepool.network.containers(tidepool.spec.Widths()).values():
        for name, tensor in make().state_dict().items():
            scale = 0.5 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
            scale *= 0.4 if name.startswith("develop") else 1.0
            state[f"tide.{name}"] = scale * torch.randn(tensor.shape, generator=random)
    path = tmp_path_factory.mktemp("checkpoint") / "tide.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def nets(tidepool: SimpleNamespace, source: Path) -> truth.Networks:
    """The family's layers for tidepool_truth.py, filled from the checkpoint itself."""
    state = {name.removeprefix("tide."): tensor for name, tensor in load_file(source).items()}
    made = {}
    for file, make in tidepool.network.containers(tidepool.spec.Widths()).items():
        made[file] = make().eval()
        made[file].load_state_dict({name: state[name] for name in made[file].state_dict()})
    words, water, glass = made.values()
    epsilon = {name: tidepool.network.Epsilon(name, getattr(water, name)) for name in ("pool", "surge")}
    return truth.Networks(words, glass, epsilon)


@pytest.fixture(scope="module")
def model(outside: Environment, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory made from the checkpoint. The command recognises the checkpoint's family."""
    path = tmp_path_factory.mktemp("converted") / "tidepool"
    said = outside.higen("convert", source, path, "--dtype", "fp32")
    assert "The weights are random: the videos show nothing." in said.stderr
    assert said.stdout.startswith(f"{path}: 4 files, ")
    return path


@dataclass(frozen=True)
class Exported:
    path: Path
    parity: list[dict[str, Any]]


@pytest.fixture(scope="module")
def exported(outside: Environment, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The model with graphs from the command. HIGEN_OUTSIDE_MODEL names a folder that keeps it for the Triton test."""
    path = tmp_path_factory.mktemp("exported") / "tidepool"
    shutil.copytree(model, path)
    parity = json.loads(outside.export("onnx", path, "--json").stdout)["parity"]
    if kept := os.environ.get("HIGEN_OUTSIDE_MODEL"):
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(path, kept)
    return Exported(path, parity)


@pytest.fixture(scope="module")
def by_torch(tidepool: SimpleNamespace, model: Path) -> Iterator[Pipeline]:
    bundle = Bundle.open(model)
    with Pipeline(bundle, TorchBackend(bundle, Options("cpu"))) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def by_graphs(exported: Exported) -> Iterator[Pipeline]:
    bundle = Bundle.open(exported.path)
    with Pipeline(bundle, OnnxBackend(bundle, Options("cpu", threads=1))) as pipeline:
        yield pipeline


# ---- Requests ----


def picture(seed: int, width: int = 33, height: int = 20) -> PIL.Image.Image:
    """Coarse colours, in a size that no request has."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)


PALETTE = picture(1)
RISING = [0.25 * i - 1 for i in range(9)]

CASES: dict[str, Options_] = {
    "defaults": {},
    "windows": {"frames": 11, "seed": 2**64 - 1, "drift": 0.7},
    "curves": {"frames": 9, "swell": RISING, "current": [1.5 * i for i in range(8)], "drift": RISING,
               "negative_prompt": "grey kelp"},
    "lcm": {"frames": 4, "solver": ["euler", "lcm"], "steps": [2, 3], "seed": 5},
    "ddim": {"frames": 3, "solver": ["heun", "ddim"], "steps": [1, 5], "seed": 6, "current": "unspecified"},
    "guidance": {"frames": 5, "guidance": [1.5, [0.0, 1.0, 4.0, 2.0, 0.5]], "negative_prompt": "light"},
    "plain": {"frames": 7, "guidance": 1, "prompt": "kelp sways in green light", "weather": "storm", "depth": 8},
    "snapshot": {"frames": 5, "snapshot": picture(2), "fps": 12, "carry": 0.9},
    "footage": {"frames": 6, "footage": [picture(10 + i) for i in range(6)], "keep": 0.75, "steps": [2, 5]},
    "frame": {"frames": 1, "width": 40, "height": 24, "seed": 9},
    "large": {"frames": 2, "width": 32, "height": 40, "palette": picture(3, 64, 48), "steps": 2, "seed": 7},
}  # fmt: skip


def wish_of(options: Options_, ids: Callable[[str], list[int]]) -> truth.Wish:
    """The request in the form of tidepool_truth.py."""
    given = {"palette": PALETTE, **options}
    known = {"swell", "current", "drift"}
    fields = {k: v for k, v in given.items() if k not in {"prompt", "negative_prompt", "steps", "guidance", *known}}
    for name in known & set(given):
        value = given[name]
        fields[name] = None if value == "unspecified" else value if isinstance(value, list) else [value]
    if "steps" in given:
        steps = given["steps"]
        fields["steps"] = tuple(steps) if isinstance(steps, list) else (steps, steps)
    if "guidance" in given:
        scales = given["guidance"] if isinstance(given["guidance"], list) else [given["guidance"]] * 2
        fields["guidance"] = (scales[0], scales[1] if isinstance(scales[1], list) else [scales[1]] * 2)
    if "solver" in given:
        fields["solver"] = tuple(given["solver"])
    return truth.Wish(ids=ids(given.get("prompt", PROMPT)), negative=ids(given.get("negative_prompt", "")), **fields)


def of_pipeline(options: Options_) -> Options_:
    """The request in a pipeline's form, with a clip as an array."""
    given = {"prompt": PROMPT, "palette": PALETTE, **options}
    if "footage" in given:
        given["footage"] = np.stack([np.asarray(frame) for frame in given["footage"]])
    return given


@pytest.fixture(scope="module")
def ids(tidepool: SimpleNamespace) -> Callable[[str], list[int]]:
    """Token ids by hand: padding 0, start 1, end 2, and the words from 4 on."""
    words = list(tidepool.spec.WORDS)

    def of(text: str) -> list[int]:
        found = [1, *(4 + words.index(word) for word in text.split()), 2]
        return found + [0] * (8 - len(found))

    return of


def result(pipeline: Pipeline, options: Options_) -> tuple[dict[str, np.ndarray], np.ndarray, set[str]]:
    """Last latents of each loop, frames, and the denoising stages that ran."""
    given = of_pipeline(options)
    stream, latents, stages = pipeline.stream(given.pop("prompt"), **given), {}, set()
    for event in stream:
        if isinstance(event, Step):
            latents[event.loop] = pipeline.backend.to_numpy(event.latents)
            stages.add(event.stage)
    return latents, stream.videos[0].frames, stages


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference between two videos."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b).max())


# ---- Convert ----


def test_the_environment_has_its_family_too(outside: Environment) -> None:
    script = "from higen import families; import tidepool; print(families.installed(), tidepool.__file__)"
    found = outside.run("-c", script).stdout.partition(")")[0].strip("(").split(", ")
    assert {"'higen'", "'tidepool'"} <= set(found)
    assert str(outside.site) in outside.run("-c", script).stdout


def test_the_checkpoint_becomes_the_familys_tables_and_weights(
    tidepool: SimpleNamespace, model: Path, source: Path
) -> None:
    bundle = Bundle.open(model)
    assert bundle.manifest == tidepool.spec.manifest(tidepool.spec.Widths())
    assert read_manifest(model).manifest == bundle.manifest
    wanted = load_file(source)
    stored = {f"tide.{k}": v for file in bundle.manifest.weights for k, v in load_file(bundle.file(file)).items()}
    assert sorted(stored) == sorted(wanted)
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
    text = (model / "higen.json").read_text().replace('"beta_end": 0.04', '"beta_end": 0.05')
    (changed := model.parent / "changed").mkdir()
    (changed / "higen.json").write_text(text)
    with pytest.raises(IntegrityError, match="was edited"):
        Bundle.open(changed)


def test_a_checkpoint_that_no_family_recognises_is_refused(tidepool: SimpleNamespace, tmp_path: Path) -> None:
    save_file({"colour": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"recognises this; installed are .*higen, .*tidepool"):
        convert_sources([tmp_path / "other.safetensors"], tmp_path / "model")
    with pytest.raises(CheckpointError, match="not a Tidepool checkpoint"):
        convert_sources([tmp_path / "other.safetensors"], tmp_path / "model", family="tidepool")
    with pytest.raises(UnknownFamily, match=r"'marsh': not installed here; installed are .*higen, .*tidepool"):
        convert_sources([tmp_path / "other.safetensors"], tmp_path / "model", family="marsh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors"]


# ---- PyTorch ----


@pytest.mark.parametrize("case", CASES)
def test_pytorch_makes_what_the_independent_loop_makes(
    by_torch: Pipeline, nets: truth.Networks, ids: Callable[[str], list[int]], case: str
) -> None:
    with torch.inference_mode():
        expected, frames = truth.generate(nets, wish_of(CASES[case], ids))
    latents, video, stages = result(by_torch, CASES[case])
    assert set(latents) == set(expected) - ({"pool"} if "snapshot" in CASES[case] else set())
    for loop, found in latents.items():
        wanted = expected[loop].numpy()
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max(), loop
    assert apart(video, frames) <= 1
    assert np.ptp(video) > 100
    guided = CASES[case].get("guidance") != 1
    assert {stage.rpartition("_")[2] for stage in stages} == {"pair" if guided else "single"}


INPUTS: dict[str, Options_] = {
    "prompt": {"prompt": "kelp sways"},
    "negative": {"negative_prompt": "kelp"},
    "seed": {"seed": 1},
    "fps": {"fps": 24},
    "swell": {"swell": 0.8},
    "current": {"current": 3.0},
    "drift": {"drift": 1.0},
    "depth": {"depth": 4},
    "weather": {"weather": "storm"},
    "carry": {"carry": 0.5},
    "palette": {"palette": picture(4)},
    "snapshot": {"snapshot": picture(5)},
    "footage": {"footage": [picture(20 + i) for i in range(5)]},
    "steps": {"steps": [3, 5]},
    "guidance of the pool": {"guidance": [12.0, [1.0, 1.5, 2.0, 2.5, 3.0]]},
    "guidance of one frame": {"guidance": [2.0, [1.0, 1.5, 2.0, 2.5, 4.0]]},
}


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_changes_the_video(by_torch: Pipeline, name: str) -> None:
    """The test would find a source that a runtime ignores."""
    assert apart(result(by_torch, INPUTS[name])[1], result(by_torch, {})[1]) > 3


def test_the_decoder_sees_the_neighbouring_frames(by_torch: Pipeline) -> None:
    latents, video, _ = result(by_torch, {})
    sizes = replace(by_torch.manifest.sizes, overlap=0)
    narrow = replace(by_torch.bundle, manifest=replace(by_torch.manifest, sizes=sizes))
    request = by_torch.request(PROMPT, palette=PALETTE)
    assert apart(by_torch.decode(latents["surge"], request)[0], video) == 0
    assert apart(Pipeline(narrow, by_torch.backend).decode(latents["surge"], request)[0], video) > 10


def check_a_batch(pipeline: Pipeline) -> None:
    """Samples of a batch equal single generations."""
    prompts, seeds, stills = [PROMPT, "kelp sways", "a crab"], [3, 4, 2**40], [picture(30 + i) for i in range(3)]
    together = pipeline(prompts, seed=seeds, palette=stills, progress=False)
    for prompt, seed, palette, video in zip(prompts, seeds, stills, together, strict=True):
        assert apart(video.frames, pipeline(prompt, seed=seed, palette=palette, progress=False).frames) <= 1


def test_a_batch_in_pytorch(by_torch: Pipeline) -> None:
    check_a_batch(by_torch)


def test_a_batch_on_the_graphs(by_graphs: Pipeline) -> None:
    check_a_batch(by_graphs)


def test_a_loop_that_needs_a_picture_says_so(by_torch: Pipeline) -> None:
    with pytest.raises(RequestError, match="palette: the loop surge needs one"):
        by_torch.request(PROMPT)
    assert by_torch.request(PROMPT, frames=1).controls["palette"] is None
    with pytest.raises(RequestError, match=r"motion: unknown; .* swell, current, drift, depth"):
        by_torch.request(PROMPT, motion=3)


# ---- Graphs ----


def test_every_graph_passed_the_gate(exported: Exported) -> None:
    bundle = Bundle.open(exported.path)
    stages = bundle.manifest.stage_names
    assert all(row["passed"] for row in exported.parity)
    counts = {name: sum(row["stage"] == name for row in exported.parity) for name in stages}
    assert all(count >= 2 for count in counts.values()), counts
    assert sorted(bundle.graphs) == sorted(f"{name}.onnx" for name in stages)
    for name in stages:
        taken = {row.name: row for row in bundle.graphs[f"{name}.onnx"]}
        assert list(taken) == [t.name for t in bundle.manifest.stage(name).inputs]
        assert bundle.files[f"{name}.onnx"].size < 60_000
    (latents, _) = bundle.graphs["develop.onnx"]
    assert latents.shape == (1, 4, "F", "H", "W")  # the decoder gets one sample at a time


def test_the_command_verifies_the_model(outside: Environment, exported: Exported) -> None:
    found = json.loads(outside.export("verify", exported.path, "--steps", 3, "--json").stdout)
    assert found["passed"]
    assert [loop["ran"] for loop in found["loops"]] == [True]


@pytest.mark.parametrize("case", CASES)
def test_graphs_make_pytorchs_frames(by_torch: Pipeline, by_graphs: Pipeline, case: str) -> None:
    theirs, expected, _ = result(by_torch, CASES[case])
    ours, video, stages = result(by_graphs, CASES[case])
    for loop, found in ours.items():
        assert np.abs(found - theirs[loop]).max() <= 1e-4 * np.abs(theirs[loop]).max()
    assert apart(video, expected) <= 1
    assert {stage.rpartition("_")[2] for stage in stages} == {"single" if case == "plain" else "pair"}


def test_half_precision_passes_its_gate(outside: Environment, exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / "tidepool"
    shutil.copytree(exported.path, path)
    stages = ("surge_pair", "develop")
    flags = [flag for stage in stages for flag in ("--stage", stage)]
    found = json.loads(outside.export("onnx", path, "--precision", "fp16", *flags, "--json").stdout)["parity"]
    assert {row["stage"] for row in found} == set(stages)
    assert all(row["passed"] for row in found)


def test_the_command_follows_the_models_controls(
    outside: Environment, by_graphs: Pipeline, exported: Exported, tmp_path: Path
) -> None:
    text = outside.higen("generate", "--model", exported.path, "--help").stdout
    for control in by_graphs.controls:
        assert f"--{control.name}" in text
        assert control.meaning.split()[0] in text
    assert "--motion" not in text
    PALETTE.save(tmp_path / "palette.png")
    swell = [0.1, 0.2, 0.3, 0.4]
    flags = ["--swell", ",".join(map(str, swell)), "--weather", "storm", "--depth", 5, "--seed", 4, "--frames", 4]
    said = outside.higen(
        "generate", PROMPT, "--model", exported.path, "--palette", tmp_path / "palette.png", *flags,
        "-o", tmp_path / "video.npy", "--backend", "onnx", "--json",
    )  # fmt: skip
    about = json.loads(said.stdout)
    assert about["model"] == "tidepool"
    assert about["weather"] == "storm"
    options = {"swell": swell, "weather": "storm", "depth": 5, "seed": 4, "frames": 4}
    assert apart(np.load(tmp_path / "video.npy"), result(by_graphs, options)[1]) == 0


# ---- Engines ----


def test_an_engine_of_every_stage_is_built(outside: Environment, exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "tidepool"
    shutil.copytree(exported.path, path)
    made = json.loads(outside.export("build-engines", path, "--target", "rtx-sm89", "--json").stdout)["engines"]
    stages = Bundle.open(path).manifest.stage_names
    assert [row["stage"] for row in made] == list(stages)
    folder = path / "engines" / "rtx-sm89"
    for row in made:
        assert (folder / f"{row['stage']}.engine").stat().st_size == row["size"] > 1000
        record = json.loads((folder / f"{row['stage']}.json").read_text())
        assert record["stage"] == row["stage"]


# ---- C++ ----


def flags_of(options: Options_, folder: Path) -> tuple[str, list[str]]:
    """The prompt and a request's options as higen-run's command line takes them."""
    given, flags = {"palette": PALETTE, **options}, []
    prompt = given.pop("prompt", PROMPT)
    for name, value in given.items():
        if name in ("palette", "snapshot", "footage"):
            pictures = value if isinstance(value, list) else [value]
            files = [folder / f"{name}{i}.ppm" for i in range(len(pictures))]
            for image, file in zip(pictures, files, strict=True):
                image.save(file)
            flags += ["--picture", f"{name}={','.join(map(str, files))}"]
        elif name == "negative_prompt":
            flags += ["--negative", value]
        elif name in ("swell", "current", "drift", "depth", "weather", "carry", "keep"):
            flags += ["--control", f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"]
        else:
            parts = value if isinstance(value, list) else [value]
            text = ",".join(":".join(map(str, part)) if isinstance(part, list) else str(part) for part in parts)
            flags += [f"--{name}", text]
    return prompt, flags


def by_cpp(built: Path, model: Path, options: Options_, folder: Path) -> np.ndarray:
    prompt, flags = flags_of(options, folder)
    run(built / "higen-run", model, prompt, "-q", "-o", folder / "video.npy", *flags, cwd=folder)
    frames: np.ndarray = np.load(folder / "video.npy")
    return frames


@pytest.mark.parametrize("case", CASES)
def test_cpp_and_python_make_the_same_frames(
    built: Path, by_torch: Pipeline, exported: Exported, case: str, tmp_path: Path
) -> None:  # fmt: skip
    assert apart(by_cpp(built, exported.path, CASES[case], tmp_path), result(by_torch, CASES[case])[1]) <= 1


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_cpp_and_python_make_the_same_frames_for_every_seed(
    built: Path, by_torch: Pipeline, exported: Exported, seed: int, tmp_path: Path
) -> None:  # fmt: skip
    options = {"seed": seed, "frames": 3}
    assert apart(by_cpp(built, exported.path, options, tmp_path), result(by_torch, options)[1]) <= 1


def test_cpp_lists_the_controls(built: Path, by_torch: Pipeline, exported: Exported, tmp_path: Path) -> None:
    lines = run(built / "higen-run", exported.path, "--list-controls", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [control.name for control in by_torch.controls]
    for line, control in zip(lines, by_torch.controls, strict=True):
        assert line.endswith(control.meaning)
    wrong = run(
        built / "higen-run", exported.path, PROMPT, "-o", "x.npy", "--control", "motion=3", check=False, cwd=tmp_path
    )
    assert wrong.returncode == 1
    assert "motion" in wrong.stderr
    assert "swell" in wrong.stderr


# ---- Where the family is not installed ----


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process without the wheel's family."""
    monkeypatch.setattr(families, "_packages", lambda: {"higen": "higen.families.higen"})


def test_graphs_run_without_the_family(alone: None, by_torch: Pipeline, exported: Exported, tmp_path: Path) -> None:
    """In another process of the tests' own environment, which does not have the wheel."""
    PALETTE.save(tmp_path / "palette.png")
    script = "from higen import families; print(families.installed())"
    assert "tidepool" not in run(sys.executable, "-c", script, cwd=tmp_path).stdout
    request = ["generate", PROMPT, "--model", exported.path, "--palette", tmp_path / "palette.png"]
    target = tmp_path / "video.npy"
    said = run(sys.executable, "-m", "higen", *request, "-o", target, "--json", cwd=tmp_path)
    assert json.loads(said.stdout)["versions"]["backend"] == "onnx"
    assert apart(np.load(target), result(by_torch, {})[1]) <= 1
    doctor = json.loads(
        run(sys.executable, "-m", "higen", "doctor", "--model", exported.path, "--json", cwd=tmp_path).stdout
    )
    assert {stage["backend"] for stage in doctor["stages"]} == {"onnx"}


@pytest.mark.parametrize("flags", [["--backend", "torch"], []])
def test_a_directory_without_graphs_needs_the_family(model: Path, flags: list[str], tmp_path: Path) -> None:
    request = ["generate", PROMPT, "--model", model, "--frames", 1, "-o", "x.npy", *flags]
    said = run(sys.executable, "-m", "higen", *request, check=False, cwd=tmp_path)
    assert said.returncode == 1
    assert "family='tidepool': not installed here; installed are animatediff, composed, higen," in said.stderr
    assert "Traceback" not in said.stderr


def test_what_needs_the_family_names_those_that_are_there(alone: None, exported: Exported, tmp_path: Path) -> None:
    message = "'tidepool': not installed here; installed are higen"
    bundle = Bundle.open(exported.path)
    with pytest.raises(UnknownFamily, match=message):
        export_model(bundle)
    with pytest.raises(BackendUnavailable, match=message):
        TorchBackend(bundle, Options("cpu"))
    with pytest.raises(UnknownFamily, match=message):
        convert_sources([tmp_path / "tide.safetensors"], tmp_path / "model", family="tidepool")
    chosen: Backend = select_backend(bundle, "auto", Options("cpu"))
    assert chosen.choose("surge_single", "surge_pair") == "surge_single"
    chosen.close()
