"""Starts the CPU Triton server of the package `nvidia-pytriton`, with higen's replacement for the onnxruntime backend.

    python -m higen.engines.triton.server REPO --http-port 8000 --grpc-port 8001 --metrics-port 8002

It is meant for machines without NVIDIA's container: development, tests, small models. It listens on 127.0.0.1 only.
HTTP requests go through higen's front (front.py). Metrics for Prometheus are at /metrics.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from higen.engines.triton.front import HOST, Front
from higen.errors import BackendError, BackendUnavailable, MissingExtra

__all__ = ["Server", "command", "free_ports", "running"]

STANDIN = "from higen.engines.triton.standin import TritonPythonModel\n"


class Server:
    """A running server. `stop` waits until its requests end, `kill` does not."""

    def __init__(
        self, process: subprocess.Popen[bytes], http_port: int, grpc_port: int, log: Path, metrics_port: int
    ) -> None:
        self.process = process
        self.http = f"{HOST}:{http_port}"
        self.grpc = f"{HOST}:{grpc_port}"
        self.metrics = f"{HOST}:{metrics_port}"
        self.log = log

    def wait_until_ready(self, seconds: float) -> None:
        """Return when every model is loaded. Otherwise raises BackendError with the last lines of the log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.kill()
        raise BackendError(f"tritonserver did not start:\n{self.last_words()}")

    def last_words(self) -> str:
        """The last errors in its log, or the last lines if it has no error."""
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith("E") or "rror" in line or "nvalid" in line]
        return "\n".join(told[-20:] or lines[-20:])

    def stop(self, seconds: float = 60) -> None:
        """Ask the server to end, and wait until it has."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the server and its models' processes at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def command(
    repository: Path, backends: Path, http_port: int, grpc_port: int, exit_timeout: int = 30, metrics_port: int = 8002
) -> list[str]:
    """The server's command line. Also fills the empty folder `backends`. Raises MissingExtra or BackendUnavailable."""
    tritonserver = _bundled()
    stub = tritonserver / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    if not stub.is_file():
        raise BackendUnavailable(f"nvidia-pytriton has no Python backend for Python 3.{sys.version_info.minor}")
    shutil.copytree(tritonserver / "backends" / "python", backends / "python")
    shutil.copy(stub, backends / "python")
    standin = backends / "onnxruntime"
    standin.mkdir()
    (standin / "model.py").write_text(STANDIN, encoding="utf-8")
    return [
        str(tritonserver / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        *(f"--{kind}-address={HOST}" for kind in ("http", "grpc", "metrics")),
        f"--http-port={http_port}",
        f"--grpc-port={grpc_port}",
        f"--metrics-port={metrics_port}",
        "--allow-gpu-metrics=false",
        f"--exit-timeout-secs={exit_timeout}",
        "--disable-auto-complete-config",
    ]


def environment() -> dict[str, str]:
    """The server's environment: its libraries, and this Python first in PATH, so that the models use its packages."""
    libraries = _bundled().parents[1] / "nvidia_pytriton.libs"
    found = [str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(found), "PATH": os.pathsep.join(path)}


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for made in sockets:
            made.bind((HOST, 0))
        return [made.getsockname()[1] for made in sockets]
    finally:
        for made in sockets:
            made.close()


@contextmanager
def running(
    repository: Path,
    http_port: int = 0,
    grpc_port: int = 0,
    metrics_port: int = 0,
    *,
    exit_timeout: int = 30,
    start_timeout: float = 120,
) -> Iterator[Server]:
    """Yields a ready server of the repository and stops it at the end. Port 0 means any free port."""
    with tempfile.TemporaryDirectory(prefix="higen-triton-") as work, ExitStack() as ending:
        free_http, free_grpc, free_metrics, inner_port = free_ports(4)
        http_port, grpc_port, metrics_port = (
            http_port or free_http,
            grpc_port or free_grpc,
            metrics_port or free_metrics,
        )
        backends, log = Path(work, "backends"), Path(work, "log")
        backends.mkdir()
        line = command(repository.resolve(), backends, inner_port, grpc_port, exit_timeout, metrics_port)
        front = Front(http_port, inner_port)
        ending.callback(front.close)
        with log.open("wb") as output:
            process = subprocess.Popen(
                line, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        server = Server(process, http_port, grpc_port, log, metrics_port)
        try:
            server.wait_until_ready(start_timeout)
            yield server
        finally:
            if process.poll() is None:
                server.stop(exit_timeout + 30)


def _bundled() -> Path:
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        raise MissingExtra("nvidia-pytriton", "triton", "the CPU Triton server")
    return Path(found.origin).parent / "tritonserver"


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Serve a repository on this machine's CPU.")
    parser.add_argument("repository", type=Path)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server, in its own session, is stopped too
    try:
        with running(arguments.repository, arguments.http_port, arguments.grpc_port, arguments.metrics_port) as server:
            print(f"http {server.http}  grpc {server.grpc}  metrics {server.metrics}; Ctrl-C ends it", flush=True)
            status, words = server.process.wait(), server.last_words()
    except KeyboardInterrupt:  # also while the server starts
        print("stopped", flush=True)
        return
    raise SystemExit(f"tritonserver ended by itself with status {status}:\n{words}")


if __name__ == "__main__":
    main()
