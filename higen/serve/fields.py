"""Reads the bodies of requests, JSON or multipart, as fields and files. higen/serve/asks.py checks their values.

The values in a multipart form are texts; numbers are parsed from them. `controls` is one JSON object or several fields
`controls[NAME]`. A list is given by repeating the field NAME[]. Files are pictures and clips.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from higen.errors import RequestError, quoted
from higen.serve.refusals import Refusal
from higen.serve.store import Upload
from higen.text_files import repeated_key

__all__ = ["Fields", "data_url", "read_fields"]

_TEXTS = ("prompt", "model", "size", "negative_prompt", "solver", "seconds")
_TEXTS_OF_LOOPS = ("window_noise", "free_init_filter", "preset", "inversion")
_NAME = re.compile(r"(?P<name>[A-Za-z_]{1,64})(\[(?P<key>\w{1,128})\])?(?P<many>\[\])?", re.ASCII)
_MOST_PARTS = 256
_TAIL = 4096
_DEPTH = 8
_SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/jpg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
}
_BY_HEAD = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"\x1aE\xdf\xa3", ".webm"))


@dataclass(frozen=True)
class Fields:
    """The contents of a request: values in JSON types, and files by field (`controls.NAME` for a control)."""

    values: dict[str, Any]
    files: dict[str, Upload] = field(default_factory=dict)


async def read_fields(request: Request) -> Fields:
    """Read a request's body. Raises Refusal: 400 if it cannot be parsed, 415 for another type, 422 for bad fields."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "application/json":
        return Fields(_object(await request.body()))
    if kind == "multipart/form-data":
        return await _form(request)
    raise Refusal(415, "unsupported_media_type", f"{quoted(kind)}: application/json or multipart/form-data is read")


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_constant)
    except Refusal:
        raise
    except UnicodeDecodeError as error:
        raise Refusal(400, "invalid_json", f"the body is not valid UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        why = "too deep" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, "invalid_json", f"the body is not JSON: {why[:200]}") from error
    if not isinstance(found, dict):
        raise Refusal(400, "invalid_json", "the body must be a JSON object")
    _check(found, _DEPTH)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := repeated_key(pairs)) is not None:
        raise Refusal(400, "invalid_json", f"{quoted(name)} appears twice in an object")
    return dict(pairs)


def _constant(name: str) -> NoReturn:
    raise Refusal(400, "invalid_json", f"{name} is not a JSON number")


def _check(value: Any, depth: int) -> None:
    """Raise Refusal for texts that are not valid Unicode, and for values nested deeper than any field allows."""
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise Refusal(422, "invalid_value", f"{quoted(value)}: not valid Unicode")
    elif isinstance(value, (dict, list)):
        if not depth:
            raise Refusal(422, "invalid_value", f"the body is nested deeper than {_DEPTH} levels")
        for one in value.items() if isinstance(value, dict) else value:
            for part in one if isinstance(one, tuple) else (one,):
                _check(part, depth - 1)


async def _form(request: Request) -> Fields:
    end = b""

    async def body() -> AsyncGenerator[bytes, None]:
        nonlocal end
        async for part in request.stream():
            end = (end + part)[-_TAIL:]
            yield part

    parser = MultiPartParser(request.headers, body(), max_files=16, max_fields=_MOST_PARTS, max_part_size=2**20)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        why = getattr(error, "message", None) or str(error) or type(error).__name__
        raise Refusal(400, "invalid_form", f"the form cannot be read: {why[:200]}") from error
    boundary = re.search(r"boundary=\"?([^\";]+)", request.headers["content-type"], re.IGNORECASE)
    if boundary is None or f"--{boundary[1].strip()}--".encode() not in end:
        await form.close()
        raise Refusal(400, "invalid_form", "the form ends before its last boundary")
    fields = Fields({})
    try:
        for name, value in form.multi_items():
            parts = _NAME.fullmatch(name)
            if parts is None:
                raise Refusal(422, "unknown_field", f"{quoted(name)}: is not a field name")
            if isinstance(value, UploadFile):
                _add_file(fields, parts, Upload(_suffix(value), await value.read()))
            else:
                _add_text(fields, parts, value)
    finally:
        await form.close()
    _check(fields.values, _DEPTH)
    return fields


def _add_file(fields: Fields, parts: re.Match[str], upload: Upload) -> None:
    name = f"{parts['name']}.{parts['key']}" if parts["key"] else parts["name"]
    if name in fields.files:
        raise Refusal(422, "invalid_value", f"{name}: one file", parts["name"])
    fields.files[name] = upload


def _add_text(fields: Fields, parts: re.Match[str], text: str) -> None:
    name, key = parts["name"], parts["key"]
    into = fields.values
    if key or (name == "controls" and not parts["many"]):
        into = into.setdefault("controls" if name == "controls" else name, {})
    if name == "controls" and not key:
        given = _parsed(text)
        if not isinstance(given, dict) or not isinstance(into, dict):
            raise Refusal(422, "invalid_value", f"controls={quoted(text)}: a JSON object", "controls")
        into.update(given)
        return
    if not isinstance(into, dict):
        raise Refusal(422, "invalid_value", f"{name} is given in two ways", name)
    place = key or name
    value = text if place in (*_TEXTS, *_TEXTS_OF_LOOPS) and not key else _parsed(text)
    if parts["many"]:
        into.setdefault(place, [])
        if not isinstance(into[place], list):
            raise Refusal(422, "invalid_value", f"{place} is given in two ways", name)
        into[place].append(value)
    elif place in into:
        raise Refusal(422, "invalid_value", f"{place} is given twice", name)
    else:
        into[place] = value


def _parsed(text: str) -> Any:
    """The JSON value of a text in a form; the text itself if it is not JSON."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    except Refusal:
        return text
    except (ValueError, RecursionError):
        return text


def _suffix(file: UploadFile) -> str:
    """The suffix for the file type that the client states. The file's reader finds the real type."""
    name = re.search(r"\.[A-Za-z0-9]{1,6}$", file.filename or "")
    given = _SUFFIXES.get((file.content_type or "").lower())
    return given or (name[0].lower() if name else ".bin")


def data_url(name: str, text: object) -> Upload:
    """The file in a data URL. Raises RequestError for any other URL; nothing is ever fetched."""
    wanted = "a data URL (data:image/png;base64,...); no address is fetched"
    if not isinstance(text, str) or not text.startswith("data:"):
        raise RequestError(f"{name}={quoted(text)}: {wanted}")
    head, comma, data = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestError(f"{name}={quoted(text)}: {wanted}")
    try:
        found = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name}={quoted(text)}: its base64 cannot be read: {error}") from error
    kind = head.removeprefix("data:").removesuffix(";base64").lower()
    return Upload(_SUFFIXES.get(kind) or next((s for h, s in _BY_HEAD if found.startswith(h)), ".bin"), found)
