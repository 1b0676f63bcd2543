"""The part of the CUDA driver that engines need, through ctypes: device, memory, one stream, graphs.

Call no function of TensorRT before `Cuda.open` has succeeded: without a driver, TensorRT can end the process.
"""

from __future__ import annotations

import ctypes
import heapq
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import CLOSED
from higen.devices import check_no_plugin, device_index
from higen.errors import BackendError, BackendUnavailable, NoDevice, NoDriver, OutOfMemory

__all__ = ["Cuda", "DeviceArray", "gpu_count", "gpu_index", "probe"]

ALIGNMENT = 256
"""Blocks of device memory are multiples of this many bytes: TensorRT needs aligned addresses."""

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_CAPTURE_THREAD_LOCAL = 1
_NON_BLOCKING = 1
_NO_DEVICE = 100
_OUT_OF_MEMORY = 2


def gpu_index(device: str | None) -> int:
    """Index of the GPU with a device name; None: the first GPU. Raises BackendUnavailable for any other device."""
    check_no_plugin(device, "TensorRT")
    if device == "cpu":
        raise BackendUnavailable(f"device={device!r}: TensorRT runs on 'cuda', 'cuda:1', ...")
    return device_index(device)


def _driver() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise NoDriver(f"no NVIDIA driver: {error}") from error


def probe() -> None:
    """Check that a GPU can be used here, and keep nothing open. Raises NoDriver or NoDevice."""
    _start(_driver())


def gpu_count() -> int | None:
    """How many GPUs the NVIDIA driver has; None without a driver."""
    try:
        return _start(_driver())
    except NoDevice:
        return 0
    except NoDriver:
        return None


def _start(driver: Any) -> int:
    code = driver.cuInit(0)
    if code == _NO_DEVICE:
        raise NoDevice("the NVIDIA driver finds no GPU")
    if code:
        raise NoDriver(f"the NVIDIA driver does not start: {_name(driver, code)}")
    count = ctypes.c_int()
    if (code := driver.cuDeviceGetCount(ctypes.byref(count))) or count.value < 1:
        raise NoDevice(f"the NVIDIA driver finds no GPU{f': {_name(driver, code)}' if code else ''}")
    return count.value


def _name(driver: Any, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return f"{text.value.decode() if text.value else 'unknown error'} ({code})"


class DeviceArray:
    """An array on the GPU. Its memory returns to the pool when the array is garbage-collected."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self.address = cuda.take(self.nbytes)
        self._cuda = cuda

    def numpy(self) -> NDArray[Any]:
        """A copy on the host, made after all earlier work on the stream."""
        return self._cuda.to_host(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The array on the host, for numpy."""
        return np.asarray(self.numpy(), dtype)

    def __del__(self) -> None:
        if hasattr(self, "_cuda"):
            self._cuda.give(self.address, self.nbytes)


class Cuda:
    """A GPU with a memory pool and one stream. Everything here runs on that stream, in order.

    The pool always gives the lowest free address of a size. A loop that frees everything it takes therefore gets the
    same addresses in each round, so captured graphs can be replayed.
    """

    def __init__(self, driver: Any, index: int) -> None:
        """Use `Cuda.open` instead."""
        self._driver = driver
        self._pool: dict[int, list[int]] = {}
        self.lock = threading.RLock()
        """Held while the stream is used. No thread may wait for the stream while work on it is captured."""
        self._open = False
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        self._device = device.value
        self.architecture = 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)
        # The primary context is the one that TensorRT itself uses.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context.value
        self._open = True
        self.enter()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self.stream = int(stream.value or 0)

    @classmethod
    def open(cls, index: int = 0) -> Cuda:
        """The GPU with an index. Raises NoDriver or NoDevice."""
        driver = _driver()
        count = _start(driver)
        if index >= count:
            raise NoDevice(f"device='cuda:{index}': there are {count} GPUs here")
        return cls(driver, index)

    def enter(self) -> None:
        """Make the GPU current for the calling thread. Raises BackendError after `close`."""
        if not self._open:
            raise BackendError(CLOSED)
        self._call("cuCtxSetCurrent", ctypes.c_void_p(self._context))

    @property
    def free_memory(self) -> int:
        """Free bytes on the GPU."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def take(self, size: int) -> int:
        """The address of a block of at least `size` bytes. Raises BackendError if the GPU has no block of this size."""
        size = _rounded(size)
        with self.lock:
            if blocks := self._pool.get(size):
                return heapq.heappop(blocks)
            return self.allocate(size)

    def give(self, address: int, size: int) -> None:
        """Return a block to the pool. Earlier work may still use it: the next owner's work is later on the stream."""
        with self.lock:
            if self._open:
                heapq.heappush(self._pool.setdefault(_rounded(size), []), address)

    def trim(self) -> None:
        """Free all blocks in the pool."""
        self.synchronize()
        with self.lock:
            blocks = [address for pool in self._pool.values() for address in pool]
            self._pool.clear()
        for address in blocks:
            self.release(address)

    def allocate(self, size: int) -> int:
        """The address of new device memory. If none is left, the pool is freed first. Raises BackendError."""
        try:
            return self._allocate(size)
        except BackendError:
            self.trim()
            return self._allocate(size)

    def _allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size), what=f"{size / 1e6:.0f} MB")
        return address.value

    def release(self, address: int) -> None:
        """Free memory that `allocate` returned."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def to_device(self, array: NDArray[Any]) -> DeviceArray:
        """A copy of an array on the GPU."""
        array = np.ascontiguousarray(array)
        made = DeviceArray(self, array.shape, str(array.dtype))
        # The driver copies pageable memory before the call returns, so the array may be freed after it.
        source = ctypes.c_void_p(array.ctypes.data)
        self._call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(made.address), source, ctypes.c_size_t(array.nbytes), self._stream
        )
        return made

    def to_host(self, array: DeviceArray) -> NDArray[Any]:
        """A copy of an array on the host."""
        made = np.empty(array.shape, array.dtype)
        source, size = ctypes.c_uint64(array.address), ctypes.c_size_t(array.nbytes)
        with self.lock:
            self.enter()
            self._call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(made.ctypes.data), source, size, self._stream)
            self.synchronize()
        return made

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts on the stream, without running it. Raises BackendError if recording fails."""
        graph = ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_CAPTURE_THREAD_LOCAL))
        try:
            work()
        finally:  # end the capture in any case
            self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        with self._owned(graph) as captured:
            executable = ctypes.c_void_p()
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), captured, ctypes.c_ulonglong(0))
        return Graph(self, executable)

    @contextmanager
    def _owned(self, graph: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
        try:
            yield graph
        finally:
            self._call("cuGraphDestroy", graph)

    def close(self) -> None:
        """Free pool, stream and context. Arrays still on the GPU are lost."""
        if not self._open:
            return
        self.enter()
        self.trim()
        self._open = False
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuCtxSetCurrent", ctypes.c_void_p())  # a destroyed context must not stay current
        self._call("cuDevicePrimaryCtxRelease_v2", ctypes.c_int(self._device))

    @property
    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.stream)

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), ctypes.c_int(self._device))
        return value.value

    def _call(self, function: str, *arguments: Any, what: str = "") -> None:
        if code := getattr(self._driver, function)(*arguments):
            kind = OutOfMemory if code == _OUT_OF_MEMORY else BackendError
            hint = f" for {what}: the GPU's memory is full (low_memory=True?)" if kind is OutOfMemory else ""
            raise kind(f"{function}: {_name(self._driver, code)}{hint}")


class Graph:
    """Recorded work that can be run again."""

    def __init__(self, cuda: Cuda, executable: ctypes.c_void_p) -> None:
        self._cuda, self._executable = cuda, executable

    def launch(self) -> None:
        """Put the recorded work on the stream."""
        self._cuda._call("cuGraphLaunch", self._executable, self._cuda._stream)

    def close(self) -> None:
        """Free the graph."""
        self._cuda._call("cuGraphExecDestroy", self._executable)


def _rounded(size: int) -> int:
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT
