"""`higen batch --ray local`: two workers, one of which is killed, make the same videos as a single process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import higen

if importlib.util.find_spec("ray") is None:
    pytest.skip("higen[ray] is not installed", allow_module_level=True)
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"prompt": "a whale", "seed": i, "frames": 2 + i % 2, "steps": 30, "width": 64, "height": 64} for i in range(8)]


def workers(session: int) -> list[int]:
    """Process ids of the actors that make rows, in the cluster that process `session` started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"ray::MapWorker" in (folder / "cmdline").read_bytes():
                environment = (folder / "environ").read_bytes()
                found += [int(folder.name)] if f"HIGEN_TEST={session}".encode() in environment else []
        except OSError:  # the process has ended or belongs to another user
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_loses_and_repeats_nothing(tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HIGEN_TEST": str(os.getpid())}
    command = ["higen", "batch", str(rows), str(output), "--format", "npy", "--threads", "1", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--ray", "local", "--workers", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(list(output.glob("videos/*/*.npy"))) < 2 and process.poll() is None:
            time.sleep(0.02)
        found = workers(os.getpid())
        assert len(found) in (1, 2)  # the second worker may still be starting
        os.kill(found[0], signal.SIGKILL)
        said, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    done: dict[str, Any] = json.loads(said)
    assert (done["rows"], done["made"], done["failed"]) == (8, 8, 0)
    index = parquet.read_table(output / "index.parquet").to_pylist()
    assert [row["lines"] for row in index] == [[line] for line in range(1, 9)]
    assert len(list(output.glob("videos/*/*.npy"))) == 8
    assert list((output / "journal").iterdir()) == []
    with higen.load(threads=1) as pipe:
        for row, given in zip(index, ROWS, strict=True):
            assert np.array_equal(np.load(output / row["path"]), pipe(**given, progress=False).frames)
