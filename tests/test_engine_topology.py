"""Every stage of the released model's topology becomes an engine in every precision.

A separate file, so that it can run in another process than test_engine_stages.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, write_tiny_model
from stage_engines import check_stages

from higen.families.higen.spec import UNetConfig

TOPOLOGY = replace(
    TINY,
    name="topology",
    unet=UNetConfig(base_channels=32, head_dim=32, first_temporal_heads=2, text_dim=48, context_dim=1024),
    text=replace(TINY.text, clip={**TINY.text.clip, "hidden_size": 48, "intermediate_size": 96, "projection_dim": 48}),
    defaults=replace(TINY.defaults, width=32, height=32),
)
"""The released model's topology at a tenth of its width, as the reference's fixtures p2."""


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_stage(tmp_path: Path, precision: str) -> None:
    # A plain step is the guided step with one branch fewer; test_engine_stages.py builds it in every precision.
    check_stages(write_tiny_model(tmp_path / "model", TOPOLOGY).path, precision, plain=False)
