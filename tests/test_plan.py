"""Planning: scene scripts from stories, by rules and by a language model behind a local endpoint."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from higen.bundle import Bundle, default_model
from higen.cli import main
from higen.errors import PlanError, RequestError
from higen.llm_planner import Endpoint, plan_by_llm, problems_of
from higen.rule_planner import plan_by_rules
from higen.script import make_script, script_schema

STORIES: dict[str, list[tuple[str, Any]]] = {
    "A whale flapping its tail on a blue sky, first slowly, then fast, then it stops.": [
        ("A whale flapping its tail on a blue sky", ["slow", "fast", "still"])
    ],
    "A penguin waddling on a pink background. Then a monkey jumping at night, very fast.": [
        ("A penguin waddling on a pink background", None),
        ("a monkey jumping at night", "very fast"),
    ],
    "A red heart beating by the sea; it slows down and stops.": [("A red heart beating by the sea", ["slow", "still"])],
    "First slowly, a whale flapping its tail on a white background; then fast.": [
        ("a whale flapping its tail on a white background", ["slow", "fast"])
    ],
    "At first a dog runs quickly through the snow and barks, then it sits down.": [
        ("a dog runs through the snow and barks", "fast"),
        ("a dog sits down", None),
    ],
    "A monkey jumping at night fades into a whale on a blue sky": [
        ("A monkey jumping at night", None),
        ("a whale on a blue sky", None),
    ],
    "A butterfly lands on a flower. It rests for two seconds. Then it flies away fast.": [
        ("A butterfly lands on a flower", None),
        ("A butterfly rests", None),
        ("A butterfly flies away", "fast"),
    ],
    "A turtle walks very slowly, and then stands still, and then runs as fast as it can.": [
        ("A turtle walks", ["very slow", "still"]),
        ("A turtle runs", "very fast"),
    ],
    "A whale on a blue sky, standing still. Finally, a penguin.": [
        ("A whale on a blue sky", "still"),
        ("a penguin", None),
    ],
    "a bee flies in slow motion\nnext a bird, big and red, sings loudly": [
        ("a bee flies", "very slow"),
        ("a bird, big and red, sings loudly", None),
    ],
}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(default_model())


@pytest.mark.parametrize("story", STORIES)
def test_the_rules_read_order_pace_and_stillness(bundle: Bundle, story: str) -> None:
    data = plan_by_rules(story, bundle.manifest)
    assert [(scene["prompt"], scene.get("motion")) for scene in data["scenes"]] == STORIES[story]
    assert len(make_script(data, bundle.manifest).scenes) == len(STORIES[story])


def test_the_rules_read_lengths_and_fades(bundle: Bundle) -> None:
    scenes = plan_by_rules("A whale for 3 seconds. Then a cat for half a day fades into a dog.", bundle.manifest)[
        "scenes"
    ]
    assert [scene["seconds"] for scene in scenes] == [3.0, 2.0, 2.0]
    assert [scene.get("transition") for scene in scenes] == [None, "cut", "crossfade"]
    with pytest.raises(RequestError, match="seconds=90"):
        make_script(plan_by_rules("A whale for 90 seconds", bundle.manifest), bundle.manifest)


@pytest.mark.parametrize("story", ["", " \n", "then, finally", "." * 9, "a" * 100_001])
def test_a_story_of_nothing_is_refused(bundle: Bundle, story: str) -> None:
    with pytest.raises(RequestError, match=r"^story="):
        plan_by_rules(story, bundle.manifest)


def test_a_model_without_such_a_control_keeps_the_words_in_the_prompt(bundle: Bundle) -> None:
    controls = tuple(replace(c, usual=None) for c in bundle.manifest.controls)
    manifest = replace(bundle.manifest, controls=controls)
    scenes = plan_by_rules("a whale swims slowly, then fast. Then a cat", manifest)["scenes"]
    assert scenes[0] == {"prompt": "a whale swims slowly, fast", "seconds": 2.0}


# A language model: a local server in OpenAI's shape.


@contextmanager
def endpoint(answer: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None], **options: Any) -> Iterator[Endpoint]:
    """An endpoint; a function of the request's body answers its requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer(self, body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # a client that has gone away
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}", "planner", **options)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def said(handler: BaseHTTPRequestHandler, text: str) -> None:
    """A chat completion with this text."""
    message = {"role": "assistant", "content": text}
    send(handler, 200, json.dumps({"object": "chat.completion", "choices": [{"message": message}]}).encode())


def drip(handler: BaseHTTPRequestHandler) -> None:
    """Send a byte from time to time, so that no single wait is long."""
    handler.wfile.write(b"HTTP/1.0 200 O")
    for _ in range(9):
        time.sleep(0.1)
        handler.wfile.write(b"K")


GOOD = {"scenes": [{"prompt": "a whale flapping its tail on a blue sky", "seconds": 1.5, "motion": ["slow", "still"]}]}


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use no proxy between a test and its server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_ten_stories_become_valid_scripts(bundle: Bundle) -> None:
    seen: list[dict[str, Any]] = []

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        assert handler.path == "/v1/chat/completions"
        assert handler.headers["Authorization"] == "Bearer secret"
        seen.append(body)
        place = list(STORIES).index(body["messages"][1]["content"])
        scenes = [
            {"prompt": bundle.manifest.prompts[(place + i) % 8], "seconds": 1 + i, "motion": ["fast", "still"]}
            for i in range(1 + place % 3)
        ]
        said(handler, f"Here it is:\n```json\n{json.dumps({'scenes': scenes})}\n```")

    with endpoint(answer, key="secret") as there:
        scripts = [make_script(plan_by_llm(story, bundle, there), bundle.manifest) for story in STORIES]
    assert [len(script.scenes) for script in scripts] == [1 + place % 3 for place in range(10)]
    asked = seen[0]["messages"]
    assert (seen[0]["model"], [m["role"] for m in asked]) == ("planner", ["system", "user"])
    assert json.dumps(script_schema(bundle.manifest, files=False)) in asked[0]["content"]
    assert "waddling" in asked[0]["content"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("I cannot do that.", "no JSON object in the answer"),
        ('{"scenes": [}', "the answer is not JSON"),
        (json.dumps({"scenes": [{"prompt": "a whale", "pace": 3}]}), "'pace': unknown key"),
        (json.dumps({"scenes": [{"prompt": "a whale", "seconds": 60}]}), "seconds=60"),
        (json.dumps({"scenes": [{"prompt": "a zebra waltzing"}]}), "does not know 'zebra', 'waltzing'"),
        (json.dumps({"scenes": [{"prompt": "a whale", "image": "/etc/passwd"}]}), "no files are allowed here"),
        (json.dumps({"scenes": [{"prompt": "a whale", "motion": "/tmp/a.wav"}]}), "no files are allowed here"),
        (json.dumps({"scenes": [{"prompt": "a whale"}], "audio": "a.wav"}), "no files are allowed here"),
        (json.dumps({"scenes": [{"prompt": "a whale", "motion": -3}]}), "motion=-3"),
    ],
)
def test_a_wrong_script_is_repaired_once_or_refused(bundle: Bundle, wrong: str, reason: str) -> None:
    rounds: list[Any] = []

    def repairs(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        rounds.append(body["messages"])
        said(handler, wrong if len(rounds) == 1 else json.dumps(GOOD))

    with endpoint(repairs) as there:
        assert plan_by_llm("a story", bundle, there) == GOOD
    assert len(rounds) == 2
    assert rounds[1][2] == {"role": "assistant", "content": wrong}
    assert reason in rounds[1][3]["content"]
    notes: list[str] = []
    with endpoint(lambda handler, body: said(handler, wrong)) as there, pytest.raises(PlanError) as raised:
        plan_by_llm("a story", bundle, there, notes.append)
    assert "no usable script in 2 answers" in str(raised.value)
    assert reason in str(raised.value)
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda h, b: send(h, 500, b"out of\nmemory"), "status 500 .*: out of memory"),
        (lambda h, b: send(h, 401, b'{"error": "no key"}'), "status 401 .*no key"),
        (lambda h, b: send(h, 307, b"", Location="http://127.0.0.1:9/"), "status 307 .*names another address"),
        (lambda h, b: send(h, 302, b"", Location="http://127.0.0.1:9/"), "status 302 .*names another address"),
        (lambda h, b: send(h, 200, b"<html>"), "not a chat completion; it begins '<html>'"),
        (lambda h, b: send(h, 200, b"\xff\x00"), "not a chat completion"),
        (lambda h, b: send(h, 200, b'{"choices": []}'), "not a chat completion"),
        (lambda h, b: send(h, 200, b'{"choices": [{"message": {"content": null}}]}'), "has no text: content=None"),
        (lambda h, b: send(h, 200, b" " * (4 * 2**20 + 1)), "more than 4194304 bytes"),
        (lambda h, b: (h.send_response(200), h.send_header("Content-Length", "99"), h.end_headers()), "was cut off"),
        (lambda h, b: h.wfile.write(b"nonsense\r\n"), "nonsense|BadStatusLine"),
        (lambda h, b: h.connection.shutdown(socket.SHUT_RDWR), "."),
        (lambda h, b: time.sleep(1), r"no answer within .*(0\.3 s|time limit)"),
        (lambda h, b: drip(h), "no answer within 0.3 s"),
    ],
)
def test_an_endpoint_that_fails_is_one_error(
    bundle: Bundle, answer: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None], reason: str
) -> None:
    with endpoint(answer, timeout=0.3) as there, pytest.raises(PlanError, match=reason):
        plan_by_llm("a story", bundle, there)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"url": "ftp://a/"}, "an address such as"),
        ({"url": "http://"}, "an address such as"),
        ({"url": "http://a:99999"}, "an address such as"),
        ({"url": "http://a\n"}, "an address such as"),
        ({"url": "http://me:secret@a/"}, "without a password"),
        ({"model": " "}, "the model's name"),
        ({"key": "a\nb"}, "no header can have"),
        ({"timeout": 0}, "seconds, more than 0"),
        ({"timeout": float("nan")}, "seconds, more than 0"),
    ],
)
def test_a_wrong_endpoint_is_refused_before_it_is_asked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as raised:
        Endpoint(**{"url": "http://a", "model": "m", **options})
    assert "secret" not in str(raised.value)


def test_the_address_is_completed() -> None:
    wanted = "http://a:8/v1/chat/completions"
    for url in ("http://a:8", "http://a:8/", "http://a:8/v1", "http://a:8/v1/", wanted):
        assert Endpoint(url, "m").address == wanted
    assert Endpoint("http://a/api/v3", "m").address == "http://a/api/v3/chat/completions"


def test_the_command_plans_by_both(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s.json"
    result = CliRunner().invoke(main, ["plan", next(iter(STORIES)), "-o", str(out)])
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert problems_of(json.loads(out.read_text()), bundle) == []
    printed = CliRunner().invoke(main, ["plan", "-"], input="A zebra.")
    assert json.loads(printed.stdout)["scenes"][0]["prompt"] == "A zebra"
    assert "does not know 'zebra'" in printed.stderr
    monkeypatch.setenv("HIGEN_LLM_KEY", "secret")
    keys: list[str] = []

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        keys.append(handler.headers["Authorization"])
        said(handler, json.dumps(GOOD)) if len(keys) == 1 else send(handler, 500, b"")

    with endpoint(answer) as there:
        options = ["plan", "a story", "--llm", there.url, "--llm-model", "m", "-o", str(out)]
        assert CliRunner().invoke(main, options).exit_code == 0
        assert json.loads(out.read_text()) == GOOD
        failed = CliRunner().invoke(main, [*options, "--json"])
        assert failed.exit_code == 1
        assert json.loads(failed.stdout)["error"] == "PlanError"
    assert json.loads(out.read_text()) == GOOD  # unchanged by the failure
    assert keys == ["Bearer secret"] * 2
    assert CliRunner().invoke(main, ["plan", "a", "--llm", "http://a"]).exit_code == 2
    schema = json.loads(CliRunner().invoke(main, ["plan", "--schema"]).stdout)
    assert set(schema["properties"]["scenes"]["items"]["properties"]) >= {"prompt", "seconds", "motion", "image"}
