"""`higen batch` in one process: the same videos as a pipeline's calls, kills and reruns, failing rows, wrong input."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from PIL import Image

import higen
from higen.api import default_model
from higen.bulk import maker, places
from higen.bulk.index import Journal
from higen.bulk.maker import Maker
from higen.bulk.places import open_place
from higen.bulk.rows import model_digest, read_rows
from higen.bulk.run import Settings, run
from higen.bundle import Bundle
from higen.cli import main
from higen.errors import BackendError, HigenError, OutputError, RequestError
from higen.pipeline import Pipeline
from higen.video import Video

pyarrow = pytest.importorskip("pyarrow", reason="higen[batch] is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

SMALL = {"frames": 2, "steps": 1, "width": 64, "height": 64}
"""Options of the cheapest request."""


def lines(folder: Path, *rows: dict[str, Any], **common: Any) -> Path:
    """A file of requests."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({**SMALL, **common, **row}) + "\n" for row in rows), encoding="utf-8")
    return path


def index(output: Path) -> list[dict[str, Any]]:
    """The rows of the index."""
    return list(parquet.read_table(output / "index.parquet").to_pylist())


def videos(output: Path) -> dict[str, tuple[int, int]]:
    """The inode and time of every video. They change if the video is written again."""
    found = (output / "videos").glob("*/*.npy")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def made(path: Path, output: Path | str, **options: Any) -> Any:
    return run(path, Settings(str(output), **{"format": "npy", "threads": 1, **options}))


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with higen.load(threads=1) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _loaded_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process share the model. The process that gets killed loads its own."""

    def load(*_: Any, **__: Any) -> Pipeline:
        twin = copy.copy(pipe)
        monkeypatch.setattr(twin, "close", lambda: None, raising=False)
        return twin

    monkeypatch.setattr(maker, "load", load)


def test_every_row_is_the_video_that_a_call_makes(tmp_path: Path, pipe: Pipeline) -> None:
    PIL.Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    rows = [
        {"prompt": "a whale", "seed": 3, "motion": 300},
        {"prompt": "a star", "steps": [2, 1], "guidance": [2, 1], "appearance": 0.9, "negative_prompt": "a whale"},
        {"prompt": "a whale", "seed": 3, "motion": 300.0, "fps": 8},  # the first request, written differently
        {"prompt": "a whale", "seed": 2**64 - 1, "width": 96, "frames": 3, "motion": [1, 2, 3]},
        {"prompt": "a red heart beating", "image": "red.png"},
    ]
    done = made(lines(tmp_path, *rows), tmp_path / "out")
    assert (done.rows, done.made, done.kept, done.failed) == (4, 4, 0, 0)
    found = index(tmp_path / "out")
    assert [row["lines"] for row in found] == [[1, 3], [2], [4], [5]]
    assert [row["seed"] for row in found] == [3, 0, 2**64 - 1, 0]
    for row, given in zip(found, [rows[0], rows[1], rows[3], rows[4]], strict=True):
        options = {**SMALL, **given} | ({"image": str(tmp_path / "red.png")} if "image" in given else {})
        expected = pipe(**options, progress=False)
        assert np.array_equal(np.load(tmp_path / "out" / row["path"]), expected.frames)
        told = json.loads(row["metadata"])
        assert {**told, "seconds": 0} == {**expected.metadata, "seconds": 0} | {
            "frames": len(expected), "width": expected.width, "height": expected.height, "fps": expected.fps
        }  # fmt: skip
        assert row["error"] is None
        assert row["attempts"] == 1
        assert row["seconds"] > 0
        assert row["file_bytes"] == (tmp_path / "out" / row["path"]).stat().st_size
    assert list((tmp_path / "out" / "journal").iterdir()) == []


def test_a_run_continues_where_it_was_killed(tmp_path: Path) -> None:
    path = lines(tmp_path, *({"prompt": "a whale", "seed": seed} for seed in range(30)))
    output = tmp_path / "out"
    command = [sys.executable, "-m", "higen", "batch", str(path), str(output), "--format", "npy", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    try:
        while len(videos(output)) < 3:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    before = videos(output)
    journal = Journal(open_place(str(output)))
    recorded = {f"{key}.npy" for key in journal.keys()}  # noqa: SIM118 # a method of ours
    assert len(before) - len(recorded) in (0, 1)
    done = made(path, output)
    after = videos(output)
    assert (done.made, done.kept, done.failed) == (30 - len(recorded), len(recorded), 0)
    assert {name: after[name] for name in recorded} == {name: before[name] for name in recorded}
    found = index(output)
    assert {row["key"] + ".npy" for row in found} == set(after)
    assert [row["lines"] for row in found] == [[line] for line in range(1, 31)]
    assert [row["attempts"] for row in found].count(1) >= 29
    # A rerun makes only the lost video again.
    lost = output / found[4]["path"]
    lost.unlink()
    again = made(path, output)
    assert (again.made, again.kept) == (1, 29)
    assert lost.exists()


def test_a_random_seed_is_drawn_once(tmp_path: Path) -> None:
    bundle = Bundle.open(default_model())
    path = lines(tmp_path, {"seed": -1}, {"seed": "random"}, {"seed": -1, "motion": 1}, {"seed": 5}, prompt="a whale")
    rows = read_rows(path, bundle, ".mp4")
    assert len({row.key for row in rows}) == 4
    assert rows == read_rows(path, bundle, ".mp4")
    assert all(0 <= json.loads(row.text)["seed"] < 2**32 for row in rows)
    assert {row.key for row in rows}.isdisjoint({row.key for row in read_rows(path, bundle, ".gif")})


def test_known_frames_masks_and_settings_are_part_of_a_row(tmp_path: Path) -> None:
    Image.new("RGB", (128, 128), "red").save(tmp_path / "a.png")
    Image.new("L", (128, 128), 255).save(tmp_path / "m.png")
    bundle = Bundle.open(default_model())
    known = {"keyframes": {"0": "a.png"}}
    rows = [{}, {"windows": [2, 1]}, known, {"keyframes": {"-1": "a.png"}}, {**known, "mask": "m.png"}]
    path = lines(tmp_path, *rows, prompt="a whale", frames=4)
    listed = read_rows(path, bundle, ".mp4")
    assert len({row.key for row in listed}) == 5
    given = json.loads(listed[-1].text)
    assert given["keyframes"] == {"0": str(tmp_path / "a.png")}
    assert given["mask"] == str(tmp_path / "m.png")
    table = tmp_path / "rows.csv"
    table.write_text('prompt,keyframes,mask\na whale,"{""0"": ""a.png""}",m.png\n', encoding="utf-8")
    (cells,) = read_rows(table, bundle, ".mp4")
    assert all(json.loads(cells.text)[name] == given[name] for name in ("keyframes", "mask"))
    with pytest.raises(RequestError, match=r"line 1: keyframes\[0\]=5: the path of a file"):
        read_rows(lines(tmp_path, {"keyframes": {"0": 5}}, prompt="a"), bundle, ".mp4")


def test_csv_says_the_same_as_json(tmp_path: Path) -> None:
    bundle = Bundle.open(default_model())
    rows = [
        {"prompt": 'a "blue", whale', "seed": 7, "steps": [2, 3], "guidance": 2.5, "motion": 300},
        {"prompt": "a star\nand a heart", "motion": [100, 200.5], "frames": 2},
        {"prompt": "5", "motion": "unspecified"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    table = tmp_path / "rows.csv"
    table.write_text(
        '\ufeffprompt,seed,steps,guidance,motion,frames\r\n"a ""blue"", whale",7,"2,3",2.5,300,\r\n'
        '"a star\nand a heart",,,,"[100, 200.5]",2\r\n5,,,,unspecified,\r\n',
        encoding="utf-8",
    )
    listed, cells = read_rows(path, bundle, ".mp4"), read_rows(table, bundle, ".mp4")
    assert [row.key for row in listed] == [row.key for row in cells]
    assert [row.lines for row in listed] == [(1,), (3,), (5,)]
    assert [row.lines for row in cells] == [(2,), (3,), (5,)]


def test_a_row_that_fails_is_tried_again_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []
    make = Pipeline.make

    def failing(self: Pipeline, request: Any, progress: bool | None = None) -> list[Video]:
        tries.append(request.seeds[0])
        if request.seeds[0] == 1 or (request.seeds[0] == 2 and tries.count(2) < 2):
            raise BackendError("the card fell off")
        return make(self, request, progress)

    monkeypatch.setattr(Pipeline, "make", failing)
    path = lines(tmp_path, {"seed": 0}, {"seed": 1}, {"seed": 2}, prompt="a whale")
    result = CliRunner().invoke(main, ["batch", str(path), str(tmp_path / "out"), "--retries", "1", "--json"])
    assert result.exit_code == 1
    assert {**json.loads(result.stdout), "seconds": 0} == {
        "index": str(tmp_path / "out" / "index.parquet"), "rows": 3, "made": 2, "kept": 0, "failed": 1, "seconds": 0
    }  # fmt: skip
    assert tries == [0, 1, 1, 2, 2]
    found = index(tmp_path / "out")
    assert [row["attempts"] for row in found] == [1, 2, 2]
    assert found[1]["error"] == "BackendError: the card fell off"
    assert (found[1]["path"], found[1]["seed"]) == (None, None)
    monkeypatch.setattr(Pipeline, "make", make)
    again = made(path, tmp_path / "out", format="mp4")
    assert (again.made, again.kept, again.failed) == (1, 2, 0)
    assert [row["error"] for row in index(tmp_path / "out")] == [None] * 3


def test_a_kill_between_record_and_mark_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "leave", lambda self, key: None)
    path = lines(tmp_path, {"seed": 0}, {"seed": 1}, prompt="a whale")
    assert made(path, tmp_path / "out").made == 2
    assert list((tmp_path / "out" / "journal").iterdir()) == []


def test_a_row_that_ends_its_process_is_given_up(tmp_path: Path) -> None:
    path = lines(tmp_path, {"seed": 0}, {"seed": 1}, prompt="a whale")
    rows = read_rows(path, Bundle.open(default_model()), ".npy")
    journal = Journal(open_place(str(tmp_path / "out")))
    assert [journal.begin(rows[0].key) for _ in range(3)] == [0, 1, 2]  # three attempts without an end
    assert journal.begin(rows[1].key) == 0
    for slots in (1, 2):
        done = made(path, tmp_path / "out", slots=slots)
        if slots == 1:
            assert (done.made, done.failed) == (1, 1)
            failed, good = index(tmp_path / "out")
            assert "the process ended 3 times while it made this row" in failed["error"]
            assert good["attempts"] == 2
        else:
            assert (done.made, done.kept, done.failed) == (1, 1, 0)  # the next run tries it again


def test_rows_in_common_batches_are_the_same_videos(tmp_path: Path) -> None:
    path = lines(tmp_path, *({"prompt": "a whale", "seed": seed, "steps": 1 + seed % 2} for seed in range(5)))
    assert made(path, tmp_path / "alone").made == made(path, tmp_path / "together", slots=3).made == 5
    for one, other in zip(index(tmp_path / "alone"), index(tmp_path / "together"), strict=True):
        a, b = (np.load(tmp_path / f / row["path"]).astype(int) for f, row in (("alone", one), ("together", other)))
        assert np.abs(a - b).max() <= 1


def test_too_many_failures_and_a_full_disk_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path, *({"prompt": "a whale", "seed": seed} for seed in range(6)))
    save = Video.save

    def failing(self: Video, to: Path) -> Path:
        if self.metadata["seed"] > 1:
            raise OutputError("no room") from OSError(errno.ENOSPC, "No space left on device")
        return save(self, to)

    monkeypatch.setattr(Video, "save", failing)
    with pytest.raises(OutputError, match="cannot be written: no room"):
        made(path, tmp_path / "out")
    assert [row["error"] for row in index(tmp_path / "out")] == [None, None]
    assert list((tmp_path / "out" / "journal").iterdir()) == []
    monkeypatch.setattr(Video, "save", lambda self, to: 1 / 0)
    with pytest.raises(BackendError, match="3 rows failed one after the other, the last with ZeroDivisionError"):
        made(path, tmp_path / "out", retries=0, failures=3)
    assert [row["error"] is None for row in index(tmp_path / "out")] == [True, True, False, False, False]


@pytest.mark.parametrize("whole", [True, False])
def test_a_url_takes_the_videos_and_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    fsspec = pytest.importorskip("fsspec")
    if not whole:
        monkeypatch.setattr(places, "WHOLE", frozenset())
    url = f"memory://bulk-{whole}/out"
    path = lines(tmp_path, {"seed": 0}, {"seed": 1}, prompt="a whale")
    assert made(path, url).made == 2
    assert (made(path, url).kept, made(path, url).made) == (2, 0)
    files = fsspec.filesystem("memory")
    names = sorted(files.find(f"/bulk-{whole}/out"))
    assert [name.rpartition(".")[2] for name in names if "/videos/" in name] == ["npy", "npy"]
    assert {name.rpartition("/")[2] for name in names if "/videos/" not in name} == {"index.parquet", "run"}
    with files.open(f"/bulk-{whole}/out/index.parquet") as file:
        found = parquet.read_table(file).to_pylist()
    for row in found:
        with files.open(f"/bulk-{whole}/out/{row['path']}") as file:
            assert np.load(file).shape == (2, 64, 64, 3)


WRONG: dict[str, tuple[str, str]] = {
    "json": ('{"prompt": "a whale"}\n{"prompt": ', "rows.jsonl: 1 of 2 rows are wrong: line 2: not JSON"),
    "list": ("[1]", "line 1: [1]: a JSON object"),
    "prompts": ('{"prompt": ["a whale"]}', "line 1: prompt=['a whale']: a string; a row is one request"),
    "empty": ('{"seed": 1}', "line 1: prompt='': a prompt with at least one word"),
    "unknown": ('\n{"prompt": "a", "speed": 1}', "line 2: speed: unknown; a request takes prompt, negative_prompt"),
    "twice": ('{"prompt": "a", "prompt": "b"}', "line 1: the key 'prompt' appears twice"),
    "value": ('{"prompt": "a", "steps": 0}', "line 1: steps=0: a whole number from 1"),
    "seed": ('{"prompt": "a", "seed": true}', "line 1: seed=True: a whole number"),
    "picture": ('{"prompt": "a", "image": "none.png"}', "none.png'"),
    "pictures": ('{"prompt": "a", "image": ["a.png"]}', "line 1: image=['a.png']: the path of a file"),
    "many": ("1\n" * 9, "9 of 9 rows are wrong: line 1: 1: a JSON object; line 2"),
    "nothing": ("\n\n", "has no rows"),
    "bytes": ("\x00", "the character U+0000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_named_before_work_starts(tmp_path: Path, case: str) -> None:
    text, message = WRONG[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError) as caught:
        made(path, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,speed\na,1\n", "line 1: the column 'speed' is unknown"),
        ("prompt,prompt\na,b\n", "line 1: the column 'prompt' appears twice"),
        ('prompt\n"a\n', "line 2: not CSV"),
        ("prompt,seed\na,1\na,1,2\n", "1 of 2 rows are wrong: line 3: 3 cells for 2 columns"),
        ("prompt,seed\na,x\n", "line 2: seed='x': a whole number"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError) as caught:
        made(path, tmp_path / "out")
    assert message in str(caught.value)


def _foreign(output: Path) -> None:
    parquet.write_table(pyarrow.table({"a": [1]}), output / "index.parquet")


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "foreign index": (_foreign, "was not written by an earlier run: move it away"),
    "broken index": (lambda output: (output / "index.parquet").write_bytes(b"PAR1"), "cannot be read: move it away"),
    "file": (lambda output: (output.rmdir(), output.write_text("mine")), "does not take this name: File exists"),
}


@pytest.mark.parametrize("case", PLACES)
def test_foreign_files_are_named_and_kept(tmp_path: Path, case: str) -> None:
    damage, message = PLACES[case]
    output = tmp_path / "out"
    output.mkdir()
    damage(output)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError) as caught:
        made(lines(tmp_path, {"prompt": "a whale"}), output)
    assert message in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    path = lines(tmp_path, {"prompt": "a whale", "fps": 60})
    with pytest.raises(RequestError, match="format='png': one of mp4, webm"):
        made(path, tmp_path / "out", format="png")
    with pytest.raises(RequestError, match=r"line 1: fps=60: a \.gif file plays"):
        made(path, tmp_path / "out", format="gif")
    with pytest.raises(RequestError, match="retries=-1: a whole number from 0 to 100"):
        made(path, tmp_path / "out", retries=-1)
    with pytest.raises(RequestError, match=r"none\.jsonl: cannot be read: No such file"):
        made(tmp_path / "none.jsonl", tmp_path / "out")
    with pytest.raises(OutputError, match="output='nowhere://x'"):
        made(path, "nowhere://x")
    with open_place(str(tmp_path)).held(), pytest.raises(OutputError, match="another run of `higen batch` works"):
        made(path, tmp_path)
    done = CliRunner().invoke(main, ["batch", str(path), str(tmp_path / "out"), "--gpus", "0.5"])
    assert done.exit_code == 2
    assert "need --ray ADDRESS" in done.stderr


def test_a_worker_sees_that_it_writes_elsewhere_or_runs_another_model(tmp_path: Path) -> None:
    place = open_place(str(tmp_path))
    digest = model_digest(Bundle.open(default_model()))
    with place.held() as token:
        order = Settings(str(tmp_path)).order(token, digest)
        Maker(order).close()
        with pytest.raises(HigenError, match="is not the model that the run started with"):
            Maker(Settings(str(tmp_path)).order(token, "0"))
    with place.held(), pytest.raises(OutputError, match="a different place for this worker"):
        Maker(order)
