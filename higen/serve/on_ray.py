"""The HTTP API as an application of Ray Serve: `import_path: higen.serve.on_ray:application` (docs/bulk.md).

A replica has one folder, like a server (higen/serve/server.py). Jobs outlive the replica if its successor has access to
the folder. Ray's proxies accept requests on every node.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from higen.errors import MissingExtra, RequestError, ServeError, quoted
from higen.paths import given_path
from higen.serve.app import open_service
from higen.serve.server import owned
from higen.serve.settings import Limits, Settings, seconds_of, size_of

__all__ = ["application", "settings_of"]

_HANDOVER = 60.0
"""Seconds that a new replica waits for its predecessor to release the folder."""

_TO_THE_END = ExitStack()
"""Holds the lock of the replica's folder until the process ends."""


def application(arguments: dict[str, Any]) -> Any:
    """The application that Ray Serve runs. `arguments`: as for `settings_of`.

    Raises RequestError, and MissingExtra if Ray is not installed.
    """
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "ray", "ray", "Ray Serve") from error
    settings = settings_of(arguments)
    replica = serve.ingress(lambda: _open(settings))()
    most = settings.limits.connections
    return serve.deployment(name="higen", num_replicas=1, max_ongoing_requests=most)(replica).bind()


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """A server's settings from the `args` of Ray Serve's configuration.

    Names and meanings are those of `higen serve`. `data`, the folder, must be given. `models` is a list. `memory`,
    `quota` and `max-body` are texts like 8GB. Raises RequestError.
    """
    given = {name.replace("_", "-"): value for name, value in arguments.items()}
    limits = {f"max-{field.name}": field.name for field in fields(Limits) if field.name != "picture"}
    plain = ("models", "backend", "device", "precision", "threads", "slots", "max-batch")
    known = (*plain, "data", "memory", "quota", "max-age", "api-keys", "cors", "allow-host", *limits)
    if unknown := sorted(set(given) - set(known)):
        raise RequestError(f"{quoted(unknown[0])}: unknown; the arguments are {', '.join(known)}")
    if not isinstance(given.get("data"), str):
        raise RequestError(f"data={quoted(given.get('data'))}: the folder of the queue and the videos")
    found = {name.replace("-", "_"): given[name] for name in plain if name in given}
    for name, ours in (("models", "models"), ("cors", "origins"), ("allow-host", "hosts")):
        if name in given:
            found[ours] = _texts(name, given[name])
    for name in ("memory", "quota"):
        if name in given:
            found[name] = size_of(str(given[name]), name)
    if "max-age" in given:
        found["age"] = seconds_of(str(given["max-age"]), "max-age")
    if "api-keys" in given:
        found["keys"] = given_path(given["api-keys"], "api-keys")
    own = {ours: _limit(name, given[name]) for name, ours in limits.items() if name in given}
    return Settings(folder=Path(given_path(given["data"], "data")), limits=Limits(**own), **found)


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise RequestError(f"{name}={quoted(value)}: a list of texts")
    return tuple(value)


def _limit(name: str, value: Any) -> int:
    if name == "max-body":
        return size_of(str(value), name)
    if type(value) is not int:
        raise RequestError(f"{name}={quoted(value)}: a whole number")
    return value


def _open(settings: Settings) -> ASGIApp:
    """Lock the folder, then make the replica's application. Raises ServeError and what `open_service` raises."""
    until = time.monotonic() + _HANDOVER
    while True:
        try:
            _TO_THE_END.enter_context(owned(settings.folder))
            break
        except ServeError as error:
            if not isinstance(error.__context__, BlockingIOError) or time.monotonic() > until:
                raise
            time.sleep(0.5)
    return open_service(settings).app
