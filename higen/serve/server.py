"""The server process: the lock of its folder, its socket, and limits on idle connections."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from higen.errors import ServeError
from higen.locks import hold
from higen.serve.app import open_service
from higen.serve.refusals import Refusal
from higen.serve.settings import Settings

__all__ = ["owned", "serve"]

HEAD_TIME = 15.0
"""Maximum seconds that a connection may take to send a request's headers."""

STOP_TIME = 10
"""Seconds that open connections have to finish when the server stops."""


def serve(settings: Settings, on_start: Callable[[str, int], None] = lambda host, port: None) -> None:
    """Serve until a signal ends the process. `on_start` is called with host and port when requests are accepted.

    Raises ServeError for a port, folder or queue that cannot be used, and what `open_service` raises.
    """
    with _terminated(), owned(settings.folder), _bound(settings.host, settings.port) as listening:
        service = open_service(settings)
        try:
            config = uvicorn.Config(
                service.app,
                http=_protocol(settings.limits.connections),
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=STOP_TIME,
                h11_max_incomplete_event_size=2**16,
            )
            port = listening.getsockname()[1]
            server = _Server(config, lambda: on_start(settings.host, port), service.parts.live.close)
            server.run(sockets=[listening])
        finally:
            service.close()


class _Server(uvicorn.Server):
    """A uvicorn server that calls back when it accepts requests and when it stops."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None], stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started
        self._stopping = stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.started:
            self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._stopping()
        await super().shutdown(sockets)


@contextmanager
def _terminated() -> Iterator[None]:
    """Make SIGTERM end the program with exit code 0, after everything is closed."""

    def end(*_: object) -> NoReturn:
        raise SystemExit(0)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the lock of a server's folder. The folder is made if necessary. Raises ServeError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder / "lock", os.O_RDWR | os.O_CREAT, wait=False)
    except BlockingIOError:
        raise ServeError(f"{folder}: another server works in this folder; --data names another one") from None
    except OSError as error:
        raise ServeError(f"{folder}: cannot be used: {error.strerror}") from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket. Raises ServeError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"host={host!r}: is not an address of this machine: {error}") from error
    with made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
        except OSError as error:
            why = (
                "is taken by another program"
                if error.errno == errno.EADDRINUSE
                else f"cannot be used: {error.strerror}"
            )
            raise ServeError(f"port {port} of {host} {why}; --port names another one") from error
        yield made


def _protocol(most: int) -> type[asyncio.Protocol]:
    """HTTP/1.1 with at most this many connections and a time limit for the headers of each."""

    class Guarded(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                self._refuse(Refusal(503, "too_many_connections", f"{most} connections are open", retry=5))
                return
            self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect_nothing()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            busy: Any = self.cycle
            if busy is not None and not busy.response_complete:
                self._expect_nothing()
            elif self._waiting is None and not self.transport.is_closing():
                self._expect_headers()

        def send_400_response(self, msg: str) -> None:
            self._refuse(Refusal(400, "invalid_http", msg))

        def _expect_headers(self) -> None:
            self._waiting = self.loop.call_later(HEAD_TIME, self._too_slow)

        def _expect_nothing(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _too_slow(self) -> None:
            self._refuse(Refusal(408, "headers_too_slow", "the headers came too slowly"))

        def _refuse(self, refusal: Refusal) -> None:
            """Send a refusal although no request was read, and end the connection."""
            self._expect_nothing()
            body = refusal.body()
            rows = {**refusal.headers(), "content-length": str(len(body)), "connection": "close"}
            head = "".join(f"{name}: {value}\r\n" for name, value in rows.items())
            self.transport.write(f"HTTP/1.1 {refusal.status} Refused\r\n{head}\r\n".encode("latin-1") + body)
            self.transport.close()

    return Guarded
