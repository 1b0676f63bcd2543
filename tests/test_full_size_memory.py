"""The released architecture at full size: both networks share one copy of the weights in memory."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from higen import bundle
from higen.families.higen import spec
from higen.families.higen.spec import ModelConfig, UNetConfig
from higen.families.higen.unet import Denoiser
from higen.parity.fixtures import recipe_state

PARAMETERS = 1_483_201_924
DISK, MEMORY = 10e9, 12e9
"""Bytes that must be free; the weights take 5.9 GB."""
FACTOR = 1.15
"""Allowed peak memory relative to the size of the weights."""

LOAD = """
import json, sys, time
from pathlib import Path
import torch, safetensors.torch
from higen.families.higen import spec
from higen.families.higen.network import load_denoiser
from higen.bundle import Bundle

def memory(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))

bundle = Bundle.open(sys.argv[1])
before, start = memory("VmRSS"), time.perf_counter()
denoiser = load_denoiser(bundle.file(spec.UNET), spec.unet_config(bundle.manifest), torch.device("cpu"), torch.float32)
spatial = denoiser.spatial_unet()
# Every page of both networks is read: a file that is only mapped does not count as loaded.
total = sum(float(p.sum()) for network in (denoiser, spatial) for p in network.parameters())
weights = sum(p.numel() * p.element_size() for p in denoiser.parameters())
print(json.dumps({
    "weights": weights, "peak": memory("VmHWM") - before, "now": memory("VmRSS") - before, "before": before,
    "seconds": round(time.perf_counter() - start, 1), "finite": total == total,
}))
"""


def available_memory() -> int:
    """Bytes of memory that are available without swapping; 0 if the system does not report them."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


def write_weights(path: Path, config: UNetConfig, salt: int) -> None:
    """Recipe weights as safetensors, tensor by tensor: an 8-byte length, a JSON header, the bytes."""
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in Denoiser(config).state_dict().items()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in recipe_state(config, salt):
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.numpy().data)


@pytest.fixture(scope="module")
def full_size_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model directory with only the full-size denoiser. It is removed after its test, because it takes 5.9 GB."""
    folder = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(folder).free < DISK:
        pytest.skip(f"less than {DISK / 1e9:.0f} GB of disk free at {folder}")
    if available_memory() < MEMORY:
        pytest.skip(f"less than {MEMORY / 1e9:.0f} GB of memory available")
    try:
        with bundle.create_model(folder / "model", spec.manifest(ModelConfig())) as target:
            write_weights(target / spec.UNET, UNetConfig(), salt=0)
        yield folder / "model"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_weights_are_in_memory_once(full_size_model: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOAD, str(full_size_model)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    print(found.stdout)
    measured = json.loads(found.stdout)
    assert measured["weights"] == 4 * PARAMETERS
    assert measured["finite"]
    assert 1.0 <= measured["peak"] / measured["weights"] <= FACTOR, measured
