"""The start of a server: next to another server, with a used port, a corrupt queue, a full disk, and after kill -9."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from higen.cli import main as higen

pytest.importorskip("fastapi", reason="higen[serve] is not installed")

from serve_campaign import Campaign
from serve_process import Server


def failed(folder: Path, *options: str) -> str:
    """The one line that a server prints if it cannot start."""
    done = CliRunner().invoke(higen, ["serve", "--port", "0", "--data", str(folder), *options])
    assert done.exit_code in (1, 2), done.output
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_what_cannot_be_started_is_one_line(tmp_path: Path) -> None:
    server = Server(tmp_path / "data")
    try:
        assert "another server works in this folder" in failed(tmp_path / "data")
        assert "is taken by another program" in failed(tmp_path / "b", "--port", server.url.rpartition(":")[2])
    finally:
        assert server.stop() == 0
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "cannot be used" in failed(tmp_path / "file" / "data")
    assert "higen.json" in failed(tmp_path / "c", str(tmp_path))
    assert "memory=1000" in failed(tmp_path / "c", "--memory", "1KB")
    assert "quota='much'" in failed(tmp_path / "c", "--quota", "much")
    assert "cannot be read" in failed(tmp_path / "c", "--api-keys", str(tmp_path / "none"))
    (tmp_path / "keys").write_text("name sha256:zz\n", encoding="utf-8")
    assert "line 1" in failed(tmp_path / "c", "--api-keys", str(tmp_path / "keys"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be used" in failed(tmp_path / "data")


@pytest.mark.parametrize("damage", ["header", "page"])
def test_a_corrupt_queue_is_copied_and_not_changed(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "data"
    server = Server(folder)
    for number in range(20):
        server.create("a whale", seed=number, num_frames=64, num_inference_steps=200)
    server.kill()
    file = folder / "jobs.sqlite"
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    data = bytearray(file.read_bytes())
    start = 0 if damage == "header" else 4096
    data[start : start + 2048] = b"\xa5" * 2048
    file.write_bytes(data)
    for _ in range(2):
        assert "the queue is corrupt" in failed(folder)
        assert file.read_bytes() == data
        copies = [path for path in folder.iterdir() if ".corrupt-" in path.name]
        assert [path.read_bytes() for path in copies] == [data]


def test_a_queue_of_a_newer_version_is_not_changed(tmp_path: Path) -> None:
    tmp_path.joinpath("data").mkdir()
    with sqlite3.connect(tmp_path / "data" / "jobs.sqlite") as db:
        db.execute("CREATE TABLE jobs (x)")
        db.execute("PRAGMA user_version = 9")
    db.close()
    assert "version 9" in failed(tmp_path / "data")


def test_jobs_survive_a_restart_of_the_process(tmp_path: Path) -> None:
    """After kill -9, finished jobs are still there, unfinished jobs run again, waiting jobs run, and files that the
    server did not write stay.
    """
    folder = tmp_path / "data"
    server = Server(folder, "--slots", "1")
    done = server.create("a heart")
    assert server.wait(done)["status"] == "completed"
    content = server.call("GET", f"/v1/videos/{done}/content")[1]
    running = server.create("a whale", num_frames=16, num_inference_steps=60)
    waiting = [server.create("a whale", seed=number) for number in range(3)]
    while server.call("GET", f"/v1/videos/{running}")[1]["progress"] < 3:
        time.sleep(0.01)
    server.kill()
    (folder / "results" / "mine").mkdir()
    (folder / "parts" / "video_of_mine").write_text("x", encoding="utf-8")
    stray = folder / "results" / ("video_" + "0" * 32)
    shutil.copytree(folder / "results" / done, stray)
    server = Server(folder, "--slots", "1")
    try:
        assert not stray.exists()
        assert (folder / "results" / "mine").is_dir()
        assert (folder / "parts" / "video_of_mine").is_file()
        assert server.call("GET", f"/v1/videos/{done}/content")[1] == content
        for name in (running, *waiting):
            assert server.wait(name)["status"] == "completed"
        second = server.create("a whale", num_frames=16, num_inference_steps=100)
        while server.call("GET", f"/v1/videos/{second}")[1]["progress"] < 3:
            time.sleep(0.01)
    finally:
        assert server.stop() == 0  # the server ends at once; its running jobs run again at the next start
    server = Server(folder, "--slots", "1")
    try:
        assert server.call("GET", f"/v1/videos/{second}")[1]["status"] in ("queued", "in_progress")
        assert server.call("DELETE", f"/v1/videos/{second}")[0] == 200
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text(encoding="utf-8")


def test_quota_and_age(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", "--quota", "100KB")
    try:
        names = []
        for seed in range(6):
            names.append(server.create("a whale", seed=seed))
            assert server.wait(names[-1])["status"] == "completed"
        gone = [server.call("GET", f"/v1/videos/{name}/content")[0] for name in names]
        assert gone[-1] == 200
        assert gone[0] == 410
        status, answer = server.call("GET", f"/v1/videos/{names[0]}/content?format=gif")
        assert (status, answer["error"]["code"]) == (410, "video_expired")
        assert not (tmp_path / "data" / "results" / names[0]).exists()
    finally:
        assert server.stop() == 0
    server = Server(tmp_path / "data", "--max-age", "1s")
    try:
        name = server.create("a whale")
        server.wait(name)
        time.sleep(1.1)
        server.wait(server.create("a heart"))  # after each finished job the server looks for old results
        status: Any = server.call("GET", f"/v1/videos/{name}/content")[0]
        assert status in (404, 410)
    finally:
        assert server.stop() == 0


def test_a_full_disk_fails_the_job_and_not_the_server(tmp_path: Path) -> None:
    """No file may grow beyond 300 kB, so a short video can be written and a long one cannot."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        server = Server(tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    try:
        large = server.wait(server.create("a whale", num_frames=32, size="128x128"))
        assert (large["status"], large["error"]["code"]) == ("failed", "storage_full")
        assert server.wait(server.create("a whale"))["status"] == "completed"
        assert list((tmp_path / "data" / "parts").iterdir()) == []
    finally:
        assert server.stop() == 0


def test_kills_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    """A short sample of tests/serve_campaign.py."""
    found = Campaign(tmp_path / "data", seed=1).run(kills=2, clients=2, between=(0.3, 1.0))
    assert found.accepted > 2
    assert (found.lost, found.doubled, found.unfinished, found.errors) == (0, 0, 0, [])
