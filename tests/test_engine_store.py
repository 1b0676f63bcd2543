"""The engine store: engines are written whole or not at all, by one builder at a time."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from higen.backends.plans import PlanProfile, PlanRecord, PlanTensor, Span, read_plans
from higen.engines.store import EngineStore, difference
from higen.errors import Malformed, OutputError

PLAN = b"a plan" * 1000

RECORD = PlanRecord(
    stage="vae_decoder",
    target="rtx-sm89",
    precision="fp32",
    flavour="rtx",
    library="1.7.1",
    architectures=(89,),
    graph="vae_decoder.onnx",
    graph_sha256="1" * 64,
    weights="vae.safetensors",
    weights_sha256="2" * 64,
    tensors=(
        PlanTensor("latents", "input", "float32", (-1, 4, -1, -1)),
        PlanTensor("pixels", "output", "float32", (-1, 3, -1, -1)),
    ),
    profiles=(PlanProfile("default", (Span("latents", (1, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8)),)),),
    options={"workspace": None, "weight_streaming": False},
    size=len(PLAN),
    sha256=hashlib.sha256(PLAN).hexdigest(),
    built="2026-01-01T00:00:00+00:00",
    seconds=1.5,
)


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    store = EngineStore(tmp_path, "rtx-sm89")
    with store.building():
        store.write(PLAN, RECORD, "log\n")
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WHOLE = [".lock", "vae_decoder.engine", "vae_decoder.json", "vae_decoder.log"]


def test_a_record_is_read_back_as_it_was(store: EngineStore, tmp_path: Path) -> None:
    assert names(store.folder) == WHOLE
    assert store.stored("vae_decoder") == RECORD
    assert store.stored("vae_encoder") is None
    (plan,), errors = read_plans(tmp_path, "vae_decoder")
    assert plan.record == RECORD
    assert plan.path.read_bytes() == PLAN
    assert errors == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"graph_sha256": "3" * 64}, "another graph"),
        ({"weights_sha256": "3" * 64}, "other weights"),
        ({"architectures": (86,)}, r"other architectures ((89,), now (86,))"),
        ({"library": "1.8.0"}, "another library (1.7.1, now 1.8.0)"),
        ({"flavour": "tensorrt"}, "another flavour"),
        ({"precision": "fp16"}, "another precision (fp32, now fp16)"),
        ({"profiles": ()}, "other profiles"),
    ],
)
def test_what_makes_a_plan_stale(change: dict[str, Any], reason: str) -> None:
    assert difference(RECORD, replace(RECORD, **change)) == reason


def test_what_does_not() -> None:
    later = replace(RECORD, built="2027-01-01T00:00:00+00:00", seconds=9.0, size=1, sha256="4" * 64)
    assert difference(RECORD, later) is None


def test_a_cut_plan_is_built_again(store: EngineStore) -> None:
    (store.folder / "vae_decoder.engine").write_bytes(PLAN[:-1])
    assert store.stored("vae_decoder") is None


def test_an_altered_plan_is_built_again(store: EngineStore) -> None:
    """The backend checks a plan's sha256. A builder that checked only the size would never repair this plan."""
    (store.folder / "vae_decoder.engine").write_bytes(PLAN[:-1] + b"x")
    assert store.stored("vae_decoder") is None
    assert store.stored("vae_decoder", verify=False) == RECORD
    assert store.holds("vae_decoder")
    assert not store.holds("vae_encoder")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": 2}', "\0", RECORD.to_text().replace('"rtx"', '"jax"')],
    ids=range(8),
)
def test_a_broken_record_is_malformed_and_built_again(store: EngineStore, tmp_path: Path, text: str) -> None:
    (store.folder / "vae_decoder.json").write_text(text)
    assert store.stored("vae_decoder") is None
    plans, (error,) = read_plans(tmp_path, "vae_decoder")
    assert plans == []
    assert isinstance(error, Malformed)
    assert "vae_decoder.json" in str(error)


def test_a_record_in_another_targets_folder_is_malformed(store: EngineStore, tmp_path: Path) -> None:
    store.folder.rename(tmp_path / "engines" / "rtx-sm86")
    plans, (error,) = read_plans(tmp_path, "vae_decoder")
    assert plans == []
    assert "is the record of rtx-sm89/vae_decoder" in str(error)


@pytest.mark.parametrize("failing", ["vae_decoder.engine", "vae_decoder.log", "vae_decoder.json"])
def test_a_full_disk_leaves_the_old_engine(store: EngineStore, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    real = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if self.name == f".{failing}.part" and "w" in mode:
            with real(self, mode) as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    with (
        store.building(),
        pytest.raises(OutputError, match=r"vae_decoder\.engine: cannot be written: the disk is full"),
    ):
        store.write(b"new", replace(RECORD, size=3), "new\n")
    monkeypatch.undo()
    assert names(store.folder) == WHOLE
    assert store.stored("vae_decoder") == RECORD


def test_too_little_space_is_detected_before_the_build(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, "rtx")
    store.check_space(1000)
    with pytest.raises(OutputError, match=r"MB free, the engines need about 1000000000000 MB"):
        store.check_space(10**18)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(OutputError, match="engines/rtx"), EngineStore(tmp_path, "rtx").building():
        pytest.fail("is not to be reached")


def test_files_of_a_killed_builder_are_removed(store: EngineStore) -> None:
    for name in ("vae_decoder.engine", "vae_decoder.log", "vae_decoder.json"):
        (store.folder / f".{name}.part").write_bytes(b"half")
    with store.building():
        assert names(store.folder) == WHOLE
    assert store.stored("vae_decoder") == RECORD


NEW = b"a new plan"
NEW_RECORD = replace(RECORD, size=len(NEW), sha256=hashlib.sha256(NEW).hexdigest())
SAME_SIZE = bytes(reversed(PLAN))


@pytest.mark.parametrize("new", [NEW, SAME_SIZE])
def test_a_builder_killed_between_plan_and_record_is_finished(store: EngineStore, tmp_path: Path, new: bytes) -> None:
    """Even before the next build, the new plan is read with its own record."""
    record = replace(RECORD, size=len(new), sha256=hashlib.sha256(new).hexdigest())
    (store.folder / "vae_decoder.engine").write_bytes(new)
    (store.folder / ".vae_decoder.json.part").write_text(record.to_text())
    assert store.stored("vae_decoder") is None
    assert [plan.record for plan in read_plans(tmp_path, "vae_decoder")[0]] == [record]
    with store.building():
        assert store.stored("vae_decoder") == record
    assert names(store.folder) == WHOLE


@pytest.mark.parametrize("stage", ["vae_decoder", "vae/decoder", ""])
def test_a_record_that_waits_for_its_plan_is_not_read(store: EngineStore, tmp_path: Path, stage: str) -> None:
    (store.folder / ".vae_decoder.json.part").write_text(replace(NEW_RECORD, stage=stage).to_text())
    assert [plan.record for plan in read_plans(tmp_path, "vae_decoder")[0]] == [RECORD]
    with store.building():
        assert store.stored("vae_decoder") == RECORD


@pytest.mark.parametrize(("failing", "left"), [(1, RECORD), (2, RECORD), (3, NEW_RECORD)])
def test_a_switch_that_fails_leaves_one_of_both_engines(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, left: PlanRecord
) -> None:
    """The log, the plan and the record are renamed in this order. The rename with number `failing` fails."""
    real, done = Path.replace, []

    def replaced(self: Path, target: Path) -> Path:
        done.append(target.name)
        if len(done) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    with store.building():
        monkeypatch.setattr(Path, "replace", replaced)
        with pytest.raises(OutputError, match="cannot be written"):
            store.write(NEW, NEW_RECORD, "new\n")
    monkeypatch.undo()
    (plan,), errors = read_plans(tmp_path, "vae_decoder")
    assert errors == []
    assert plan.record == left
    assert hashlib.sha256(plan.path.read_bytes()).hexdigest() == left.sha256
    with store.building():
        assert store.stored("vae_decoder") == left
    assert names(store.folder) == WHOLE


BUILDER = """
import sys, time
from dataclasses import replace
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_engine_store import RECORD
from higen.engines.store import EngineStore
import hashlib
letter, folder = sys.argv[1:]
store = EngineStore(Path(folder), "rtx-sm89")
plan = letter.encode() * 100_000
record = replace(RECORD, size=len(plan), sha256=hashlib.sha256(plan).hexdigest())
print("ready", flush=True)
for _ in range(20):
    with store.building():
        store.write(plan, record, letter)
        assert (store.folder / "vae_decoder.engine").read_bytes() == plan
        assert store.stored("vae_decoder") == record
        if letter == "k":
            print("inside", flush=True)
            time.sleep(60)
"""


def builder(letter: str, folder: Path) -> subprocess.Popen[str]:
    code = BUILDER.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", code, letter, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_builders_at_once_never_mix(tmp_path: Path) -> None:
    processes = [builder(letter, tmp_path) for letter in "ab"]
    assert [process.wait(120) for process in processes] == [0, 0]
    for process in processes:
        process.communicate()
    assert names(tmp_path / "engines" / "rtx-sm89") == WHOLE


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_killed_builder_releases_its_lock(tmp_path: Path) -> None:
    process = builder("k", tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    process.kill()
    process.communicate()
    started = time.monotonic()
    with EngineStore(tmp_path, "rtx-sm89").building():
        assert time.monotonic() - started < 60
