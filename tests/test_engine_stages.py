"""Every stage of the built-in model becomes an engine in every precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stage_engines import check_stages

from higen.api import default_model


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_stage(tmp_path: Path, precision: str) -> None:
    check_stages(Path(shutil.copytree(default_model(), tmp_path / "model")), precision)
