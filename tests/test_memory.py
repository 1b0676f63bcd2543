"""Too little memory gives one error that says so, while loading a model or for a request that is too large."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys

import pytest

from higen.errors import BackendError, IntegrityError, OutOfMemory, RequestError
from higen.memory import enough_memory, is_lack_of_memory

MESSAGES = [
    MemoryError(),
    MemoryError("Unable to allocate 16.0 MiB for an array with shape (2097152,) and data type uint64"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: bad allocation"),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : bfc_arena.cc:376 Failed to allocate memory for requested buffer"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] data. DefaultCPUAllocator: not enough memory: you tried to ..."),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", MESSAGES, ids=lambda error: str(error)[:40])
def test_every_message_about_memory_is_one_error(error: Exception) -> None:
    assert is_lack_of_memory(error)
    with pytest.raises(OutOfMemory, match=r"^load: there is too little memory here"), enough_memory("load"):
        raise error
    wrapped = IntegrityError("model.safetensors: cannot be read as safetensors")
    wrapped.__cause__ = error
    with pytest.raises(OutOfMemory), enough_memory("load"):
        raise wrapped


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOENT, "No such file"), RequestError("solver='out of memory': one of 'ddim'"), ValueError("x")],
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, enough_memory("load"):
        raise error
    assert caught.value is error


def test_an_error_that_is_named_already_is_not_named_twice() -> None:
    with pytest.raises(OutOfMemory, match=r"^a stage$"), enough_memory("load"):
        raise OutOfMemory("a stage")
    assert issubclass(OutOfMemory, BackendError)


LIMITED = """
import re, resource, sys
import higen, higen.api, {library}
def limit(more):
    used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + more * 2**20, resource.RLIM_INFINITY))
small = dict(steps=1, frames=2, width=32, height=32, progress=False)
pipe = higen.load(backend="{backend}", threads=1)
pipe("a heart", **small)
for more in (1, 8, 40):
    limit(more)
    for work in (
        lambda: higen.load(backend="{backend}", threads=1)("a heart", **small) if more < 40 else 1 / 0,
        lambda: pipe("a heart", **dict(small, frames=8, width=2048, height=2048)),
    ):
        try:
            work()
            print("done")
        except higen.HigenError as error:
            print(type(error).__name__)
        except ZeroDivisionError:
            pass
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(len(pipe("a heart", **small)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize(("backend", "library"), [("onnx", "onnxruntime"), ("torch", "higen.backends.torch")])
def test_a_process_with_too_little_memory(backend: str, library: str) -> None:
    """The error is typed at every memory limit. With enough memory the pipeline works again."""
    code = LIMITED.format(backend=backend, library=library)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    *limited, last = run.stdout.split()
    assert last == "2"
    assert set(limited[1::2] + limited[-1:]) <= {"OutOfMemory", "done"}
    assert limited.count("OutOfMemory") >= 4


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only glibc keeps freed memory",
)
def test_freed_memory_goes_back_to_the_system() -> None:
    """Small blocks below a block that stays in use are kept by glibc until it is asked to return them."""
    code = (
        "import re; from pathlib import Path; from higen.memory import return_freed\n"
        "def held(): return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "import ctypes; libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        "blocks = [ctypes.c_void_p(libc.malloc(65536)) for _ in range(1000)]\n"
        "for block in blocks: ctypes.memset(block, 1, 65536)\n"
        "last = libc.malloc(65536)\n"
        "for block in blocks: libc.free(block)\n"
        "before = held(); return_freed(); print(before - held())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(ran.stdout) > 50_000
