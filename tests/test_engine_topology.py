"""The released model's topology becomes engines in every precision.

A separate file, so that it can run in another process than test_engine_stages.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, write_tiny_model
from stage_engines import check_stages

from higen.families.higen.spec import ModelConfig, UNetConfig

TOPOLOGY = replace(
    TINY,
    name="topology",
    unet=UNetConfig(base_channels=32, head_dim=32, first_temporal_heads=2, text_dim=48, context_dim=1024),
    text=replace(TINY.text, clip={**TINY.text.clip, "hidden_size": 48, "intermediate_size": 96, "projection_dim": 48}),
    defaults=replace(TINY.defaults, width=32, height=32),
)
"""The released model's topology at a tenth of its width, as the reference's fixtures p2."""

SMALL = replace(
    TOPOLOGY,
    name="small",
    unet=replace(TOPOLOGY.unet, channel_multipliers=(2, 4), attention_levels=(True, False), blocks_per_level=1),
)
"""The same with two levels instead of four and one block per level instead of two. It has every kind of layer."""

STEPS = ("conditioner", "temporal_unet")
"""The stages that differ from those of test_engine_stages.py. The step of a clip contains all layers of the key frame's
step.

That file also builds the steps without guidance, which have one branch fewer.
"""


# A precision changes the types within a block, and no connection between blocks. Tracing takes most of the time.
@pytest.mark.parametrize(
    ("precision", "config"), [("fp32", SMALL), ("fp16", TOPOLOGY), ("bf16", SMALL)], ids=["fp32", "fp16", "bf16"]
)
def test_every_stage(tmp_path: Path, precision: str, config: ModelConfig) -> None:
    check_stages(write_tiny_model(tmp_path / "model", config).path, precision, STEPS)
