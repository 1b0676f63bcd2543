"""`import higen` is cheap: heavy packages are imported at their first use."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import higen

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "tensorrt", "PIL", "av", "numpy", "tokenizers",
         "safetensors", "click", "tqdm", "ftfy")  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """The top-level packages in memory after `code`, in a separate process."""
    script = f"{code}\nimport json, sys; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT, env=dict(os.environ)
    )
    return set(json.loads(made.stdout.splitlines()[-1]))


def test_importing_higen_loads_nothing_heavy() -> None:
    assert loaded_by("import higen").isdisjoint(HEAVY)


def test_the_names_of_the_package_are_listed_without_loading_them() -> None:
    assert loaded_by("import higen; dir(higen), higen.__version__, higen.HigenError").isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "code", ["import higen.cli", "import higen; higen.Video", "import higen.doctor", "import higen.pipeline"]
)
def test_commands_and_videos_need_no_torch(code: str) -> None:
    assert loaded_by(code).isdisjoint({"torch", "diffusers", "transformers", "onnx", "onnxruntime", "tensorrt"})


def test_help_loads_neither_numpy_nor_torch() -> None:
    code = "from higen.cli import main\ntry: main(['generate', '--help'])\nexcept SystemExit: pass"
    assert loaded_by(code).isdisjoint({"torch", "numpy", "PIL", "av"})


def test_every_public_name_is_there() -> None:
    assert sorted(higen.__all__) == dir(higen)
    for name in higen.__all__:
        assert getattr(higen, name) is getattr(higen, name)
    assert issubclass(higen.HigenError, Exception)
    assert callable(higen.generate)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'higen' has no attribute 'generat'"):
        _ = higen.generat


def modules() -> list[str]:
    """Every module that this environment can import; modules of a missing extra are left out."""
    found = [module.name for module in pkgutil.walk_packages(higen.__path__, "higen.")]
    return [name for name in found if not name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_what_a_module_offers_is_there(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "higen").startswith("higen"):
            raise
        pytest.skip(f"{name} needs {error.name}")
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    assert [n for n in names if not hasattr(module, n)] == []
