"""Load-tests a server with clients that create, poll, listen to and cancel jobs and send broken uploads.

    python benchmarks/serving_load.py FOLDER --clients 1 4 16 64 --seconds 120 --serve "--slots 8"

`--serve` takes options of `higen serve`. Prints latencies and errors. The latency of a call is that of the HTTP
request; the latency of a video is the time from its creation to its end. At the end every accepted job is checked.
Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shlex
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from serve_process import Server

FIELDS = {"num_frames": 4, "num_inference_steps": 4, "size": "64x64"}


class Load:
    """Clients of one server, for some seconds."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.calls: list[float] = []
        self.videos: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.accepted: list[str] = []
        self.broken: list[str] = []

    def run(self, clients: int, seconds: float) -> None:
        """Several clients at the same time."""
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self._ended.set()
        for thread in threads:
            thread.join()

    def _client(self, number: int) -> None:
        chance = random.Random(number)
        while not self._ended.is_set():
            try:
                self._round(chance)
            except (OSError, http.client.HTTPException, AssertionError) as error:
                with self._lock:
                    self.broken.append(f"{type(error).__name__}: {error}")

    def _call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        began = time.perf_counter()
        status, answer = self._server.call(method, path, body, headers, timeout=120)
        with self._lock:
            self.calls.append(time.perf_counter() - began)
            self.statuses[str(status)] += 1
        return answer if status == 200 else None

    def _round(self, chance: random.Random) -> None:
        if chance.random() < 0.1:
            form = b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\n\x89PNG'
            self._call("POST", "/v1/videos", form, {"content-type": "multipart/form-data; boundary=b"})
        began = time.perf_counter()
        made = self._call("POST", "/v1/videos", {"prompt": "a whale", **FIELDS, "seed": chance.randrange(10**6)})
        if made is None:
            time.sleep(0.5)
            return
        with self._lock:
            self.accepted.append(made["id"])
        address = f"/v1/videos/{made['id']}"
        if chance.random() < 0.1:
            self._call("POST", f"{address}/cancel")
            return
        if chance.random() < 0.25:
            self._call("GET", f"{address}/events")
        while (job := self._call("GET", address)) is not None and job["status"] in ("queued", "in_progress"):
            time.sleep(0.2)
        with self._lock:
            self.videos.append(time.perf_counter() - began)
        self._call("GET", f"{address}/content")


def memory(process: int) -> float:
    """Resident megabytes."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


def row(folder: Path, clients: int, seconds: float, options: list[str]) -> dict[str, Any]:
    """The results of one run of a server with some clients."""
    server = Server(folder, *options)
    try:
        load = Load(server)
        before = memory(server.process.pid)
        load.run(clients, seconds / 2)
        half = memory(server.process.pid)
        load._ended.clear()
        load.run(clients, seconds / 2)
        after = memory(server.process.pid)
        ends = Counter(server.wait(name, 600)["status"] for name in load.accepted)
    finally:
        server.stop()
    calls, videos = (np.array(values or [float("nan")]) for values in (load.calls, load.videos))
    return {
        "clients": clients,
        "calls": len(load.calls),
        "call_p50_ms": round(float(np.percentile(calls, 50)) * 1000, 1),
        "call_p99_ms": round(float(np.percentile(calls, 99)) * 1000, 1),
        "video_p50_s": round(float(np.percentile(videos, 50)), 2),
        "video_p99_s": round(float(np.percentile(videos, 99)), 2),
        "videos_a_minute": round(len(load.videos) / seconds * 60, 1),
        "statuses": dict(load.statuses),
        "accepted": len(load.accepted),
        "ends": dict(ends),
        "broken": load.broken[:5],
        "rss_mb": [round(value) for value in (before, half, after)],
    }


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Load on a server.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--serve", default="", help="options of `higen serve`")
    told = parser.parse_args()
    for clients in told.clients:
        print(json.dumps(row(told.folder / str(clients), clients, told.seconds, shlex.split(told.serve))), flush=True)


if __name__ == "__main__":
    main()
