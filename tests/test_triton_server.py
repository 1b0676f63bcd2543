"""A real Triton server on the CPU, with real clients. Needs a separate environment, because nvidia-pytriton pins numpy:

    python -m venv V && V/bin/pip install -e ".[triton]" onnx pytest && V/bin/python -m pytest --noconftest THIS_FILE

The server runs the repository as `higen-export triton` writes it; its onnxruntime backend is our stand-in.
"""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

MISSING = [name for name in ("pytriton", "tritonclient", "grpc", "onnx") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: pip install 'higen[triton]' onnx", allow_module_level=True)

from made_up_model import MANIFEST, write_made_up_model  # noqa: E402

from higen.api import default_model  # noqa: E402
from higen.backends.onnx import OnnxBackend  # noqa: E402
from higen.backends.options import Options  # noqa: E402
from higen.bundle import Bundle  # noqa: E402
from higen.engines.triton.client import stream  # noqa: E402
from higen.engines.triton.repository import Settings, write_repository  # noqa: E402
from higen.engines.triton.server import Server, free_ports, running  # noqa: E402
from higen.errors import BackendError, Cancelled, RequestError, RetryLater  # noqa: E402
from higen.pipeline import Pipeline  # noqa: E402
from higen.request import MAX_PROMPT  # noqa: E402
from higen.sampler import Step  # noqa: E402

SLOTS, LINE = 8, 4
SMALL: dict[str, Any] = {"frames": 4, "width": 64, "height": 64}
LONG: dict[str, Any] = {**SMALL, "steps": [900, 900]}

Result = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(Bundle.open(default_model()), target, Settings(slots=SLOTS, line=LINE, threads=1))
    return target


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with running(repository, exit_timeout=1) as made:
        yield made
        assert made.process.poll() is None, made.last_words()  # the server's last output if it died


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """The expected results: the same model without a server."""
    bundle = Bundle.open(default_model())
    return Pipeline(bundle, OnnxBackend(bundle, Options("cpu", threads=1)))


def ask(server: Server, prompt: str = "a whale", **options: Any) -> Result:
    """Latents after the last step, and frames, through the server."""
    events = list(stream(server.grpc, prompt, timeout=120, return_latents=True, **SMALL | options))
    return events[-1]["latents"], np.concatenate([e["frames"] for e in events if e["event"] == "frames"])


def alone(pipeline: Pipeline, prompt: str = "a whale", **options: Any) -> Result:
    """The same results without a server."""
    steps = pipeline.stream(prompt, **SMALL | options)
    last = [event for event in steps if isinstance(event, Step)][-1]
    return pipeline.backend.to_numpy(last.latents)[0], steps.videos[0].frames


def assert_same(found: Result, expected: Result) -> None:
    assert np.abs(found[0] - expected[0]).max() < 1e-4
    assert found[1].shape == expected[1].shape
    assert np.abs(found[1].astype(int) - expected[1]).max() <= 1


def get(server: Server, path: str) -> Any:
    status, text = http_request(server, "GET", path)
    assert status == 200
    return json.loads(text)


def http_request(server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    with closing(http.client.HTTPConnection(server.http, timeout=120)) as connection:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def sse(server: Server, body: Any) -> tuple[int, list[dict[str, Any]]]:
    """The status and the events of a request by HTTP with server-sent events."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, text = http_request(server, "POST", "/v2/models/higen/generate_stream", raw)
    return status, [json.loads(line.removeprefix("data:")) for line in text.split("\n") if line.strip()]


TEMPORAL = ("temporal_unet", "temporal_unet_plain")
"""The second stage runs requests with guidance 1."""


def executed(server: Server, *stages: str) -> tuple[int, int]:
    """The numbers of rows and batches that these stages have run."""
    found = [get(server, f"/v2/models/{stage}/stats")["model_stats"][0] for stage in stages]
    return sum(one["inference_count"] for one in found), sum(one["execution_count"] for one in found)


def all_at_once(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Run `work` on each item in its own thread. An error takes the place of a result."""

    def one(item: Any) -> Any:
        try:
            return work(item)
        except (RetryLater, RequestError, Cancelled) as error:
            return error

    with ThreadPoolExecutor(len(items)) as threads:
        return list(threads.map(one, items))


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; fails after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_every_model_is_there_as_the_stage_table_says(server: Server, pipeline: Pipeline) -> None:
    fixed = pipeline.manifest.fixed
    for stage in pipeline.manifest.stages:
        config = get(server, f"/v2/models/{stage.name}/config")
        assert (config["backend"], config["max_batch_size"]) == ("onnxruntime", 8)
        assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 0
        for found, tensors, names in (
            (config["input"], stage.inputs, [tensor.name for tensor in stage.inputs]),
            (config["output"], stage.outputs, stage.graph_outputs),
        ):
            assert [entry["name"] for entry in found] == list(names)
            for entry, tensor in zip(found, tensors, strict=True):
                inner = entry["reshape"]["shape"] if "reshape" in entry else entry["dims"]
                expected = [n if isinstance(n, int) else fixed.get(n, -1) for n in tensor.shape[1:]]
                assert [int(n) for n in inner] == expected
                assert entry["data_type"] == {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}[tensor.dtype]
    assert get(server, "/v2/models/higen/config")["model_transaction_policy"] == {"decoupled": True}


def test_a_stage_can_be_called_by_itself(server: Server, pipeline: Pipeline) -> None:
    import tritonclient.grpc as grpc

    stage, random = pipeline.manifest.stage("temporal_unet"), np.random.default_rng(0)
    sizes = {**pipeline.manifest.fixed, "B": 2, "F": 3, "H": 4, "W": 2}
    tensors = {}
    for tensor in stage.inputs:
        shape = [n if isinstance(n, int) else sizes[n] for n in tensor.shape]
        whole = tensor.dtype == "int64"
        tensors[tensor.name] = random.integers(1, 999, shape) if whole else random.normal(size=shape).astype(np.float32)
    inputs = []
    for tensor in stage.inputs:
        array = tensors[tensor.name]
        array = array[:, None] if array.ndim == 1 else array
        inputs.append(grpc.InferInput(tensor.name, list(array.shape), "INT64" if tensor.dtype == "int64" else "FP32"))
        inputs[-1].set_data_from_numpy(array)
    with grpc.InferenceServerClient(server.grpc) as client:
        answer = client.infer(stage.name, inputs)
    expected = pipeline.backend.run(stage.name, **tensors)
    for name, output in zip(stage.graph_outputs, stage.outputs, strict=True):
        theirs = pipeline.backend.to_numpy(expected[output.name])
        assert np.abs(answer.as_numpy(name) - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_a_request_by_grpc_streams_its_events(server: Server, pipeline: Pipeline) -> None:
    events = list(stream(server.grpc, "a whale", timeout=120, seed=3, steps=[3, 2], preview_every=2, **SMALL))
    kinds = [(e["event"], e.get("loop"), e.get("step")) for e in events]
    assert kinds == [
        ("progress", "spatial", 1),
        ("progress", "spatial", 2),
        ("preview", "spatial", 2),
        ("progress", "spatial", 3),
        ("progress", "temporal", 1),
        ("progress", "temporal", 2),
        ("preview", "temporal", 2),
        ("frames", None, None),
        ("frames", None, None),
        ("done", None, None),
    ]
    assert [e["stage"] for e in events[:2]] == ["spatial_unet"] * 2
    assert events[2]["frames"].shape == (1, 64, 64, 3)
    about = json.loads(events[-1]["metadata"])
    assert (about["seed"], about["steps"], about["frames"], about["versions"]["backend"]) == (3, [3, 2], 4, "triton")
    assert_same(ask(server, seed=3, steps=[3, 2]), alone(pipeline, seed=3, steps=[3, 2]))


def test_a_request_by_http_streams_its_events(server: Server, pipeline: Pipeline) -> None:
    status, events = sse(server, {"prompt": "a whale", "seed": 2**64 - 1, "steps": [2, 2], "encoding": "png", **SMALL})
    assert status == 200
    assert [e["event"] for e in events] == ["progress"] * 4 + ["frames"] * 2 + ["done"]
    images = [image for e in events if e["event"] == "frames" for image in e["images"]]
    frames = np.stack([np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(image)))) for image in images])
    _, expected = alone(pipeline, seed=2**64 - 1, steps=[2, 2])
    assert np.abs(frames.astype(int) - expected).max() <= 1


def test_known_frames_use_the_layers_that_were_trained_for_them(server: Server, pipeline: Pipeline) -> None:
    first, last = alone(pipeline, seed=4, steps=[2, 1])[1][[0, -1]]
    options = {"seed": 5, "steps": [2, 2], "guidance": 1.0, "keyframes": {0: first, -1: last}}
    before = executed(server, "temporal_unet_known_plain")
    found = ask(server, **options)
    assert executed(server, "temporal_unet_known_plain")[0] == before[0] + 2
    assert_same(found, alone(pipeline, **options))


def test_eight_at_once_get_their_single_results(server: Server, pipeline: Pipeline) -> None:
    prompts = pipeline.manifest.prompts or ("a whale",)
    requests = [
        {
            "prompt": prompts[i % len(prompts)],
            "seed": 100 + i,
            "steps": [2 + i % 4, 5 - i % 3],
            "guidance": [1.0 + i, 1.0 + i / 4],
            "solver": ("ddim", "dpm++2m")[i % 2],
        }
        for i in range(8)
    ]
    start = time.perf_counter()
    single = [ask(server, **arguments) for arguments in requests]
    one_by_one = time.perf_counter() - start
    before = executed(server, *TEMPORAL)
    start = time.perf_counter()
    found = all_at_once(lambda arguments: ask(server, **arguments), requests)
    at_once = time.perf_counter() - start
    rows, batches = (now - then for now, then in zip(executed(server, *TEMPORAL), before, strict=True))
    print(f"\n8 requests: {one_by_one:.2f} s one by one, {at_once:.2f} s at once; {rows} steps in {batches} batches")
    for together, by_itself in zip(found, single, strict=True):
        assert_same(together, by_itself)
    for together, arguments in list(zip(found, requests, strict=True))[::3]:
        assert_same(together, alone(pipeline, **arguments))
    assert rows == sum(arguments["steps"][1] for arguments in requests)
    assert batches < rows  # requests at different steps shared batches


def test_cancelling_frees_the_slot(server: Server) -> None:
    held = [stream(server.grpc, "a whale", timeout=120, seed=i, **LONG) for i in range(SLOTS)]
    try:
        for events in held:
            next(events)
        with ThreadPoolExecutor(1) as threads:
            late = threads.submit(ask, server, steps=1)
            held.pop().close()
            late.result(120)  # while the others are running
        for events in held:
            assert next(events)["event"] == "progress"
    finally:
        for events in held:
            events.close()
    wait_for(lambda: idle(server))


def test_an_http_client_that_goes_away_frees_its_slot(server: Server) -> None:
    before = executed(server, "spatial_unet")[0]
    body = json.dumps({"prompt": "a whale", **LONG})
    with closing(http.client.HTTPConnection(server.http, timeout=120)) as connection:
        connection.request("POST", "/v2/models/higen/generate_stream", body)
        with connection.getresponse() as answer:
            assert b'"event":"progress"' in answer.readline()
    wait_for(lambda: idle(server))
    assert executed(server, "spatial_unet")[0] < before + LONG["steps"][0]


def idle(server: Server) -> bool:
    """Whether no stage runs for half a second."""
    before = get(server, "/v2/models/stats")["model_stats"]
    time.sleep(0.5)
    return bool(before == get(server, "/v2/models/stats")["model_stats"])


def test_when_all_slots_and_the_queue_are_full_the_client_is_told_to_try_again(server: Server) -> None:
    held = [stream(server.grpc, "a whale", timeout=120, seed=i, **LONG) for i in range(SLOTS)]
    with ThreadPoolExecutor(2 * LINE) as threads:
        try:
            for events in held:
                next(events)
            late = [threads.submit(ask, server, steps=1, seed=i) for i in range(2 * LINE)]
            # Half of them fit into the queue. The others are refused at once.
            wait_for(lambda: sum(future.done() for future in late) == LINE)
        finally:
            for events in held:
                events.close()
        errors = [future.exception(120) for future in late]
    refused = [error for error in errors if error is not None]
    assert len(refused) == LINE
    for error in refused:
        assert isinstance(error, RetryLater)
        assert f"{SLOTS} requests are running and {LINE} are waiting" in str(error)
    wait_for(lambda: idle(server))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps=0: a whole number from 1 to 1000"),
    ({"steps": [1, 2, 3]}, "one value, or 2 (one per loop: spatial, temporal)"),
    ({"frames": [1, 2]}, "frames=[1, 2]: a whole number"),
    ({"seed": []}, "seed is empty: at least one value"),
    ({"prompt": "x" * 20_000_000}, f"at most {MAX_PROMPT} characters"),
    ({"colour": "red"}, "unexpected inference input 'colour' for model 'higen'; the model takes prompt BYTES"),
    ({"motion": "fast"}, "input 'motion' data-type is 'BYTES', but model 'higen' expects 'FP32'"),
    ({"image": np.zeros((2, 8, 8, 3), np.uint8)}, "unexpected shape for input 'image'"),
    ({"guidance": float("nan")}, "guidance=nan"),
    ({"width": 65}, "width=65: a multiple of"),
    ({"frames": 10**6}, "frames=1000000"),
    ({"motion": [1.0, float("inf")]}, "motion"),
    ({"solver": "euler"}, "solver='euler'"),
    ({"prompt": ""}, "prompt=''"),
]


NO_PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n...").decode()
WRONG_BODIES: list[tuple[Any, str]] = [
    ({"prompt": "a whale", "steps": 0}, "steps=0: a whole number from 1 to 1000"),
    ({"prompt": "a whale", "colour": "red"}, "colour: unknown; a request takes prompt"),
    ({"prompt": "a whale", "colour": ["red"]}, "'colour': unknown; a request takes prompt"),
    ({"steps": 2}, "prompt"),
    ({"prompt": ""}, "prompt=''"),
    ({"prompt": "x" * 20_000_000}, f"at most {MAX_PROMPT} characters"),
    ({"prompt": "a whale", "steps": "many"}, "steps='many': a whole number of 32 bits is wanted"),
    ({"prompt": "a whale", "steps": True}, "steps=True: a whole number"),
    ({"prompt": "a whale", "steps": 1.5}, "steps=1.5: a whole number"),
    ({"prompt": "a whale", "frames": 10**6}, "frames=1000000: a whole number from 1 to"),
    ({"prompt": "a whale", "frames": 2**32 + 5}, "frames=4294967301: a whole number of 32 bits"),
    ({"prompt": "a whale", "seed": -1}, "seed=-1: a whole number from 0"),
    ({"prompt": "a whale", "seed": 2**64}, "seed=18446744073709551616: a whole number from 0"),
    ({"prompt": "a whale", "motion": "fast"}, "motion='fast': a number is wanted"),
    ({"prompt": "a whale", "motion": None}, "motion=None: a number is wanted"),
    ({"prompt": "a whale", "motion": [1e39]}, "motion=1e+39: a number is wanted"),
    ({"prompt": "a whale", "motion": [-1]}, "motion"),
    (b'{"prompt": "a whale", "motion": NaN}', "motion"),
    ({"prompt": "a whale", "guidance": [[1.0]]}, "guidance: a flat list is wanted"),
    ({"prompt": "a whale", "return_latents": "yes"}, "return_latents='yes': true or false is wanted"),
    ({"prompt": "a whale", "image_file": "nothing"}, "image_file: one PNG or JPEG file"),
    (
        {"prompt": "a whale", "image_file": NO_PNG},
        "image_file: cannot be read",
    ),
    ({"prompt": 7}, "prompt=7: a text is wanted"),
    ({"prompt": ["a", "b"]}, "prompt: one text is wanted"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": "a whale", "id": 5}, "id=5: a text is wanted"),
    (b'{"prompt": "a whale", "prompt": "a dog"}', "'prompt': appears twice in the body"),
    (b'{"prompt": "\\ud800"}', "a text is wanted"),
    (b'{"prompt": "\xff\xfe"}', "the body is not valid UTF-8: invalid start byte at byte 12"),
    (b"{", "the body is not JSON: Expecting property name"),
    (b"", "the body is not JSON"),
    (b"[1]", "the body must be a JSON object"),
    (b"[" * 100_000, "the body is not JSON"),
    (b"\xff\x00", "the body is not valid UTF-8"),
]


def test_wrong_requests_get_a_clear_error_and_disturb_nobody(server: Server, pipeline: Pipeline) -> None:
    with ThreadPoolExecutor(1) as threads:
        good = threads.submit(ask, server, seed=5, steps=[12, 12])
        for options, message in WRONG:
            with pytest.raises(RequestError) as caught:
                ask(server, **options)
            assert message in str(caught.value)
        for body, message in WRONG_BODIES:
            status, (answer,) = sse(server, body)
            assert (status, message in answer["error"]) == (400, True), (body, status, answer)
            assert "\n" not in answer["error"]
        for endpoint in ("generate", "infer"):
            status, answer = http_request(server, "POST", f"/v2/models/higen/{endpoint}", b'{"prompt": "a whale"}')
            assert (status, "POST it to generate_stream" in answer) == (400, True)
        assert_same(good.result(120), alone(pipeline, seed=5, steps=[12, 12]))
    assert get(server, "/v2/models/higen")["name"] == "higen"


def metrics(server: Server) -> dict[str, float]:
    """The server's metrics by name and labels, as Prometheus reads them."""
    with closing(http.client.HTTPConnection(server.metrics, timeout=120)) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_metrics_count_requests_and_frames(server: Server, pipeline: Pipeline) -> None:
    labels = f'name="{pipeline.manifest.name}"'
    before = metrics(server)
    ask(server, steps=1)
    ask(server, steps=1)
    with pytest.raises(RequestError):
        ask(server, steps=0)
    with closing(stream(server.grpc, "a whale", timeout=120, **LONG)) as events:
        next(events)
        assert metrics(server)[f"higen_requests_active{{{labels}}}"] == 1
    cancelled = f'higen_requests_total{{{labels},outcome="cancelled"}}'
    wait_for(lambda: metrics(server)[cancelled] == before[cancelled] + 1)
    counted = {name: now - before[name] for name, now in metrics(server).items() if name.startswith("higen_")}
    assert counted[f'higen_requests_total{{{labels},outcome="done"}}'] == 2
    assert counted[f'higen_requests_total{{{labels},outcome="refused"}}'] == 1
    assert counted[f"higen_frames_total{{{labels}}}"] == 2 * SMALL["frames"]
    assert metrics(server)[f"higen_requests_active{{{labels}}}"] == 0
    assert metrics(server)['nv_inference_count{model="spatial_unet",version="1"}'] > 0


def test_a_client_that_sends_its_body_in_chunks_is_served(server: Server) -> None:
    body = json.dumps({"prompt": "a whale", "steps": [1, 1], **SMALL, "encoding": "png"}).encode()
    with closing(http.client.HTTPConnection(server.http, timeout=120)) as connection:
        parts = (body[i : i + 7] for i in range(0, len(body), 7))
        connection.request("POST", "/v2/models/higen/generate_stream", parts, {"Expect": "100-continue"})
        answer = connection.getresponse()
        assert (answer.status, b'"event":"done"' in answer.read()) == (200, True)


def test_a_wrong_type_or_rank_is_refused_by_triton(server: Server) -> None:
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    for name, kind, array in (("seed", "FP32", np.ones(1, np.float32)), ("steps", "INT32", np.ones((1, 1), np.int32))):
        answers: list[Any] = []
        with grpc.InferenceServerClient(server.grpc) as client:
            client.start_stream(lambda result, error, answers=answers: answers.append(error))
            prompt = grpc.InferInput("prompt", [1], "BYTES")
            prompt.set_data_from_numpy(np.array([b"a whale"], dtype=np.object_))
            wrong = grpc.InferInput(name, list(array.shape), kind)
            wrong.set_data_from_numpy(array)
            client.async_stream_infer("higen", [prompt, wrong])
            wait_for(lambda answers=answers: bool(answers))
        assert isinstance(answers[0], InferenceServerException)
        assert name in answers[0].message()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_under_load_loses_no_request_silently(
    repository: Path, pipeline: Pipeline, how: signal.Signals
) -> None:
    http_port, grpc_port = free_ports(2)
    # Some requests end before the server does, some do not.
    requests = [{"seed": i, "steps": [1, 1] if i < 2 else [900, 900]} for i in range(SLOTS + 2)]
    with running(repository, http_port, grpc_port, exit_timeout=1) as first, ThreadPoolExecutor(1) as threads:
        answers = threads.submit(all_at_once, lambda arguments: ask(first, **arguments), requests)
        wait_for(lambda: executed(first, "spatial_unet")[0] > 2 * SLOTS)
        if how is signal.SIGTERM:
            first.stop()
        else:
            first.kill()
        found = answers.result(120)
    assert any(isinstance(answer, RetryLater) for answer in found)
    retried = [arguments | {"steps": [1, 1]} for arguments in requests]
    with running(repository, http_port, grpc_port, exit_timeout=1) as second:
        for answer, arguments in zip(found, retried, strict=True):
            if isinstance(answer, RetryLater):
                assert_same(ask(second, **arguments), alone(pipeline, **arguments))
            else:
                assert_same(answer, alone(pipeline, **arguments))


def test_a_missing_server_is_an_error_to_retry_on() -> None:
    (port,) = free_ports(1)
    with pytest.raises(RetryLater):
        list(stream(f"127.0.0.1:{port}", "a whale", timeout=30))


def test_a_repository_that_does_not_load_says_why(repository: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(repository, tmp_path / "repository")
    (broken / "text_encoder" / "1" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"did not start(.|\n)*text_encoder"), running(broken, exit_timeout=1):
        pass


def command(repository: Path) -> tuple[subprocess.Popen[str], int]:
    """Start the README's command and wait until it serves; returns its process and the server's process id."""
    line = [sys.executable, "-m", "higen.engines.triton.server", str(repository)]
    ports = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), free_ports(3), strict=True)]
    process = subprocess.Popen([*line, *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "Ctrl-C" in process.stdout.readline()
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, int(child)


def test_the_command_ends_the_server_when_it_is_terminated(repository: Path) -> None:
    process, child = command(repository)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped" in output
    assert not Path(f"/proc/{child}").exists()


def test_the_command_says_that_the_server_died(repository: Path) -> None:
    process, child = command(repository)
    os.kill(child, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "tritonserver ended by itself with status -9" in errors


def test_two_instances_work_side_by_side(tmp_path: Path) -> None:
    """HIGEN_FAMILY_MODEL may name a model of another family to serve (tests/test_animatediff.py writes it)."""
    family = os.environ.get("HIGEN_FAMILY_MODEL")
    bundle, target = Bundle.open(family or default_model()), tmp_path / "repository"
    write_repository(bundle, target, Settings(instances=2, max_batch=2, threads=1))
    requests: list[dict[str, Any]] = [{"seed": seed, "steps": [2 + seed % 3, 3]} for seed in range(6)]
    if family:
        requests[1]["prompt"] = "(a small whale:1.4) " + "flaps its tail, " * 40  # weighted words, three chunks
        requests[2] |= {"frames": 1, "guidance": [1.0, 1.0]}
    with Pipeline(bundle, OnnxBackend(bundle, Options("cpu", threads=1))) as pipeline:
        expected = [alone(pipeline, **request) for request in requests]
    with running(target, exit_timeout=1) as server:
        for found, wanted in zip(all_at_once(lambda r: ask(server, **r), requests), expected, strict=True):
            scale = max(1.0, float(np.abs(wanted[0]).max()))
            assert_same((found[0] / scale, found[1]), (wanted[0] / scale, wanted[1]))


# A model that belongs to no family: tests/made_up_model.py.


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Pipeline]]:
    """The server of the made-up model, and a pipeline for the expected results."""
    folder = tmp_path_factory.mktemp("made-up")
    bundle = write_made_up_model(folder / "model")
    write_repository(bundle, folder / "repository", Settings(threads=1))
    with running(folder / "repository", exit_timeout=1) as made:
        yield made, Pipeline(bundle, OnnxBackend(bundle, Options("cpu", threads=1)))
        assert made.process.poll() is None, made.last_words()


MADE_UP: list[dict[str, Any]] = [
    {},
    {"wobble": [1, -1, 0, 0, 2], "grain": 7, "mood": "dark"},
    {"drift": 0.5, "guidance": [2.0, 1.0], "frames": 9},
    {"drift": "unspecified", "frames": 3, "steps": [2, 7]},
    {"drift": np.linspace(0, 1, 48).reshape(6, 8)},
    {"frames": 1, "guidance": 1.0, "solver": "ddim"},
    {"solver": ["ddim", "euler_ancestral"], "steps": [1, 5], "negative_prompt": "green", "width": 24},
    {"sketch": np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)},
]


def made_up_frames(server: Server, **options: Any) -> np.ndarray:
    events = stream(server.grpc, "a red kite climbs", timeout=120, **options)
    return np.concatenate([event["frames"] for event in events if event["event"] == "frames"])


def test_a_model_without_an_installed_family_gives_the_frames_of_its_pipeline(made_up: tuple[Server, Pipeline]) -> None:
    server, pipeline = made_up
    requests = [{"seed": seed, **options} for seed, options in enumerate(MADE_UP)]
    expected = [pipeline("a red kite climbs", **options).frames.astype(int) for options in requests]
    for found, frames in zip([made_up_frames(server, **options) for options in requests], expected, strict=True):
        assert found.shape == frames.shape
        assert np.abs(found - frames).max() <= 1
    before = executed(server, "unpack")
    for found, frames in zip(all_at_once(lambda o: made_up_frames(server, **o), requests), expected, strict=True):
        assert np.abs(found - frames).max() <= 1
    rows, batches = (now - then for now, then in zip(executed(server, "unpack"), before, strict=True))
    assert rows == batches == sum((len(frames) + 1) // 2 for frames in expected)  # a decoder's calls are never joined


def test_the_stages_of_a_model_without_an_installed_family(made_up: tuple[Server, Pipeline]) -> None:
    server, _ = made_up
    for stage in MANIFEST.stages:
        assert get(server, f"/v2/models/{stage.name}/config")["max_batch_size"] == (8 if stage.batch else 0)
    found = {f["name"]: [int(n) for n in f["dims"]] for f in get(server, "/v2/models/higen/config")["input"]}
    assert (found["drift"], found["drift_matrix"], found["sketch"]) == ([-1], [-1, -1], [-1, -1, 3])
    events = list(stream(server.grpc, "a red kite", timeout=120, guidance=[1.0, 2.0], steps=1))
    assert [(e["loop"], e["stage"]) for e in events[:2]] == [("draft", "draft_one"), ("film", "film_two")]
    assert json.loads(events[-1]["metadata"])["versions"]["backend"] == "triton"


def test_a_picture_by_http_is_a_file_in_base64(made_up: tuple[Server, Pipeline]) -> None:
    server, pipeline = made_up
    file = io.BytesIO()
    PIL.Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)).save(file, "png")
    text = base64.b64encode(file.getvalue()).decode()
    body = {"prompt": "a red kite", "sketch_file": text, "encoding": "png", "wobble": [0.5, 1.5]}
    status, events = sse(server, body | {"frames": 2})
    assert status == 200
    images = [image for e in events if e["event"] == "frames" for image in e["images"]]
    frames = np.stack([np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(image)))) for image in images])
    expected = pipeline("a red kite", sketch=PIL.Image.open(file), wobble=[0.5, 1.5], frames=2).frames
    assert np.abs(frames.astype(int) - expected).max() <= 1
    status, (answer,) = sse(server, body | {"sketch_file": "nothing"})
    assert (status, "sketch_file: one PNG or JPEG file" in answer["error"]) == (400, True)


def test_a_huge_prompt_delays_nobody(made_up: tuple[Server, Pipeline]) -> None:
    server, _ = made_up
    made_up_frames(server, steps=1)
    with ThreadPoolExecutor(1) as threads:
        huge = threads.submit(lambda: list(stream(server.grpc, "x " * 10_000_000, timeout=120)))
        slowest = 0.0
        while not huge.done():
            start = time.perf_counter()
            made_up_frames(server, steps=1)
            slowest = max(slowest, time.perf_counter() - start)
        with pytest.raises(RequestError, match=f"at most {MAX_PROMPT} characters"):
            huge.result()
    assert slowest < 5  # seconds; the huge prompt's tokens alone took longer
