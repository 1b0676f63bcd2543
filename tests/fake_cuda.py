"""A fake of the CUDA driver functions that cuda.py calls. It uses host memory and enforces the real driver's rules.

Work on the stream waits for a synchronisation, so a test fails if memory is used too early or freed too soon. Graphs
record and replay. A call that the real driver refuses gives an error code. A call that would crash the real driver
fails an assertion.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

NOT_INITIALIZED, INVALID_CONTEXT, CAPTURE_UNSUPPORTED, NO_DEVICE, OUT_OF_MEMORY = 3, 201, 900, 100, 2
STREAM = 4711


class FakeDriver:
    """A replacement for `ctypes.CDLL("libcuda.so.1")`. `calls` counts functions by name."""

    def __init__(self, architecture: int = 89, devices: int = 1, memory: int = 2**32) -> None:
        self.architecture = architecture
        self.devices = devices
        self.memory = memory
        self.calls: dict[str, int] = {}
        self.blocks: dict[int, np.ndarray[Any, Any]] = {}
        self.current = False
        self._pending: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] | None = None
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._started = self._stream = False
        self._retained = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name != "current":
            calls = object.__getattribute__(self, "calls")
            calls[name] = calls.get(name, 0) + 1
        return object.__getattribute__(self, name)

    # Functions for tests and the fake TensorRT

    @property
    def capturing(self) -> bool:
        return self._recording is not None

    @property
    def used(self) -> int:
        return sum(block.nbytes for block in self.blocks.values())

    @property
    def clean(self) -> bool:
        """Whether all memory and objects were freed."""
        return not (self.blocks or self._graphs or self._stream or self._retained)

    def view(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """Bytes of device memory; asserts that they lie in one block that is still allocated."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.nbytes:
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    def enqueue(self, work: Callable[[], None]) -> None:
        """Put work on the stream, or into the graph that is being captured."""
        (self._pending if self._recording is None else self._recording).append(work)

    def drain(self) -> None:
        """Do the stream's waiting work."""
        pending, self._pending = self._pending, []
        for work in pending:
            work()

    # The driver's functions

    def cuInit(self, flags: int) -> int:  # noqa: N802
        if not self.devices:
            return NO_DEVICE
        self._started = True
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = f"CUDA_ERROR_{code}".encode()
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.devices
        return 0 if self._started else NOT_INITIALIZED

    def cuDeviceGet(self, device: Any, index: Any) -> int:  # noqa: N802
        device._obj.value = index.value
        return 0 if index.value < self.devices else 101

    def cuDeviceGetAttribute(self, value: Any, which: Any, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: self.architecture // 10, 76: self.architecture % 10}[which.value]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        self._retained += 1
        context._obj.value = 1
        return 0 if self._started else NOT_INITIALIZED

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:  # noqa: N802
        assert not self.current, "the context would be destroyed while it is current"
        self._retained -= 1
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        self.current = context.value == 1
        return 0

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:  # noqa: N802
        stream._obj.value = STREAM
        self._stream = True
        return 0 if self.current else INVALID_CONTEXT

    def cuStreamDestroy_v2(self, stream: Any) -> int:  # noqa: N802
        self._stream = False
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        if self.capturing:
            return CAPTURE_UNSUPPORTED
        self.drain()
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value, total._obj.value = self.memory - self.used, self.memory
        return 0 if self.current else INVALID_CONTEXT

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802
        if not self.current:
            return INVALID_CONTEXT
        if self.capturing:
            return CAPTURE_UNSUPPORTED
        if self.used + size.value > self.memory:
            return OUT_OF_MEMORY
        room = np.full(size.value + 256, 0xAB, np.uint8)
        skip = -room.ctypes.data % 256
        block = room[skip : skip + size.value]
        self.blocks[block.ctypes.data] = block
        address._obj.value = block.ctypes.data
        return 0

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        if self.capturing:
            return CAPTURE_UNSUPPORTED
        self.drain()
        del self.blocks[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        if not self.current or stream.value != STREAM:
            return INVALID_CONTEXT
        content = np.frombuffer(ctypes.string_at(source.value, size.value), np.uint8)  # read before the call returns
        to = self.view(target.value, size.value)
        self.enqueue(lambda: to.__setitem__(slice(None), content))
        return 0

    def cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        if not self.current or stream.value != STREAM:
            return INVALID_CONTEXT
        start = self.view(source.value, size.value)
        self.enqueue(lambda: ctypes.memmove(target.value, start.ctypes.data, size.value))
        return 0

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:  # noqa: N802
        assert not self.capturing
        self._recording = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:  # noqa: N802
        assert self._recording is not None
        graph._obj.value = 1000 + self.calls["cuStreamEndCapture"]
        self._graphs[graph._obj.value], self._recording = self._recording, None
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        executable._obj.value = graph.value + 10**6
        self._graphs[executable._obj.value] = list(self._graphs[graph.value])
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:  # noqa: N802
        del self._graphs[graph.value]
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:  # noqa: N802
        self.drain()
        del self._graphs[executable.value]
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:  # noqa: N802
        for work in self._graphs[executable.value]:
            self.enqueue(work)
        return 0
