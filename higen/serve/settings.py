"""Settings of a server. They are checked once, before anything is opened."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from higen.errors import RequestError, quoted
from higen.noise_schedule import is_whole

__all__ = ["Limits", "Settings", "seconds_of", "size_of"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SPANS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


def size_of(text: str, name: str = "size") -> int:
    """Bytes of "500MB" or "8GB" (powers of ten). Raises RequestError."""
    found = re.fullmatch(r"(\d{1,12})\s*([kmgt]?)b?", text.strip().lower())
    if not found:
        raise RequestError(f"{name}={quoted(text)}: a number of bytes: 500MB, 8GB")
    return int(found[1]) * _UNITS[found[2]]


def seconds_of(text: str, name: str = "age") -> int:
    """Seconds of "90s", "30m", "12h" or "7d". Raises RequestError."""
    found = re.fullmatch(r"(\d{1,9})\s*([smhd]?)", text.strip().lower())
    if not found:
        raise RequestError(f"{name}={quoted(text)}: a time: 90s, 30m, 12h, 7d")
    return int(found[1]) * _SPANS[found[2]]


@dataclass(frozen=True)
class Limits:
    """Limits on requests.

    body         bytes of a request's body                    frames       of a video
    pixels       of one frame                                 steps        of each loop
    queue        waiting and running jobs of one key          picture      pixels of an uploaded picture
    streams      open event streams and waiting calls         connections  open connections
    """

    body: int = 32 * 2**20
    frames: int = 256
    pixels: int = 2**21
    steps: int = 200
    queue: int = 64
    picture: int = 2**25
    streams: int = 256
    connections: int = 768

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not is_whole(value, 1, 2**40):
                raise RequestError(f"{name}={quoted(value)}: a whole number from 1")


@dataclass(frozen=True)
class Settings:
    """A server's settings.

    models     directories, or NAME=DIRECTORY; the first is the default; if empty, the built-in model
    folder     of the queue and the results
    memory     maximum bytes of weights loaded at once; None: no limit
    slots      jobs that run at once       max_batch  maximum samples of a shared batch
    quota      maximum bytes of results    age        seconds that a finished job is kept
    keys       file of hashed API keys; None: no key is needed
    origins    origins of other pages that may call the API (CORS)
    hosts      accepted host names of requests besides those of this machine; "*": any
    """

    folder: Path
    models: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    backend: str | None = None
    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    memory: int | None = None
    slots: int = 8
    max_batch: int = 8
    quota: int = 20 * 10**9
    age: int = 7 * 86400
    keys: Path | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not is_whole(self.port, 0, 65535):
            raise RequestError(f"port={quoted(self.port)}: a whole number from 0 to 65535; 0 is any free port")
        for name, most in (("slots", 256), ("max_batch", 1024), ("quota", 2**62), ("age", 2**40)):
            if not is_whole(getattr(self, name), 1, most):
                raise RequestError(f"{name}={quoted(getattr(self, name))}: a whole number from 1 to {most}")
        if self.memory is not None and not is_whole(self.memory, 1, 2**62):
            raise RequestError(f"memory={quoted(self.memory)}: a number of bytes from 1")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise RequestError(f"origin={quoted(origin)}: as https://example.org, without a path")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")
