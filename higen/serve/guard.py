"""Checks every request before its route: host, origin, key, size and speed. Gives all refusals the same form.

A connection that sends its headers or body too slowly, or reads the answer too slowly, is ended. A page of another host
cannot call a local server through the user's browser. The check of Host stops DNS rebinding, where the page's own name
points to this machine. The check of Origin stops forms that the page sends here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from higen.serve.keys import digest
from higen.serve.metrics import Metrics
from higen.serve.refusals import Refusal, as_refusal
from higen.serve.settings import Settings
from higen.serve.webpage import PUBLIC

__all__ = ["Guard"]

LOG = logging.getLogger("higen.serve")

BODY_PAUSE, BODY_TIME = 15.0, 120.0
"""Maximum seconds between two parts of a body, and for the whole body."""

HELD = 16
"""Maximum memory of all bodies, in bodies of the largest size. Further requests must try again."""

READER_PAUSE = 60.0
"""Maximum seconds that a client may take to read a part of the answer."""

_HERE = ("localhost", "127.0.0.1", "::1")


class Guard:
    """The outermost ASGI layer of the application."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Mapping[str, str] | None, metrics: Metrics) -> None:
        """`keys`: names by digest; None if no key is needed."""
        self._app = app
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._held = _Held(HELD * settings.limits.body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        answer = _Answer(send)
        body = _Body(receive, self._settings.limits.body, self._held)
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
            preflight = preflight and headers.get("origin") in self._settings.origins
            answer.page = headers.get("origin", "") if headers.get("origin") in self._settings.origins else ""
            self._check_place(headers)
            public = preflight or (scope["method"] in ("GET", "HEAD") and scope["path"] in PUBLIC)
            scope.setdefault("state", {})["owner"] = "" if public else self._owner(headers)
            self._check_body(headers)
            await self._app(scope, body, answer)
        except Exception as error:
            refusal = as_refusal(error)
            if refusal.code == "internal_error":
                LOG.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if answer.status:
                raise
            await answer.refuse(refusal)
        finally:
            body.release()
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(_method(scope["method"]), route, str(answer.status)).inc()

    def _check_place(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        name = (urlsplit(f"//{host}").hostname or "") if _is_plain(host) else ""
        told = self._settings
        open_to_all = self._keys is not None or not told.is_local or "*" in told.hosts
        if not open_to_all and name not in (*_HERE, told.host, *told.hosts):
            raise Refusal(403, "unknown_host", "the request is addressed to another host; see --allow-host")
        origin = headers.get("origin")
        if origin is not None and origin not in told.origins and origin.partition("://")[2] != host:
            raise Refusal(403, "origin_not_allowed", "this page may not call the server; see --cors")

    def _owner(self, headers: Mapping[str, str]) -> str:
        """The digest of the caller's key."""
        if self._keys is None:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        found = digest(key.strip())
        if scheme.lower() != "bearer" or found not in self._keys:
            raise Refusal(401, "invalid_api_key", "the header `Authorization: Bearer KEY` with a known key is wanted")
        return found

    def _check_body(self, headers: Mapping[str, str]) -> None:
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self._settings.limits.body:
            raise _too_large(self._settings.limits.body)
        if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise Refusal(415, "unsupported_encoding", "the body must not be compressed")


def _is_plain(host: str) -> bool:
    return len(host) < 300 and all(letter.isalnum() or letter in ".-:[]_" for letter in host)


def _method(name: str) -> str:
    """The method as a label. Unknown methods share one label, so that clients cannot create new ones."""
    return name if name in ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH") else "other"


def _too_large(most: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the body has more than {most} bytes")


class _Held:
    """Counts the bytes of the bodies of all requests."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = 0


class _Body:
    """Receives a request's body, and limits its size and time."""

    def __init__(self, receive: Receive, most: int, held: _Held) -> None:
        self._receive = receive
        self._most = most
        self._held = held
        self._size = 0
        self._began = time.monotonic()
        self._ended = False

    async def __call__(self) -> Message:
        """The next part. Raises Refusal for a body that is too large or too slow."""
        if self._ended:  # only the client's disconnect can follow
            return await self._receive()
        left = min(BODY_PAUSE, self._began + BODY_TIME - time.monotonic())
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, "body_too_slow", "the body came too slowly") from None
        size = len(message.get("body", b""))
        self._size += size
        self._held.size += size
        self._ended = not message.get("more_body", False)
        if self._size > self._most:
            raise _too_large(self._most)
        if self._held.size > self._held.most:
            raise Refusal(503, "too_many_bodies", "too many large requests are read at once", retry=5)
        return message

    def release(self) -> None:
        """Stop counting the body: the request has ended."""
        self._held.size -= self._size
        self._size = 0


class _Answer:
    """Sends an answer. Ends it if the reader is too slow, and replaces a library's own error page by a Refusal."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._replaced = False
        self.status = 0
        self.page = ""
        """The allowed origin of the calling page, which may read refusals too; empty if there is none."""

    async def __call__(self, message: Message) -> None:
        """Send a part of the answer."""
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            status = message["status"]
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            if status >= 400 and (not kinds or not kinds[0].startswith(b"application/json")):
                self._replaced = True
                await self.refuse(Refusal(status, "refused", "the request is malformed or not supported"))
                return
            self.status = status
        try:
            async with asyncio.timeout(READER_PAUSE):
                await self._send(message)
        except TimeoutError:
            raise ConnectionError("the client does not read its answer") from None

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal and end the connection, because the body may not have been read."""
        self.status = refusal.status
        body = refusal.body()
        headers: dict[str, Any] = {**refusal.headers(), "content-length": str(len(body)), "connection": "close"}
        if self.page:
            headers |= {"access-control-allow-origin": self.page, "vary": "Origin"}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
        await self._send({"type": "http.response.body", "body": body})
