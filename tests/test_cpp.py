"""Builds the C++ runtime (engines/cpp) with sanitizers, runs its own tests, and compares it with Python."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cpp_build
import numpy as np
import onnx
import PIL
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from cpp_build import SOURCE, done
from made_up_model import write_made_up_model
from onnxruntime.transformers.float16 import convert_float_to_float16
from random_texts import ORDINARY, random_texts
from safetensors.torch import save_file
from test_edges import pictures_for_edges
from test_engine_store import PLAN, RECORD

from higen.api import default_model, load
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.plans import EXTRAS, Plan, PlanProfile, Span, best_profile, fitting_plans, read_plans
from higen.bundle import MANIFEST, Bundle, create_model, graph_file, put_file
from higen.conditioning import curve_rows, curve_values, similarity_rows, sinusoid_rows
from higen.edges import edges
from higen.errors import (
    BackendUnavailable,
    HigenError,
    MissingExtra,
    ModelError,
    OutsideProfile,
    PictureWarning,
    PromptWarning,
)
from higen.export.model_graphs import export_model
from higen.export.quantize import quantize, record_calls
from higen.images import resampling
from higen.models.companions import text_encoder
from higen.noise import frame_noise
from higen.pipeline import Pipeline
from higen.precision import QUANTIZED, precision_named
from higen.tables import TextRules
from higen.tokenizer import PromptTokenizer, build_clip_tokenizer, build_word_tokenizer, write_tokenizer
from higen.version import __version__
from higen.video import Video

built, onnxruntime_root = cpp_build.built, cpp_build.onnxruntime_root  # fixtures

SANITIZERS = "-fsanitize=address,undefined"


@pytest.fixture(scope="session")
def ask(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[dict[str, Any]]], list[Any]]:
    """Ask the program tests/vectors.cpp for results; its source lists the questions."""
    folder = tmp_path_factory.mktemp("vectors")

    def answers(jobs: Sequence[dict[str, Any]]) -> list[Any]:
        (folder / "jobs.json").write_text(json.dumps(list(jobs)), encoding="ascii")
        done(built / "tests" / "vectors", folder / "jobs.json", folder / "answers.json")
        found: list[Any] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        return found

    return answers


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with CLIP's tokenizer, text cleaning, and a random text encoder for CLIP's token ids."""
    source = Bundle.open(default_model())
    length, width = source.manifest.fixed["L"], source.manifest.fixed["Dt"]
    clip = {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": length,
        "projection_dim": width,
    }
    rules = TextRules("tokenizer.json", length)
    manifest = replace(source.manifest, text=rules, architecture={**source.manifest.architecture, "clip": clip})
    path = tmp_path_factory.mktemp("models") / "clip"
    torch.manual_seed(0)
    with create_model(path, manifest) as folder:
        for name in source.files:
            if not name.startswith("text_encoder") and name != rules.tokenizer and not name.endswith(".onnx"):
                shutil.copy(source.path / name, folder)
        save_file(text_encoder(clip).state_dict(), folder / "text_encoder.safetensors")
        write_tokenizer(build_clip_tokenizer(), folder / rules.tokenizer)
    made = Bundle.open(path)
    for name, inputs in source.graphs.items():
        if not name.startswith("text_encoder"):
            finished = Path(shutil.copy(source.path / name, path / ".graph"))
            made = put_file(made, finished, name, inputs)
    export_model(made, ("text_encoder",))
    return path


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that belongs to no family. Its graphs are written by hand (made_up_model.py)."""
    path = tmp_path_factory.mktemp("models") / "made-up"
    write_made_up_model(path)
    return path


@pytest.fixture(scope="session")
def pipelines() -> Callable[[Path], Pipeline]:
    """Python's pipeline on ONNX Runtime for a model directory."""
    made: dict[Path, Pipeline] = {}

    def pipeline(path: Path) -> Pipeline:
        if path not in made:
            bundle = Bundle.open(path)
            made[path] = Pipeline(bundle, OnnxBackend(bundle))
        return made[path]

    return pipeline


def higen_run(built: Path, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run higen-run."""
    command = [built / "higen-run", *map(str, arguments)]
    return done(*command) if check else subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_its_own_tests(built: Path) -> None:
    """Unit tests, the C header, the public interface on the built-in model, a fake TensorRT, and seeded fuzzing."""
    result = done("ctest", "--test-dir", built, "--output-on-failure", "--no-tests=error", timeout=1200)
    for name in (
        *("unit_tests", "provider_tests", "schedule_tests", "c_header", "model_tests", "lifecycle_tests"),
        *("tensorrt_tests", "fuzz_corpus"),
    ):
        assert name in result.stdout


def test_no_source_names_a_model() -> None:
    """The library, its interface and its program interpret tables: they do not name any family's stages or controls."""
    known = re.compile(r"spatial_unet|temporal_unet|\bconditioner\b|\bmotion\b|\bappearance\b|\bprior\b")
    for folder in ("src", "include", "run"):
        for path in sorted((SOURCE / folder).rglob("*")):
            if path.is_file() and path.suffix != ".inc":
                assert known.findall(path.read_text(encoding="utf-8")) == [], path


def test_the_version_equals_pythons(built: Path) -> None:
    assert f"higen {__version__}\n" in done(built / "tests" / "c_header").stdout
    library = next(built.glob("libhigen.so.*.*.*"))
    dynamic = done("readelf", "-d", library).stdout
    assert f"libhigen.so.{'.'.join(__version__.split('.')[:2])}]" in dynamic


def flag(controls: Sequence[str], name: str, value: Any) -> list[str]:
    """A request's option as the command line takes it; a list within a list is one number per frame."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if name in controls:
        return ["--control", f"{name}={','.join(map(str, parts))}"]
    joined = ",".join(":".join(map(str, part)) if isinstance(part, (list, tuple)) else str(part) for part in parts)
    return [f"--{name.replace('negative_prompt', 'negative').replace('_', '-')}={joined}"]


CASES: list[dict[str, Any]] = [
    {"prompt": 0, "seed": 7, "steps": (4, 3), "frames": 5},
    {"prompt": 1, "seed": 2**64 - 1, "solver": "ddim", "steps": (5, 2), "guidance": (7.5, 2.25), "frames": 3},
    {"prompt": 2, "seed": 1, "steps": 2, "guidance": 3, "frames": 4, "motion": 150, "appearance": 0.7, "size": [3, 2]},
    {"prompt": 3, "steps": 2, "frames": 4, "motion": [10.0, 200.0, 30.5], "appearance": [0.0, 1.5, 0.25, 1.0]},
    {"prompt": 4, "steps": 2, "frames": 3, "motion": [1, 2, 3], "appearance": "unspecified", "offset_noise": 0.1},
    {"prompt": 5, "seed": 3, "steps": 3, "frames": 1, "size": (2, 3)},
    {"prompt": "a whale!", "negative_prompt": "pink", "steps": 1, "frames": 2, "motion": "unspecified"},
    {"prompt": 6, "steps": 2, "frames": 3, "guidance": (1, [1, 2.5, 0.5]), "negative_prompt": "snow"},
    {"prompt": 8, "preset": "fast", "frames": 4, "seed": 5},
    {"prompt": 8, "preset": "full", "frames": 2, "seed": 5},
    {"prompt": 9, "frames": 4, "seed": 6},
    {"prompt": 9, "frames": 2, "seed": 6, "offset_noise": 0.1},
    {"prompt": 7, "steps": (2, 3), "frames": 3, "guidance": 1, "solver": ("ddim", "dpm++2m"), "offset_noise": 0.3},
]  # fmt: skip


def compare(built: Path, pipeline: Pipeline, case: dict[str, Any], target: Path, *more: object) -> Video:
    """Frames of higen-run against Python's, at most 1/255 apart; returns Python's."""
    options = dict(case)
    sizes = pipeline.manifest.sizes
    height, width = (n * sizes.multiple for n in options.pop("size", (2, 2)))
    options |= {"height": height, "width": width}
    prompt = options.pop("prompt")
    prompts = pipeline.manifest.prompts
    prompt = prompts[prompt % len(prompts)] if isinstance(prompt, int) else prompt
    controls = [control.name for control in pipeline.controls]
    shown = {name for name, value in options.items() if isinstance(value, (np.ndarray, dict))}
    flags = [text for name, value in options.items() if name not in shown for text in flag(controls, name, value)]
    higen_run(built, pipeline.bundle.path, prompt, "-q", "-o", target, *flags, *more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        video: Video = pipeline(prompt, progress=False, **options)
    ours = np.load(target)
    assert ours.dtype == np.uint8
    assert ours.shape == video.frames.shape
    assert np.ptp(video.frames) > 20, "a blank video shows nothing"
    assert np.abs(ours.astype(int) - video.frames.astype(int)).max() <= 1
    return video


@pytest.mark.parametrize("case", CASES, ids=[str(i) for i in range(len(CASES))])
def test_frames_equal_pythons(
    built: Path, pipelines: Callable[[Path], Pipeline], case: dict[str, Any], tmp_path: Path
) -> None:
    compare(built, pipelines(default_model()), case, tmp_path / "video.npy")


def ppm(path: Path, picture: np.ndarray) -> Path:
    """A picture as a binary PPM."""
    height, width, _ = picture.shape
    path.write_bytes(b"P6\n# a comment\n%d %d\n255\n" % (width, height) + picture.tobytes())
    return path


@pytest.mark.parametrize("size", [(64, 64), (50, 97), (130, 40)])
def test_frames_from_a_given_key_frame(
    built: Path, pipelines: Callable[[Path], Pipeline], tmp_path: Path, size: tuple[int, int]
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    case = {"prompt": 0, "steps": 2, "frames": 3, "image": picture}
    flag = ("--image", "") if size == (64, 64) else ("--picture", "image=")
    file = ppm(tmp_path / "key.ppm", picture)
    compare(built, pipelines(default_model()), case, tmp_path / "video.npy", flag[0], f"{flag[1]}{file}")


def test_frames_that_a_clip_passes_through(built: Path, pipelines: Callable[[Path], Pipeline], tmp_path: Path) -> None:
    """Known frames (one of another size) and a mask; then a clip as the start of a second clip."""
    random = np.random.default_rng(2)
    frames = [random.integers(0, 256, size, dtype=np.uint8) for size in ((64, 64, 3), (50, 97, 3))]
    files = [ppm(tmp_path / f"{i}.ppm", frame) for i, frame in enumerate(frames)]
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, 20:] = 255
    case = {"prompt": 0, "steps": 2, "frames": 3, "keyframes": {0: frames[0], -1: frames[1]}, "mask": mask}
    more = ["--keyframe", f"0={files[0]}", f"--keyframe=-1={files[1]}", "--picture"]
    more += [f"mask={ppm(tmp_path / 'm.ppm', mask)}"]
    pipeline = pipelines(default_model())
    with pytest.warns(PictureWarning, match=r"^keyframes\[2\] has 97x50 pixels"):
        compare(built, pipeline, case, tmp_path / "video.npy", *more)
    with pytest.warns(PictureWarning):
        compare(built, pipeline, {**case, "preset": "fast"}, tmp_path / "video.npy", *more)
    case = {"prompt": 0, "steps": 4, "frames": 2, "video": np.stack([frames[0], frames[0]]), "strength": 0.5}
    compare(built, pipeline, case, tmp_path / "video.npy", "--picture", f"video={files[0]},{files[0]}")


def test_inverted_clips(built: Path, pipelines: Callable[[Path], Pipeline], tmp_path: Path) -> None:
    """A clip of moving stripes is inverted; then a clip with known frames, with another solver and empty text."""
    y, x = np.mgrid[:64, :64]
    clip = np.stack([np.stack([4 * (x - 6 * t) % 256, 4 * y, 128 + 0 * x], -1) for t in range(3)]).astype(np.uint8)
    files = [str(ppm(tmp_path / f"{t}.ppm", frame)) for t, frame in enumerate(clip)]
    more = ["--picture", f"video={','.join(files)}"]
    case = {"prompt": 0, "steps": (1, 4), "frames": 3, "video": clip, "inversion": "a whale", "strength": 1.0}
    compare(built, pipelines(default_model()), case, tmp_path / "video.npy", *more)
    case |= {"inversion": "", "strength": 0.5, "solver": "ddim", "keyframes": {1: clip[1]}, "guidance": (1, [1, 3, 2])}
    compare(built, pipelines(default_model()), case, tmp_path / "video.npy", *more, f"--keyframe=1={files[1]}")


MADE_UP: list[dict[str, Any]] = [
    {"seed": 3},
    {"seed": 4, "frames": 1, "steps": 3},
    {"wobble": [0.5, -1.0, 2.0], "drift": [0.0, 1.0, 0.5, 2.0], "frames": 4, "grain": 7, "mood": "dark", "fps": 9},
    {"drift": "unspecified", "guidance": 1, "frames": 3, "size": (1, 3), "solver": ["ddim", "euler_ancestral"]},
    {"guidance": [1, [1.0, 2.0, 0.0, 1.5, 3.0]], "frames": 5, "negative_prompt": "a green boat", "steps": [2, 5]},
    {"sketch": np.arange(24 * 40 * 3, dtype=np.uint8).reshape(24, 40, 3), "frames": 7},
]  # fmt: skip


@pytest.mark.parametrize("case", MADE_UP, ids=[str(i) for i in range(len(MADE_UP))])
def test_frames_of_a_model_without_an_installed_family(
    built: Path, pipelines: Callable[[Path], Pipeline], made_up: Path, case: dict[str, Any], tmp_path: Path
) -> None:
    case = {"prompt": "a red kite climbs", "size": (2, 4), **case}
    more = ["--picture", f"sketch={ppm(tmp_path / 's.ppm', case['sketch'])}"] if "sketch" in case else []
    compare(built, pipelines(made_up), case, tmp_path / "video.npy", *more)


REUSED: list[dict[str, Any]] = [
    {"reuse": [1, 2], "seed": 2},
    {"reuse": [1, 3], "steps": [2, 6], "guidance": [1, 2], "guidance_interval": [0, 1, 0, 0.5], "frames": 3},
    {"reuse": [1, 2], "frames": 9, "windows": [4, 2], "guidance": 1, "solver": "ddim"},
]  # fmt: skip


def test_reused_features_equal_pythons(built: Path, pipelines: Callable[[Path], Pipeline], tmp_path: Path) -> None:
    model = write_made_up_model(tmp_path / "model", reuse=True).path
    for case in REUSED:
        compare(
            built, pipelines(model), {"prompt": "a red kite climbs", "size": (2, 4), **case}, tmp_path / "video.npy"
        )


def test_a_model_without_the_graphs_of_reuse(built: Path, made_up: Path, tmp_path: Path) -> None:
    lacking = write_made_up_model(tmp_path / "model", without=("film_two_shallow",), reuse=True).path
    for model, every, message in (
        (made_up, "2", "reuse=2: the loop draft of made-up has no shallow steps"),
        (lacking, "1,2", "no film_two_shallow.onnx in "),
    ):
        command = [built / "higen-run", model, "a kite", "-q", "-o", tmp_path / "v.npy", "--reuse", every]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode != 0
        assert message in found.stderr
        assert "--reuse" in found.stderr
        assert not (tmp_path / "v.npy").exists()


def test_the_guided_stage_runs_where_the_plain_one_has_no_graph(
    built: Path, pipelines: Callable[[Path], Pipeline], tmp_path: Path
) -> None:
    write_made_up_model(tmp_path / "model", without=("draft_one", "film_one"))
    pipeline = pipelines(tmp_path / "model")
    compare(built, pipeline, {"prompt": "a boat", "guidance": 1, "frames": 3, "size": (2, 4)}, tmp_path / "v.npy")
    info = higen_run(built, tmp_path / "model", "--info").stdout
    assert "draft_two: onnx" in info
    assert "draft_one" not in info


def test_a_model_says_what_it_takes(built: Path, made_up: Path) -> None:
    lines = higen_run(built, made_up, "--list-controls").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["wobble", "drift", "grain", "mood", "sketch"]
    assert lines[0].endswith("curve, curve, from -2 to 2, default 0.5: how much it shakes")
    assert "choice, number: bright|dark, default bright" in lines[3]
    info = higen_run(built, made_up, "--info").stdout
    assert "loop film: all frames, 4 steps of euler_ancestral or ddim (at most 100), guidance 1:4" in info


@pytest.mark.parametrize(
    "prompt", ["A  cafe's \u201cBlue\u201d WHALE, 3.14 & 日本 👍🏽", "a dog runs on the beach " * 8]
)
def test_frames_of_a_model_with_clips_tokenizer(
    built: Path, pipelines: Callable[[Path], Pipeline], clip_model: Path, prompt: str, tmp_path: Path
) -> None:
    case = {"prompt": prompt, "negative_prompt": "blurry, ugly", "seed": 5, "steps": 2, "guidance": 4.0, "frames": 3}
    compare(built, pipelines(clip_model), case, tmp_path / "video.npy")


def test_output_formats(built: Path, pipelines: Callable[[Path], Pipeline], tmp_path: Path) -> None:
    pipeline = pipelines(default_model())
    side = 2 * pipeline.manifest.sizes.multiple
    request = (
        pipeline.bundle.path,
        "a whale",
        "--steps=1",
        "--frames=3",
        "--fps=5",
        f"--width={side}",
        f"--height={side}",
    )
    for suffix in ("npy", "rgb", "y4m"):
        higen_run(built, *request, "-q", "-o", tmp_path / f"clip.{suffix}")
    frames = np.load(tmp_path / "clip.npy")
    assert (tmp_path / "clip.rgb").read_bytes() == frames.tobytes()
    with av.open(str(tmp_path / "clip.y4m")) as source:
        stream = source.streams.video[0]
        assert stream.average_rate == 5
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in source.decode(stream)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames.astype(int)).max() <= 4  # 8-bit YUV in the limited range
    piped = subprocess.run([built / "higen-run", *map(str, request), "-q", "-o", "-"], capture_output=True, check=True)
    assert piped.stdout == (tmp_path / "clip.y4m").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.npy", "clip.rgb", "clip.y4m"]


def test_an_interrupt_leaves_nothing_behind(built: Path, tmp_path: Path) -> None:
    command = [built / "higen-run", default_model(), "a whale", "-o", tmp_path / "clip.npy", "--steps=1000"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.read(8) == b"\rspatial"  # the first loop is running
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().endswith(b"higen-run: stopped\n")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "a model and a prompt are wanted"),
        (["{model}", "a whale"], 2, "--output: a file is wanted"),
        (["{model}", "a whale", "--colour=red"], 2, "--colour=red: unknown option"),
        (["{model}", "a whale", "-o", "x.npy", "--steps=1.5"], 2, "--steps=1.5"),
        (["{model}", "a whale", "-o", "x.npy", "--seed=-1"], 2, "--seed=-1"),
        (["{model}", "a whale", "-o", "x.npy", "--steps=0"], 1, "steps=0: a whole number from 1"),
        (["{model}", "a whale", "-o", "x.npy", "--control", "motion"], 2, "--control=motion: NAME=VALUE is wanted"),
        (["{model}", "a whale", "-o", "x.npy", "--control", "motion=fast"], 2, "--control motion=fast: a number"),
        (["{model}", "a whale", "-o", "x.npy", "--control", "motion=-1"], 1, "motion has the value -1"),
        (["{model}", "a whale", "-o", "x.npy", "--preset=slow"], 1, "preset='slow': the presets of higen default"),
        (["{model}", "a whale", "-o", "x.npy", "--inversion=a whale"], 1, "no loop of this request begins from a pic"),
        (["{model}", "a whale", "-o", "x.npy", "--control=hue=3"], 1, "'hue': unknown; this model takes motion"),
        (["{model}", "a whale", "-o", "x.npy", "--picture=image=none.ppm"], 1, "none.ppm: No such file"),
        (["{model}", "a whale", "-o", "x.npy", "--provider=tensorrt-rtx"], 1, "provider='tensorrt-rtx'"),
        (["{model}", "a whale", "-o", "x.avi"], 1, "the suffix selects the format: .mp4, .webm, .y4m, .npy or .rgb"),
        *(
            (["{model}", "a", "-o", "x.npy", f"--provider={name}"], 1, f"provider='{name}': one of 'auto', 'cpu'")
            for name in ("cuda:banana", "cuda:-1", "cpu:7", "")
        ),
        (
            ["{model}", "a whale", "-o", "x.npy", "--provider=cuda:1"],
            1,
            "provider='cuda:1': this ONNX Runtime has no CUDA",
        ),
        (["{model}", "a", "-o", "x.npy", "--backend=tensorrt", "--provider=cpu"], 1, "only ONNX Runtime has providers"),
        (["{model}", "a whale", "-o", "x.npy", "--precision="], 1, "precision='': one of 'fp32'"),
        (["{model}", "a whale", "-o", "x.npy", "--threads=4294967297"], 2, "--threads=4294967297: too large"),
        (["{model}", "a whale", "-o", "x.npy", "--threads=2000"], 1, "threads=2000: 0 to 1024"),
        (["{model}", "a whale", "-o", "nowhere/x.npy"], 1, "nowhere/x.npy: cannot be written"),
        (["nowhere", "a whale", "-o", "x.npy"], 1, "nowhere: not a model directory"),
    ],
)
def test_wrong_command_lines(built: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    command = [built / "higen-run", *(a.format(model=default_model()) for a in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert result.returncode == code
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_installed_package(
    built: Path, onnxruntime_root: str, pipelines: Callable[[Path], Pipeline], tmp_path: Path
) -> None:
    """find_package(higen) in another project, built and run."""
    prefix, folder = tmp_path / "prefix", tmp_path / "examples"
    done("cmake", "--install", built, "--prefix", prefix)
    done(
        "cmake", "-S", SOURCE / "examples", "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}",
        f"-DCMAKE_C_FLAGS={SANITIZERS}", f"-DCMAKE_CXX_FLAGS={SANITIZERS}",
    )  # fmt: skip
    done("cmake", "--build", folder)
    pipeline = pipelines(default_model())
    side = 2 * pipeline.manifest.sizes.multiple
    sheet = tmp_path / "sheet.ppm"
    result = done(folder / "contact_sheet", default_model(), "a red heart", sheet, 1, side)
    assert "spatial 1/1: mean" in result.stdout
    frames = pipeline("a red heart", steps=1, width=side, height=side, progress=False).frames
    header, pixels = sheet.read_bytes().split(b"\n255\n", 1)
    assert header == b"P6\n%d %d" % (len(frames) * side, side)
    found = np.frombuffer(pixels, np.uint8).reshape(side, len(frames), side, 3).transpose(1, 0, 2, 3)
    assert np.abs(found.astype(int) - frames.astype(int)).max() <= 1
    failed = subprocess.run([folder / "minimal", "nowhere", "a whale"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "HIGEN_ERROR_MANIFEST: nowhere: not a model directory" in failed.stderr
    done(prefix / "bin" / "higen-run", default_model(), "--info")


Ask = Callable[[Sequence[dict[str, Any]]], list[Any]]


@pytest.mark.parametrize("model", ["built-in", "made-up"])
def test_the_tables_are_read_as_python_reads_them(ask: Ask, made_up: Path, model: str) -> None:
    path = default_model() if model == "built-in" else made_up
    manifest = Bundle.open(path).manifest
    (found,) = ask([{"op": "tables", "path": str(path)}])
    assert found["symbols"] == manifest.fixed
    for stage in manifest.stages:
        inputs = [[t.name, list(t.shape), t.dtype, t.source] for t in stage.inputs]
        outputs = [[name, list(t.shape)] for name, t in zip(stage.graph_outputs, stage.outputs, strict=True)]
        assert found["stages"][stage.name] == [inputs, outputs, stage.weights, stage.lowest, stage.batch]
    for loop in manifest.loops:
        guidance = list(loop.guidance) if isinstance(loop.guidance, tuple) else [loop.guidance]
        wanted = [list(loop.stages), loop.steps, guidance, loop.solvers[0].name, loop.least_frames]
        assert found["loops"][loop.name] == wanted
    assert found["controls"] == {control.name: [control.kind, control.range] for control in manifest.controls}


def test_noise(ask: Ask) -> None:
    shapes = [
        (0, 0, 4, 1, 3, 5),
        (7, 1, 3, 4, 8, 8),
        (2**64 - 1, 1, 32, 2, 16, 8),
        (2**63, 5 + (3 << 32), 1, 1, 1, 1),
    ]
    names = ("seed", "purpose", "channels", "frames", "height", "width")
    found = ask([{"op": "noise", **dict(zip(names, shape, strict=True))} for shape in shapes])
    for shape, numbers in zip(shapes, found, strict=True):
        wanted = frame_noise(*shape).ravel()
        # Both round float64 to float32. They differ by one unit in the last place where log or cos differ.
        assert np.abs(np.float32(numbers) - wanted).max() <= 2.4e-7 * max(np.abs(wanted).max(), 1)
        assert (np.float32(numbers) == wanted).mean() > 0.999


def given(value: Any) -> dict[str, Any] | None:
    """A control's value as tests/vectors.cpp reads it."""
    if value is None:
        return None
    array = np.atleast_1d(np.asarray(value, dtype=float))
    rows, columns = array.shape if array.ndim == 2 else (len(array), 1)
    return {"values": array.ravel().tolist(), "rows": rows, "columns": columns}


def encoded(encoding: str, value: Any, frames: int, columns: int) -> np.ndarray:
    """A control as Python encodes it."""
    if encoding == "similarity":
        return similarity_rows("control", value, frames, columns)
    values = None if value is None else curve_values("control", value, frames, 0.0)
    if encoding == "sinusoid":
        return sinusoid_rows(values, frames, columns)
    assert values is not None
    return curve_rows(values, frames)


def test_encodings(ask: Ask) -> None:
    random_numbers = np.random.default_rng(3)
    cases: list[tuple[str, Any, int, int]] = [
        (encoding, value, frames, dim)
        for frames in (1, 2, 5, 32)
        for encoding, dims in (("sinusoid", (32, 96, 7)), ("curve", (1,)))
        for dim in dims
        for value in (
            *([None] if encoding == "sinusoid" else []),
            0.0,
            500.0,
            3.4e38,
            random_numbers.uniform(0, 900, max(frames - 1, 1)),
            random_numbers.uniform(0, 900, frames),
        )
    ]
    cases += [
        ("similarity", value, frames, columns)
        for frames in (1, 2, 5, 40)
        for columns in (32, 3)
        for value in (
            *(None, 0.0, 1.0, -2.5, random_numbers.normal(size=frames), random_numbers.normal(size=(frames, columns))),
            # A 1x1 array is a number in the C interface but a matrix in Python, so it is left out.
            *([random_numbers.normal(size=(frames, frames))] if frames > 1 else []),
        )
    ]
    jobs = [
        {"op": "encoded", "encoding": e, "low": None if e == "similarity" else 0, "frames": f, "columns": c}
        | {"value": given(value)}
        for e, value, f, c in cases
    ]
    for numbers, case in zip(ask(jobs), cases, strict=True):
        wanted = encoded(*case)
        # A relative tolerance for curves, because their values can be large.
        np.testing.assert_allclose(np.reshape(numbers, wanted.shape), wanted, rtol=2e-7, atol=5e-7)


def test_pictures_are_scaled_as_pillow_scales_them(ask: Ask) -> None:
    """Both give the same bytes and use the same matrices. Before version 13, Pillow resized tall pictures by width
    first.
    """
    generator = np.random.default_rng(1)
    sizes = [(40, 30), (64, 64), (200, 30), (30, 200), (7, 9), (1, 1), (129, 97), (640, 360), (97, 129), (70, 400)]
    targets = [(64, 64), (32, 96), (96, 64), (128, 32)]
    if int(PIL.__version__.split(".")[0]) < 13:
        sizes, targets = sizes[:3], targets[:1]
    jobs, wanted = [], []
    for width, height in sizes:
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for new_width, new_height in targets:
            fitted = PIL.ImageOps.fit(
                PIL.Image.fromarray(picture), (new_width, new_height), PIL.Image.Resampling.LANCZOS
            )
            pixels = np.asarray(fitted, np.float32).transpose(2, 0, 1) / 127.5 - 1
            small = int(generator.integers(1, 40)), int(generator.integers(1, 40))
            resampled = resampling(new_height, small[0]) @ pixels.astype(float) @ resampling(new_width, small[1]).T
            wanted.append((np.asarray(fitted), resampled))
            jobs.append(
                {"op": "picture", "rgb": picture.ravel().tolist(), "width": width, "height": height}
                | {"new_width": new_width, "new_height": new_height, "small": small}
            )
    for (covered, resampled), (fitted, small) in zip(ask(jobs), wanted, strict=True):
        np.testing.assert_array_equal(np.reshape(covered, fitted.shape), fitted)
        np.testing.assert_allclose(np.reshape(resampled, small.shape), small, rtol=0, atol=1e-6)


def test_edges_equal_pythons(ask: Ask) -> None:
    shown = pictures_for_edges()
    jobs = [{"op": "edges", "rgb": p.ravel().tolist(), "width": p.shape[1], "height": p.shape[0]} for p in shown]
    for found, picture in zip(ask(jobs), shown, strict=True):
        np.testing.assert_array_equal(np.reshape(found, picture.shape), edges(picture))


WORDS = ("a", "Blue", "whale", "swimming", ",", "blue", "it", "'", "s", "日本", "café", "3", "ß", "i\u0307")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (("clip", build_clip_tokenizer()), ("word", build_word_tokenizer(WORDS))):
        write_tokenizer(tokenizer, folder / f"{name}.json")
    return {name: folder / f"{name}.json" for name in ("clip", "word")}


def tokens(ask: Ask, tokenizer: Path, rules: TextRules, texts: Sequence[str]) -> list[Any]:
    """What the C++ tokenizer makes of each text: ids, or the name of a status."""
    known = {"length": rules.length, "pad_id": rules.pad_id, "clean": rules.clean}
    (found,) = ask([{"op": "tokens", "tokenizer": str(tokenizer), "texts": texts, **known}])
    return list(found)


@pytest.mark.parametrize(
    ("kind", "clean", "ordinary", "count"),
    [
        ("clip", True, True, 2500),
        ("clip", True, False, 3500),
        ("clip", False, False, 2000),
        ("word", False, False, 1500),
        ("word", True, True, 500),
    ],
)
def test_token_ids_equal_pythons(
    ask: Ask, tokenizers: dict[str, Path], kind: str, clean: bool, ordinary: bool, count: int
) -> None:
    """Ten thousand texts in all. With cleaning, texts that only ftfy can repair are refused and never get other ids."""
    texts = random_texts(count, seed=11, words=ORDINARY if ordinary else None, more=WORDS)
    rules = TextRules("tokenizer.json", 40, 0, clean)
    tokenizer = PromptTokenizer.from_file(tokenizers[kind], rules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        wanted = [tokenizer.encode([text])[0].tolist() for text in texts]
    found = tokens(ask, tokenizers[kind], rules, texts)
    refused = [text for text, ids in zip(texts, found, strict=True) if ids == "HIGEN_ERROR_CLEANING"]
    if ordinary or not clean:
        assert refused == []
    else:
        assert len(refused) < 0.9 * count  # many of these texts have mojibake, entities and loose accents
    wrong = [
        (ascii(text), ids, expected)
        for text, ids, expected in zip(texts, found, wanted, strict=True)
        if ids not in (expected, "HIGEN_ERROR_CLEANING")
    ]
    assert wrong == []


def test_every_pair_of_suspicious_characters_is_cleaned_as_python_does_or_refused(
    ask: Ask, tokenizers: dict[str, Path]
) -> None:
    """ftfy's rules depend on neighbouring characters, so every pair of its categories is tested in four contexts."""
    from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES

    generator = random.Random(5)
    kinds = [
        [c for c in (expand(members)) if c.isprintable()]
        for name, members in MOJIBAKE_CATEGORIES.items()
        if name != "c1"
    ]
    named = sorted({c for c in BADNESS_RE.pattern if ord(c) > 0x80})
    one_each = [*named, *(generator.choice(kind) for kind in kinds for _ in range(2))]
    texts = [f"{before}{a}{b}{after}" for a in one_each for b in one_each for before, after in (("x", "y"), ("", " z"))]
    texts = generator.sample(texts, 6000)
    rules = TextRules("tokenizer.json", 16)
    tokenizer = PromptTokenizer.from_file(tokenizers["clip"], rules)
    wanted = [tokenizer.encode([text])[0].tolist() for text in texts]
    found = tokens(ask, tokenizers["clip"], rules, texts)
    wrong = [
        (ascii(text), ids, expected)
        for text, ids, expected in zip(texts, found, wanted, strict=True)
        if ids not in (expected, "HIGEN_ERROR_CLEANING")
    ]
    assert wrong == []


def expand(members: str) -> list[str]:
    """The characters of a regular expression's class."""
    found: list[str] = []
    i = 0
    while i < len(members):
        if members[i + 1 : i + 2] == "-" and i + 2 < len(members):
            found += [chr(c) for c in range(ord(members[i]), ord(members[i + 2]) + 1)]
            i += 3
        else:
            found.append(members[i])
            i += 1
    return found


def resealed(document: Any) -> str:
    """The text of a manifest with the correct seal for its tables."""
    none = "0" * 64
    if isinstance(document, dict) and document.get("seal") is not None:
        document = {**document, "seal": none}
    text = json.dumps(document)
    return text.replace(none, hashlib.sha256(text.encode()).hexdigest(), 1)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of the values in a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2, 33, 64, 0.5, 1.0, 1e30, "", "x", [], {}, [1], [1, 2], "../x", [0.1, 0.2]),
    *("F", "state", "control:wobble", "control:grain", "text:prompt", "draft.latents", "mixer.hints", "film", "reader"),
]  # fmt: skip


@pytest.mark.parametrize("model", ["built-in", "made-up"])
def test_malformed_manifests_are_refused_where_python_refuses_them(
    ask: Ask, made_up: Path, model: str, tmp_path: Path
) -> None:
    """One value at a time is replaced and the manifest is sealed again: both runtimes accept it, or both refuse it."""
    source = Bundle.open(default_model() if model == "built-in" else made_up)
    manifest = json.loads((source.path / MANIFEST).read_text(encoding="utf-8"))
    generator = random.Random(2)
    # `architecture` is private to the family. Without the second filter most places would be prompts and hashes.
    everywhere = [
        p for p in places(manifest) if p and p[0] not in ("architecture", "seal") and p[-1] not in range(3, 99)
    ]
    paths, texts = [], []
    for i in range(500):
        changed = copy.deepcopy(manifest)
        place = generator.choice(everywhere)
        node = changed
        for key in place[:-1]:
            node = node[key]
        if isinstance(node, dict) and generator.random() < 0.1:
            del node[place[-1]]
        else:
            node[place[-1]] = generator.choice(VALUES)
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in source.files:
            (folder / name).symlink_to(source.path / name)
        texts.append(resealed(changed))
        (folder / MANIFEST).write_text(texts[-1], encoding="utf-8")
        paths.append(folder)
    both = {"accepted": 0, "refused": 0}
    different = []
    for path, text, found in zip(paths, texts, ask([{"op": "bundle", "path": str(p)} for p in paths]), strict=True):
        try:
            Bundle.open(path)
            wanted: str | ModelError = "accepted"
        except ModelError as error:
            wanted = error
        both["accepted" if wanted == "accepted" else "refused"] += 1
        if isinstance(found, dict) == (wanted == "accepted"):
            different.append((found, str(wanted), text[:0]))
    assert different == []
    assert min(both.values()) > 40


def test_an_edited_manifest_and_an_older_one(built: Path, tmp_path: Path) -> None:
    source = default_model()
    for name in ("edited", "older", "newer"):
        (tmp_path / name).mkdir()
        for file in Bundle.open(source).files:
            (tmp_path / name / file).symlink_to(source / file)
    text = (source / MANIFEST).read_text(encoding="utf-8")
    (tmp_path / "edited" / MANIFEST).write_text(text.replace('"fps": 8', '"fps": 9'), encoding="utf-8")
    document = {"format": "higen", "version": 1, "model": {}, "files": {}}
    (tmp_path / "older" / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / "newer" / MANIFEST).write_text(text.replace('"version": 2', '"version": 3'), encoding="utf-8")
    for name, words in (
        ("edited", f"was edited after it was written: its tables do not fit its seal. Fetch the file again, or accept "
                   f"the edit: higen upgrade --reseal {tmp_path / 'edited'}"),
        ("older", f"version=1, but this library reads version 2: higen upgrade {tmp_path / 'older'}"),
        ("newer", "version=3, but this higen reads version 2: a newer higen is needed"),
    ):  # fmt: skip
        result = higen_run(built, tmp_path / name, "--info", check=False)
        assert result.returncode == 1
        assert words in result.stderr


def test_graphs_of_the_older_step_contract_are_refused(built: Path, tmp_path: Path) -> None:
    """Graphs with an integer `t` or with one guidance value per sample must be exported again."""
    for name, change in (("t", "int64"), ("guidance", "[B]")):
        made = write_made_up_model(tmp_path / name)
        path = made.path / graph_file("film_two")
        model = onnx.load(str(path), load_external_data=False)
        (value,) = (value for value in model.graph.input if value.name == name)
        if change == "int64":
            value.type.tensor_type.elem_type = onnx.TensorProto.INT64
            model.graph.node.insert(0, onnx.helper.make_node("Cast", ["t"], ["t_float"], to=onnx.TensorProto.FLOAT))
        else:
            del value.type.tensor_type.shape.dim[1]
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "last_axis"))
            model.graph.node.insert(
                0, onnx.helper.make_node("Unsqueeze", ["guidance", "last_axis"], ["guidance_float"])
            )
        for node in list(model.graph.node)[1:]:
            for i, given_name in enumerate(node.input):
                if given_name == name:
                    node.input[i] = f"{name}_float"
        finished = made.path / ".graph"
        finished.write_bytes(model.SerializeToString())
        put_file(made, finished, graph_file("film_two"), made.graphs[graph_file("film_two")])
        result = higen_run(built, made.path, "--info", check=False)
        assert result.returncode == 1
        assert f"was made before version 2 of the manifest (its input {name} differs)" in result.stderr
        assert f"higen-export onnx {made.path}" in result.stderr


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with a quantised key-frame step, and every graph in float16 by ONNX Runtime's converter."""
    path = Path(shutil.copytree(default_model(), tmp_path_factory.mktemp("variants") / "model"))
    bundle = Bundle.open(path)
    side = bundle.manifest.sizes.multiple
    calls = record_calls(bundle, ["a red heart"], 4, 3, ("spatial_unet",), frames=2, width=side, height=side)
    bundle = quantize(bundle, calls, "int8", ["spatial_unet"], 0.3)
    made = {}
    for stage in bundle.manifest.stage_names:
        graph = onnx.load(str(path / graph_file(stage)))
        made[graph_file(stage, "fp16")] = convert_float_to_float16(graph, keep_io_types=True), stage
    # Graphs are chosen by their names.
    name = "temporal_unet_plain"
    made[graph_file(name, "int8.fp16")] = made[graph_file(name, "fp16")]
    for file, (graph, stage) in made.items():
        onnx.save(graph, str(path / ".graph"))
        bundle = put_file(bundle, path / ".graph", file, bundle.graphs[graph_file(stage)])
    return path


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_frames_in_another_precision(
    built: Path, pipelines: Callable[[Path], Pipeline], variants: Path, precision: str, tmp_path: Path
) -> None:
    bundle = Bundle.open(variants)
    pipeline = Pipeline(bundle, OnnxBackend(bundle, Options("cpu", precision)))
    case = {"prompt": 0, "seed": 7, "steps": 2, "frames": 2}
    low = compare(built, pipeline, case, tmp_path / "low.npy", f"--precision={precision}").frames
    height, width = low.shape[1:3]
    options = {"seed": 7, "steps": 2, "frames": 2, "height": height, "width": width, "progress": False}
    assert np.any(low != pipelines(variants)(pipeline.manifest.prompts[0], **options).frames)


@pytest.mark.parametrize("precision", ["int8", "int8.fp16"])
def test_a_stage_without_a_quantised_graph_runs_in_the_precision_of_its_weights(
    built: Path, variants: Path, precision: str
) -> None:
    info = higen_run(built, variants, "--info", "--no-verify", f"--precision={precision}").stdout
    backend = OnnxBackend(Bundle.open(variants), Options("cpu", precision))
    for stage in ("text_encoder", "spatial_unet_plain", "temporal_unet_plain"):  # those of the usual preset
        assert f"{stage}: onnx, {backend.describe(stage)}" in info


def test_a_missing_precision(built: Path, variants: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable) as raised:
        OnnxBackend(Bundle.open(variants), Options("cpu", "bf16")).prepare("text_encoder")
    for precision, message in (("bf16", str(raised.value)), ("int4", "precision='int4': one of 'fp32'")):
        target = tmp_path / "x.npy"
        result = higen_run(built, variants, "a", "-o", target, f"--precision={precision}", check=False)
        assert result.returncode == 1
        assert message in result.stderr


@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_precision_that_the_model_was_never_quantised_to_is_refused(built: Path, precision: str) -> None:
    model = default_model()
    result = higen_run(built, model, "--info", f"--precision={precision}", check=False)
    assert result.returncode == 1
    assert str(Bundle.open(model).not_quantized(precision)) in result.stderr


def test_plans_are_chosen_as_python_chooses_them(ask: Ask, tmp_path: Path) -> None:
    """Up to three engines of a stage, with a few changes in each record: both runtimes give the same plans or error."""
    generator = random.Random(4)
    changes: list[tuple[str, Any]] = [
        *(("architectures", value) for value in ([86], [86, 89], [], "89")),
        *(("library", value) for value in ("1.8.0", "10.13.3", 1)),
        *(("flavour", value) for value in ("tensorrt", "lean", None)),
        *(("precision", value) for value in ("fp16", "int8")),
        *((key, "5" * 64) for key in ("graph_sha256", "weights_sha256")),
        *(("graph", "gone.onnx"), ("stage", "vae_encoder"), ("target", "other"), ("format", 2), ("format", True)),
        *(("seconds", 2), ("seconds", "2"), ("size", 1.0), ("size", -1), ("options", []), ("colour", "red")),
        *(("tensors", [{"name": "x"}]), ("profiles", [{"name": "x", "spans": [1]}]), ("tensors", {})),
    ]
    here = {RECORD.graph: RECORD.graph_sha256, RECORD.weights: RECORD.weights_sha256}
    jobs: list[dict[str, Any]] = []
    for i in range(400):
        model = tmp_path / str(i)
        for target in generator.sample(("rtx", "rtx-sm89", "tensorrt-sm89", ".hidden"), generator.randint(0, 3)):
            classic = {"flavour": "tensorrt", "library": "10.13.3"} if target.startswith("tensorrt") else {}
            record = json.loads(replace(RECORD, target=target).to_text()) | classic
            for key, value in generator.sample(changes, generator.choice((0, 1, 1, 2))):
                record[key] = value
            if generator.random() < 0.05:
                del record[generator.choice(list(record))]
            text = json.dumps(record)
            folder = model / "engines" / target
            folder.mkdir(parents=True)
            (folder / "vae_decoder.json").write_text(text[: generator.choice((len(text), len(text), len(text), 99))])
            if generator.random() < 0.3:  # a build that was killed between plan and record or before both
                record = json.loads(replace(RECORD, target=target, precision="bf16").to_text()) | classic
                for key, value in generator.sample(changes, generator.choice((0, 0, 1))):
                    record[key] = value
                (folder / ".vae_decoder.json.part").write_text(json.dumps(record)[: generator.choice((None, None, 99))])
                (folder / "vae_decoder.engine").write_bytes(generator.choice((PLAN, PLAN, PLAN[::-1], PLAN[1:])))
        libraries = generator.choice(({"rtx": "1.7.1"}, {"rtx": "1.7.1", "tensorrt": "10.13.3"}, {"rtx": "1.8.0"}))
        jobs.append(
            {"op": "plan", "model": str(model), "stage": "vae_decoder", "files": here, "libraries": libraries}
            | {"architecture": generator.choice((89, 89, 86)), "precision": generator.choice(("", "", "fp16", "int8"))}
        )
    outcomes: dict[str, int] = {}
    for job, found in zip(jobs, ask(jobs), strict=True):
        plans, errors = read_plans(Path(job["model"]), "vae_decoder")
        if precision := job["precision"]:
            there = {plan.record.precision for plan in plans}
            best = next((p for p in precision_named(precision).stand_ins if p in there), precision)
            plans = [plan for plan in plans if plan.record.precision == best]
        absent = {name: MissingExtra(package, extra, "an engine") for name, (package, extra) in EXTRAS.items()}
        libraries = absent | job["libraries"]
        wanted: list[list[str]] | HigenError
        try:
            fitting = fitting_plans("vae_decoder", plans, errors, here, job["architecture"], libraries)
            wanted = [[plan.record.target, plan.record.precision] for plan in fitting]
        except HigenError as error:
            wanted = error
        if isinstance(wanted, list):
            outcome = "pending" if wanted[0][1] == "bf16" else "chosen"
            assert found == wanted
        elif type(wanted) is BackendUnavailable:
            outcome = "none"
            assert found["message"] == str(wanted)
        else:
            outcome = type(wanted).__name__.replace("MissingExtra", "MissingLibrary")
            if outcome in ("Stale", "WrongArchitecture"):
                assert found["message"] == f"{outcome}: {wanted}"
            else:  # these messages differ between the languages
                assert found["message"].startswith(f"{outcome}: "), (found, wanted)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert set(outcomes) == {"chosen", "pending", "none", "Malformed", "Stale", "WrongArchitecture", "MissingLibrary"}
    assert min(outcomes.values()) >= 5, outcomes


def test_profiles_are_chosen_as_python_chooses_them(ask: Ask) -> None:
    generator = random.Random(6)

    def span(name: str) -> Span:
        axes = [sorted(generator.choices((1, 2, 4, 8, 16), k=2)) for _ in range(2)]
        low, high = (tuple(axis[end] for axis in axes) for end in (0, 1))
        return Span(name, low, high, high)

    jobs, wanted = [], []
    for _ in range(300):
        names = ("latents", "context")[: generator.randint(1, 2)]
        profiles = [PlanProfile(f"p{i}", tuple(map(span, names))) for i in range(generator.randint(1, 4))]
        record = replace(RECORD, profiles=tuple(profiles))
        shapes = {name: tuple(generator.choices((1, 2, 4, 8), k=2)) for name in names}
        jobs.append({"op": "profile", "record": record.to_text(), "shapes": shapes})
        try:
            wanted.append(best_profile(Plan(Path(), record), shapes))
        except OutsideProfile as error:
            wanted.append({"error": "HIGEN_ERROR_UNAVAILABLE", "message": f"OutsideProfile: {error}"})
    assert ask(jobs) == wanted
    assert {type(found) for found in wanted} == {int, dict}


def test_warnings_about_texts_equal_pythons(built: Path, tmp_path: Path) -> None:
    """The warnings name the text and its words, each cut short, because a prompt may be one word of 100,000 letters."""
    texts = {"prompt": f"a red heart {'x' * 90_000} zebra " + "whale " * 40, "negative_prompt": "blurry"}
    options = {"steps": 1, "frames": 2, "width": 32, "height": 32}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(threads=1)(**texts, **options, progress=False)
    wanted = [str(warning.message).split(";")[0] for warning in said if warning.category is PromptWarning]
    assert len(wanted) == 3
    flags = [f"--{name}={value}" for name, value in options.items()]
    run = higen_run(
        built,
        default_model(),
        texts["prompt"],
        f"--negative={texts['negative_prompt']}",
        "-o",
        tmp_path / "a.npy",
        *flags,
    )
    lines = [line.rpartition("warning: ")[2].split(";")[0] for line in run.stderr.splitlines() if "warning: " in line]
    assert sorted(lines) == sorted(wanted)
