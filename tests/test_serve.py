"""`higen serve` from outside: the official openai client, plain HTTP, and requests that must be refused."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("fastapi", reason="higen[serve] is not installed")
openai = pytest.importorskip("openai")

from openai.types import Video, VideoDeleteResponse  # noqa: E402
from serve_process import QUICK, Server  # noqa: E402

import higen  # noqa: E402
from higen.serve.schema import ErrorBody  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("serve") / "data", "--max-body", "2MB", "--max-streams", "4")
    yield made
    assert made.stop() == 0
    assert "Traceback" not in made.log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


CUT = b"""--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na whale\r\n--b\r\nContent-Disposition: form-data;
 name="input_reference"; filename="a.png"\r\n\r\n\x89PNG"""
"""A form that is cut off within its file. It must not become a video without the picture."""


def png(width: int = 64, height: int = 64) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def refused(answer: tuple[int, Any], status: int, words: str = "") -> dict[str, Any]:
    """Check that an answer is an error in OpenAI's shape; returns the error."""
    assert answer[0] == status, answer
    error = ErrorBody.model_validate(answer[1]).error
    assert words in error.message, error.message
    return error.model_dump()


def test_the_openai_client_makes_polls_downloads_lists_and_deletes(client: Any, tmp_path: Path) -> None:
    extra = {"num_frames": 4, "num_inference_steps": 2, "seed": 7, "controls": {"motion": 300}}
    made = client.videos.create(prompt="a whale", size="64x64", extra_body=extra)
    assert isinstance(made, Video)
    Video.model_validate({**made.to_dict(), "size": "720x1280"})  # strict except for the size, which is an extension
    done = client.videos.poll(made.id, poll_interval_ms=50)
    assert (done.status, done.progress, done.error, done.seconds) == ("completed", 100, None, "0.5")
    path = tmp_path / "video.mp4"
    client.videos.download_content(made.id).write_to_file(path)
    video = higen.Video.open(path)
    assert video.frames.shape == (4, 64, 64, 3)
    assert video.metadata["motion"] == 300
    thumbnail = client.videos.download_content(made.id, variant="thumbnail").read()
    assert PIL.Image.open(io.BytesIO(thumbnail)).format == "WEBP"
    sheet = client.videos.download_content(made.id, variant="spritesheet").read()
    assert PIL.Image.open(io.BytesIO(sheet)).format == "JPEG"
    again = client.videos.remix(made.id, prompt="a heart")
    assert again.remixed_from_video_id == made.id
    assert client.videos.poll(again.id, poll_interval_ms=50).status == "completed"
    assert [video.id for video in client.videos.list(limit=1)][:2] == [again.id, made.id]  # two pages
    assert isinstance(client.videos.delete(made.id), VideoDeleteResponse)
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)
    with pytest.raises(openai.UnprocessableEntityError, match="unknown; models are higen"):
        client.videos.create(prompt="a whale", model="sora-2")


def test_a_served_video_equals_the_pipelines(server: Server) -> None:
    """A request has the same frames whether it runs alone or in a batch with another request."""
    names = [server.create(f"a {what}", seed=3, num_frames=4, num_inference_steps=3) for what in ("whale", "heart")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = higen.generate("a heart", seed=3, frames=4, steps=3, width=64, height=64, progress=False)
    assert server.wait(names[1])["status"] == "completed"
    _, data = server.call("GET", f"/v1/videos/{names[1]}/content?format=webp")
    path = Path(server.log).with_name("served.webp")
    path.write_bytes(data)
    found = higen.Video.open(path).frames.astype(int)
    assert np.abs(found - truth.frames.astype(int)).max() <= 1


def test_plain_text_to_video_has_the_models_usual_preset(server: Server) -> None:
    plain = {"num_inference_steps": None, "guidance_scale": None, "negative_prompt": "", "seed": 3}
    names = [server.create("a whale", **plain, **options) for options in ({}, {"preset": "full"})]
    jobs = [server.wait(name) for name in names]
    assert [(job["preset"], job["metadata"]["preset"]) for job in jobs] == [(None, "fast"), ("full", "full")]
    assert [job["metadata"]["steps"] for job in jobs] == [[2, 1], [12, 3]]
    (model,) = server.call("GET", "/v1/models")[1]["data"]
    assert (model["presets"], model["usual_preset"]) == (["fast", "full"], "fast")


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif", "webp"])
def test_sync_answers_with_the_file(server: Server, suffix: str, tmp_path: Path) -> None:
    status, data = server.call("POST", f"/v1/videos/sync?format={suffix}", {"prompt": "a heart", **QUICK})
    assert status == 200
    path = tmp_path / f"clip.{suffix}"
    path.write_bytes(data)
    assert len(higen.Video.open(path)) == 2


def test_a_picture_comes_as_a_file_a_data_url_or_an_object(server: Server, client: Any) -> None:
    quick = {"num_frames": 2, "num_inference_steps": 1}
    made = client.videos.create(prompt="a heart", input_reference=("a.png", png()), size="64x64", extra_body=quick)
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    names = [
        made.id,
        server.create("a heart", input_reference=url),
        server.create("a heart", input_reference={"image_url": url}),
        server.create("a heart", controls={"image": url}),
    ]
    for name in names:
        assert server.wait(name)["status"] == "completed"
    clips = {server.call("GET", f"/v1/videos/{name}/content?format=webp")[1] for name in names}
    assert len({PIL.Image.open(io.BytesIO(clip)).tobytes() for clip in clips}) == 1


def test_events_tell_progress_previews_and_the_end(server: Server) -> None:
    name = server.create("a whale", num_inference_steps=8, num_frames=4)
    request = urllib.request.Request(f"{server.url}/v1/videos/{name}/events")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = [block for block in answer.read().decode().split("\n\n") if block and not block.startswith(":")]
    events = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "status"
    assert kinds[-1] == "done"
    assert json.loads(events[-1]["data"])["status"] == "completed"
    percents = [json.loads(event["data"])["progress"] for event in events if event["event"] == "progress"]
    assert percents == sorted(percents)
    strips = [json.loads(event["data"]) for event in events if event["event"] == "preview"]
    strip = PIL.Image.open(io.BytesIO(base64.b64decode(strips[-1]["image"].partition(",")[2])))
    assert strip.size == (strips[-1]["frames"] * 64, 64)


def test_cancelling_frees_the_slot_and_is_answered_as_failed(server: Server) -> None:
    name = server.create(num_frames=64, num_inference_steps=200, size="128x128")
    while server.call("GET", f"/v1/videos/{name}")[1]["status"] == "queued":
        time.sleep(0.02)
    status, answer = server.call("POST", f"/v1/videos/{name}/cancel")
    assert (status, answer["status"], answer["error"]["code"]) == (200, "failed", "cancelled")
    deleted = server.create(num_frames=64, num_inference_steps=200, size="128x128")
    assert server.call("DELETE", f"/v1/videos/{deleted}") == (
        200,
        {"id": deleted, "object": "video.deleted", "deleted": True},
    )
    while b"higen_jobs_running 0.0" not in server.call("GET", "/metrics")[1]:
        time.sleep(0.05)
    refused(server.call("GET", f"/v1/videos/{name}/content"), 409, "cancelled")


def test_an_idempotency_key_gives_the_same_job_once(server: Server) -> None:
    body = {"prompt": "a whale", **QUICK, "seed": -1}
    header = {"idempotency-key": "one"}
    first, second = (server.call("POST", "/v1/videos", body, header)[1] for _ in range(2))
    assert (first["id"], first["seed"]) == (second["id"], second["seed"])
    other = server.call("POST", "/v1/videos", {**body, "prompt": "a heart"}, header)
    assert refused(other, 409)["code"] == "idempotency_conflict"
    refused(server.call("POST", "/v1/videos", body, {"idempotency-key": "x" * 300}), 422, "Idempotency-Key")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "other"}, "models are higen"),
        ({"colour": "red"}, "fields are prompt, negative_prompt"),
        ({"controls": {"speed": 1}}, "controls: motion, appearance"),
        ({"controls": {"motion": "fast"}}, "motion="),
        ({"controls": {"motion": -1}}, "motion="),
        ({"controls": [1]}, "controls=[1]"),
        ({"size": "65x64"}, "multiple of 32"),
        ({"size": "4096x4096"}, "pixels"),
        ({"size": "64"}, "WIDTHxHEIGHT"),
        ({"num_frames": 65}, "from 1 to 64"),
        ({"num_frames": True}, "num_frames=True"),
        ({"num_frames": 100000}, "at most 256"),
        ({"seconds": "1000", "num_frames": None}, "seconds='1000'"),
        ({"seconds": "4"}, "one of the two"),
        ({"seconds": {}, "num_frames": None}, "seconds={}"),
        ({"fps": 0}, "fps=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 999}, "at most 200"),
        ({"guidance_scale": "high"}, "guidance_scale='high'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": [1, 2]}, "seed=[1, 2]"),
        ({"solver": "magic"}, "solver='magic'"),
        ({"prompt": ["a", "b"]}, "prompt="),
        ({"prompt": " "}, "at least one word"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"input_reference": "https://example.org/a.png"}, "no address is fetched"),
        ({"input_reference": "/etc/passwd"}, "no address is fetched"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "cannot be read"),
        ({"input_reference": {"file_id": "x"}}, "file ids are not kept"),
        ({"input_reference": "data:image/png;base64," + base64.b64encode(png()[:60]).decode()}, "cannot be read"),
    ],
)
def test_a_wrong_field_is_one_clear_422(server: Server, fields: dict[str, Any], words: str) -> None:
    refused(server.call("POST", "/v1/videos", {"prompt": "a whale", **QUICK, **fields}), 422, words)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b'{"prompt": "a", "prompt": "b"}', "application/json", 400),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b"x", "multipart/form-data", 400),
        (b"--b\r\nbroken", "multipart/form-data; boundary=b", 400),
        (CUT, "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="../x"\r\n\r\n1\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            422,
        ),
    ],
)
def test_a_broken_body_is_refused(server: Server, body: bytes, kind: str, status: int) -> None:
    refused(server.call("POST", "/v1/videos", body, {"content-type": kind}), status)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/videos/video_" + "0" * 32, 404),
        ("GET", "/v1/videos/..%2f..%2fjobs.sqlite/content", 404),
        ("DELETE", "/v1/videos/..", 404),
        ("GET", "/v1/videos/../../etc/passwd", 404),
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/videos", 405),
        ("GET", "/v1/videos?limit=0", 422),
        ("GET", "/v1/videos?limit=x", 422),
        ("GET", "/v1/videos?after=nothing", 404),
        ("GET", "/v1/models/other", 404),
    ],
)
def test_a_wrong_address_is_refused(server: Server, method: str, path: str, status: int) -> None:
    refused(server.call(method, path), status)


def test_bombs_are_refused(server: Server) -> None:
    bomb = io.BytesIO()
    PIL.Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    url = "data:image/png;base64," + base64.b64encode(bomb.getvalue()).decode()
    refused(server.call("POST", "/v1/videos", {"prompt": "a whale", "input_reference": url}), 422, "pixels")
    refused(server.call("POST", "/v1/videos", b"x" * 10, {"content-encoding": "gzip"}), 415)
    refused(server.call("POST", "/v1/videos", b"x", {"content-length": str(10**9)}, timeout=10), 413)


def test_a_body_without_a_length_is_counted(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(
            b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(64):
                raw.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except OSError:
            pass
        assert b" 413 " in raw.recv(65536)
    assert server.call("GET", "/health")[0] == 200


def test_pages_and_hosts_of_others_are_refused(server: Server) -> None:
    refused(server.call("GET", "/v1/videos", headers={"origin": "https://evil.example"}), 403, "page")
    refused(server.call("GET", "/v1/videos", headers={"host": "evil.example"}), 403, "host")
    assert server.call("GET", "/v1/videos", headers={"origin": server.url})[0] == 200


def test_event_streams_are_limited(server: Server) -> None:
    name = server.create(num_frames=64, num_inference_steps=200, size="128x128")
    opened = [urllib.request.urlopen(f"{server.url}/v1/videos/{name}/events?previews=false") for _ in range(4)]
    assert refused(server.call("GET", f"/v1/videos/{name}/events"), 429)["code"] == "too_many_streams"
    assert server.call("DELETE", f"/v1/videos/{name}")[0] == 200
    for stream in opened:
        assert b'"status":"deleted"' in stream.read()
        stream.close()


def test_the_openapi_page_describes_what_is_there(server: Server) -> None:
    _, text = server.call("GET", "/openapi.json")
    assert {"/v1/videos", "/v1/videos/sync", "/v1/videos/{video_id}/events", "/v1/models"} <= set(text["paths"])
    assert server.call("GET", "/docs")[0] == 200
    _, models = server.call("GET", "/v1/models")
    schema = models["data"][0]["controls"]
    assert set(schema["properties"]) == {control.name for control in higen.load(prepare=False).controls}


def test_keys_queues_and_pages(tmp_path: Path) -> None:
    """Calls need a key. A key sees only its own jobs and has a limited queue. An allowed page gets CORS headers."""
    from higen.serve.keys import add_key

    file = tmp_path / "keys"
    keys = [add_key(file, name) for name in ("one", "two")]
    assert not any(key in file.read_text(encoding="utf-8") for key in keys)
    assert file.stat().st_mode & 0o077 == 0
    page = "https://page.example"
    server = Server(tmp_path / "data", "--api-keys", str(file), "--max-queue", "1", "--slots", "1", "--cors", page)
    one, two = ({"authorization": f"Bearer {key}"} for key in keys)
    try:
        for path in (
            "/v1/videos",
            "/health",
            "/ready",
            "/metrics",
            "/docs",
            "/openapi.json",
            "/v1/models",
            "/x",
            "/page/x",
        ):
            refused(server.call("GET", path), 401)
            refused(server.call("OPTIONS", path), 401)
            refused(server.call("GET", path, headers={"authorization": "Bearer wrong"}), 401)
        for path in ("/", "/page/main.js"):  # the web page loads without a key and asks for one
            assert server.call("GET", path)[0] == 200
            refused(server.call("POST", path), 401)
        long = {"prompt": "a whale", "num_frames": 64, "num_inference_steps": 200}
        name = server.call("POST", "/v1/videos", long, one)[1]["id"]
        assert refused(server.call("POST", "/v1/videos", long, one), 429)["code"] == "queue_full"
        assert server.call("GET", f"/v1/videos/{name}", headers=one)[0] == 200
        refused(server.call("GET", f"/v1/videos/{name}", headers=two), 404)
        assert server.call("GET", "/v1/videos", headers=two)[1]["data"] == []
        assert server.call("POST", "/v1/videos", {"prompt": "a", **QUICK}, two)[0] == 200
        asked = {"origin": page, "access-control-request-method": "POST"}
        assert server.call("OPTIONS", "/v1/videos", headers=asked)[0] == 200
        refused(server.call("OPTIONS", "/v1/videos", headers={**asked, "origin": "https://evil.example"}), 403)
        assert server.call("DELETE", f"/v1/videos/{name}", headers=one)[0] == 200
    finally:
        assert server.stop() == 0


def test_two_models_share_the_memory(tmp_path: Path) -> None:
    from higen.api import default_model

    model = str(default_model())
    server = Server(tmp_path / "data", f"a={model}", f"b={model}", "--memory", "25MB")
    try:
        names = [server.create(model=which) for which in "abbab"]
        assert {server.wait(name)["status"] for name in names} == {"completed"}
        assert b"higen_models_loaded 1.0" in server.call("GET", "/metrics")[1]
    finally:
        assert server.stop() == 0


def test_many_slow_connections_are_ended(tmp_path: Path) -> None:
    """Connections over the limit are refused at once. Silent connections do not disturb others."""
    server = Server(tmp_path / "data", "--max-connections", "20")
    host, port = server.url.removeprefix("http://").split(":")
    try:
        opened = [socket.create_connection((host, int(port)), timeout=30) for _ in range(200)]
        for one in opened[:20]:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        assert b" 503 " in opened[-1].recv(4096)
        for one in opened:
            one.close()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if server.call("GET", "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.05)
        assert server.call("GET", "/health")[0] == 200
    finally:
        assert server.stop() == 0


def test_requests_of_many_threads_are_all_answered(server: Server) -> None:
    done: list[str] = []

    def one(number: int) -> None:
        done.append(server.wait(server.create("a whale", seed=number))["status"])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == ["completed"] * 8
