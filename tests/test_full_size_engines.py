"""benchmarks/full_size_engines.py: each step gets its own stage. Its results take hours and are stored next to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import full_size_engines
import pytest


@pytest.mark.parametrize(
    "given", [[], ["--stage", "spatial_unet", "--stage", "temporal_unet"], ["--stage", "temporal_unet"]]
)
def test_each_step_is_for_its_own_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    done: list[tuple[str, str]] = []
    monkeypatch.setattr(full_size_engines, "write_model", lambda path: done.append(("write", "")))
    monkeypatch.setattr(full_size_engines, "export", lambda path, stage: done.append(("export", stage)))
    monkeypatch.setattr(full_size_engines, "build", lambda path, stage, *_: done.append(("build", stage)))

    def run(command: list[str]) -> Any:
        """Do the work of a process with this command line."""
        with monkeypatch.context() as inner:
            inner.setattr(sys, "argv", command[1:])
            full_size_engines.main()
        return SimpleNamespace(pid=0)

    used = SimpleNamespace(ru_utime=0.0, ru_stime=0.0, ru_maxrss=0)
    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr(os, "wait4", lambda pid, options: (pid, 0, used))
    monkeypatch.setattr(sys, "argv", ["full_size_engines.py", str(tmp_path), *given])
    full_size_engines.main()
    stages = [name for name in given if name != "--stage"] or ["spatial_unet", "temporal_unet"]
    assert done == [("write", ""), *((step, stage) for stage in stages for step in ("export", "build"))]
