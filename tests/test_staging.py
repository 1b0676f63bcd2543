"""Files appear whole or not at all. Only the leftovers of killed writers are removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from higen import commit
from higen import staging as staging_module
from higen.staging import exclusive, others, settle, staging, sweep, whole_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}


START = """
import os, signal, sys
from pathlib import Path
from higen import commit, staging
folder = Path(sys.argv[1])
"""


def killed(code: str, folder: Path) -> None:
    """Run Python code, with the variable `folder`, in a process that kills itself with SIGKILL."""
    done = subprocess.run(
        [sys.executable, "-c", START + code, str(folder)], check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


DIE = "os.kill(os.getpid(), signal.SIGKILL)\n"
LEAVE = f"""
place = staging.Staging(folder)
(place.folder / 'half').write_text('x')
place.beside('graph').write_text('x')
{DIE}"""


def test_files_of_a_killed_writer_are_removed_by_the_next(tmp_path: Path) -> None:
    killed(LEAVE, tmp_path)
    assert len(names(tmp_path)) == 2
    with whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {"a.txt": "new"}


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Names similar to higen's, a folder with higen's exact name but other contents, a nonempty lock file, links."""
    with staging(tmp_path) as place:
        own = place.root.name
    for foreign in (own, ".higen-notes", ".higen-0123456789ab01234567", f"{own}x"):
        (tmp_path / foreign).mkdir()
        (tmp_path / foreign / "thesis").write_text("years of work")
    (tmp_path / own / "note").write_text("of somebody else")
    (tmp_path / ".higen-lock").write_text("a key")
    (tmp_path / ".higen-list.txt").write_text("a list")
    (tmp_path / "elsewhere").mkdir()
    killed(LEAVE, tmp_path / "elsewhere")
    (left,) = [path for path in (tmp_path / "elsewhere").iterdir() if path.is_dir()]
    (tmp_path / left.name).symlink_to(left)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    sweep(tmp_path)
    with exclusive(tmp_path):
        pass
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_files_of_a_running_writer_stay(tmp_path: Path) -> None:
    with staging(tmp_path) as first:
        (first.folder / "half").write_text("x")
        aside = first.beside("graph")
        aside.write_text("x")
        assert not others(first)
        with staging(tmp_path) as second:
            assert (first.folder / "half").exists()
            assert aside.exists()
            assert others(first)
            assert others(second)
    assert names(tmp_path) == []


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("old")

    def write() -> None:
        with whole_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_folder_that_is_swept_as_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the owner locks a new folder, another process may mistake it for the folder of a killed writer."""
    real, times = Path.mkdir, []

    def mkdir(self: Path, *arguments: object, **options: object) -> None:
        real(self, *arguments, **options)  # type: ignore[arg-type]
        times.append(self)
        if len(times) == 1:
            sweep(tmp_path)
            assert not self.exists()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with staging(tmp_path) as place:
        assert place.root != times[0]


# Several files


def prepared(folder: Path) -> None:
    for name in "abcd":
        (folder / name).write_text("old")


CHANGE = """
with staging.staging(folder) as place:
    for name in 'abc':
        (place.folder / name).write_text('new')
    with staging.exclusive(folder):
        place.commit([(place.folder / name, folder / name) for name in 'abc'], [folder / 'd'])
"""
KILL_AT = """
count = 0
def hook(event, arguments):
    global count
    if event in ('os.rename', 'os.remove'):
        count += 1
        if count == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""
OLD, NEW = dict.fromkeys("abcd", "old"), dict.fromkeys("abc", "new")


@pytest.mark.parametrize("at", range(1, 7))  # the renames: journal, three new files, removed file, journal
@pytest.mark.parametrize("finish", [settle, sweep], ids=["reader", "writer"])
def test_a_change_of_several_files_is_made_whole_or_not_at_all(
    tmp_path: Path, at: int, finish: Callable[[Path], None]
) -> None:
    prepared(tmp_path)
    killed(KILL_AT.format(at=at) + CHANGE, tmp_path)
    finish(tmp_path)
    found = {name: text for name, text in contents(tmp_path).items() if not name.startswith(".")}
    assert found == (OLD if at == 1 else NEW)
    sweep(tmp_path)
    assert names(tmp_path) == sorted(found)


def test_a_file_that_somebody_changed_after_the_kill_stays(tmp_path: Path) -> None:
    prepared(tmp_path)
    killed(KILL_AT.format(at=3) + CHANGE, tmp_path)  # `a` is new
    (tmp_path / "c").write_text("a later work")
    (tmp_path / "d").write_text("a later work")
    settle(tmp_path)
    sweep(tmp_path)
    assert contents(tmp_path) == {"a": "new", "b": "new", "c": "a later work", "d": "a later work"}


def test_a_journal_changes_no_file_outside_its_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("old")
    killed(LEAVE, inside)
    (root,) = [path for path in inside.iterdir() if path.is_dir()]
    (root / "journal").write_text('{"moves": [["x", "../secret", null, null]], "removals": [["../secret", null]]}')
    sweep(inside)
    assert names(inside) == []
    assert (tmp_path / "secret").read_text() == "old"


@pytest.mark.parametrize("at", range(1, 6))
def test_a_folder_replaces_another_where_two_cannot_be_exchanged(tmp_path: Path, at: int) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("old")
    code = """
commit.exchange = lambda *_: False
with staging.staging(folder) as place:
    (place.folder / 'file').write_text('new')
    with staging.exclusive(folder):
        place.swap(folder / 'model')
"""
    killed(KILL_AT.format(at=at) + code, tmp_path)
    settle(tmp_path)
    assert (tmp_path / "model" / "file").read_text() == ("old" if at == 1 else "new")
    sweep(tmp_path)
    assert names(tmp_path) == ["model"]


def test_two_folders_are_exchanged_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if not commit.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])
    with pytest.raises(FileNotFoundError):
        commit.exchange(tmp_path / "a", tmp_path / "nowhere")


# Locks


ADD = """
for _ in range(100):
    with staging.exclusive(folder):
        number = int((folder / 'number').read_text())
        (folder / 'number').write_text(str(number + 1))
"""


def test_two_processes_never_change_a_folder_at_once(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    writers = [subprocess.Popen([sys.executable, "-c", START + ADD, str(tmp_path)]) for _ in range(2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert contents(tmp_path) == {"number": "200"}


def test_a_killed_holder_releases_the_lock(tmp_path: Path) -> None:
    killed(f"with staging.exclusive(folder):\n    {DIE}", tmp_path)
    assert names(tmp_path) == [".higen-lock"]
    with exclusive(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path)
    killed(KILL_AT.format(at=3) + CHANGE, tmp_path)
    real = os.open

    def refused(path: str, flags: int, *rest: int, **options: int) -> int:
        if os.fspath(path).endswith(".higen-lock"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refused)
    settle(tmp_path)
    assert contents(tmp_path) == {"a": "new", "b": "old", "c": "old", "d": "old", ".higen-lock": ""}


def test_a_journal_of_somebody_else_moves_nothing_of_ours(tmp_path: Path) -> None:
    """A copied folder may contain a journal. The journal is applied only if it names files of its own hidden folder."""
    (tmp_path / "home").mkdir()
    secret = tmp_path / "home" / "secret.txt"
    secret.write_text("mine")
    status = secret.stat()
    mark = [status.st_ino, status.st_size, status.st_mtime_ns]
    for number, place in enumerate(("../home/secret.txt", os.fspath(secret), ".", "{}/new/../../../home/secret.txt")):
        folder = tmp_path / f"sent{number}"
        folder.mkdir()
        root = folder / staging_module._named(f"{number:012x}")
        (root / "new").mkdir(parents=True)
        (root / "note").write_text(staging_module.TEXT)
        steps = [[place.format(root.name), "taken.txt", mark, None]]
        (root / "journal").write_text(json.dumps({"moves": steps, "removals": []}))
        settle(folder)
        with staging(folder):
            pass
        assert secret.read_text() == "mine"
        assert not (folder / "taken.txt").exists()


def test_an_unfinished_file_that_was_exchanged_is_not_moved(tmp_path: Path) -> None:
    prepared(tmp_path)
    killed(KILL_AT.format(at=1) + CHANGE, tmp_path)
    for root in tmp_path.glob(".higen-*/new"):
        for file in root.iterdir():
            file.write_text("another's")
    settle(tmp_path)
    assert "another's" not in contents(tmp_path).values()


def test_a_writer_never_waits_for_its_own_lock(tmp_path: Path) -> None:
    """A journal that is not applied, because its folder has no note, stays. The owner of the lock ignores it."""
    root = tmp_path / staging_module._named("0" * 12)
    (root / "new").mkdir(parents=True)
    (root / "journal").write_text("{}")
    with exclusive(tmp_path), staging(tmp_path), whole_file(tmp_path / "a") as file:
        file.write_text("done")
    assert (tmp_path / "a").read_text() == "done"
    assert (root / "journal").exists()


@pytest.mark.parametrize(
    "journal",
    [
        "[]",
        "7",
        '{"moves": [["{}/new/a", "a", [1], null]], "removals": []}',
        '{"moves": [["{}/new/a", "a", {}, null]], "removals": []}',
        '{"moves": [["{}/new/a", "a"]], "removals": []}',
        '{"moves": [], "removals": [["a", [1]]]}',
        '{"swap": "a"}',
        '{"swap": "a", "inode": "x"}',
        "[" * 100_000,
    ],
    ids=range(9),
)
def test_a_journal_of_another_shape_is_ignored(tmp_path: Path, journal: str) -> None:
    root = tmp_path / staging_module._named("0" * 12)
    (root / "new").mkdir(parents=True)
    (root / "note").write_text(staging_module.TEXT)
    (root / "journal").write_text(journal.replace("{}/", f"{root.name}/"))
    (tmp_path / "a").write_text("mine")
    settle(tmp_path)
    assert contents(tmp_path) == {"a": "mine"}
