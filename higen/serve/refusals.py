"""Errors as answers of the API: a status, and the object {"error": {message, type, param, code}} as in OpenAI's API."""

from __future__ import annotations

import errno
import json
import sqlite3
from typing import Any

from higen.errors import HigenError, OutOfMemory, RequestError, RetryLater

__all__ = ["Refusal", "as_refusal", "job_error", "to_json"]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Refusal(HigenError):
    """The answer to a request that is refused.

    status  HTTP status                  param  the wrong field, or None
    code    identifier for programs      retry  seconds after which the same request may be sent again, or None
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry = retry

    def body(self) -> bytes:
        """The answer's body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return to_json({"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}})

    def headers(self) -> dict[str, str]:
        """The headers of the answer that depend on the refusal."""
        headers = {"content-type": "application/json"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry is not None:
            headers["retry-after"] = str(self.retry)
        return headers


def to_json(value: Any) -> bytes:
    """JSON in ASCII, because texts from clients may contain characters that UTF-8 cannot encode."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def as_refusal(error: BaseException) -> Refusal:
    """Any error as a refusal. An internal error shows only its type."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestError):
        return Refusal(422, "invalid_value", str(error), _param(str(error)))
    if isinstance(error, OutOfMemory):
        return Refusal(503, "out_of_memory", str(error), retry=10)
    if isinstance(error, RetryLater):
        return Refusal(503, "try_again", str(error), retry=5)
    if is_full(error):
        return Refusal(507, "storage_full", "the server's disk is full: delete videos, or try again later", retry=60)
    if isinstance(error, HigenError):
        return Refusal(500, "failed", str(error))
    return Refusal(500, "internal_error", f"an error in the server: {type(error).__name__}; see its log")


def is_full(error: BaseException) -> bool:
    """Whether an error, or its cause, says that a disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if isinstance(seen, sqlite3.Error) and "full" in str(seen):
            return True
        seen = seen.__cause__
    return False


def job_error(error: BaseException) -> tuple[str, str]:
    """The error code and message that are stored for a failed job."""
    if is_full(error):
        return "storage_full", "the server's disk is full"
    if isinstance(error, RequestError):
        return "invalid_request", str(error)
    if isinstance(error, OutOfMemory):
        return "out_of_memory", str(error)
    if isinstance(error, HigenError):
        return "generation_failed", str(error)
    return "internal_error", f"a bug in the server: {type(error).__name__}"


def _param(message: str) -> str | None:
    """The name of the field at the start of an error message; None if there is none."""
    name = message.partition("=")[0].partition(":")[0].partition(" ")[0]
    return name if name.isidentifier() else None
