"""A model's folder as a whole: what it may replace, and what remains after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from higen import bundle
from higen.bundle import MANIFEST, Bundle
from higen.errors import HigenError, ModelError
from higen.families.higen import spec
from higen.model_folder import check_free

TABLES = spec.manifest(TINY)


def make(path: Path, content: bytes = b"old", overwrite: bool = False) -> None:
    with bundle.create_model(path, TABLES, overwrite) as folder:
        (folder / "weights").write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("foreign", ["notes.txt", "engines/rtx/thesis.pdf", "docs/a", ".conditioner.onnx.part", "link"])
def test_a_model_with_files_that_are_not_its_own_is_not_replaced(tmp_path: Path, foreign: str) -> None:
    make(tmp_path / "model")
    place = tmp_path / "model" / foreign
    place.parent.mkdir(parents=True, exist_ok=True)
    if foreign == "link":
        place.symlink_to(tmp_path)
    else:
        place.write_text("years of work")
    with pytest.raises(
        ModelError, match=f"holds files that do not belong to the model, such as {foreign}: move it away"
    ):
        make(tmp_path / "model", b"new", overwrite=True)
    assert Bundle.open(tmp_path / "model").file("weights").read_bytes() == b"old"
    assert os.path.lexists(place)
    assert names(tmp_path) == ["model"]


def test_engines_and_files_of_killed_writers_belong_to_the_model(tmp_path: Path) -> None:
    make(tmp_path / "model")
    engines = tmp_path / "model" / "engines" / "rtx-sm89"
    engines.mkdir(parents=True)
    for name in (".lock", "a.engine", "a.json", "a.log", ".a-sm89.cache", ".a.engine.part"):
        (engines / name).write_bytes(b"x")
    make(tmp_path / "model", b"new", overwrite=True)
    assert names(tmp_path / "model") == [MANIFEST, "weights"]


def test_a_link_to_a_model_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    make(tmp_path / "store" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "store" / "model")
    make(tmp_path / "link", b"new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(tmp_path / "store" / "model").file("weights").read_bytes() == b"new"
    assert names(tmp_path / "store") == ["model"]


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "\ud800"], ids=["long", "nul", "surrogate"])
def test_a_name_that_no_file_system_takes(tmp_path: Path, name: str) -> None:
    with pytest.raises(HigenError, match="take this name"):
        check_free(f"{tmp_path}/{name}")


KILLED = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from test_model_folder import TABLES
from higen import bundle
with bundle.create_model(sys.argv[1], TABLES) as folder:
    (folder / "weights").write_bytes(b"x" * 1_000_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_files_of_killed_writers_are_removed_by_the_next(tmp_path: Path) -> None:
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model")], check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(names(tmp_path)) == 1
    make(tmp_path / "other")
    assert names(tmp_path) == ["other"]
