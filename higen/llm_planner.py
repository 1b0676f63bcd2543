"""A language model turns a story into a scene script. Works with any endpoint that has OpenAI's chat completions.

The answer is checked against the video model. If it is wrong, the language model gets the errors and is asked once
more; a second wrong answer is refused. The answer must not name files.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from higen.bundle import Bundle
from higen.errors import PlanError, RequestError, quoted
from higen.request import MAX_PROMPT, make_request
from higen.script import TRANSITIONS, make_script, script_schema
from higen.tables import COMMON
from higen.text_files import TextError, from_json_text
from higen.tokenizer import PromptTokenizer
from higen.version import __version__

__all__ = ["Endpoint", "plan_by_llm", "problems_of"]

_LARGEST = 4 * 2**20
_ROUNDS = 2
_SHOWN = 40
"""The most prompts, and the most error lines, that are shown to the language model."""


@dataclass(frozen=True)
class Endpoint:
    """The endpoint of a language model.

    url      of the server: http://host, http://host/v1, or the full address of its chat completions
    model    the language model's name on that server
    key      sent as a bearer token; None: no token is sent
    timeout  seconds that one answer may take

    Raises RequestError.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 120.0

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            good = False
        if not good or re.search(r"[\s\x00-\x1f\x7f]", self.url) or not self.url.isascii():
            raise RequestError(f"llm={quoted(self.url)}: an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise RequestError(
                "llm: an address without a password, query or fragment; the key is read from HIGEN_LLM_KEY"
            )
        if not self.model.strip():
            raise RequestError(f"llm_model={quoted(self.model)}: the model's name at the endpoint")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and self.key.strip()):
            raise RequestError("the key of the endpoint has characters that no header can have")
        if not 0 < self.timeout <= 3600:
            raise RequestError(f"llm_timeout={quoted(self.timeout)}: seconds, more than 0, at most 3600")

    @property
    def address(self) -> str:
        """The address of the chat completions."""
        base = self.url.rstrip("/")
        if base.endswith("/chat/completions"):
            return base
        return f"{base}/chat/completions" if re.search(r"/v\d+\w*$", base) else f"{base}/v1/chat/completions"

    def answer(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's answer as text. Raises PlanError for every failure."""
        body = json.dumps({"model": self.model, "messages": list(messages), "temperature": 0, "stream": False}).encode()
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": f"higen/{__version__}",
        }
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.address, body, headers, method="POST")
        found: list[bytes | Exception] = []

        def ask() -> None:
            try:
                with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                    announced = response.length
                    body = response.read(_LARGEST + 1)
                    if announced is not None and len(body) < min(announced, _LARGEST):
                        raise http.client.IncompleteRead(body)
                    found.append(body)
            except Exception as error:
                found.append(error)

        # A socket's timeout restarts with each byte, so the whole answer has a time limit, too.
        thread = threading.Thread(target=ask, name="higen plan", daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not found:
            raise PlanError(f"{self.address}: no answer within {self.timeout:g} s")
        if isinstance(found[0], Exception):
            raise PlanError(f"{self.address}: {_reason(found[0])}") from found[0]
        return self._content(found[0])

    def _content(self, body: bytes) -> str:
        if len(body) > _LARGEST:
            raise PlanError(f"{self.address}: the answer has more than {_LARGEST} bytes")
        try:
            content = json.loads(body.decode("utf-8"))["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            start = quoted(body[:80].decode("utf-8", "replace"))
            raise PlanError(f"{self.address}: the answer is not a chat completion; it begins {start}") from error
        if not isinstance(content, str):
            raise PlanError(f"{self.address}: the answer has no text: content={quoted(content)}")
        return content


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not be sent to another address."""

    def redirect_request(self, *_: Any) -> None:
        """Returns None, so that urllib raises an HTTPError with the status."""


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        with error:
            try:
                said = " ".join(error.read(400).decode("utf-8", "replace").split())
            except (OSError, http.client.HTTPException):
                said = ""
        moved = (
            f"; it names another address, {quoted(error.headers.get('Location'))}" if 300 <= error.code < 400 else ""
        )
        return f"status {error.code} {error.reason}{moved}{f': {said}' if said and not moved else ''}"
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, TimeoutError):
        return "no answer within the time limit"
    if isinstance(inner, http.client.IncompleteRead):
        return "the answer was cut off"
    return str(getattr(inner, "strerror", None) or inner) or type(inner).__name__


def plan_by_llm(
    story: str, bundle: Bundle, endpoint: Endpoint, note: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The checked data of a scene script (higen/script.py) for a story. `note` gets a line for each refused answer.

    Raises RequestError for an invalid story, PlanError if the endpoint fails or gives two unusable answers.
    """
    if not isinstance(story, str) or not story.strip() or len(story) > MAX_PROMPT:
        raise RequestError(f"story={quoted(story)}: a text of 1 to {MAX_PROMPT} characters")
    messages = [{"role": "system", "content": _instructions(bundle)}, {"role": "user", "content": story}]
    problems: list[str] = []
    for _ in range(_ROUNDS):
        text = endpoint.answer(messages)
        data, problems = _read(text, bundle)
        if not problems:
            return data
        note(f"the language model's script is refused: {problems[0]}")
        said = "\n".join(f"- {line}" for line in problems[:_SHOWN])
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": f"This script is wrong:\n{said}\nAnswer with the whole corrected JSON object."},
        ]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise PlanError(f"{endpoint.address}: no usable script in {_ROUNDS} answers: {problems[0]}{more}")


def _read(text: str, bundle: Bundle) -> tuple[dict[str, Any], list[str]]:
    """The JSON object in an answer, and what is wrong with it."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        return {}, [f"no JSON object in the answer, which begins {quoted(text[:80])}"]
    try:
        data = from_json_text(text[start : end + 1])
    except TextError as error:
        return {}, [f"the answer is {error}"]
    return data, problems_of(data, bundle)


def problems_of(data: object, bundle: Bundle) -> list[str]:
    """Errors in a script's data (keys, values, lengths, words), one line each. It must not name files."""
    manifest = bundle.manifest
    try:
        script = make_script(data, manifest)
    except RequestError as error:
        return [str(error)]
    text = manifest.text
    tokenizer = None if text is None else PromptTokenizer.from_file(bundle.file(text.tokenizer), text)
    found: list[str] = []
    for place, scene in enumerate(script.scenes):
        controls = {name: value for name, value in scene.options.items() if name not in COMMON}
        common = {name: value for name, value in scene.options.items() if name in COMMON}
        try:
            make_request(manifest, scene.prompt, **common, controls=controls, load=_no_picture)
            if tokenizer is not None:
                tokenizer.read(scene.prompt, lambda warning, at=place: found.append(f"scenes[{at}]: {warning}"))  # type: ignore[misc]
        except RequestError as error:
            found.append(f"scenes[{place}]: {error}")
    return found


def _no_picture(*_: Any) -> Any:
    raise RequestError("a script of a language model names no files")


def _instructions(bundle: Bundle) -> str:
    manifest = bundle.manifest
    text, low, default, high = manifest.text, *manifest.sizes.frames
    fps = manifest.sizes.fps
    lines = [
        "You turn a story into a scene script for a text-to-video model. Answer with one JSON object and nothing else.",
        f"JSON schema: {json.dumps(script_schema(manifest, files=False))}",
        "Each scene's prompt describes one shot in one sentence, without names that only the story explains.",
        f"A scene has {low / fps:g} to {high / fps:g} seconds, usually {default / fps:g}.",
        "A curve may be one word, or a list of words in order of time: how it changes within the scene.",
        f"transition is how a scene begins: {TRANSITIONS[0]} or {TRANSITIONS[1]}; the first scene has none.",
    ]
    words = None
    if text is not None:
        words = PromptTokenizer.from_file(bundle.file(text.tokenizer), text).words()
    if words is not None:
        lines.append(f"The video model knows these words and no others: {' '.join(words)}")
    if manifest.prompts:
        lines.append("Prompts that it draws well:")
        lines += [f"- {prompt}" for prompt in manifest.prompts[:_SHOWN]]
    return "\n".join(lines)
