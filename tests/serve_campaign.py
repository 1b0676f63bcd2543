"""Kills a server with SIGKILL repeatedly while clients create, poll, cancel and delete jobs; then checks every job.

    PYTHONPATH=. python tests/serve_campaign.py FOLDER --kills 200

An accepted job ends completed, failed or cancelled, has a readable file if it is completed, and is listed once. If a
kill cuts off a creation, the job may exist or not; after a repeated request with its Idempotency-Key it exists once.
"""

from __future__ import annotations

import argparse
import http.client
import random
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from serve_process import QUICK, Server

OPTIONS = ("--slots", "2", "--max-queue", "32")
"""Few jobs run at a time, so that some end between two kills."""


@dataclass
class Found:
    """The results of a campaign."""

    kills: int = 0
    accepted: int = 0
    lost: int = 0
    doubled: int = 0
    unfinished: int = 0
    states: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


class Campaign:
    """A server that is killed repeatedly, and clients that carry on."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._found = Found()
        self._accepted: dict[str, str] = {}
        self._deleted: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._server = Server(folder, *OPTIONS)

    def run(self, kills: int, clients: int, between: tuple[float, float], most: float = 3600) -> Found:
        """Kill the server `kills` times at random intervals of `between` seconds; stop early after `most` seconds."""
        deadline = time.monotonic() + most
        threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(clients)]
        for thread in threads:
            thread.start()
        while self._found.kills < kills and time.monotonic() < deadline:
            time.sleep(self._random.uniform(*between))
            self._server.kill()
            self._found.kills += 1
            self._server = Server(self._folder, *OPTIONS)
        time.sleep(between[1])
        self._ended.set()
        for thread in threads:
            thread.join(60)
        try:
            self._judge()
        finally:
            self._server.stop()
        return self._found

    def _client(self, number: int) -> None:
        chance = random.Random(number)
        while not self._ended.is_set():
            key = uuid.UUID(int=chance.getrandbits(128)).hex
            body = {"prompt": "a whale", **QUICK, "seed": chance.randrange(1000)}
            name = self._asked(key, body)
            if name is None:
                return
            with self._lock:
                self._accepted[key] = name
            what = chance.random()
            try:
                if what < 0.15:
                    self._server.call("POST", f"/v1/videos/{name}/cancel", timeout=10)
                elif what < 0.25:
                    with self._lock:
                        self._deleted.add(name)  # a kill may cut the answer off; then the job may exist or not
                    self._server.call("DELETE", f"/v1/videos/{name}", timeout=10)
                else:
                    self._server.call("GET", f"/v1/videos/{name}", timeout=10)
            except (OSError, http.client.HTTPException):
                continue

    def _asked(self, key: str, body: dict[str, object]) -> str | None:
        """Create a job. After a kill, ask again with the same key."""
        while True:
            try:
                status, answer = self._server.call("POST", "/v1/videos", body, {"idempotency-key": key}, timeout=10)
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)
                continue
            if status == 200:
                return str(answer["id"])
            if status != 429:
                self._found.errors.append(f"{status}: {answer}")
            if self._ended.is_set():
                return None
            time.sleep(0.2)

    def _judge(self) -> None:
        found, server = self._found, self._server
        found.accepted = len(self._accepted)
        listed: Counter[str] = Counter()
        after = ""
        while True:
            _, page = server.call("GET", f"/v1/videos?limit=100&order=asc{after}")
            listed.update(row["id"] for row in page["data"])
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        found.doubled = sum(count - 1 for count in listed.values()) + max(0, len(listed) - len(self._accepted))
        for name in self._accepted.values():
            if name not in listed:
                found.lost += name not in self._deleted
                continue
            try:
                job = server.wait(name, 600)
            except AssertionError:
                found.unfinished += 1
                continue
            found.states[job["status"] if job["error"] is None else job["error"]["code"]] += 1
            if job["status"] == "completed" and server.call("GET", f"/v1/videos/{name}/content")[0] != 200:
                found.errors.append(f"{name}: no file")
        known = {path.name for path in (self._folder / "results").iterdir()}
        if extra := known - set(listed):
            found.errors.append(f"results without a job: {sorted(extra)}")


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--between", type=float, nargs=2, default=(0.2, 3.0))
    parser.add_argument("--seconds", type=float, default=3600, help="the longest time to kill for")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    print(Campaign(told.folder, told.seed).run(told.kills, told.clients, tuple(told.between), told.seconds))


if __name__ == "__main__":
    main()
