"""Every stage of the built-in model becomes an engine in fp32, and every stage of a guided video in fp16 and bf16."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stage_engines import check_stages

from higen.api import default_model
from higen.bundle import Bundle


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_stage(tmp_path: Path, precision: str) -> None:
    model = Path(shutil.copytree(default_model(), tmp_path / "model"))
    manifest = Bundle.open(model).manifest
    # A step without guidance is the guided step with one branch fewer. The precision changes no operator.
    left_out = {loop.plain for loop in manifest.loops if precision != "fp32"}
    check_stages(model, precision, [name for name in manifest.stage_names if name not in left_out])
