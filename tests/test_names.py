"""The runtimes know no model family: their code names no stage and no control of HiGen.

Comments and docstrings may name them. In code, only the family itself, training, measures, parity and benchmarks do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

NAMES = ("temporal_unet", "spatial_unet", "conditioner", "motion", "appearance", "prior")

WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(NAMES)})(?:s|es)?(?![A-Za-z])", re.IGNORECASE)
"""One of the names as a word, or as a part of an identifier: motion, motion_cue, MOTION; not promotion."""

KNOWING = (
    "families/animatediff",
    "families/higen",
    "families/modelscope",
    "families/stable_diffusion",
    "families/svd",
    "train",
    "measures",
    "parity",
)
"""Folders of the package that know HiGen, or have a stage of the same name."""


def python_files() -> list[Path]:
    package = [
        p for p in (ROOT / "higen").rglob("*.py") if not p.relative_to(ROOT / "higen").as_posix().startswith(KNOWING)
    ]
    linked = ("engines", "export")  # in the package they are links, which rglob may follow
    own = [path for path in package if path.relative_to(ROOT / "higen").parts[0] not in linked]
    return sorted([*own, *(ROOT / "engines").rglob("*.py"), *(ROOT / "export").rglob("*.py")])


def cpp_files() -> list[Path]:
    folders = [ROOT / "engines" / "cpp" / name for name in ("src", "include", "run")]
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def in_python(text: str) -> Iterator[str]:
    """Every identifier and every string of a program, except docstrings."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if id(node) in documentation and isinstance(node, ast.Constant):
            continue
        for _, value in ast.iter_fields(node):
            yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str))
            if isinstance(value, bytes):
                yield value.decode("latin-1")


CPP = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|R"\((?P<raw>.*?)\)\"""", re.DOTALL)


def in_cpp(text: str) -> str:
    """A program without its comments; strings stay."""
    return CPP.sub(lambda found: " " if found[0].startswith(("//", "/*")) else found[0], text)


@pytest.mark.parametrize("path", python_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_python_module_around_the_pipeline_names_them(path: Path) -> None:
    assert [part for part in in_python(path.read_text(encoding="utf-8")) if WORD.search(part)] == []


@pytest.mark.parametrize("path", cpp_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_cpp_file_names_them(path: Path) -> None:
    lines = in_cpp(path.read_text(encoding="utf-8")).splitlines()
    assert [line for line in lines if WORD.search(line)] == []


def test_every_part_is_looked_at() -> None:
    """Otherwise a moved folder would be skipped silently."""
    seen = {path.relative_to(ROOT).as_posix() for path in (*python_files(), *cpp_files())}
    assert {
        "higen/pipeline.py",
        "higen/sources.py",
        "higen/backends/onnx.py",
        "higen/models/solver_step.py",
        "higen/families/__init__.py",
        "engines/model_engines.py",
        "engines/triton/interface.py",
        "export/graphs.py",
        "engines/cpp/src/pipeline.cpp",
        "engines/cpp/include/higen/higen.h",
    } <= seen
    assert not any("families/higen/" in name or "/train/" in name for name in seen)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"""motion"""\nx = 1  # prior\n', False),
        ('def f():\n    """the prior"""\n    return "promotion"\n', False),
        ("priority = conditioning = 1\n", False),
        ('run("temporal_unet")\n', True),
        ('f"stage {x} of spatial_unet_plain"\n', True),
        ("f'{a.motion_cue}'\n", True),
        ("import a.motion\n", True),
        ("def f(prior): ...\n", True),
        ("f(appearance=1)\n", True),
        ("class Conditioner: ...\n", True),
        ("MOTION = b'x'\n", True),
    ],
)
def test_the_python_scan(text: str, found: bool) -> None:
    assert any(WORD.search(part) for part in in_python(text)) is found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("int x; // motion\n/* the\nprior */ int y;", False),
        ('const char* a = "// no comment", *b = "motion";', True),
        ("run(temporal_unet);", True),
        ("x = '\"'; // prior\n", False),
        ('R"(motion)"', True),
    ],
)
def test_the_cpp_scan(text: str, found: bool) -> None:
    assert bool(WORD.search(in_cpp(text))) is found
