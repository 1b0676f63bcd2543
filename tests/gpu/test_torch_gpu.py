"""PyTorch on a GPU: stages and whole videos compared with the CPU's, half precisions, threads, memory, training."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, write_tiny_model
from gpu_video import Frames, largest, on_the_cpu, psnr, video
from safetensors.torch import load_file, save_file
from training_run import MODEL, make_settings, write_clips

import higen
from higen.api import default_model
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.errors import BackendUnavailable, OutOfMemory
from higen.export.shapes import example_inputs, sizes_for
from higen.families.higen import spec
from higen.families.higen.spec import UNetConfig
from higen.train.emoji import known_frames
from higen.train.emoji.configuration import KNOWN_FRAMES
from higen.train.emoji.further import Where
from higen.train.emoji.subjects import SUBJECTS
from higen.train.record import read_losses
from higen.train.trainer import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]

COMPUTED = ("fp32", "bf16", "fp16")
"""Precisions, the safest first. A stage computes in each of them up to its lowest allowed precision."""

ALLOWED = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference of a stage's output from the CPU's float32 output, relative to that output's largest value.

By default PyTorch computes float32 convolutions on a GPU in TF32, which has 10 bits of mantissa.
"""

TOPOLOGY = replace(
    TINY,
    name="topology",
    unet=UNetConfig(base_channels=64, head_dim=32, first_temporal_heads=2, text_dim=48, context_dim=1024),
    text=replace(TINY.text, clip={**TINY.text.clip, "hidden_size": 48, "intermediate_size": 96, "projection_dim": 48}),
    defaults=replace(TINY.defaults, width=32, height=32),
)
"""The released model's topology at a fifth of its width."""


@pytest.fixture(scope="module")
def expected() -> Frames:
    return on_the_cpu()


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "topology", TOPOLOGY).path


@pytest.mark.parametrize("precision", list(ALLOWED))
@pytest.mark.parametrize("model", ["built-in", "topology"])
def test_every_stage_equals_the_cpu(model: str, precision: str, topology: Path) -> None:
    check_stages(model, precision, topology, ALLOWED[precision])


@pytest.mark.parametrize("model", ["built-in", "topology"])
def test_every_stage_equals_the_cpu_without_tf32(model: str, topology: Path) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check_stages(model, "fp32", topology, 1e-4)


def check_stages(model: str, precision: str, topology: Path, allowed: float) -> None:
    bundle = Bundle.open(default_model() if model == "built-in" else topology)
    cpu = TorchBackend(bundle, Options("cpu", "fp32"))
    gpu = TorchBackend(bundle, Options("cuda", precision))
    apart = {}
    for stage in bundle.manifest.stages:
        if precision not in COMPUTED[: COMPUTED.index(stage.lowest) + 1]:
            continue
        inputs = example_inputs(
            bundle.manifest, stage, sizes_for(bundle.manifest, {"B": 2, "F": 4, "N": 2, "H": 16, "W": 8})
        )
        ours, theirs = gpu.run(stage.name, **inputs), cpu.run(stage.name, **inputs)
        for name, value in theirs.items():
            truth, found = cpu.to_numpy(value), gpu.to_numpy(ours[name])
            assert found.dtype == truth.dtype
            assert np.isfinite(found).all(), f"{stage.name}.{name}"
            apart[f"{stage.name}.{name}"] = float(np.abs(found - truth).max() / np.abs(truth).max())
    print({name: f"{value:.1e}" for name, value in apart.items()})
    assert max(apart.values()) <= allowed, apart


def test_float32_gives_the_video_of_the_cpu(expected: Frames) -> None:
    with higen.load(backend="torch", device="cuda", precision="fp32") as pipe:
        frames = video(pipe)
        assert {choice.details for choice in pipe.backend.choices.values()} == {"cuda, fp32"}
    print(f"fp32: {psnr(frames, expected):.1f} dB, at most {largest(frames, expected)}/255")
    assert largest(frames, expected) <= 2  # only the order of summation differs


@pytest.mark.parametrize(("precision", "least"), [("fp16", 35.0), ("bf16", 25.0)])
def test_half_precisions_keep_the_video(expected: Frames, precision: str, least: float) -> None:
    with higen.load(backend="torch", device="cuda", precision=precision) as pipe:
        frames = video(pipe)
    print(f"{precision}: {psnr(frames, expected):.1f} dB, at most {largest(frames, expected)}/255")
    assert psnr(frames, expected) >= least


def test_threads_share_a_pipeline() -> None:
    with higen.load(backend="torch", device="cuda") as pipe:
        alone = [video(pipe, seed=seed, steps=4) for seed in range(3)]
        together: dict[int, Frames] = {}

        def run(seed: int) -> None:
            together[seed] = video(pipe, seed=seed, steps=4)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, frames in enumerate(alone):
        assert largest(together[seed], frames) <= 1


def test_samples_of_a_batch_are_those_of_single_runs() -> None:
    with higen.load(backend="torch", device="cuda", precision="fp32") as pipe:
        prompts = ["a red heart beating", "a whale", "a penguin"]
        together = pipe(prompts, steps=4, seed=5, progress=False)
        alone = [
            pipe(prompt, steps=4, seed=seed, progress=False) for prompt, seed in zip(prompts, (5, 6, 7), strict=True)
        ]
    for one, of_batch in zip(alone, together, strict=True):
        if one.metadata["seed"] == of_batch.metadata["seed"]:
            assert largest(one.frames, of_batch.frames) <= 2


def test_too_little_memory_is_one_error() -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        with pytest.raises(OutOfMemory), higen.load(backend="torch", device="cuda") as pipe:
            video(pipe, frames=64, steps=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with higen.load(backend="torch", device="cuda") as pipe:
        video(pipe, steps=1)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(BackendUnavailable, match=rf"device='cuda:{count}': there (is|are) {count} GPU"):
        higen.load(backend="torch", device=f"cuda:{count}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_gives_the_same_losses_twice(tmp_path: Path, precision: str) -> None:
    model = write_tiny_model(tmp_path / "tiny", MODEL).path
    clips = write_clips(tmp_path / "clips")
    changes: dict[str, Any] = {"run__precision": precision, "optimiser__learning_rate": 3e-3}
    whole = make_settings(tmp_path / "whole", model, clips, run__steps=24, **changes)
    train(whole)
    losses = read_losses(Path(whole.run.output, "losses.jsonl"))
    print(precision, [round(row["video"], 4) for row in losses[::4]])
    assert all(np.isfinite(row["video"]) and np.isfinite(row["image"]) for row in losses)
    second = make_settings(tmp_path / "second", model, clips, run__steps=24, **changes)
    train(second)
    again = read_losses(Path(second.run.output, "losses.jsonl"))
    for one, other in zip(losses, again, strict=True):
        assert one["video"] == pytest.approx(other["video"], rel=1e-3 if precision == "fp32" else 5e-2)
    with higen.load(Path(whole.run.output, "model"), "torch", device="cuda") as pipe:
        assert pipe("a blue whale swimming", steps=2, progress=False).frames.shape[-1] == 3


def test_layers_for_known_frames_are_the_same_from_a_gpu(tmp_path: Path) -> None:
    """On random latents, with processes that make the batches."""
    random = torch.Generator().manual_seed(0)
    latents = {f"latents/{s.name}": torch.randn((10, 16, 32, 8, 8), generator=random).half() for s in SUBJECTS}
    save_file(latents, tmp_path / "latents.safetensors")
    known = replace(KNOWN_FRAMES, steps=3, videos=2, save_every=1, measure_every=0)
    model, made = Bundle.open(default_model()), []
    for where in (Where(), Where("cuda", workers=2)):
        shutil.rmtree(tmp_path / "known_frames", ignore_errors=True)
        output = tmp_path / f"on-{where.device}"
        made.append(load_file(known_frames.train(model, tmp_path, output, known, where).file(spec.UNET)))
    host, gpu = made
    for name, tensor in host.items():
        torch.testing.assert_close(gpu[name], tensor, rtol=2e-2, atol=2e-3)
