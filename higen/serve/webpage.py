"""The web page: the files of page/. They contain no data, so no key is needed for them.

The page loads nothing from other hosts. The policy below makes browsers enforce this: they refuse every source that it
does not name, and no text can become markup or a script (Trusted Types).
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

from higen.serve.refusals import Refusal

__all__ = ["PUBLIC", "page_routes"]

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",  # previews are data URLs
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}


def _read() -> dict[str, tuple[bytes, str]]:
    """Contents and media type by path."""
    found = {}
    for file in files("higen.serve").joinpath("page").iterdir():
        if (kind := _KINDS.get(file.name.rpartition(".")[2])) is not None:
            found["/" if file.name == "index.html" else f"/page/{file.name}"] = file.read_bytes(), kind
    return found


_FILES = _read()
PUBLIC = frozenset(_FILES)
"""Paths that are answered without a key."""


def page_routes() -> APIRouter:
    """The routes of the page at / and of its files below /page."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    def page(request: Request) -> Response:
        if request.url.path not in _FILES:
            raise Refusal(404, "not_found", "Not Found")
        data, kind = _FILES[request.url.path]
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={**_HEADERS, "etag": tag})
        return Response(data, media_type=kind, headers={**_HEADERS, "etag": tag})

    return router
