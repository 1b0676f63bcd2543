"""The queue: jobs are in SQLite (WAL), so that accepted jobs outlive the process.

queued -> in_progress -> completed | failed | cancelled. Each change of state is one transaction that also checks the
old state, so no job is run twice or finished twice. A finished job is kept until it expires. Its row is then kept for
the same time again, so that the API can answer that it has expired.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from higen.errors import ServeError
from higen.serve.refusals import Refusal, is_full

__all__ = ["DONE", "Draft", "Job", "Store", "Upload"]

VERSION = 1
ATTEMPTS = 5
"""A job fails after this many starts in which the process died."""

DONE = ("completed", "failed", "cancelled")

_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    model TEXT NOT NULL,
    status TEXT NOT NULL,
    request TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    expires REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    error_code TEXT,
    error_message TEXT,
    remixed TEXT,
    idempotency TEXT,
    fingerprint TEXT NOT NULL,
    metadata TEXT,
    bytes INTEGER NOT NULL DEFAULT 0,
    expired INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX jobs_idempotency ON jobs (owner, idempotency) WHERE idempotency IS NOT NULL;
CREATE INDEX jobs_status ON jobs (status, number);
CREATE INDEX jobs_owner ON jobs (owner, number);
CREATE TABLE inputs (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    suffix TEXT NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (job, name)
);
"""


@dataclass(frozen=True)
class Upload:
    """A file of a request: the suffix of its name, and its contents."""

    suffix: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Draft:
    """A new job.

    request  the arguments of the pipeline in JSON types; a random seed is already replaced by a number
    asked    the fields as the client gave them
    """

    owner: str
    model: str
    request: Mapping[str, Any]
    asked: Mapping[str, Any]
    uploads: Mapping[str, Upload]
    idempotency: str | None = None
    remixed: str | None = None

    def fingerprint(self) -> str:
        """A digest of the request: equal requests have equal digests."""
        asked = json.dumps([self.model, dict(self.asked), self.remixed], sort_keys=True)
        found = hashlib.sha256(asked.encode())
        for name, upload in sorted(self.uploads.items()):
            found.update(f"{name}:{upload.suffix}:{len(upload.data)}:".encode() + upload.data)
        return found.hexdigest()


@dataclass(frozen=True)
class Job:
    """A row of the queue. Times are seconds since 1970."""

    number: int
    id: str
    owner: str
    model: str
    status: str
    request: Mapping[str, Any]
    created: float
    started: float | None
    finished: float | None
    expires: float | None
    attempts: int
    error_code: str | None
    error_message: str | None
    remixed: str | None
    idempotency: str | None
    fingerprint: str
    metadata: Mapping[str, Any] | None
    bytes: int
    expired: bool


class Store:
    """The queue in a file. Any thread may use it."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises ServeError if it is corrupt, has another version, or cannot be written."""
        self._path = path
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
            self._db.row_factory = sqlite3.Row
            self._open()
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from error

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version == 0 and tables == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        elif version != VERSION:
            self._db.close()
            raise ServeError(f"{self._path}: a queue of version {version}; this higen reads version {VERSION}")
        elif (said := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(said)

    def _unusable(self, error: sqlite3.DatabaseError) -> ServeError:
        """The error for a queue that cannot be opened. A corrupt file is copied, not changed."""
        with suppress(AttributeError, sqlite3.Error):
            self._db.close()
        words = " ".join(str(error).split())
        if is_full(error) or any(said in words for said in ("unable to open", "readonly", "disk I/O", "locked")):
            return ServeError(f"{self._path}: cannot be used: {words}")
        data = self._path.read_bytes()
        kept = self._path.with_name(f"{self._path.name}.corrupt-{hashlib.sha256(data).hexdigest()[:12]}")
        if not kept.exists():
            shutil.copy2(self._path, kept)
            if (wal := Path(f"{self._path}-wal")).exists():
                shutil.copy2(wal, f"{kept}-wal")
        return ServeError(
            f"{self._path}: the queue is corrupt ({words}). A copy is {kept.name}. Repair the file with "
            "`sqlite3 FILE .recover`, or move it away to begin with an empty queue"
        )

    def close(self) -> None:
        """Close the database; SQLite then writes the WAL into the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[Job]:
        with self._lock:
            return [_job(row) for row in self._db.execute(query, values).fetchall()]

    # Requests.

    def create(self, draft: Draft, most: int, now: float | None = None) -> tuple[Job, bool]:
        """Accept a job. Returns the job and whether it is new: an Idempotency-Key used before gives the same job.

        Raises Refusal if the key was used for another request, or if the owner has `most` waiting and running jobs.
        """
        now = time.time() if now is None else now
        fingerprint = draft.fingerprint()
        with self._change() as db:
            if draft.idempotency is not None:
                before = self._rows(
                    "SELECT * FROM jobs WHERE owner = ? AND idempotency = ?", draft.owner, draft.idempotency
                )
                if before and before[0].fingerprint == fingerprint:
                    return before[0], False
                if before:
                    raise Refusal(409, "idempotency_conflict", "this Idempotency-Key was used for another request")
            query = "SELECT count(*) FROM jobs WHERE owner = ? AND status IN ('queued', 'in_progress')"
            waiting = db.execute(query, (draft.owner,)).fetchone()[0]
            if waiting >= most:
                raise Refusal(429, "queue_full", f"{waiting} of your jobs wait or run: at most {most}", retry=10)
            name = f"video_{secrets.token_hex(16)}"
            db.execute(
                "INSERT INTO jobs (id, owner, model, status, request, created, remixed, idempotency, fingerprint,"
                " bytes) VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?)",
                (
                    name,
                    draft.owner,
                    draft.model,
                    json.dumps(dict(draft.request)),
                    now,
                    draft.remixed,
                    draft.idempotency,
                    fingerprint,
                    sum(len(upload.data) for upload in draft.uploads.values()),
                ),
            )
            for key, upload in draft.uploads.items():
                db.execute("INSERT INTO inputs VALUES (?, ?, ?, ?)", (name, key, upload.suffix, upload.data))
            return self._rows("SELECT * FROM jobs WHERE id = ?", name)[0], True

    def get(self, name: str, owner: str | None = None) -> Job | None:
        """A job; None if it does not exist or belongs to another owner."""
        found = self._rows("SELECT * FROM jobs WHERE id = ?", name)
        return found[0] if found and owner in (None, found[0].owner) else None

    def page(self, owner: str, after: int | None, count: int, ascending: bool) -> list[Job]:
        """An owner's jobs in order of creation or in reverse order, from the job after number `after`."""
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        start = after if after is not None else (0 if ascending else 2**62)
        return self._rows(
            f"SELECT * FROM jobs WHERE owner = ? AND number {sign} ? ORDER BY number {order} LIMIT ?",
            owner,
            start,
            count,
        )

    def uploads(self, name: str) -> dict[str, Upload]:
        """The files of a job's request."""
        with self._lock:
            rows = self._db.execute("SELECT name, suffix, data FROM inputs WHERE job = ?", (name,)).fetchall()
        return {row["name"]: Upload(row["suffix"], bytes(row["data"])) for row in rows}

    def files(self, name: str) -> list[str]:
        """Names of a job's controls that have a file."""
        with self._lock:
            rows = self._db.execute("SELECT name FROM inputs WHERE job = ? ORDER BY name", (name,)).fetchall()
        return [row["name"] for row in rows]

    def cancel(self, name: str, age: float) -> bool:
        """Cancel a job. Returns whether it was waiting or running."""
        return self._finish(name, "cancelled", ("queued", "in_progress"), age, "cancelled", "the job was cancelled")

    def delete(self, name: str) -> None:
        """Delete a job's row."""
        with self._change() as db:
            db.execute("DELETE FROM jobs WHERE id = ?", (name,))

    # The worker.

    def recover(self, age: float) -> None:
        """At the start, queue the jobs that ran when the process ended. Fail those with which it died too often."""
        message = f"the server ended {ATTEMPTS} times while it ran this job"
        for job in self._rows("SELECT * FROM jobs WHERE status = 'in_progress'"):
            if job.attempts >= ATTEMPTS:
                self._finish(job.id, "failed", ("in_progress",), age, "server_died", message)
            else:
                self.requeue(job.id, counts=True)

    def queued(self, count: int) -> list[Job]:
        """The waiting jobs, the oldest first."""
        return self._rows("SELECT * FROM jobs WHERE status = 'queued' ORDER BY number LIMIT ?", count)

    def start(self, name: str) -> bool:
        """Change a job from waiting to running. Returns False if it was not waiting."""
        query = "UPDATE jobs SET status = 'in_progress', started = ?, attempts = attempts + 1"
        with self._change() as db:
            done = db.execute(f"{query} WHERE id = ? AND status = 'queued'", (time.time(), name))
            return done.rowcount == 1

    def requeue(self, name: str, counts: bool = False) -> None:
        """Change a job from running to waiting. `counts`: this start counts as an attempt."""
        query = "UPDATE jobs SET status = 'queued', started = NULL, attempts = attempts - ?"
        with self._change() as db:
            db.execute(f"{query} WHERE id = ? AND status = 'in_progress'", (0 if counts else 1, name))

    def complete(self, name: str, metadata: Mapping[str, Any], size: int, age: float) -> bool:
        """Record that a running job has its result. Returns False if it was cancelled or deleted meanwhile."""
        return self._finish(name, "completed", ("in_progress",), age, None, None, json.dumps(dict(metadata)), size)

    def fail(self, name: str, code: str, message: str, age: float) -> bool:
        """Record that a running job has failed. Returns False if it was not running."""
        return self._finish(name, "failed", ("in_progress",), age, code, message)

    def _finish(
        self,
        name: str,
        status: str,
        before: Sequence[str],
        age: float,
        code: str | None,
        message: str | None,
        metadata: str | None = None,
        size: int = 0,
    ) -> bool:
        now = time.time()
        states = ", ".join(f"'{state}'" for state in before)
        with self._change() as db:
            done = db.execute(
                "UPDATE jobs SET status = ?, finished = ?, expires = ?, error_code = ?, error_message = ?,"
                f" metadata = ?, bytes = bytes + ? WHERE id = ? AND status IN ({states})",
                (status, now, now + age, code, message, metadata, size, name),
            )
            return done.rowcount == 1

    # Cleaning the folder.

    def grow(self, name: str, size: int) -> None:
        """Add to the bytes that a result takes."""
        with self._change() as db:
            db.execute("UPDATE jobs SET bytes = bytes + ? WHERE id = ? AND expired = 0", (size, name))

    def expire(self, name: str) -> None:
        """Mark a finished job as expired and delete its uploads. Its row is kept to show this."""
        with self._change() as db:
            db.execute("DELETE FROM inputs WHERE job = ?", (name,))
            query = "UPDATE jobs SET expired = 1, bytes = 0, expires = min(expires, ?) WHERE id = ?"
            db.execute(query, (time.time(), name))

    def outdated(self, age: float) -> list[Job]:
        """Finished jobs past their time, the oldest first. Also deletes rows that expired more than `age` ago."""
        now = time.time()
        with self._change() as db:
            db.execute("DELETE FROM jobs WHERE expired = 1 AND expires < ?", (now - age,))
        return self._rows("SELECT * FROM jobs WHERE expired = 0 AND expires < ? ORDER BY finished", now)

    def finished(self, count: int = 100) -> list[Job]:
        """Finished jobs that are not expired, the oldest first."""
        states = ", ".join(f"'{state}'" for state in DONE)
        query = f"SELECT * FROM jobs WHERE status IN ({states}) AND expired = 0 ORDER BY finished LIMIT ?"
        return self._rows(query, count)

    def completed_ids(self) -> set[str]:
        """Ids of the jobs with a result in the folder."""
        with self._lock:
            rows = self._db.execute("SELECT id FROM jobs WHERE status = 'completed' AND expired = 0").fetchall()
        return {row["id"] for row in rows}

    def used(self) -> int:
        """Bytes of all results and uploads."""
        with self._lock:
            return int(self._db.execute("SELECT coalesce(sum(bytes), 0) FROM jobs").fetchone()[0])

    def counts(self) -> dict[str, int]:
        """Number of jobs in each state."""
        with self._lock:
            rows = self._db.execute("SELECT status, count(*) AS n FROM jobs GROUP BY status").fetchall()
        return dict.fromkeys(("queued", "in_progress", *DONE), 0) | {row["status"]: row["n"] for row in rows}


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    values["request"] = json.loads(values["request"])
    values["metadata"] = None if values["metadata"] is None else json.loads(values["metadata"])
    values["expired"] = bool(values["expired"])
    return Job(**values)
