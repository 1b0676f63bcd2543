"""An HTTP front of the bundled Triton server: every client error is answered with status 400 and one clear line.

Triton answers a body that it cannot parse with status 500 and does not name the input. It cuts whole numbers to 32
bits, and it runs requests whose answer it cannot send. So this front checks the body of each request to the model
`higen` against the model's table of inputs. All other requests pass through. When a client disconnects, its connection
to Triton is closed too. Each connection serves one request.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from higen.engines.triton.json_body import check_body
from higen.errors import RequestError

__all__ = ["HOST", "Front"]

HOST = "127.0.0.1"
MAX_HEAD, MAX_BODY = 2**16, 2**28
GENERATE = re.compile(r"/v2/models/higen(/versions/\d+)?/(infer|generate|generate_stream)(\?.*)?")
PARSING = re.compile(rb"failed to parse|Unable to parse|attempt to (access|get)")
"""Triton's message for an unreadable body, at endpoints that are not checked here. Triton would answer with 500."""


class _Refused(Exception):
    """A request that is answered here and not passed on to Triton."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class _Head:
    """The first line of a request or answer, and its headers in lower case."""

    line: str
    headers: Mapping[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> _Head:
        """Raises asyncio.IncompleteReadError at the end of the stream, _Refused for bytes that are not HTTP."""
        try:
            raw = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError as error:
            raise _Refused(400, f"RequestError: the header has more than {MAX_HEAD} bytes") from error
        line, *rows = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        return cls(
            line, {name.strip().lower(): value.strip() for name, _, value in (row.partition(":") for row in rows)}
        )

    def to_bytes(self) -> bytes:
        rows = (f"{name}: {value}\r\n" for name, value in self.headers.items())
        return f"{self.line}\r\n{''.join(rows)}\r\n".encode("latin-1")


class Front:
    """Serves 127.0.0.1:`port` from its own thread, in front of the Triton server at 127.0.0.1:`behind`."""

    def __init__(self, port: int, behind: int) -> None:
        """Raises OSError if the port is in use."""
        self._behind = behind
        self._inputs: Sequence[tuple[str, str]] | None = None
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        start = asyncio.start_server(self._client, HOST, port, limit=MAX_HEAD)
        self._server = self._loop.run_until_complete(start)
        self._thread = threading.Thread(target=self._loop.run_forever, name="higen http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await self._request(reader, writer)
        except _Refused as error:
            with suppress(OSError):
                await _answer(writer, error.status, str(error))
        except (asyncio.IncompleteReadError, OSError):  # the client or Triton has closed its connection
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await _Head.read(reader)
        method, path = [*head.line.split(" "), "", ""][:2]
        if head.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await writer.drain()
        body = await _body(head, reader)
        if method == "POST" and (found := GENERATE.fullmatch(path)):
            await self._check(found[2], head, body)
        try:
            theirs, ours = await asyncio.open_connection(HOST, self._behind, limit=MAX_HEAD)
        except OSError as error:
            raise _Refused(503, "RetryLater: the server is starting or has stopped") from error
        try:
            gone = ("connection", "expect", "transfer-encoding", "content-length", "keep-alive")
            kept = {name: value for name, value in head.headers.items() if name not in gone}
            length = {"content-length": str(len(body))} if body or method == "POST" else {}
            ours.write(_Head(head.line, {**kept, **length, "connection": "close"}).to_bytes() + body)
            await ours.drain()
            await _until_client_leaves(reader, _relay(theirs, writer))
        finally:
            ours.close()

    async def _check(self, endpoint: str, head: _Head, body: bytes) -> None:
        if endpoint != "generate_stream":
            raise _Refused(400, "RequestError: a request has many answers: POST it to generate_stream, or use gRPC")
        if head.headers.get("content-encoding", "identity") != "identity":
            return  # Triton itself refuses other encodings
        try:
            if self._inputs is None:
                self._inputs = await asyncio.to_thread(self._table)
        except OSError:
            return  # the model is not loaded yet, as Triton's own answer will say
        try:
            await asyncio.to_thread(check_body, body, self._inputs)  # in a thread: a large body must not delay others
        except RequestError as error:
            raise _Refused(400, f"RequestError: {error}") from error

    def _table(self) -> list[tuple[str, str]]:
        """The inputs of the model `higen`: names and data types."""
        with urllib.request.urlopen(f"http://{HOST}:{self._behind}/v2/models/higen/config", timeout=30) as answer:
            config = json.load(answer)
        return [(entry["name"], entry["data_type"].removeprefix("TYPE_")) for entry in config["input"]]


async def _body(head: _Head, reader: asyncio.StreamReader) -> bytes:
    """A request's whole body. Raises _Refused."""
    if "chunked" in head.headers.get("transfer-encoding", "").lower():
        parts, size = [], 0
        while True:
            line = (await reader.readuntil(b"\r\n")).partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", line):
                raise _Refused(400, "RequestError: a chunk of the body has no size")
            size += int(line, 16)
            if size > MAX_BODY:
                raise _Refused(400, f"RequestError: a body of more than {MAX_BODY} bytes")
            parts.append((await reader.readexactly(int(line, 16) + 2))[:-2])
            if not parts[-1]:
                return b"".join(parts)
    length = head.headers.get("content-length", "0")
    if not re.fullmatch(r"\d{1,12}", length):
        raise _Refused(400, f"RequestError: content-length={length[:40]!r}: a whole number")
    if int(length) > MAX_BODY:
        raise _Refused(400, f"RequestError: a body of {length} bytes: at most {MAX_BODY}")
    return await reader.readexactly(int(length))


async def _until_client_leaves(client: asyncio.StreamReader, work: Any) -> None:
    """Run `work`; cancel it when the client disconnects."""
    relay, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_end_of(client))
    try:
        await asyncio.wait((relay, leaving), return_when=asyncio.FIRST_COMPLETED)
        if relay.done():
            await relay
    finally:
        for task in (relay, leaving):
            task.cancel()
        await asyncio.gather(relay, leaving, return_exceptions=True)


async def _end_of(reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        while await reader.read(MAX_HEAD):
            pass


async def _relay(theirs: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on Triton's answer as it arrives."""
    head = await _Head.read(theirs)
    body = b""
    if head.line.split(" ")[1:2] == ["500"]:
        body = await theirs.read()
        if PARSING.search(body):
            head = _Head("HTTP/1.1 400 Bad Request", head.headers)
    writer.write(_Head(head.line, {**head.headers, "connection": "close"}).to_bytes() + body)
    await writer.drain()
    while part := await theirs.read(MAX_HEAD):
        writer.write(part)
        await writer.drain()


async def _answer(writer: asyncio.StreamWriter, status: int, message: str) -> None:
    body = json.dumps({"error": message}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    writer.write(_Head(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", headers).to_bytes() + body)
    await writer.drain()
