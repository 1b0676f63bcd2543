"""A `higen serve` process for tests, campaigns and load measurements."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICK = {"num_frames": 2, "num_inference_steps": 1, "size": "64x64"}
"""Options of the cheapest request."""


class Server:
    """A running server; its address is `url`."""

    def __init__(self, folder: Path, *options: str) -> None:
        """Start a server and wait until it is ready. Raises RuntimeError with the server's output if it ends."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "higen", "serve", "--port", "0", "--data", str(folder), "--json", *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if '"url"' not in line:
            self.process.wait(30)
            raise RuntimeError(line + self.log.read_text(encoding="utf-8"))
        self.url = str(json.loads(line)["url"])

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, Any]:
        """The status and the body of an answer; a JSON body is parsed."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, text, kind = answer.status, answer.read(), answer.headers["content-type"]
        except urllib.error.HTTPError as error:
            with error:
                status, text, kind = error.code, error.read(), error.headers["content-type"]
        return status, json.loads(text) if kind == "application/json" else text

    def create(self, prompt: str = "a whale", **fields: Any) -> str:
        """Create a job; returns its id."""
        status, answer = self.call("POST", "/v1/videos", {"prompt": prompt, **QUICK, **fields})
        assert status == 200, answer
        return str(answer["id"])

    def wait(self, name: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until a job has ended; returns the job."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status, answer = self.call("GET", f"/v1/videos/{name}")
            assert status == 200, answer
            if answer["status"] in ("completed", "failed"):
                return dict(answer)
            time.sleep(0.05)
        raise AssertionError(f"{name} has not ended: {answer}")

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        self.process.kill()
        self._gone()

    def stop(self) -> int:
        """Stop the server with SIGTERM; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
        return self._gone()

    def _gone(self) -> int:
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code
