"""Kills a command with SIGKILL at each of its file operations, and checks that the old or the new state is left.

    python tests/kill_campaign.py                     every command, every operation (some minutes on one core)
    python tests/kill_campaign.py --stride 7 export   every seventh operation of the cases named "export..."

Each case runs in forked children; the parent starts no threads, because a fork would lose them. Python's audit events
count the operations that change files (open for writing, rename, remove, mkdir, rmdir, link, chmod, truncate). The
child kills itself before operation number n. Then:

- a reader that repairs nothing (the C++ library) finds consistent files: each listed file has its hash;
- higen opens the complete old state or the complete new one;
- the same command, run again, succeeds, and leaves the new state and no hidden file.

Slow parts (tracing, calibration, TensorRT) are replaced by results that were made before. The code that writes files is
higen's own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch

from higen import commit, families
from higen.bundle import MANIFEST, Bundle, create_model, default_model, file_record, graph_file
from higen.convert import convert_sources
from higen.engines import model_engines as engines
from higen.engines.build import BuiltPlan
from higen.engines.shapes import read_profile
from higen.engines.targets import parse_targets
from higen.errors import IntegrityError
from higen.export import model_graphs as exports
from higen.export import quantize as quantizing
from higen.families.higen import spec
from higen.manifest_file import read_manifest
from higen.train.checkpoints import Checkpoints
from higen.train.latents import Encoded, LatentCache
from higen.train.record import Record, read_losses
from higen.typed_json import to_json
from higen.upgrade import upgrade
from higen.video import Video

__all__ = ["CASES", "Case", "Result", "campaign"]

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
STAGE = "text_encoder"  # the cheapest stage with weights of its own


@dataclass(frozen=True)
class Case:
    """A command on a folder.

    setup   makes the old state
    run     turns it into the new state
    state   checks everything and returns "old" or "new"
    """

    name: str
    setup: Callable[[Path], object]
    run: Callable[[Path], object]
    state: Callable[[Path], str]


@dataclass(frozen=True)
class Result:
    """The result of a case: number of kills, how many of them left the old and the new state, and the problems."""

    name: str
    kills: int
    old: int
    new: int
    wrong: tuple[str, ...]


# Video files

OLD_CLIP = Video(np.full((6, 16, 16, 3), 10, np.uint8), 8, {"prompt": "old"})
NEW_CLIP = Video(np.full((4, 16, 16, 3), 200, np.uint8), 8, {"prompt": "new"})


def save_case(name: str, suffix: str, old: Video | None = OLD_CLIP, new: Video = NEW_CLIP) -> Case:
    """The clip `new` replaces `old`, if there is one."""

    def setup(folder: Path) -> None:
        if old is not None:
            old.save(folder / f"clip{suffix}")

    def state(folder: Path) -> str:
        if old is None and not any(path.suffix == suffix for path in folder.iterdir()):
            return "old"
        clip = Video.open(folder / f"clip{suffix}")
        levels = {int(round(float(frame.mean()), -1)) for frame in clip.frames}
        found = next(video for video in (OLD_CLIP, NEW_CLIP) if levels == {int(video.frames[0, 0, 0, 0])})
        assert len(clip) == len(found), (len(clip), levels)
        return "new" if found is new else "old"

    return Case(name, setup, lambda folder: new.save(folder / f"clip{suffix}"), state)


# Model directories


def model_in(folder: Path) -> Path:
    """A copy of the built-in model, by hard links, because no command writes into an existing file."""
    return Path(shutil.copytree(default_model(), folder / "model", copy_function=os.link))


def fits_together(model: Path) -> None:
    """Check, without repairing anything, that every file in the manifest has the recorded hash."""
    for name, record in read_manifest(model, sealed=False).files.items():
        assert file_record(model / name) == record, name


def opened(model: Path) -> Bundle:
    """The model as higen opens it. Every file is checked, and the folder must not hold any unlisted file."""
    bundle = Bundle.open(model)
    for name in bundle.files:
        bundle.file(name)
    fits_together(model)
    there = {path.name for path in model.iterdir() if path.is_file() and not path.name.startswith(".higen-")}
    assert there == {*bundle.files, MANIFEST}, there ^ {*bundle.files, MANIFEST}
    return bundle


CONVERTED = SimpleNamespace(
    manifest=Bundle.open(default_model()).manifest,
    weights={f"{name}.safetensors": {"a": torch.arange(8.0) + i} for i, name in enumerate(("unet", "vae"))},
    texts={"tokenizer.json": "{}\n"},
    notes=(),
)


def convert(folder: Path, overwrite: bool) -> None:
    """A conversion of a checkpoint that was read before."""
    reader = SimpleNamespace(recognise=lambda _: True, convert=lambda *_, **__: CONVERTED)
    with mock.patch.object(families, "checkpoint", return_value=reader):
        convert_sources([], folder / "model", family="higen", dtype="fp32", overwrite=overwrite)


def convert_case(name: str, there: bool, exchange: bool) -> Case:
    """A model directory that is new or replaces another one, on a system with or without an exchange of folders."""

    def setup(folder: Path) -> None:
        if there:
            with create_model(folder / "model", CONVERTED.manifest) as made:
                (made / "old.safetensors").write_bytes(b"old")

    def run(folder: Path) -> None:
        with mock.patch.object(commit, "exchange", commit.exchange if exchange else lambda *_: False):
            convert(folder, overwrite=True)

    def state(folder: Path) -> str:
        if not there and not (folder / "model").exists():
            return "old"
        files = {*opened(folder / "model").files}
        assert files in ({"old.safetensors"}, {*CONVERTED.weights, "tokenizer.json"}), files
        return "old" if "old.safetensors" in files else "new"

    return Case(name, setup, run, state)


def export(folder: Path, precision: str) -> None:
    """An export of a graph that was traced and compared before. Only its name differs from the existing graph."""

    def traced(bundle: Bundle, _: object, name: str, output: Path, *__: object) -> None:
        graph = onnx.load(str(bundle.path / graph_file(name)), load_external_data=False)
        graph.graph.name = f"of {precision} again"
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = bundle.weights(name, precision)
        output.write_bytes(graph.SerializeToString())

    class Backend:
        def __init__(self, *_: object) -> None: ...
        def module(self, _: str) -> torch.nn.Module:
            return torch.nn.Identity()

        def close(self) -> None: ...

    passed = SimpleNamespace(passed=True)
    with mock.patch.multiple(
        exports,
        TorchBackend=Backend,
        export_stage=traced,
        references=lambda *_: [None],
        check_interface=lambda *_: None,
        check_rounding=lambda *_: passed,
        check_graph=lambda *_: [passed],
    ):
        exports.export_model(Bundle.open(folder / "model"), [STAGE], precision=precision)


def export_case(precision: str) -> Case:
    """A graph that replaces another one, or the first graph of its precision, which comes with weights."""

    def state(folder: Path) -> str:
        bundle, name = opened(folder / "model"), graph_file(STAGE, precision)
        before = Bundle.open(default_model()).files
        if bundle.files.get(name) == before.get(name):
            return "old"
        assert b"again" in (folder / "model" / name).read_bytes()
        assert bundle.weights(STAGE, precision) in bundle.files
        return "new"

    return Case(f"export {precision}", model_in, lambda folder: export(folder, precision), state)


def linked_model(folder: Path) -> None:
    """The layout of Hugging Face's cache: a snapshot of links to blobs."""
    (folder / "blobs").mkdir()
    (folder / "snapshots" / "x").mkdir(parents=True)
    for file in default_model().iterdir():
        name = hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copyfile(file, folder / "blobs" / name)
        (folder / "snapshots" / "x" / file.name).symlink_to(Path("..", "..", "blobs", name))
    (folder / "model").symlink_to(Path("snapshots", "x"))


def cache_case(precision: str) -> Case:
    """An export into a model that consists of links. No blob is changed."""
    there = export_case(precision)

    def state(folder: Path) -> str:
        for file in default_model().iterdir():
            blob = folder / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
            assert blob.read_bytes() == file.read_bytes(), f"the blob of {file.name} was changed"
        return there.state(folder)

    return Case(f"export {precision} in a cache of links", linked_model, there.run, state)


def quantize(folder: Path) -> None:
    """A quantisation of layers that were chosen before."""
    stage = Bundle.open(folder / "model").manifest.denoising[0]
    layer = {"a": 1.0}
    trial = SimpleNamespace(stage=stage, work=layer, ranges=layer, outputs={}, kind=None, error_of=lambda _: 0.0)
    with mock.patch.multiple(
        quantizing, _Trial=lambda *_: trial, _choose=lambda *_: (["a"], 0.0), insert=lambda *_, **__: None
    ):
        quantizing.quantize(Bundle.open(folder / "model"), {stage: []}, "int8", [stage])


def quantized_state(folder: Path) -> str:
    """Whether the graph exists."""
    bundle = opened(folder / "model")
    return "new" if graph_file(bundle.manifest.denoising[0], "int8") in bundle.files else "old"


BUILT = ("vae_decoder", "vae_encoder")


def build(folder: Path, content: bytes) -> None:
    """A build that writes `content` as each plan."""
    bundle = Bundle.open(folder / "model")
    with mock.patch.multiple(
        engines,
        library=lambda *_: SimpleNamespace(__version__=content.decode()),
        build_plan=lambda *_: BuiltPlan(content * 100, (), f"log of {content.decode()}\n"),
    ):
        profile = read_profile("default", bundle.manifest)
        engines.build_engines(bundle, parse_targets("rtx-sm89"), [profile], BUILT)


def build_setup(folder: Path) -> None:
    model_in(folder)
    build(folder, b"old")


def build_state(folder: Path) -> str:
    """Each stage's plan has its own record. The state is new if all plans are new."""
    from higen.backends.plans import read_plans

    found = []
    for stage in BUILT:
        plans, errors = read_plans(folder / "model", stage)
        if not plans and not errors:
            found.append("old")
            continue
        (plan,) = plans
        content = plan.path.read_bytes()
        assert not errors
        assert hashlib.sha256(content).hexdigest() == plan.record.sha256
        assert content in (b"old" * 100, b"new" * 100)
        found.append(content[:3].decode())
    return found[-1]  # the stages are built in this order, so the last one tells


# Training


def train(folder: Path) -> None:
    """Save a training run's files: the log, a clip's latents, a checkpoint, the list of skipped files, the model."""
    record = Record(folder / "run", 20, tensorboard=False)
    for step in (30, 40):
        record.log(step, {"image": 0.5})
    record.close()
    cache = LatentCache(str(folder / "cache"), {})
    cache.save(cache.folder / "ab" / "clip.safetensors", Encoded(torch.zeros(2)))
    Checkpoints(folder / "run" / "checkpoints", keep=2).save(40, {"a": torch.ones(8)})
    record.skipped({"broken.mp4": "no video"})
    with create_model(folder / "run" / "model", CONVERTED.manifest, overwrite=True) as made:
        (made / "unet.safetensors").write_bytes(b"40")


def train_setup(folder: Path) -> None:
    """Two checkpoints, and log lines from after the last one."""
    checkpoints = Checkpoints(folder / "run" / "checkpoints", keep=2)
    for step in (10, 20):
        checkpoints.save(step, {"a": torch.zeros(8)})
    record = Record(folder / "run", 0, tensorboard=False)
    for step in (10, 20, 25):
        record.log(step, {"image": 0.5})
    record.close()
    with create_model(folder / "run" / "model", CONVERTED.manifest) as made:
        (made / "unet.safetensors").write_bytes(b"20")


def train_state(folder: Path) -> str:
    """Check that every file is whole. The model is written last, so the state is new if the model is new."""
    steps = [int(row["step"]) for row in read_losses(folder / "run" / "losses.jsonl")]
    assert steps in ([10, 20, 25], [10, 20], [10, 20, 30], [10, 20, 30, 40]), steps
    checkpoints = Checkpoints(folder / "run" / "checkpoints", keep=2)
    state = checkpoints.load()
    newest = checkpoints.paths()[-1].name
    assert state is not None
    assert float(state["a"][0]) == (1 if newest == "step-00000040.pt" else 0), newest
    cached = folder / "cache" / "ab" / "clip.safetensors"
    assert not cached.exists() or LatentCache(str(folder / "cache"), {}).load(cached) is not None
    bundle = opened(folder / "run" / "model")
    return {b"20": "old", b"40": "new"}[bundle.file("unet.safetensors").read_bytes()]


# Upgrade


def upgrade_setup(folder: Path) -> None:
    """A directory of version 1."""
    model = folder / "model"
    model.mkdir()
    (model / "weights.safetensors").write_bytes(b"weights")
    files = {"weights.safetensors": to_json(file_record(model / "weights.safetensors"))}
    config = spec.write_config(spec.ModelConfig(name="old"))
    (model / MANIFEST).write_text(json.dumps({"format": "higen", "version": 1, "model": config, "files": files}))


def upgrade_state(folder: Path) -> str:
    return {1: "old", 2: "new"}[opened(folder / "model").version]


def edited(folder: Path) -> None:
    """A directory with tables that somebody has edited."""
    model = model_in(folder)
    text = (model / MANIFEST).read_text()
    (model / MANIFEST).unlink()  # it is a hard link to the built-in model's manifest
    (model / MANIFEST).write_text(text.replace('"name": "', '"name": "my ', 1))


def resealed_state(folder: Path) -> str:
    try:
        opened(folder / "model")
    except IntegrityError:
        return "old"
    return "new"


CASES = (
    *(save_case(f"save {suffix}", suffix) for suffix in (".mp4", ".webm", ".gif", ".webp", ".png", ".npy")),
    save_case("save .png over a shorter one", ".png", NEW_CLIP, OLD_CLIP),
    save_case("save .png where none is", ".png", None),
    save_case("save .mp4 where none is", ".mp4", None),
    convert_case("convert", there=False, exchange=True),
    convert_case("convert over another", there=True, exchange=True),
    convert_case("convert over another without exchange", there=True, exchange=False),
    export_case("fp32"),
    export_case("fp16"),
    export_case("bf16"),
    cache_case("fp32"),
    cache_case("fp16"),
    Case("quantize", model_in, quantize, quantized_state),
    Case("build", build_setup, lambda folder: build(folder, b"new"), build_state),
    Case("build where none is", model_in, lambda folder: build(folder, b"new"), build_state),
    Case("train", train_setup, train, train_state),
    Case("upgrade", upgrade_setup, lambda folder: upgrade(folder / "model"), upgrade_state),
    Case("upgrade --reseal", edited, lambda folder: upgrade(folder / "model", reseal=True), resealed_state),
)


# The campaign


def in_child(work: Callable[[], object], kill_at: int = 0, seconds: int = 60) -> tuple[int, str]:
    """Run `work` in a forked child. `kill_at`: the number, from 1, of the operation before which it dies; 0 for none.

    Returns the child's exit code (negative for a signal) and the result or the error of `work` as text.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking with threads: the parent has none running
        child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(seconds)
            if kill_at:
                kill_before(kill_at)
            said = str(work())
            code = 0
        except BaseException as error:  # the parent reports it
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode()[:4000])
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def kill_before(number: int) -> None:
    """Kill this process before file operation `number`."""
    done = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            path, mode, flags = arguments
            writes = bool(set(mode) & set("wax+")) if isinstance(mode, str) else bool((flags or 0) & WRITING)
            if not writes or str(path).startswith("/dev/"):
                return
        elif event not in OPERATIONS:
            return
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def left_over(folder: Path) -> list[str]:
    """Hidden and unfinished files."""
    found = (path for path in folder.rglob("*") if path.name.startswith(".higen-") or path.name.endswith(".part"))
    return sorted(str(path.relative_to(folder)) for path in found)


def killed(case: Case, number: int) -> tuple[str | None, str]:
    """Kill a case at an operation. Returns the state after it (None: the run ended first) and the problem (or "")."""
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        folder = Path(place)
        if problem := failed("the first state", in_child(lambda: case.setup(folder))):
            return None, problem
        code, said = in_child(lambda: case.run(folder), number)
        if code != -signal.SIGKILL:
            return None, failed("the command", (code, said))
        found = in_child(lambda: untouched(folder) or case.state(folder))
        if problem := failed("after the kill", found):
            return "?", problem
        again = in_child(lambda: case.run(folder))
        after = in_child(lambda: case.state(folder))
        problem = failed("the next run", again) or failed("after the next run", after)
        if not problem and (after[1] != "new" or left_over(folder)):
            problem = f"the next run left the {after[1]} state and {left_over(folder)}"
        return found[1], problem


def failed(what: str, ended: tuple[int, str]) -> str:
    code, said = ended
    return "" if code == 0 else f"{what}: exit code {code}, {said}"


def untouched(folder: Path) -> None:
    """Check the files after a kill without repairing anything."""
    model = folder / "model"
    if (model / MANIFEST).exists():
        fits_together(model)


def campaign(case: Case, stride: int = 1, first: int = 1) -> Result:
    """Kill a case at every operation or, with `stride` n, at every n-th operation from `first`."""
    states, wrong, number = [], [], first
    while True:
        state, problem = killed(case, number)
        if problem:
            wrong.append(f"operation {number}: {problem}")
        if state is None:
            break
        states.append(state)
        number += stride
    return Result(case.name, len(states), states.count("old"), states.count("new"), tuple(wrong))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stride", type=int, default=1, help="kill at every n-th operation  [1]")
    parser.add_argument("names", nargs="*", help="cases that have one of these words in their names  [all]")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    total, wrong = 0, 0
    print(f"{'case':<40}{'kills':>6}{'old':>6}{'new':>6}{'wrong':>7}{'seconds':>9}")
    for place, case in enumerate(CASES):
        if given.names and not any(name in case.name for name in given.names):
            continue
        start = time.perf_counter()
        found = campaign(case, given.stride, 1 + 7 * place % min(given.stride, 8))
        spent = time.perf_counter() - start
        print(
            f"{case.name:<40}{found.kills:>6}{found.old:>6}{found.new:>6}{len(found.wrong):>7}{spent:>9.1f}", flush=True
        )
        for line in found.wrong:
            print(f"    {line}", flush=True)
        total, wrong = total + found.kills, wrong + len(found.wrong)
    print(f"{'all':<40}{total:>6}{'':>12}{wrong:>7}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
