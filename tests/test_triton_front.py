"""The HTTP front of the bundled Triton server: the request bodies that it checks, and what it passes through."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from higen.engines.triton.front import MAX_BODY, Front
from higen.engines.triton.json_body import check_body
from higen.errors import RequestError

INPUTS = [
    ("prompt", "STRING"),
    ("seed", "UINT64"),
    ("steps", "INT32"),
    ("guidance", "FP32"),
    ("return_latents", "BOOL"),
    ("image", "UINT8"),
]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "日本", "seed": 2**64 - 1, "steps": [3, -(2**31)], "guidance": [1, 2.5], "return_latents": False},
        {"prompt": ["a", "b"], "seed": 0, "guidance": 1e38, "steps": [], "image": [0, 255]},
        {"prompt": "", "id": "mine", "parameters": {"x": [1]}, "colour": "red"},  # the model checks the meaning
        {},
    ],
)
def test_a_body_of_the_right_types_passes(body: dict[str, object]) -> None:
    check_body(json.dumps(body).encode(), INPUTS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"null", "the body must be a JSON object"),
        (b'{"a": ' * 5000, "the body is not JSON"),
        (b'{"steps": ' + b"9" * 5000 + b"}", "the body is not JSON: Exceeds the limit"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "the body is not JSON: Unexpected UTF-8 BOM"),
        (b'{"prompt": "\xe9"}', "not valid UTF-8"),
        (b'{"prompt": "\\udfff"}', r"prompt='.*udfff': a text"),
        (b'{"steps": 1, "steps": 2}', "'steps': appears twice in the body"),
        (b'{"steps": 2147483648}', "steps=2147483648: a whole number of 32 bits"),
        (b'{"steps": 1.0}', "steps=1.0: a whole number"),
        (b'{"steps": false}', "steps=False: a whole number"),
        (b'{"seed": -1}', "seed=-1: a whole number from 0"),
        (b'{"guidance": "1"}', "guidance='1': a number"),
        (b'{"guidance": 4e38}', "guidance=4e\\+38: a number"),
        (b'{"guidance": [[1]]}', "guidance: a flat list"),
        (b'{"image": [256]}', "image=256: a whole number from 0 to 255"),
        (b'{"return_latents": 0}', "return_latents=0: true or false"),
        (b'{"prompt": {"a": 1}}', "prompt={'a': 1}: a text"),
        (b'{"colour": null}', "'colour': unknown; a request takes prompt, seed"),
        (b'{"id": 1}', "id=1: a text"),
    ],
)
def test_another_body_is_refused_in_one_line(body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        check_body(body, INPUTS)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


class Upstream(BaseHTTPRequestHandler):
    """Imitates Triton: it returns what it received. `/slow` streams without end, `/odd` reports a parse error."""

    left = threading.Event()

    def do_GET(self) -> None:
        config = {"input": [{"name": name, "data_type": f"TYPE_{kind}"} for name, kind in INPUTS]}
        self.answer(200, config if self.path.endswith("/config") else {"path": self.path})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/odd":
            self.answer(500, {"error": "Unable to parse 'data': no"})
        elif self.path == "/broken":
            self.answer(500, {"error": "ONNX Runtime failed"})
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"data: {}\n\n")
                    self.wfile.flush()
            except OSError:
                self.left.set()
        else:
            self.answer(200, {"path": self.path, "body": body.decode()})

    def answer(self, status: int, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def front() -> Iterator[int]:
    """The port of a front server in front of `Upstream`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    made = Front(port, server.server_address[1])
    yield port
    made.close()
    server.shutdown()
    server.server_close()


def send(port: int, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str]]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body, headers)  # type: ignore[arg-type]
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


STREAM = "/v2/models/higen/generate_stream"


def test_a_good_request_arrives_as_it_was_sent(front: int) -> None:
    body = '{"prompt": "日本",  "steps": 3}'
    for sent in (body.encode(), iter([body[:9].encode(), body[9:].encode()])):
        assert send(front, "POST", STREAM, sent) == (200, {"path": STREAM, "body": body})
    assert send(front, "GET", "/v2/health/ready?x=1") == (200, {"path": "/v2/health/ready?x=1"})


def test_a_wrong_request_goes_no_further(front: int) -> None:
    for path in (STREAM, "/v2/models/higen/versions/1/generate_stream"):
        assert send(front, "POST", path, b'{"steps": "x"}') == (
            400,
            {"error": "RequestError: steps='x': a whole number of 32 bits is wanted"},
        )
    assert send(front, "POST", "/v2/models/higen/generate", b"{}")[0] == 400
    assert send(front, "POST", STREAM, **{"Content-Length": "many"})[0] == 400
    assert send(front, "POST", STREAM, **{"Content-Length": str(MAX_BODY + 1)})[0] == 400
    assert send(front, "GET", "/", X="x" * 100_000)[0] == 400


def test_a_request_that_triton_cannot_parse_is_the_clients_error(front: int) -> None:
    assert send(front, "POST", "/odd", b"{}") == (400, {"error": "Unable to parse 'data': no"})
    assert send(front, "POST", "/broken", b"{}") == (500, {"error": "ONNX Runtime failed"})


def test_a_client_that_leaves_is_gone_for_the_server(front: int) -> None:
    Upstream.left.clear()
    with closing(http.client.HTTPConnection("127.0.0.1", front, timeout=60)) as connection:
        connection.request("POST", "/slow", b"{}")
        with connection.getresponse() as answer:
            assert answer.readline() == b"data: {}\n"
    assert Upstream.left.wait(60)


def test_a_server_that_is_not_there_may_be_asked_again() -> None:
    with closing(socket.socket()) as taken, closing(socket.socket()) as free:
        for one in (taken, free):
            one.bind(("127.0.0.1", 0))
        nobody, port = taken.getsockname()[1], free.getsockname()[1]
    made = Front(port, nobody)
    try:
        status, answer = send(port, "POST", STREAM, b"{}")
    finally:
        made.close()
    assert (status, "RetryLater" in answer["error"]) == (503, True)
