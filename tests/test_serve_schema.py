"""The API against its own OpenAPI description: generated requests get documented answers and never a 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

pytest.importorskip("fastapi", reason="higen[serve] is not installed")

from higen.api import default_model
from higen.bundle import Bundle
from higen.errors import RequestError
from higen.serve.app import Service, open_service
from higen.serve.asks import check
from higen.serve.fields import Fields
from higen.serve.results import Results
from higen.serve.schema import ErrorBody, Page, VideoObject
from higen.serve.settings import Limits, Settings

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
ANY = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
EXAMPLES = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The application without its worker. Jobs are accepted and wait."""
    made = open_service(Settings(tmp_path_factory.mktemp("serve"), limits=Limits(queue=50)))
    yield made
    made.parts.catalog.close()
    made.parts.store.close()


@pytest.fixture(scope="module")
def described(service: Service) -> dict[str, Any]:
    status, body = call(service, "GET", "/openapi.json")
    assert status == 200
    return dict(json.loads(body))


def call(
    service: Service, method: str, path: str, body: bytes = b"", kind: str = "application/json"
) -> tuple[int, bytes]:
    """Send a request directly to the application."""
    path, _, query = path.partition("?")
    headers = [(b"host", b"localhost"), (b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": quote(path).encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "headers": headers,
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 1),
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(service.app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema allows."""
    if "anyOf" in schema:
        return st.one_of(*map(values, schema["anyOf"]))
    if "pattern" in schema:
        return st.from_regex(schema["pattern"], fullmatch=True)
    kind = schema["type"]
    if kind == "integer":
        return st.integers(schema.get("minimum"), schema.get("maximum"))
    if kind == "number":
        return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
    if kind == "array":
        return st.lists(values(schema["items"]), max_size=3)
    if kind == "object":
        own = {name: values(row) for name, row in schema.get("properties", {}).items()}
        required = {name: own.pop(name) for name in schema.get("required", [])}
        return st.fixed_dictionaries(required, optional=own)
    return st.text(max_size=30)


def judged(described: dict[str, Any], path: str, status: int, body: bytes) -> Any:
    """Check that the description has this answer's status and shape; returns the answer."""
    assert status != 500, body
    assert str(status) in described["paths"][path]["post"]["responses"], status
    answer = json.loads(body)
    return (VideoObject if status == 200 else ErrorBody).model_validate(answer, strict=True)


@EXAMPLES
@given(data=st.data())
def test_what_the_description_allows_is_answered_as_it_says(
    service: Service, described: dict[str, Any], data: st.DataObject
) -> None:
    body = described["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    asked = data.draw(values(body))
    judged(described, "/v1/videos", *call(service, "POST", "/v1/videos", json.dumps(asked).encode()))


@EXAMPLES
@given(
    asked=st.dictionaries(
        st.sampled_from(
            ["prompt", "model", "seconds", "size", "seed", "controls", "fps", "num_frames", "input_reference"]
        )
        | st.text(max_size=8),
        ANY,
        max_size=5,
    )
)
def test_any_json_is_answered(service: Service, described: dict[str, Any], asked: dict[str, Any]) -> None:
    judged(described, "/v1/videos", *call(service, "POST", "/v1/videos", json.dumps(asked).encode()))


@EXAMPLES
@given(body=st.binary(max_size=300), kind=st.sampled_from(["application/json", "multipart/form-data; boundary=b", "x"]))
def test_any_bytes_are_answered(service: Service, described: dict[str, Any], body: bytes, kind: str) -> None:
    judged(described, "/v1/videos", *call(service, "POST", "/v1/videos", body, kind))


@EXAMPLES
@given(
    name=st.sampled_from(
        ["prompt", "size", "controls", "controls[motion]", "controls[motion][]", "seed", "prompt[]", "x"]
    ),
    text=st.text(max_size=40),
    file=st.booleans(),
)
def test_any_form_is_answered(service: Service, described: dict[str, Any], name: str, text: str, file: bool) -> None:
    more = '; filename="a.png"' if file else ""
    row = f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{text}\r\n'
    body = f'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na whale\r\n{row}--b--\r\n'
    answer = call(service, "POST", "/v1/videos", body.encode(), "multipart/form-data; boundary=b")
    judged(described, "/v1/videos", *answer)


def test_pages_of_a_list_have_every_job_once(service: Service) -> None:
    for number in range(7):
        call(service, "POST", "/v1/videos", json.dumps({"prompt": "a whale", "seed": number}).encode())
    jobs = service.parts.store.page("", None, 100, True)
    for order in ("asc", "desc"):
        seen: list[str] = []
        after = ""
        while True:
            status, body = call(service, "GET", f"/v1/videos?limit=3&order={order}{after}")
            assert status == 200
            page = Page.model_validate_json(body)
            seen += [video.id for video in page.data]
            if not page.has_more:
                break
            after = f"&after={page.last_id}"
        ids = [job.id for job in jobs]
        assert seen == (ids if order == "asc" else ids[::-1])


def test_the_answers_are_what_the_openai_client_parses(service: Service) -> None:
    types = pytest.importorskip("openai.types")
    path = service.parts.store.page("", None, 1, True)[0].id
    status, body = call(service, "GET", f"/v1/videos/{path}")
    assert status == 200
    answer = json.loads(body)
    types.Video.model_validate({**answer, "size": "720x1280"})
    assert set(types.Video.model_fields) <= set(answer)


def test_a_folder_of_somebody_else_is_not_read(tmp_path: Path) -> None:
    from higen.errors import ServeError

    (tmp_path / "results").write_text("x", encoding="utf-8")
    with pytest.raises(ServeError, match="cannot be written"):
        open_service(Settings(tmp_path))


@pytest.mark.parametrize(
    ("given", "steps"),
    [({"preset": "full"}, 12), ({"negative_prompt": "grass"}, 12), ({}, None), ({"num_frames": 4}, None)],
)
def test_the_limit_of_steps_holds_for_presets_and_defaults(given: dict[str, Any], steps: int | None) -> None:
    manifest = Bundle.open(default_model()).manifest
    fields = Fields({"prompt": "a whale", **given})
    if steps is None:  # the usual preset takes two
        assert check(manifest, fields, Limits(steps=5), cast("Results", None)).arguments["seed"] is not None
        return
    with pytest.raises(
        RequestError, match=f"num_inference_steps: this request takes {steps} steps; this server makes at"
    ):
        check(manifest, fields, Limits(steps=5), cast("Results", None))
