"""benchmarks/families.py, which against.py uses: both sides run the same request from the same noise."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
import torch

import higen
from higen.bundle import Bundle

# a warning of diffusers under NumPy 2 about arrays made from tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 3


@pytest.mark.parametrize("family", list(families.JOBS))
def test_the_latents_of_diffusers_and_of_higen_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(families, "DEVICE", "cpu")
    pipeline, where = families.made(tmp_path, family, "tiny", "fp32")
    job = families.JOBS[family]
    with torch.inference_mode():
        wanted = job.theirs(pipeline, Bundle.open(where), STEPS, job.shapes["tiny"])
    with higen.load(where, "torch", device="cpu") as pipe:
        found = families.last_latents(pipe, families.request(family, "tiny", STEPS))
    assert found.shape == wanted.shape
    assert np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)) < 1e-4
