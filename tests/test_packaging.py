"""Built packages: a wheel from a checkout or from the source archive holds the whole tree."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import higen
from higen.api import default_model
from higen.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"higen": "higen", "export": "higen/export", "engines": "higen/engines"}
"""Folders of the repository, and where they are installed."""


def build(tree: Path, kind: str, to: Path) -> Path:
    """Build a wheel or sdist of `tree` with the backend named in pyproject.toml; nothing is downloaded."""
    script = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(to)!r}))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    made = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    return to / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packaged files with links kept, because building writes into the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the unpacked sdist, from which a user builds."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module", params=["checkout", "checkout without links", "sdist"])
def wheel(request: pytest.FixtureRequest, tree: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    if request.param == "sdist":
        return build(unpacked, "wheel", folder)
    copy = folder / "tree"
    shutil.copytree(tree, copy, symlinks=True)
    if request.param == "checkout without links":  # as on a system without symbolic links
        for link in ("export", "engines"):
            (copy / "higen" / link).unlink()
    return build(copy, "wheel", folder)


def files() -> dict[str, Path]:
    """Every file that belongs in the wheel, by its name there."""
    found = {}
    for folder, installed in SOURCES.items():
        for path in sorted((ROOT / folder).rglob("*")):
            inner = path.relative_to(ROOT / folder)
            linked = folder == "higen" and inner.parts[0] in ("export", "engines")
            if path.is_file() and not linked and "__pycache__" not in inner.parts:
                found[f"{installed}/{inner.as_posix()}"] = path
    return found


def test_the_wheel_holds_every_file_of_the_tree_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert sorted(set(files()) - names) == []
        assert sorted(names - set(files())) == []
        for name, path in files().items():
            assert archive.read(name) == path.read_bytes(), name


def test_nothing_lands_beside_the_package(wheel: Path) -> None:
    """A top-level `export` or `engines` would hide other people's modules."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert tops == {"higen", f"higen-{higen.__version__}.dist-info"}


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    info = f"higen-{higen.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        commands = archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Name"] == "higen"
    assert metadata["Version"] == higen.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "higen = higen.cli:main" in commands
    assert wheel.name == f"higen-{higen.__version__}-py3-none-any.whl"


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 25e6


def test_the_sdist_can_be_built_from_and_read(unpacked: Path) -> None:
    assert {"pyproject.toml", "README.md", "LICENSE", "higen", "export", "engines"} <= {
        p.name for p in unpacked.iterdir()
    }


def test_the_links_in_the_package_lead_to_the_folders() -> None:
    for name in ("export", "engines"):
        link = ROOT / "higen" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
        assert link.resolve() == ROOT / name


# In a separate environment


def core(wheel: Path) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that the wheel needs without extras, including indirect requirements."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"higen-{higen.__version__}.dist-info/METADATA"))
    wanted, found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])], {}
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = importlib.metadata.distribution(name)
            wanted += [Requirement(line) for line in found[name].requires or []]
    return found


@pytest.fixture(scope="module")
def environment(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel, and links to its core dependencies installed here."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("no pip here to install the wheel with")
    folder = tmp_path_factory.mktemp("environment")
    built = build(tree, "wheel", folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    for distribution in core(built).values():
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / name).symlink_to(Path(str(distribution.locate_file(name))))
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([sys.executable, *install, str(built)], check=True)
    return folder / "venv" / "bin"


def run(environment: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in a folder without a checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [environment / command, *arguments], capture_output=True, text=True, env=kept, cwd=environment, check=False
    )


def test_the_wheel_alone_makes_a_video(environment: Path, tmp_path: Path) -> None:
    for absent in ("torch", "onnx", "safetensors", "diffusers", "pytest"):
        assert "No module named" in run(environment, "python", "-c", f"import {absent}").stderr
    where = run(environment, "python", "-c", "import higen; print(higen.__file__)").stdout
    assert where.startswith(str(environment.parent))
    prompt = Bundle.open(default_model()).manifest.prompts[0]
    made = run(environment, "higen", "generate", prompt, "--steps", "2", "-o", str(tmp_path / "video.mp4"), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["versions"]["backend"] == "onnx"
    assert (tmp_path / "video.mp4").stat().st_size > 1000
    doctor = json.loads(run(environment, "higen", "doctor", "--json").stdout)
    assert {stage["backend"] for stage in doctor["stages"]} == {"onnx"}
    assert doctor["backends"]["torch"]["works"] is False


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["higen-export", "onnx"], "export"),
        (["higen-export", "verify"], "export"),
        (["higen", "serve"], "serve"),
        (["higen", "batch", "rows.jsonl", "videos", "--model"], "batch"),
        (["higen", "batch", "rows.jsonl", "videos", "--ray", "local", "--model"], "ray"),
        (["higen", "generate", "a dog", "-o", "x.mp4", "--backend", "torch", "--model"], "torch"),
    ],
)
def test_a_missing_extra_names_itself(environment: Path, command: list[str], extra: str) -> None:
    result = run(environment, *command, str(default_model()))
    assert result.returncode == 1
    assert f"pip install 'higen[{extra}]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
