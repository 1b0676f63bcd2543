"""Forked processes: a model loaded before the fork is refused at once, and nothing waits for lost threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

SCRIPT = """
import json, os, signal, sys, threading, warnings
import higen
from higen.backends.shared_batches import SharedBackend
from higen.backends.batching import Batcher

backend = sys.argv[1]
small = dict(steps=1, frames=2, width=32, height=32, progress=False)
pipe = higen.load(backend=backend, threads=2)
pipe("a heart", **small)
waiting = pipe.stream("a heart", steps=9, frames=2, width=32, height=32)
next(waiting)
shared = SharedBackend(pipe.backend, pipe.manifest, Batcher(4, dict.fromkeys(pipe.manifest.stage_names, 8)))
with shared.request() as mine:
    pipe.on(mine)("a heart", **small)
busy = pipe.stream("a heart", steps=999, frames=2, width=32, height=32)
going = threading.Event()
worker = threading.Thread(target=lambda: [going.set() for _ in busy])
worker.start()
going.wait()  # it needs none of the locks below any more
pipe._kept._lock.acquire()  # as if another thread held it at the moment of the fork
waiting._working.acquire()

def with_shared():
    with shared.request() as mine:
        pipe.on(mine)("a heart", **small)

def fresh():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with higen.load(backend=backend, threads=2) as mine:
            return len(mine("a heart", **small)), [type(one.message).__name__ for one in told]

def closed():
    waiting.close()
    shared.close()
    with pipe:
        pass

CASES = {
    "call": lambda: pipe("a heart", **small),
    "image": lambda: pipe.image("a heart", steps=1, width=32, height=32),
    "stream": lambda: pipe.stream("a heart"),
    "next": lambda: next(waiting),
    "prepare": lambda: pipe.prepare(),
    "shared": with_shared,
    "backend": lambda: pipe.backend.prepare("vae_decoder"),
    "close": closed,
    "fresh": fresh,
    "generate": lambda: len(higen.generate("a heart", backend=backend, **small)),
}
found = {}
for name, case in CASES.items():
    if name == "close":
        busy.close()
        worker.join()
    away, home = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(40)
        try:
            said = case()
        except higen.HigenError as error:
            said = f"{type(error).__name__}: {error}"
        os.write(home, json.dumps(said).encode())
        sys.exit(7)  # not os._exit: the handlers of Python and of the libraries run
    os.close(home)
    said = os.read(away, 10_000).decode()
    status = os.waitpid(child, 0)[1]
    found[name] = [os.waitstatus_to_exitcode(status), json.loads(said or "null")]
print(json.dumps(found))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_forked_process_does_not_hang(backend: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {name: status for name, (status, _) in found.items()} == dict.fromkeys(found, 7)
    said = {name: text for name, (_, text) in found.items()}
    for name in ("call", "image", "stream", "next", "prepare", "shared", "backend"):
        assert said[name].startswith("BackendError: the model was loaded in process "), name
        assert "call higen.load here, or start processes by 'spawn'" in said[name]
    assert said["close"] is None
    # PyTorch loses its threads in the fork and warns about it; ONNX Runtime makes new threads.
    assert said["fresh"] == [2, ["FallbackWarning"] if backend == "torch" else []]
    assert said["generate"] == 2
