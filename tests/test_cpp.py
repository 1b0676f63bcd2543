"""The C++ runtime (engines/cpp): built here with sanitizers, its own tests, and its results beside Python's."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import pytest
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from random_texts import ORDINARY, random_texts
from safetensors.torch import save_file
from test_engine_store import PLAN, RECORD

from higen import bundle as files
from higen.api import default_model
from higen.backends.onnx import OnnxBackend
from higen.backends.plans import EXTRAS, Plan, PlanProfile, Span, best_profile, fitting_plans, read_plans
from higen.bundle import Bundle
from higen.conditioning import appearance_cue, motion_cue
from higen.config import ScheduleConfig, TextConfig
from higen.errors import BackendUnavailable, HigenError, MissingExtra, ModelError, OutsideProfile, PromptWarning
from higen.export.model import export_model
from higen.export.quantize import quantize, record_calls
from higen.models.companions import text_encoder
from higen.noise import SPATIAL, TEMPORAL, initial_noise
from higen.pipeline import Pipeline
from higen.schedule import solver_table
from higen.stages import STAGES, dimensions
from higen.tokenizer import PromptTokenizer, build_clip_tokenizer, build_word_tokenizer
from higen.video import Video

SOURCE = Path(__file__).resolve().parents[1] / "engines" / "cpp"
SANITIZERS = "-fsanitize=address,undefined"


def unavailable(reason: str) -> None:
    """Skip; where the C++ runtime must be tested (continuous integration) it is a failure."""
    if os.environ.get("HIGEN_REQUIRE_CPP"):
        pytest.fail(reason)
    pytest.skip(reason)


def done(*command: object, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that must succeed."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result


@pytest.fixture(scope="session")
def onnxruntime_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Headers and library of ONNX Runtime, or a skip that says what is missing."""
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            unavailable(f"{program} is not installed: apt-get install cmake g++ nlohmann-json3-dev")
    probe = subprocess.run(
        ["c++", "-E", "-x", "c++", "-"], input="#include <nlohmann/json.hpp>", capture_output=True, text=True
    )
    if probe.returncode:
        unavailable("no nlohmann/json.hpp: apt-get install nlohmann-json3-dev")
    if given := os.environ.get("ONNXRUNTIME_ROOT"):
        return given
    folder = tmp_path_factory.mktemp("onnxruntime")
    made = subprocess.run([SOURCE / "get_onnxruntime.sh", folder, sys.executable], capture_output=True, text=True)
    if made.returncode:
        unavailable(f"no headers of ONNX Runtime (set ONNXRUNTIME_ROOT): {made.stderr.strip()[-300:]}")
    return str(folder)


@pytest.fixture(scope="session")
def built(onnxruntime_root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder, with the address and the undefined-behaviour sanitizer; HIGEN_CPP_BUILD names one to reuse."""
    folder = Path(os.environ.get("HIGEN_CPP_BUILD") or tmp_path_factory.mktemp("cpp"))
    done(
        "cmake", "-S", SOURCE, "-B", folder, "-DCMAKE_BUILD_TYPE=Debug", "-DHIGEN_SANITIZE=ON",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O1", "-DCMAKE_C_FLAGS_DEBUG=-O1", f"-DONNXRUNTIME_ROOT={onnxruntime_root}",
        f"-DHIGEN_TEST_MODEL={default_model()}",
    )  # fmt: skip
    done("cmake", "--build", folder, "--parallel", len(os.sched_getaffinity(0)))
    return folder


@pytest.fixture(scope="session")
def ask(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[dict[str, Any]]], list[Any]]:
    """Put questions to tests/vectors.cpp; see there."""
    folder = tmp_path_factory.mktemp("vectors")

    def answers(jobs: Sequence[dict[str, Any]]) -> list[Any]:
        (folder / "jobs.json").write_text(json.dumps(list(jobs)), encoding="ascii")
        done(built / "tests" / "vectors", folder / "jobs.json", folder / "answers.json")
        found: list[Any] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        return found

    return answers


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with CLIP's tokenizer, cleaning, and a text encoder of random weights for its ids."""
    source = Bundle.open(default_model())
    length, width = source.config.text.context_length, source.config.unet.text_dim
    clip = {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": length,
        "projection_dim": width,
    }
    config = replace(source.config, text=TextConfig(clip=clip, context_length=length))
    path = tmp_path_factory.mktemp("models") / "clip"
    torch.manual_seed(0)
    with files.create(path, config) as folder:
        for name in source.files:
            if not name.startswith("text_encoder") and name != files.TOKENIZER:
                shutil.copy(source.path / name, folder)
        save_file(text_encoder(config.text).state_dict(), folder / files.TEXT_ENCODER)
        build_clip_tokenizer().save(str(folder / files.TOKENIZER))
    export_model(Bundle.open(path), ("text_encoder",))
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
    """Unit tests, the C header, the public interface on the built-in model, TensorRT on a fake, and seeded fuzzing."""
    result = done("ctest", "--test-dir", built, "--output-on-failure", "--no-tests=error")
    for name in ("unit_tests", "c_header", "model_tests", "tensorrt_tests", "fuzz_corpus"):
        assert name in result.stdout


def option(value: object) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


CASES: list[dict[str, Any]] = [
    {"prompt": 0, "seed": 7, "steps": (4, 3), "frames": 5},
    {"prompt": 1, "seed": 2**64 - 1, "solver": "ddim", "steps": (5, 2), "guidance": (7.5, 2.25), "frames": 3},
    {"prompt": 2, "seed": 1, "steps": 2, "guidance": 3, "frames": 4, "motion": 150, "appearance": 0.7, "size": [3, 2]},
    {"prompt": 3, "steps": 2, "frames": 4, "motion": [10.0, 200.0, 30.5], "appearance": [0.0, 1.5, 0.25, 1.0]},
    {"prompt": 4, "steps": 2, "frames": 3, "motion": [1, 2, 3], "appearance": None, "offset_noise": 0.1},
    {"prompt": 5, "seed": 3, "steps": 3, "frames": 1, "size": (2, 3)},
    {"prompt": "a whale!", "negative_prompt": "pink", "steps": 1, "frames": 2, "motion": None, "offset_noise": 0.0},
]  # fmt: skip


def compare(built: Path, pipeline: Pipeline, case: dict[str, Any], target: Path, *more: object) -> Video:
    """Frames of higen-run against Python's, at most 1/255 apart; returns Python's."""
    options = dict(case)
    multiple = pipeline.config.autoencoder.factor * pipeline.config.unet.size_multiple
    height, width = (n * multiple for n in options.pop("size", (2, 2)))
    options |= {"height": height, "width": width}
    prompt = options.pop("prompt")
    if isinstance(prompt, int):
        prompt = pipeline.config.prompts[prompt % len(pipeline.config.prompts)]
    names = {"negative_prompt": "negative"}
    flags = [f"--{names.get(k, k).replace('_', '-')}={option(v)}" for k, v in options.items() if k != "image"]
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
def test_frames_are_pythons(
    built: Path, pipelines: Callable[[Path], Pipeline], case: dict[str, Any], tmp_path: Path
) -> None:
    compare(built, pipelines(default_model()), case, tmp_path / "video.npy")


def test_frames_of_a_key_frame_of_the_users(built: Path, pipelines: Callable[[Path], Pipeline], tmp_path: Path) -> None:
    pipeline = pipelines(default_model())
    side = 2 * pipeline.config.autoencoder.factor * pipeline.config.unet.size_multiple
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    (tmp_path / "key.ppm").write_bytes(b"P6\n# a comment\n%d %d\n255\n" % (side, side) + picture.tobytes())
    case = {"prompt": 0, "steps": 2, "frames": 3, "image": picture}
    compare(built, pipeline, case, tmp_path / "video.npy", "--image", tmp_path / "key.ppm")


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
    side = 2 * pipeline.config.autoencoder.factor * pipeline.config.unet.size_multiple
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
        assert process.stderr.read(12) == b"\rspatial_une"  # it is in its first loop
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
        (["{model}", "a whale", "-o", "x.npy", "--provider=tensorrt-rtx"], 1, "provider='tensorrt-rtx'"),
        (["{model}", "a whale", "-o", "x.mp4"], 1, "the suffix says the format: .y4m, .npy or .rgb"),
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
    side = 2 * pipeline.config.autoencoder.factor * pipeline.config.unet.size_multiple
    sheet = tmp_path / "sheet.ppm"
    result = done(folder / "contact_sheet", default_model(), "a red heart", sheet, 1, side)
    assert "spatial_unet 1/1: mean" in result.stdout
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


def test_the_stage_table_is_pythons(ask: Ask) -> None:
    for stage, found in zip(STAGES.values(), ask([{"op": "stage", "stage": name} for name in STAGES]), strict=True):
        inputs = [[t.name, list(t.shape), t.dtype] for t in stage.inputs]
        outputs = [[name, list(t.shape), t.dtype] for name, t in zip(stage.graph_outputs, stage.outputs, strict=True)]
        assert found == [inputs, outputs]
    assert ask([{"op": "dimensions", "path": str(default_model())}]) == [
        dimensions(Bundle.open(default_model()).config)
    ]


def test_noise(ask: Ask) -> None:
    shapes = [
        (0, SPATIAL, 4, 1, 3, 5),
        (7, TEMPORAL, 3, 4, 8, 8),
        (2**64 - 1, TEMPORAL, 32, 2, 16, 8),
        (2**63, SPATIAL, 1, 1, 1, 1),
    ]
    names = ("seed", "purpose", "channels", "frames", "height", "width")
    found = ask([{"op": "noise", **dict(zip(names, shape, strict=True))} for shape in shapes])
    for shape, numbers in zip(shapes, found, strict=True):
        wanted = initial_noise(*shape).ravel()
        # Both round float64 to float32, so that they differ by one unit in the last place where log or cos do.
        assert np.abs(np.float32(numbers) - wanted).max() <= 2.4e-7 * max(np.abs(wanted).max(), 1)
        assert (np.float32(numbers) == wanted).mean() > 0.999


def test_schedules(ask: Ask) -> None:
    jobs = [
        {"op": "schedule", "solver": solver, "steps": steps, "timesteps": timesteps, "zero_terminal_snr": zero}
        for timesteps, zero in ((1000, True), (1000, False), (37, True))
        for solver in ("ddim", "dpm++2m")
        for steps in (1, 2, 3, 8, 12, 33, 37, 50, 333, 1000)
        if steps <= timesteps
    ]
    for job, rows in zip(jobs, ask(jobs), strict=True):
        config = ScheduleConfig(timesteps=job["timesteps"], zero_terminal_snr=job["zero_terminal_snr"])
        table = solver_table(job["solver"], job["steps"], config)
        found = np.array(rows)
        assert np.array_equal(found[:, 0], table.t)
        for column, name in enumerate(("A", "B", "C", "alpha", "sigma"), start=1):
            np.testing.assert_allclose(found[:, column], getattr(table, name), rtol=1e-12, atol=1e-13)


def given(value: Any) -> dict[str, Any] | None:
    """A cue as tests/vectors.cpp reads it."""
    if value is None:
        return None
    array = np.atleast_1d(np.asarray(value, dtype=float))
    rows, columns = array.shape if array.ndim == 2 else (len(array), 1)
    return {"values": array.ravel().tolist(), "rows": rows, "columns": columns}


def test_cues(ask: Ask) -> None:
    random_numbers = np.random.default_rng(3)
    motions: list[tuple[Any, int, int]] = [
        (value, frames, dim)
        for frames in (1, 2, 5, 32)
        for dim in (32, 96, 7)
        for value in (
            None,
            0.0,
            500.0,
            3.4e38,
            random_numbers.uniform(0, 900, max(frames - 1, 1)),
            random_numbers.uniform(0, 900, frames),
        )
    ]
    appearances: list[tuple[Any, int, int]] = [
        (value, frames, columns)
        for frames in (1, 2, 5, 40)
        for columns in (32, 3)
        for value in (
            *(None, 0.0, 1.0, -2.5, random_numbers.normal(size=frames), random_numbers.normal(size=(frames, columns))),
            # One by one is a number in the C interface, and a matrix in Python.
            *([random_numbers.normal(size=(frames, frames))] if frames > 1 else []),
        )
    ]
    found = ask(
        [{"op": "motion", "cue": given(value), "frames": f, "dim": d} for value, f, d in motions]
        + [{"op": "appearance", "cue": given(value), "frames": f, "columns": c} for value, f, c in appearances]
    )
    wanted = [motion_cue(*case) for case in motions] + [appearance_cue(*case) for case in appearances]
    for numbers, cue in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.reshape(numbers, cue.shape), cue, rtol=0, atol=5e-7)


WORDS = ("a", "Blue", "whale", "swimming", ",", "blue", "it", "'", "s", "日本", "café", "3", "ß", "i\u0307")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (("clip", build_clip_tokenizer()), ("word", build_word_tokenizer(WORDS))):
        tokenizer.save(str(folder / f"{name}.json"))
    return {name: folder / f"{name}.json" for name in ("clip", "word")}


def tokens(ask: Ask, tokenizer: Path, config: TextConfig, texts: Sequence[str]) -> list[Any]:
    """What the C++ tokenizer makes of each text: ids, or the name of a status."""
    rules = {"context_length": config.context_length, "pad_id": config.pad_id, "clean": config.clean}
    (found,) = ask([{"op": "tokens", "tokenizer": str(tokenizer), "texts": texts, **rules}])
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
def test_token_ids_are_pythons(
    ask: Ask, tokenizers: dict[str, Path], kind: str, clean: bool, ordinary: bool, count: int
) -> None:
    """Ten thousand texts in all. With cleaning, texts that only ftfy can repair are refused: never other ids."""
    texts = random_texts(count, seed=11, words=ORDINARY if ordinary else None, more=WORDS)
    config = TextConfig(context_length=40, pad_id=0, clean=clean)
    tokenizer = PromptTokenizer.from_file(tokenizers[kind], config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        wanted = [tokenizer.encode([text])[0].tolist() for text in texts]
    found = tokens(ask, tokenizers[kind], config, texts)
    refused = [text for text, ids in zip(texts, found, strict=True) if ids == "HIGEN_ERROR_CLEANING"]
    if ordinary or not clean:
        assert refused == []
    else:
        assert len(refused) < 0.9 * count  # mojibake, entities and loose accents are a good part of these texts
    wrong = [
        (ascii(text), ids, expected)
        for text, ids, expected in zip(texts, found, wanted, strict=True)
        if ids not in (expected, "HIGEN_ERROR_CLEANING")
    ]
    assert wrong == []


def test_every_pair_of_suspicious_characters_is_cleaned_as_python_does_or_refused(
    ask: Ask, tokenizers: dict[str, Path]
) -> None:
    """ftfy's rules are about neighbours: one character of each of its kinds beside each other, in four surroundings."""
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
    config = TextConfig(context_length=16)
    tokenizer = PromptTokenizer.from_file(tokenizers["clip"], config)
    wanted = [tokenizer.encode([text])[0].tolist() for text in texts]
    found = tokens(ask, tokenizers["clip"], config, texts)
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


def test_malformed_manifests_are_refused_where_python_refuses_them(ask: Ask, tmp_path: Path) -> None:
    """One value at a time exchanged for another: both accept, or both refuse."""
    source = Bundle.open(default_model())
    manifest = json.loads((source.path / files.MANIFEST).read_text(encoding="utf-8"))
    generator = random.Random(2)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        2,
        33,
        64,
        0.5,
        1.0,
        1e30,
        "",
        "x",
        [],
        {},
        [1],
        [1, 2],
        "../x",
        [0.1, 0.2],
    ]

    def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return [path, *(place for key, child in items for place in places(child, (*path, key)))]

    # A list of 32 numbers would else be most of the places; `clip` and `arguments` are free-form.
    everywhere = [
        p for p in places(manifest) if p and not {"clip", "arguments"} & set(p[:-1]) and p[-1] not in range(2, 100)
    ]
    paths, texts = [], []
    for i in range(400):
        changed = copy.deepcopy(manifest)
        place = generator.choice(everywhere)
        node = changed
        for key in place[:-1]:
            node = node[key]
        if isinstance(node, dict) and generator.random() < 0.1:
            del node[place[-1]]
        else:
            node[place[-1]] = generator.choice(values)
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in source.files:
            (folder / name).symlink_to(source.path / name)
        texts.append(json.dumps(changed))
        (folder / files.MANIFEST).write_text(texts[-1], encoding="utf-8")
        paths.append(folder)
    both = {"accepted": 0, "refused": 0}
    for path, text, found in zip(paths, texts, ask([{"op": "bundle", "path": str(p)} for p in paths]), strict=True):
        try:
            Bundle.open(path)
            wanted = "accepted"
        except ModelError:
            wanted = "refused"
        both[wanted] += 1
        assert ("refused" if isinstance(found, dict) else "accepted") == wanted, (found, text)
    assert min(both.values()) > 40


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with a quantised key frame, and with every graph in float16 by ONNX Runtime's converter."""
    path = Path(shutil.copytree(default_model(), tmp_path_factory.mktemp("variants") / "model"))
    bundle = Bundle.open(path)
    side = bundle.config.autoencoder.factor * bundle.config.unet.size_multiple
    calls = record_calls(bundle, ["a red heart"], 4, 3, frames=2, width=side, height=side)
    bundle = quantize(bundle, calls, "int8", ["spatial_unet"], 0.3)
    for stage in STAGES:
        graph = onnx.load(str(path / files.graph_file(stage)))
        onnx.save(convert_float_to_float16(graph, keep_io_types=True), str(path / files.graph_file(stage, "fp16")))
    # The name is what counts in choosing between graphs.
    shutil.copy(path / files.graph_file("temporal_unet", "fp16"), path / files.graph_file("temporal_unet", "int8.fp16"))
    made = [files.graph_file(stage, "fp16") for stage in STAGES]
    files.add_files(bundle, [*made, files.graph_file("temporal_unet", "int8.fp16")])
    return path


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_frames_in_another_precision(
    built: Path, pipelines: Callable[[Path], Pipeline], variants: Path, precision: str, tmp_path: Path
) -> None:
    bundle = Bundle.open(variants)
    pipeline = Pipeline(bundle, OnnxBackend(bundle, "cpu", precision))
    case = {"prompt": 0, "seed": 7, "steps": 2, "frames": 2}
    low = compare(built, pipeline, case, tmp_path / "low.npy", f"--precision={precision}").frames
    height, width = low.shape[1:3]
    options = {"seed": 7, "steps": 2, "frames": 2, "height": height, "width": width, "progress": False}
    assert np.any(low != pipelines(variants)(pipeline.config.prompts[0], **options).frames)


@pytest.mark.parametrize("precision", ["int8", "int8.fp16"])
def test_a_stage_without_a_quantised_graph_runs_in_the_precision_of_its_weights(
    built: Path, variants: Path, precision: str
) -> None:
    info = higen_run(built, variants, "--info", "--no-verify", f"--precision={precision}").stdout
    backend = OnnxBackend(Bundle.open(variants), "cpu", precision)
    for stage in ("text_encoder", "spatial_unet", "temporal_unet"):
        assert f"{stage}: onnx, {backend.describe(stage)}" in info


def test_a_precision_that_is_not_there(built: Path, variants: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable) as raised:
        OnnxBackend(Bundle.open(variants), "cpu", "bf16").prepare("text_encoder")
    for precision, message in (("bf16", str(raised.value)), ("int4", "precision='int4': one of 'fp32'")):
        target = tmp_path / "x.npy"
        result = higen_run(built, variants, "a", "-o", target, f"--precision={precision}", check=False)
        assert result.returncode == 1
        assert message in result.stderr


@pytest.mark.parametrize("precision", files.QUANTIZED)
def test_a_precision_that_the_model_was_never_quantised_to_is_refused(built: Path, precision: str) -> None:
    model = default_model()
    result = higen_run(built, model, "--info", f"--precision={precision}", check=False)
    assert result.returncode == 1
    assert str(Bundle.open(model).not_quantized(precision)) in result.stderr


def test_plans_are_chosen_as_python_chooses_them(ask: Ask, tmp_path: Path) -> None:
    """Up to three engines of a stage, each record changed in one place or none: the same plans, or the same error."""
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
            if generator.random() < 0.3:  # a build that was killed between plan and record, or before both
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
            best = next((p for p in files.stand_ins(precision) if p in there), precision)
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
            else:  # their words are each language's
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
