"""The HTTP API as a Ray Serve application: its arguments, and the documented configuration on a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="higen[serve] is not installed")

from higen.errors import RequestError
from higen.serve.on_ray import settings_of
from higen.serve.settings import Limits, Settings

ROOT = Path(__file__).resolve().parents[1]


def test_arguments_are_those_of_the_command() -> None:
    given = {"data": "/srv/a", "models": ["m", "n=o"], "memory": "8GB", "max-age": "2d", "max_body": "1MB"}
    given |= {"api-keys": "/etc/keys", "cors": ["https://a.b"], "allow-host": ["c"], "max-frames": 8, "threads": 1}
    assert settings_of(given) == Settings(
        folder=Path("/srv/a"),
        models=("m", "n=o"),
        memory=8 * 10**9,
        age=2 * 86400,
        keys=Path("/etc/keys"),
        origins=("https://a.b",),
        hosts=("c",),
        threads=1,
        limits=Limits(body=10**6, frames=8),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "data=None: the folder"),
        ({"data": "a", "port": 1}, "'port': unknown; the arguments are models, backend"),
        ({"data": "a", "models": "m"}, "models='m': a list of texts"),
        ({"data": "a", "max-frames": "8"}, "max-frames='8': a whole number"),
        ({"data": "a", "memory": 7.5}, "memory='7.5': a number of bytes"),
        ({"data": "a", "slots": 0}, "slots=0: a whole number from 1"),
    ],
)
def test_wrong_arguments_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        settings_of(given)
    assert message in str(caught.value)


def documented() -> dict[str, Any]:
    """The configuration in docs/bulk.md."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "docs" / "bulk.md").read_text(encoding="utf-8")
    return dict(yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]))


def test_the_documented_arguments_are_taken() -> None:
    assert settings_of(documented()["applications"][0]["args"]).slots == 8


def call(url: str, body: Any = None, key: str = "") -> Any:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@contextmanager
def nodes() -> Iterator[str]:
    """Start a cluster of two nodes, the second with the folder; returns its address."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        cluster.add_node(resources={"higen": 1}, **small)
        yield cluster.address
    finally:
        cluster.shutdown()


def replica() -> int:
    """The process of the replica."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return int(next(line.split()[0] for line in listed.splitlines() if "ray::ServeReplica" in line))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="higen[ray] is not installed")
@pytest.mark.filterwarnings("ignore")
def test_jobs_outlive_a_replica_on_a_cluster_of_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from higen.serve.keys import add_key

    for name in ("READY_CHECK", "HEALTH_CHECK"):
        monkeypatch.setenv(f"RAY_SERVE_PROXY_{name}_TIMEOUT_S", "120")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    key = add_key(tmp_path / "keys", "a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = documented()
    told["http_options"] = {"host": "127.0.0.1", "port": port, "location": "HeadOnly"}  # both nodes are this machine
    (application,) = told["applications"]
    application["args"] |= {"data": str(tmp_path / "data"), "api-keys": str(tmp_path / "keys"), "models": []}
    application["deployments"][0]["ray_actor_options"]["num_gpus"] = 0
    (tmp_path / "config.yaml").write_text(json.dumps(told), encoding="utf-8")  # JSON is YAML
    url = f"http://127.0.0.1:{port}"
    with nodes() as address:
        command = [str(Path(sys.executable).with_name("serve")), "run", str(tmp_path / "config.yaml")]
        process = subprocess.Popen([*command, "--address", address])
        try:
            wait_for(url, key, process)
            small = {"prompt": "a whale", "num_frames": 2, "num_inference_steps": 4, "size": "64x64"}
            ids = [call(f"{url}/v1/videos", {**small, "seed": seed}, key)["id"] for seed in range(6)]
            os.kill(replica(), signal.SIGKILL)
            done: dict[str, str] = {}
            until = time.monotonic() + 240
            while set(done) != set(ids) and time.monotonic() < until:
                time.sleep(0.5)
                try:
                    listed = call(f"{url}/v1/videos?limit=100", None, key)["data"]
                except OSError:  # no replica is running now
                    continue
                done = {job["id"]: job["status"] for job in listed if job["status"] in ("completed", "failed")}
            assert done == dict.fromkeys(ids, "completed")
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str, key: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the application is ready."""
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        try:
            if call(f"{url}/ready", None, key) == {"status": "ready"}:
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the application is not ready")
